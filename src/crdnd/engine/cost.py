"""What a run will cost on this machine: a few of its own steps and a part of one validation, timed before it starts.

The steps are those of `train` and `distill` themselves, on a run in a folder that is thrown away.
"""

import copy
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn

from crdnd.config import build
from crdnd.data import ImageData, Splits
from crdnd.engine.loop import Progress
from crdnd.engine.pace import run_seconds, validations_left
from crdnd.engine.run import distill, train
from crdnd.engine.settings import TrainSettings
from crdnd.engine.validate import validate
from crdnd.engine.weights import reestimate_batch_norm
from crdnd.errors import Interrupted
from crdnd.models import device_of, evaluating
from crdnd.threat import ThreatModel

Clock = Callable[[], float]

WARM_UP = 2
"""Steps that do not count: the first ones make caches and choose kernels."""
FEWEST, MOST, SECONDS = 3, 30, 15.0
"""How many steps count: at least, at most, and after how many seconds it is enough."""
SLOW = 15.0
"""Seconds of a step from which on a smaller batch is measured instead."""
PROBE, SMALLEST = 4, 16
"""Images of the first look, which tells whether the whole batch would be slow; and of the smallest batch that is
measured then: what a step costs whatever its batch is scaled up too, and shows in still smaller ones."""
FOREVER = 10**9


@dataclass(frozen=True)
class Counts:
    """How much data a run has, where the images at hand are only some of it."""

    train: int
    validation: int


@dataclass(frozen=True)
class Estimate:
    """What one run will cost. Seconds are wall-clock time; saving checkpoints is not in them."""

    device: str
    threads: int
    batch_size: int
    measured_batch_size: int
    """Smaller than `batch_size` where a whole batch is slow; times and memory are then scaled by the images."""
    steps_timed: int
    step_seconds: float
    """The median of the timed steps."""
    steps_per_epoch: int
    epoch_seconds: float
    validation_seconds: float
    """Of one validation at most: if every image withstands the first of its two attacks."""
    epochs: int
    validations: int
    run_seconds: float
    peak_memory: int | None
    """Bytes: of the process, with everything that was in it before; on a GPU what torch allocates there. None where
    the system does not tell."""

    @property
    def extrapolated(self) -> bool:
        """Whether a smaller batch was measured than the run has."""
        return self.measured_batch_size < self.batch_size


def estimate(
    student: nn.Module,
    data: Splits,
    *,
    teachers: Sequence[nn.Module] = (),
    counts: Counts | None = None,
    clock: Clock = time.perf_counter,
    **settings: Any,
) -> Estimate:
    """Time a few steps of a run and a part of its validation.

    Args:
        student: the network that would learn. Its weights are changed: give one that is not needed any more.
        data: training and validation data, or some of it.
        teachers: as many as the method looks at; their weights do not matter for the cost.
        counts: how many images the run would have, if `data` is only a part of them.
        clock: seconds, rising.
        settings: as for `train` and `distill`.

    Raises:
        InputError: what the run itself would refuse.
    """
    chosen = build(TrainSettings, settings)
    counts = counts or Counts(len(data.train), len(data.validation))
    batch_size = min(chosen.batch_size, counts.train)
    measured = min(batch_size, len(data.train))
    first, memory_of_probe = 0.0, None
    if measured >= 2 * PROBE:
        first = statistics.median(_steps(student, data, teachers, chosen, PROBE, clock, 1))
        memory_of_probe = _peak_memory()
        while measured >= 2 * SMALLEST and first * measured / PROBE > SLOW:
            measured //= 2
    seconds = _steps(student, data, teachers, chosen, measured, clock, MOST)
    scale = batch_size / measured
    step = statistics.median(seconds) * scale
    validation = _validation(student, data, chosen, measured, counts, clock)
    per_epoch = counts.train // batch_size
    validations = validations_left(0, chosen.epochs, chosen.validate_every)
    memory = _peak_memory()
    if memory is not None:
        if scale > 1 and memory_of_probe is not None:  # what grows with the batch, by the two batches that were seen
            memory += max(0, memory - memory_of_probe) * (batch_size - measured) // (measured - PROBE)
        missing = counts.train + counts.validation - len(data.train) - len(data.validation)
        memory += missing * data.train.x[0].nbytes
    return Estimate(
        device=_device_name(),
        threads=torch.get_num_threads(),
        batch_size=batch_size,
        measured_batch_size=measured,
        steps_timed=len(seconds),
        step_seconds=step,
        steps_per_epoch=per_epoch,
        epoch_seconds=step * per_epoch,
        validation_seconds=validation,
        epochs=chosen.epochs,
        validations=validations,
        run_seconds=run_seconds(chosen.epochs * per_epoch, step, validations, validation),
        peak_memory=memory,
    )


