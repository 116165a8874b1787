"""`crdnd diff`."""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from crdnd.cli._common import JsonOption, print_json
from crdnd.errors import InputError

if TYPE_CHECKING:
    from crdnd.evaluation import Protocol, Row

FileArgument = Annotated[
    Path, typer.Argument(help="What `crdnd evaluate --out` wrote, or a folder with it as evaluation.json.")
]


def diff_command(first: FileArgument, second: FileArgument, json: JsonOption = False) -> None:
    """Compare two models on the same samples: differences of accuracy with paired 95% intervals.

    Both must have been evaluated under the same protocol.

    Examples:

        crdnd diff ard.json rslad.json

        crdnd diff runs/ard runs/rslad
    """
    from rich import box
    from rich.console import Console
    from rich.table import Table

    from crdnd.evaluation import compare

    differences = compare(_row(first), _row(second))
    if json:
        print_json({name: dataclasses.asdict(difference) for name, difference in differences.items()})
        return
    title = f"Accuracy of {first} minus accuracy of {second}, in points, with paired 95% intervals"
    table = Table(
        "", "difference", "interval", "only first right", "only second right", box=box.SIMPLE_HEAD, title=title
    )
    for name, found in differences.items():
        interval = f"{found.low:+.1f} to {found.high:+.1f}"
        table.add_row(name, f"{found.points:+.1f}", interval, str(found.only_first), str(found.only_second))
    Console(highlight=False).print(table)


def _row(path: Path) -> tuple["Protocol", "Row"]:
    from crdnd.evaluation import load_results
    from crdnd.models import EVALUATION

    if path.is_dir():
        folder, path = path, path / EVALUATION
        if not path.exists():
            raise InputError(f"{folder}: has no {EVALUATION}; write it with `crdnd evaluate {folder} --out {path}`.")
    results = load_results(path)
    if len(results.rows) != 1:
        raise InputError(f"{path}: has {len(results.rows)} rows; one is compared with one.")
    return results.protocol, results.rows[0]
