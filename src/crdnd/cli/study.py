"""`crdnd study`: a whole study, part by part, from training the teachers to the numbers of its page."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from crdnd.cli._common import JobsOption, JsonOption, print_json
from crdnd.errors import InputError, did_you_mean

if TYPE_CHECKING:
    from crdnd.cli._grid import Spec
    from crdnd.report.comparison import Comparison

FOLDER = Path(__file__).parent.parent / "studies"
QUICK = "quick"
LOG = "test-log.jsonl"


def study_command(
    name: Annotated[str, typer.Argument(help="The study: crdnd-plus.")],
    quick: Annotated[bool, typer.Option("--quick", help="A small form of it that takes minutes.")] = False,
    parts: Annotated[
        list[str] | None, typer.Option("--part", help="Only this part. Repeatable; by default all, in their order.")
    ] = None,
    out: Annotated[Path, typer.Option("--out", help="Folder of the runs.")] = Path("runs/studies"),
    results: Annotated[Path, typer.Option("--results", help="Folder of the numbers: STUDY/PART.json.")] = Path(
        "results"
    ),
    jobs: JobsOption = None,
    json: JsonOption = False,
) -> None:
    """Do a study that comes with crdnd again: train all, attack all, write the numbers that its page is made of.

    Each part is a comparison, as `crdnd compare` does it; parts share the teachers. A stopped study goes on with the
    same command, and what another part has done already is not done again.

    Examples:

        crdnd study crdnd-plus --quick

        crdnd study crdnd-plus --part width-4 --jobs 2
    """
    from crdnd.cli.compare import make_plan, raise_failures, refuse_another, run_plan
    from crdnd.io import exclusive, make_folder

    specs = study_parts(name)
    chosen = list(parts or [part for part in specs if part != QUICK])
    if quick:
        if parts:
            raise InputError("--quick: is a part of its own; leave out --part.")
        chosen = [QUICK]
    for part in chosen:
        if part not in specs:
            raise InputError(f"--part: {name} has no part {part!r}{did_you_mean(part, specs)}")
    runs, numbers = out / name, results / name
    documents = {part: numbers / f"{part}.json" for part in chosen}
    for part, document in documents.items():
        refuse_another(document, specs[part], "Move it aside, and choose another --out.")
    plans = {part: make_plan(specs[part], runs) for part in chosen}
    make_folder(runs)
    make_folder(numbers)
    done: dict[str, Comparison] = {}
    with exclusive(runs):
        for part, plan in plans.items():
            done[part] = run_plan(plan, documents[part], results / LOG, jobs)
            if not json:
                _show(part, done[part], documents[part])
    if json:
        print_json("[" + ",".join(comparison.to_json().rstrip() for comparison in done.values()) + "]")
    for comparison in done.values():
        raise_failures(comparison)


def study_parts(name: str) -> "dict[str, Spec]":
    """The parts of a shipped study, each with what all of them share.

    Raises:
        InputError: there is no such study.
    """
    from crdnd.cli._grid import Spec
    from crdnd.config import build
    from crdnd.recipe import merge, read_yaml

    names = sorted(file.stem for file in FOLDER.glob("*.yaml"))
    if name not in names:
        raise InputError(f"study: there is no {name!r}{did_you_mean(name, names)}")
    values = read_yaml(FOLDER / f"{name}.yaml")
    common: Mapping[str, Any] = values["all"]
    teachers: Mapping[str, Any] = values["teachers"]
    found: dict[str, Spec] = {}
    for part, own in values["parts"].items():
        layers = merge(common, own)
        layers["teachers"] = {key: teachers[key] for key in own["teachers"]}
        found[part] = build(Spec, layers, where=f"{name}.{part}")
    return found


def _show(part: str, comparison: "Comparison", document: Path) -> None:
    from rich.console import Console

    from crdnd.report import leaderboard
    from crdnd.report.leaderboard import tables

    console = Console(highlight=False)
    console.rule(part)
    if any(cell.row is not None for cell in comparison.cells):
        for table in tables(leaderboard(comparison)):
            console.print(table)
    Console(highlight=False, soft_wrap=True, markup=False).print(f"Results: {document}")
