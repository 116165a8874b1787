"""The state of a run as its folder tells it: files are read, and nothing is held, written or waited for."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from crdnd.config import Frozen
from crdnd.engine.checkpoint import POINTER, Checkpoint, read_checkpoint
from crdnd.engine.history import Change, Epoch, Validation
from crdnd.engine.pace import TimeLeft, read_note, time_left
from crdnd.engine.run import DIVERGED, LOG, RUN
from crdnd.errors import InputError
from crdnd.io import is_held, read_json

State = Literal["running", "finished", "stopped", "diverged", "damaged"]
TAIL = 4096
"""Bytes at the end of a log that hold its last line."""


class Best(Frozen):
    """The epoch whose weights were best on validation data."""

    epoch: int
    validation: Validation


class RunStatus(Frozen):
    """What is known of a run; of a damaged one only what is wrong."""

    folder: str
    state: State
    note: str
    """What is damaged; else the last line of the log."""
    method: str | None = None
    model: str | None = None
    data: str | None = None
    started: str | None = None
    step: int = 0
    steps: int | None = None
    """In all; None where no checkpoint says so."""
    epoch: int = 0
    """Finished epochs."""
    epochs: int | None = None
    best: Best | None = None
    seconds: float = 0.0
    """Spent on steps and validations that count; what a kill cost is not in it."""
    left: TimeLeft | None = None
    changes: tuple[Change, ...] = ()
    """What the run changed about itself to go on."""
    levers: dict[str, str] = {}
    """What became of them: on or off, and why."""
    settings: dict[str, Any] = {}
    history: tuple[Epoch, ...] = ()


def find_runs(folder: Path) -> Iterator[Path]:
    """Every run in a folder and below it, in the order of their names."""
    for root, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        if RUN in files or POINTER in files:
            yield Path(root)


def read_status(folder: Path) -> RunStatus:
    """The state of the run in a folder; whatever its files hold, an answer."""
    last = _last_line(folder)
    held = is_held(folder)  # before the rest is read: a run that ends meanwhile is called running, and is whole
    try:
        document, checkpoint = read_json(folder / RUN), read_checkpoint(folder)
        found = _status(folder, document, checkpoint, running=held)
    except InputError as error:
        return RunStatus(folder=str(folder), state="damaged", note=str(error))
    except (KeyError, TypeError, AttributeError):
        return RunStatus(folder=str(folder), state="damaged", note=f"{folder / RUN}: holds no run's settings.")
    state: State = "stopped"
    if held:
        state = "running"
    elif checkpoint is not None and checkpoint.finished:
        state = "finished"
    elif DIVERGED in last:
        state = "diverged"
    return found.model_copy(update={"state": state, "note": last})


def _status(folder: Path, document: dict[str, Any], checkpoint: Checkpoint | None, *, running: bool) -> RunStatus:
    settings, identity = document["settings"], document["identity"]
    epochs, every = int(settings["epochs"]), int(settings["validate_every"])
    history = checkpoint.history if checkpoint else ()
    step, seconds = (checkpoint.step, checkpoint.seconds) if checkpoint else (0, 0.0)
    steps = checkpoint.steps if checkpoint else None
    left = time_left(step, steps, epochs, every, history) if steps else None
    note = read_note(folder) if running else None
    if note is not None and note.step >= step:
        step, seconds, left = note.step, note.seconds, note.left
    best = None
    if checkpoint is not None and checkpoint.best_epoch is not None:
        validation = history[checkpoint.best_epoch - 1].validation
        best = validation and Best(epoch=checkpoint.best_epoch, validation=validation)
    return RunStatus(
        folder=str(folder),
        state="stopped",
        note="",
        method=settings["objective"]["name"],
        # Without their digests, which only machines compare.
        model=identity["model"].rpartition(" ")[0],
        data=identity["data"].rpartition(" ")[0],
        started=document.get("started"),
        step=step,
        steps=steps,
        epoch=step * epochs // steps if steps else len(history),
        epochs=epochs,
        best=best,
        seconds=sum(epoch.seconds + epoch.validation_seconds for epoch in history) + seconds,
        left=left,
        changes=checkpoint.changes if checkpoint else (),
        levers={str(name): str(fate) for name, fate in document.get("levers", {}).items()},
        settings=settings,
        history=history,
    )


def _last_line(folder: Path) -> str:
    """What the log says last; empty where there is none."""
    try:
        with (folder / LOG).open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - TAIL))
            lines = file.read().decode("utf-8", "replace").splitlines()
    except OSError:
        return ""
    return next((line for line in reversed(lines) if line.strip()), "")
