"""`crdnd runs`, `crdnd status` and `crdnd watch`: what runs are doing, read from their folders."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from crdnd.cli._common import JsonOption, duration, print_json, time_left
from crdnd.errors import InputError

if TYPE_CHECKING:
    from rich.table import Table

    from crdnd.engine import Epoch, RunStatus

SECONDS_BETWEEN_LOOKS = 1.0
LAST_EPOCHS = 5


def runs_command(
    folder: Annotated[Path, typer.Argument(metavar="[DIR]", help="Runs in it and below it.")] = Path("runs"),
    json: JsonOption = False,
) -> None:
    """List every run below a folder: whether it runs, how far it is, how good, and the time it still takes.

    A run is running, finished, stopped (the same command goes on), diverged (its loss is not finite any more) or
    damaged. Files are only read; a run under way is not disturbed.

    Examples:

        crdnd runs

        crdnd runs runs/compare --json
    """
    found = _statuses(folder)
    if json:
        print_json({"runs": [one.model_dump(mode="json", exclude={"settings", "history"}) for one in found]})
        return
    from rich.console import Console

    Console(highlight=False).print(_table(found, folder))


def status_command(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The run's folder.")], json: JsonOption = False
) -> None:
    """Show one run in full: where it is, its last epochs, and what its log said last.

    Examples:

        crdnd status runs/student

        crdnd status runs/student --json
    """
    from crdnd.engine import read_status

    if run not in _runs(run):
        raise InputError(f"{run}: holds no run; `crdnd runs` lists those that there are.")
    found = read_status(run)
    if json:
        print_json(found.model_dump_json(indent=1))
        return
    facts = {
        "run": found.folder,
        "state": found.state,
        "method": found.method,
        "model": found.model,
        "data": found.data,
        "started": found.started,
        "epoch": _epoch(found) and f"{_epoch(found)}, step {found.step} of {found.steps or '?'}",
        "best": found.best and f"{_best(found)} in epoch {found.best.epoch}",
        "spent": found.epochs and duration(found.seconds),
        "left": _left(found),
        "log": found.note,
    }
    for name, value in facts.items():
        if value:
            print(f"{name:<8} {value}")
    for name, fate in found.levers.items():
        print(f"lever    {name} {fate}")
    for change in found.changes:
        print(f"changed  {change}")
    if found.history:
        from rich.console import Console

        Console(highlight=False).print(_epochs(found.history[-LAST_EPOCHS:]))


def watch_command(
    folder: Annotated[Path, typer.Argument(metavar="RUN|DIR", help="A run, or a folder of runs.")],
) -> None:
    """Show a run, or every run below a folder, live until none of them runs any more.

    Examples:

        crdnd watch runs/student

        crdnd watch runs
    """
    from rich.live import Live

    found = _statuses(folder)
    with Live(_table(found, folder), auto_refresh=False) as live:
        while any(one.state == "running" for one in found):
            time.sleep(SECONDS_BETWEEN_LOOKS)
            found = _statuses(folder)
            live.update(_table(found, folder), refresh=True)


def _statuses(folder: Path) -> list["RunStatus"]:
    from crdnd.engine import read_status

    return [read_status(run) for run in _runs(folder)]


def _runs(folder: Path) -> list[Path]:
    from crdnd.engine import find_runs

    if not folder.is_dir():
        raise InputError(f"{folder}: is no folder; name the folder of a run or of several.")
    return list(find_runs(folder))


def _table(found: Sequence["RunStatus"], folder: Path) -> "Table | str":
    from rich import box
    from rich.table import Table

    if not found:
        return f"There is no run in {folder}."
    table = Table(box=box.SIMPLE_HEAD)
    for column in ("run", "state", "method", "model", "data", "epoch", "clean / robust", "spent", "left"):
        table.add_column(column, no_wrap=column not in ("run", "model", "data"), overflow="fold")
    for one in found:
        spent = duration(one.seconds) if one.epochs else ""
        table.add_row(
            one.folder, one.state, one.method, one.model, one.data, _epoch(one), _best(one), spent, _left(one)
        )
    return table


def _epochs(history: Sequence["Epoch"]) -> "Table":
    from rich import box
    from rich.table import Table

    table = Table("epoch", "loss", "learning rate", "clean / robust", "took", box=box.SIMPLE_HEAD)
    for epoch in history:
        found = epoch.validation
        table.add_row(
            str(epoch.epoch),
            f"{epoch.loss:.4f}",
            f"{epoch.learning_rate:.3g}",
            f"{found.clean.percent:.1f} / {found.robust.percent:.1f}" if found else "",
            duration(epoch.seconds + epoch.validation_seconds),
        )
    return table


def _epoch(found: "RunStatus") -> str:
    return f"{found.epoch} of {found.epochs}" if found.epochs else ""


def _best(found: "RunStatus") -> str:
    if found.best is None:
        return ""
    validation = found.best.validation
    return f"{validation.clean.percent:.1f} / {validation.robust.percent:.1f}"


def _left(found: "RunStatus") -> str:
    """What a run that is not done still takes; of one that stands still, what it would."""
    return "" if found.state in ("finished", "damaged") else time_left(found.left)
