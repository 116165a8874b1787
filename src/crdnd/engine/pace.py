"""How long a run still takes, from what its own recent steps and validations took."""

import contextlib
import json
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path

from pydantic import ValidationError

from crdnd.config import Frozen
from crdnd.engine.history import Epoch

PROGRESS = "progress.json"
SECONDS_BETWEEN_NOTES = 2.0
RECENT = 50
"""How many steps tell how fast a run is now."""


class TimeLeft(Frozen):
    """What a run still takes on this machine, in wall-clock seconds."""

    seconds: float
    at_least: bool
    """Before the first validation nobody knows what one costs, and it is left out."""


class Note(Frozen):
    """What a run that is under way says between two checkpoints, in `progress.json`."""

    step: int
    """Optimiser steps done."""
    seconds: float
    """Of the unfinished epoch so far."""
    left: TimeLeft | None


def run_seconds(steps: int, step_seconds: float, validations: int, validation_seconds: float) -> float:
    """Seconds of so many steps and validations; saving checkpoints is part of neither."""
    return steps * step_seconds + validations * validation_seconds


def validations_left(epoch: int, epochs: int, every: int) -> int:
    """How many validations come after so many epochs are done; the last epoch always has one.

    >>> [validations_left(epoch, epochs=7, every=3) for epoch in (0, 2, 3, 6, 7)]
    [3, 3, 2, 1, 0]
    """
    return epochs // every - epoch // every + (epoch < epochs and epochs % every > 0)


def time_left(
    step: int, steps: int, epochs: int, every: int, history: Sequence[Epoch], step_seconds: float | None = None
) -> TimeLeft | None:
    """What remains after so many of all steps.

    Args:
        step: steps done.
        steps: steps in all.
        epochs: epochs in all.
        every: epochs between validations.
        history: the finished epochs.
        step_seconds: of a recent step; those of the last epoch where nobody measured more recent ones.

    Returns:
        None where no step was measured yet.
    """
    per_epoch = steps // epochs
    if step_seconds is None:
        if not history:
            return None
        step_seconds = history[-1].seconds / per_epoch
    validations = validations_left(step // per_epoch, epochs, every)
    known = next((epoch.validation_seconds for epoch in reversed(history) if epoch.validation), None)
    seconds = run_seconds(steps - step, step_seconds, validations, known or 0.0)
    return TimeLeft(seconds=seconds, at_least=known is None and validations > 0)


class Pace:
    """Seconds of this process's recent steps, and the note of them that others may read."""

    def __init__(self, folder: Path) -> None:
        self._file = folder / PROGRESS
        self._recent: deque[float] = deque(maxlen=RECENT)
        self._warm = False
        self._noted = time.monotonic()

    def step(self, seconds: float) -> None:
        """A step took so long; the first one also makes caches and chooses kernels, and does not count."""
        if self._warm:
            self._recent.append(seconds)
        self._warm = True

    @property
    def step_seconds(self) -> float | None:
        """The mean of the recent steps: what is slow now and then is part of how long it takes."""
        return sum(self._recent) / len(self._recent) if self._recent else None

    def note(self, step: int, seconds: float, left: TimeLeft | None) -> None:
        """Write the note now and then; nothing is synced, a torn or missing one costs its reader nothing but news."""
        if time.monotonic() - self._noted < SECONDS_BETWEEN_NOTES:
            return
        self._noted = time.monotonic()
        with contextlib.suppress(OSError):  # a full disk ends the run when it is saved, with a message of its own
            self._file.write_text(Note(step=step, seconds=seconds, left=left).model_dump_json(), encoding="utf-8")

    def forget(self) -> None:
        """Remove the note: the checkpoint says it all, or the note is that of a process that was killed."""
        with contextlib.suppress(OSError):
            self._file.unlink(missing_ok=True)


def read_note(folder: Path) -> Note | None:
    """The note of the run that is under way in a folder, if there is a whole one."""
    try:
        return Note.model_validate(json.loads((folder / PROGRESS).read_bytes()))
    except (OSError, ValueError, ValidationError):
        return None