class _Enough(Exception):  # noqa: N818
    """Ends a run whose steps have been timed."""


class _Stopwatch:
    """A run's listener that keeps the seconds of its steps and ends it after enough of them."""

    def __init__(self, clock: Clock, most: int) -> None:
        self.clock, self.most = clock, most
        self.readings: list[float] = []

    def __call__(self, progress: Progress) -> None:
        _settle()
        self.readings.append(self.clock())
        took = self.seconds
        if len(took) >= self.most or (len(took) >= FEWEST and sum(took) > SECONDS):
            raise _Enough

    @property
    def seconds(self) -> list[float]:
        """Of every step behind the warm-up."""
        ends = self.readings[WARM_UP - 1 :]
        return [end - start for start, end in pairwise(ends)]


def _steps(
    student: nn.Module,
    data: Splits,
    teachers: Sequence[nn.Module],
    settings: TrainSettings,
    batch_size: int,
    clock: Clock,
    most: int,
) -> list[float]:
    """Seconds of steps of this run at another batch size."""
    values = {name: getattr(settings, name) for name in TrainSettings.model_fields}
    # No validation and no save falls between the steps, the weights hardly move, and what begins later has begun.
    values |= {
        "batch_size": batch_size,
        "epochs": FOREVER,
        "validate_every": FOREVER,
        "save_every_steps": FOREVER,
        "trackers": (),
        "check_teacher": False,  # it may have random weights, which cost the same
        "optimizer": settings.optimizer.model_copy(update={"learning_rate": 1e-6}),
        "awp": settings.awp and settings.awp.model_copy(update={"warmup": 0.0}),
    }
    watch = _Stopwatch(clock, most)
    with TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        try:
            if teachers:
                second = teachers[1] if len(teachers) > 1 else None
                distill(student, data, teacher=teachers[0], second_teacher=second, out=out, listener=watch, **values)
            else:
                train(student, data, out=out, listener=watch, **values)
        except _Enough:
            pass
        except Interrupted as error:
            raise Interrupted("stopped; an estimate keeps nothing.", error.exit_code) from None
    return watch.seconds


def _validation(
    student: nn.Module, data: Splits, settings: TrainSettings, batch_size: int, counts: Counts, clock: Clock
) -> float:
    """Seconds of one validation in which every image is right and stays so.

    The labels are the network's own predictions and eps is 0, so that the second attack has as much to do as the first.
    """
    device = device_of(student)
    some = torch.arange(min(batch_size, len(data.validation)))
    x = data.validation.pixels(some).to(device)
    with evaluating(student), torch.no_grad():
        logits = student(data.validation.batch(some)[0].to(device))
    own = ImageData(x, logits.argmax(1), logits.shape[1])
    still = ThreatModel(norm=settings.threat.norm, eps=0.0)

    def job() -> None:
        validate(student, own, still, batch_size)

    found = _timed(job, clock) * counts.validation / len(some)
    if settings.ema is not None or settings.swa is not None:
        train_data = data.train.subset(torch.arange(min(batch_size, len(data.train)))).to(device)
        averaged = copy.deepcopy(student)
        again = _timed(lambda: reestimate_batch_norm(averaged, train_data, batch_size), clock)
        found += again * counts.train / len(train_data)
    return found


def _timed(job: Callable[[], None], clock: Clock) -> float:
    """Seconds of a job when it is done for the second time."""
    job()
    _settle()
    start = clock()
    job()
    _settle()
    return clock() - start


def _settle() -> None:
    """Wait for the GPU, which works on after a call has returned."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _device_name() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"


def _peak_memory() -> int | None:
    """Bytes: the most that this process has held at once, or that torch has held on the GPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
