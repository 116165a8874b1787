"""The training run: epochs of steps, validation, checkpoints, and an exact resume.

Order, augmentation and attack starts are pure functions of (seed, epoch, sample), the learning rate of the step. So
all that a resume must bring back is: weights, optimiser, averages, the objective's state, the sums of the unfinished
epoch, and torch's own generator (for modules such as dropout). Between two steps all of that is the same in every
process, but for the sums, which are added up before they are saved; so a run may go on with another number of them.
"""

import copy
import logging
import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from crdnd.attacks import PROBE
from crdnd.data import Splits, augment
from crdnd.engine.checkpoint import SCHEMA, WAY_OUT, Checkpoint, load_checkpoint, save_checkpoint
from crdnd.engine.generator import random_states, set_random_states
from crdnd.engine.history import Change, Epoch, Validation
from crdnd.engine.levers import (
    Levers,
    arithmetic,
    caller,
    make_optimizer,
    note_precision,
    student_folding,
    teacher_memory,
    teaching,
    without_waiting,
)
from crdnd.engine.memory import out_of_memory
from crdnd.engine.pace import Pace, TimeLeft, time_left
from crdnd.engine.processes import SharedRun
from crdnd.engine.schedule import learning_rate_factor
from crdnd.engine.settings import TrainSettings
from crdnd.engine.signals import StopRequest, stop_requests
from crdnd.engine.step import Batch, Step
from crdnd.engine.validate import validate
from crdnd.engine.weights import (
    average,
    keeping_statistics,
    moving_statistics,
    perturbable,
    perturbed,
    put_back,
    reestimate_batch_norm,
    statistics,
)
from crdnd.errors import DivergenceError, Interrupted, RunError, first_line
from crdnd.io import check_room
from crdnd.models import load_tensors, state
from crdnd.objectives import LossTerms, Objective, TrainingAttack, Views, attack_needs
from crdnd.random import Stream, permutation

log = logging.getLogger("crdnd")

Result = TypeVar("Result")

SECONDS_BETWEEN_SAVES = 10.0
MOST_SAVING = 0.01
"""The part of a run's time that saving may take by default."""
# What is kept of the end of the epoch before stands in a checkpoint behind this, and which step it was.
GOOD, STEP = "good/", "step/done"
# How often a device other than the CPU is asked whether the loss is still finite; asking stops its queue.
STEPS_BETWEEN_LOOKS = 50
MOST_RETRIES = 2


@dataclass(frozen=True)
class Progress:
    """Where a run is; handed to its listener after every step."""

    step: int
    steps: int
    history: tuple[Epoch, ...]
    left: TimeLeft | None
    """None before the first steps are measured."""


Listener = Callable[[Progress], None]


def seconds_between_saves(took: float) -> float:
    """How long a run goes on by default before it saves again, after a save that took so many seconds.

    >>> seconds_between_saves(0.05), seconds_between_saves(0.5)
    (10.0, 50.0)
    """
    return max(SECONDS_BETWEEN_SAVES, took / MOST_SAVING)


class Trainer:
    """One run. `fit` does it all; the rest is what a checkpoint has to bring back.

    Args:
        student: the network that learns; its weights are changed.
        teachers: the frozen networks: none, the robust one, or that and a naturally trained one.
        objective: the method, on the same number of classes.
        attack: the training attack or None.
        data: training and validation data.
        settings: the run's settings.
        folder: where the run lives; exists, and is held by this process.
        accelerator: device and trackers.
        shared: the processes that share the run.
        listener: called after every step.
        on_change: called with all that the run has changed about itself, once it goes on with it.
    """

    def __init__(
        self,
        student: nn.Module,
        teachers: tuple[nn.Module, ...],
        objective: Objective,
        attack: TrainingAttack | None,
        data: Splits,
        settings: TrainSettings,
        folder: Path,
        accelerator: Accelerator,
        shared: SharedRun,
        listener: Listener | None = None,
        on_change: Callable[[tuple[Change, ...]], None] = lambda changes: None,
    ) -> None:
        device = accelerator.device
        self.settings, self.folder, self.accelerator, self.listener = settings, folder, accelerator, listener
        self.shared, self.on_change = shared, on_change
        self.train_data, self.validation_data = data.train.to(device), data.validation.to(device)
        self.student, self.teachers = student.to(device), teachers
        averages = settings.ema is not None or settings.swa is not None
        self.averaged = copy.deepcopy(self.student).eval() if averages else None
        self.objective = objective.to(device)
        self.objective.processes = shared
        self.trained = [p for module in (self.student, self.objective) for p in module.parameters() if p.requires_grad]
        self.levers = Levers()
        note_precision(settings, device, self.levers)
        fused = settings.levers.fused_optimizer
        self.optimizer = make_optimizer(self.trained, settings.optimizer, device, fused, self.levers)
        first = torch.arange(min(PROBE, len(self.train_data)), device=device)
        self._probe = self.train_data.batch(first)[0]
        self.step_function = Step(
            self.student,
            teachers[0].to(device) if teachers else None,
            self.objective,
            attack,
            settings.threat,
            self._precision,
            teachers[1].to(device) if len(teachers) > 1 else None,
            repair=settings.repair,
            igdm=settings.igdm,
            # On the initial weights, so that a run that goes on computes as the one that began.
            folding=student_folding(self.student, self._probe, settings, self.levers) if attack is not None else None,
            call=caller(settings, device, self.levers),
        )
        self.batch_size = min(settings.batch_size, len(self.train_data) // shared.count * shared.count)
        self.steps_per_epoch = len(self.train_data) // self.batch_size  # an incomplete last batch is left out
        self.total_steps = settings.epochs * self.steps_per_epoch
        # Nothing of a sharded teacher can be folded or left out: this process has but a part of its weights.
        self._sharded = shared.count > 1 and settings.shard_teacher
        needs = self.step_function.needs | attack_needs(attack)
        self._memory = teacher_memory(len(self.train_data), needs, settings, self.levers, sharded=self._sharded)

        self.step = 0
        self.history: tuple[Epoch, ...] = ()
        self.best: dict[str, Tensor] = {}
        self.best_epoch: int | None = None
        self.sums: dict[str, Tensor] = {}
        self.seconds = 0.0
        self.changes: tuple[Change, ...] = ()
        self.stop_asked: int | None = None
        # The state at the end of the epoch before, where a run that turns NaN goes back to.
        self._good: dict[str, Tensor] = {}
        self._order_of = (-1, torch.empty(0))
        self._last_save, self._save_took, self._unsaved = 0.0, 0.0, False

    def fit(self) -> None:
        """Train to the end, from wherever the folder's checkpoint is.

        Raises:
            Interrupted: a signal asked to stop; the state was saved.
            DivergenceError: the loss is not finite any more; the last good checkpoint is kept.
            RunError: the machine failed; the last good checkpoint is kept.
        """
        if not self.student.training:
            self.student.train()
        with ExitStack() as stack:
            stack.enter_context(teaching(self.teachers, self._probe, self.settings, whole=not self._sharded))
            stack.enter_context(arithmetic(self.settings, self.accelerator.device))
            request = stack.enter_context(stop_requests())
            self._resume()
            if self.shared.is_main and not self.finished:
                copies = 1 if self.step else 2  # the one that is replaced goes last
                check_room(self.folder, copies * self._checkpoint_size(), "the run's checkpoints")
            pace = Pace(self.folder)
            pace.forget()
            self._last_save = time.monotonic()
            while self.step < self.total_steps:
                try:
                    self._advance(pace, request)
                except DivergenceError as error:
                    self._retry(error)
                except (RuntimeError, MemoryError) as error:
                    if not out_of_memory(error):
                        raise
                    raise RunError(
                        f"out of memory at step {self.step + 1} of {self.total_steps}, where no micro-batch helps "
                        f"({first_line(error)}); what was saved in {self.folder} is kept."
                    ) from error
                self._tell(pace)
            pace.forget()

    def _advance(self, pace: Pace, request: StopRequest) -> None:
        """One step, and what is due after it."""
        started = time.monotonic()
        self._one_step()
        ends_epoch = self.step % self.steps_per_epoch == 0
        if ends_epoch:
            self._refuse_nan()  # here a device's queue is waited for, which is a part of the steps' time
            self._refuse_nan_weights()
        stepped = time.monotonic()
        self.seconds += stepped - started
        if ends_epoch:
            self._end_epoch()
        saving = time.monotonic()
        self._save_if_due(ends_epoch, request)
        if ends_epoch:
            self._remember()
        pace.step(stepped - started + time.monotonic() - saving)

    def _tell(self, pace: Pace) -> None:
        """Say where the run is: to its listener, and now and then to whoever reads its folder."""
        settings = self.settings
        left = time_left(
            self.step, self.total_steps, settings.epochs, settings.validate_every, self.history, pace.step_seconds
        )
        if self.shared.is_main:
            pace.note(self.step, self.seconds, left)
        if self.listener:
            self.listener(Progress(self.step, self.total_steps, self.history, left))

    @property
    def finished(self) -> bool:
        """Whether all steps are done."""
        return self.step >= self.total_steps

    @property
    def result(self) -> nn.Module:
        """The network whose accuracy counts: the averaged one where there is one."""
        return self.student if self.averaged is None else self.averaged

    def _one_step(self) -> None:
        epoch, index = divmod(self.step, self.steps_per_epoch)
        progress = self.step / self.total_steps
        ids = self._ids(epoch, index)
        try:
            x = self.train_data.pixels(ids)
        except RunError:  # a file of streamed data; nothing of this step has happened yet
            if self.shared.count == 1:  # the others are in the middle of theirs, and cannot add up what to save
                self._save()
            raise
        if index + 1 < self.steps_per_epoch:
            self.train_data.expect(self._ids(epoch, index + 1))
        here, ids = ids, without_waiting(ids, self.accelerator.device)
        y = self.train_data.y[ids]
        kind = self.settings.augmentation_at(epoch / self.settings.epochs)
        draws = Stream.of("augment", self.settings.seed_for("augment"), epoch, ids=ids)
        x, target = augment(x, y, self.objective.num_classes, kind, draws)

        stream = Stream.of("train", self.settings.seed_for("attack"), epoch, ids=ids)
        for group in self.optimizer.param_groups:
            group["lr"] = self._highest_rate * learning_rate_factor(self.settings.schedule, progress)
        same = here if kind == "none" else None
        terms, views = self._within_memory(lambda: self._gradients(x, y, same, stream, progress, target), save=True)
        loss, passes = terms.total, self.step_function.passes
        if self.shared.count > 1:
            self._share()
        if self.settings.clip_grad_norm is not None:
            torch.nn.utils.clip_grad_norm_(self.trained, self.settings.clip_grad_norm)
        self.optimizer.step()
        with torch.no_grad():
            self.objective.observe(views)
        if self.averaged is not None and self.settings.ema is not None:
            # At first as many steps as there are: a short run would else end in what is left of its random start.
            decay = min(self.settings.ema, (1 + self.step) / (10 + self.step))
            average(self.averaged, self.student, 1 - decay)
        values = {"loss": loss, **{f"terms.{name}": term.mean() for name, term in terms.terms.items()}}
        for name, count in (("student", passes.student), ("teacher", passes.teacher)):
            values[f"passes.{name}"] = torch.full((), count / len(x), dtype=torch.float64, device=loss.device)
        self._note(values)
        self.step += 1

    def _gradients(
        self, x: Tensor, y: Tensor, ids: Tensor | None, stream: Stream, progress: float, target: Tensor
    ) -> tuple[LossTerms, Views]:
        """Attack and look: the gradients of the batch's loss, and the terms and views that they came from.

        `ids` are those of samples that come back as they are; None where augmentation changes them.
        """
        passes = self.step_function.passes
        passes.student = passes.teacher = 0
        # Micro-batches differ in size, and what a teacher says of an image may differ with it in the last bits.
        memory = self._memory if self.micro_batch is None else None
        known = memory.recall(ids) if memory is not None and ids is not None else None
        batch = self.step_function.prepare(x, y, stream, progress, target, known, self.micro_batch)
        if memory is not None and ids is not None and known is None:
            memory.keep(ids, batch.teachers)
        with self._worst_weights(batch):
            self.optimizer.zero_grad(set_to_none=True)
            return self.step_function.backward(batch, self.micro_batch)

    def _within_memory(self, work: Callable[[], Result], *, save: bool) -> Result:
        """Do what may need more memory than there is; if it does, do it again with smaller micro-batches."""
        while True:
            before = statistics(self.student)
            try:
                return work()
            except (RuntimeError, MemoryError) as error:
                if not out_of_memory(error):
                    raise
                why = first_line(error)
            # Here and not above, where the error still holds the tensors of the step.
            put_back(self.student, before)
            self.optimizer.zero_grad(set_to_none=True)
            if self.accelerator.device.type == "cuda":
                torch.cuda.empty_cache()
            self._halve(why, save=save)

    def _halve(self, why: str, *, save: bool) -> None:
        """Take half the micro-batch from here on, or say that nothing helps."""
        now = min(self.micro_batch or self.batch_size, self.batch_size // self.shared.count)
        fitting = now // 2
        if fitting < 2:
            raise RunError(f"out of memory with {now} images at once ({why}); take a smaller model or smaller images.")
        if self.shared.count > 1:  # the others wait in the middle of this step
            raise RunError(
                f"out of memory with {now} images at once in a process ({why}); set micro_batch={fitting}, or "
                f"batch_size={fitting * self.shared.count}, and start over with --fresh."
            )
        self._change(Change(what="micro_batch", value=fitting, step=self.step, why=f"out of memory: {why}"), save=save)

    @property
    def micro_batch(self) -> int | None:
        """How many images the networks see at once; None for the whole batch."""
        found = [int(change.value) for change in self.changes if change.what == "micro_batch"]
        return found[-1] if found else self.settings.micro_batch

    def _worst_weights(self, batch: Batch) -> AbstractContextManager[None]:
        """The weights at which the loss is taken: as they are, or moved to where it is larger (AWP)."""
        awp = self.settings.awp
        if awp is None or batch.progress < awp.warmup:
            return nullcontext()
        weights = perturbable(self.student)
        self.optimizer.zero_grad(set_to_none=True)
        with keeping_statistics(self.student):
            self.step_function.backward(batch, self.micro_batch)
        gradients = [torch.zeros_like(weight) if weight.grad is None else weight.grad for weight in weights]
        return perturbed(weights, self.shared.means(gradients), awp.gamma)

    def _ids(self, epoch: int, index: int) -> Tensor:
        """This process's share of a batch, int64 on the CPU; draws are keyed by sample and do not depend on it."""
        ids = self._order(epoch)[index * self.batch_size : (index + 1) * self.batch_size]
        return ids[self.shared.index :: self.shared.count]

    def _order(self, epoch: int) -> Tensor:
        """The epoch's order of the samples, int64 (N,); worked out once an epoch."""
        if self._order_of[0] != epoch:
            self._order_of = epoch, permutation(len(self.train_data), "order", self.settings.seed_for("order"), epoch)
        return self._order_of[1]

    def _share(self) -> None:
        """Average gradients and batch-norm statistics over the processes; they stay the same network everywhere.

        With equal shares that is the gradient of the joined batch, but for what batch norm does to a share.
        """
        learned = [parameter for parameter in self.trained if parameter.grad is not None]
        moved = moving_statistics(self.student)
        means = self.shared.means([*(cast("Tensor", parameter.grad) for parameter in learned), *moved])
        for parameter, gradient in zip(learned, means[: len(learned)], strict=True):
            parameter.grad = gradient
        for own, joined in zip(moved, means[len(learned) :], strict=True):
            own.copy_(joined)

    def _note(self, values: dict[str, Tensor]) -> None:
        """Add to the epoch's sums, on the device; look at them only as often as looking is free or due."""
        for name, value in values.items():
            value = value.detach().double()
            self.sums[name] = self.sums[name] + value if name in self.sums else value
        if self.accelerator.device.type == "cpu" or (self.step + 1) % STEPS_BETWEEN_LOOKS == 0:
            self._refuse_nan()

    def _refuse_nan(self) -> None:
        if "loss" in self.sums and not math.isfinite(self.sums["loss"].item()):
            raise DivergenceError(
                f"the loss is not finite at step {self.step + 1} of {self.total_steps}; the last good checkpoint in "
                f"{self.folder} is kept. Lower optimizer.learning_rate (now {self._highest_rate:g}) "
                "or set clip_grad_norm, and start over with --fresh."
            )

    def _end_epoch(self) -> None:
        epoch = self.step // self.steps_per_epoch
        means = {name: value.item() / self.steps_per_epoch for name, value in self._joined_sums().items()}
        self._average_epoch(epoch)
        started = time.monotonic()
        due = epoch % self.settings.validate_every == 0 or epoch == self.settings.epochs
        validation = self._validate(epoch) if due else None
        entry = Epoch(
            epoch=epoch,
            loss=means["loss"],
            terms={name.removeprefix("terms."): mean for name, mean in means.items() if name.startswith("terms.")},
            learning_rate=self.optimizer.param_groups[0]["lr"],
            seconds=round(self.seconds, 3),
            validation_seconds=round(time.monotonic() - started, 3) if validation else 0.0,
            student_passes=means.get("passes.student", 0.0),
            teacher_passes=means.get("passes.teacher", 0.0),
            validation=validation,
        )
        self.history += (entry,)
        self.sums, self.seconds = {}, 0.0
        for name, total in self._joined_counts().items():
            self.objective.get_buffer(name).copy_(total)
        self.objective.end_epoch()
        self._report(entry)

    def _joined_sums(self) -> dict[str, Tensor]:
        """The epoch's sums so far, of the joined batches."""
        names = sorted(self.sums)  # a file gives them back in an order of its own, in every process another
        return dict(zip(names, self.shared.means([self.sums[name] for name in names]), strict=True))

    def _joined_counts(self) -> dict[str, Tensor]:
        """The objective's sums over samples so far, of all processes."""
        names = self.objective.summed
        return dict(zip(names, self.shared.sums([self.objective.get_buffer(name) for name in names]), strict=True))

    def _average_epoch(self, epoch: int) -> None:
        """Take the weights at the end of an epoch into their average (SWA); before its start they are the average."""
        if self.averaged is not None and self.settings.swa is not None:
            first = math.floor(self.settings.swa * self.settings.epochs) + 1
            average(self.averaged, self.student, 1 / max(1, epoch - first + 1))

    def _validate(self, epoch: int) -> Validation:
        if self.averaged is not None:
            reestimate_batch_norm(self.averaged, self.train_data, self.batch_size)
        validation = self._within_memory(
            lambda: validate(
                self.result,
                self.validation_data,
                self.settings.threat,
                self.micro_batch or self.settings.batch_size,
            ),
            save=False,  # what this epoch found does not yet stand where a checkpoint looks for it
        )
        if self.best_epoch is None or self._rank(validation) > self._rank(self._best_validation()):
            self.best_epoch = epoch
            self.best = {key: value.detach().clone() for key, value in state(self.result).items()}
        return validation

    def _rank(self, validation: Validation) -> tuple[int, int]:
        """What `best` maximises: robust accuracy, then natural accuracy; the earlier epoch wins a tie.

        A method that never meets an attack is judged by natural accuracy first: its robust accuracy only falls while it
        learns, and would choose a network that has hardly begun.
        """
        robust, clean = validation.robust.correct, validation.clean.correct
        return (robust, clean) if self.step_function.attack else (clean, robust)

    def _best_validation(self) -> Validation:
        assert self.best_epoch is not None  # noqa: S101
        best = self.history[self.best_epoch - 1].validation
        assert best is not None  # noqa: S101
        return best

    def _report(self, entry: Epoch) -> None:
        found = entry.validation
        text = f", validation clean {found.clean.percent:.1f} robust {found.robust.percent:.1f}" if found else ""
        log.info("epoch %d/%d: loss %.4f%s", entry.epoch, self.settings.epochs, entry.loss, text)
        images = self.steps_per_epoch * self.batch_size
        values = {
            "loss": entry.loss,
            **{f"terms/{name}": mean for name, mean in entry.terms.items()},
            "learning_rate": entry.learning_rate,
            "images_per_second": images / max(entry.seconds, 1e-3),
            "passes/student": entry.student_passes,
            "passes/teacher": entry.teacher_passes,
        }
        if found:
            values |= {"validation/clean": found.clean.percent, "validation/robust": found.robust.percent}
        self.accelerator.log(values, step=self.step)

    def _save_if_due(self, ends_epoch: bool, request: StopRequest) -> None:
        every = self.settings.save_every_steps
        late = time.monotonic() - self._last_save > seconds_between_saves(self._save_took)
        # A signal reaches one process, and clocks differ: all save or none.
        stop, late = self.shared.agree(request.exit_code, main=late)
        due = self.step % every == 0 if every else ends_epoch and late
        if due or self._unsaved or self.finished or stop is not None:
            self._save()
            # A signal that comes after the look above waits for the next step, unless this state happens to be saved.
            # And nobody ends before the main process has written it: launchers then end all the others.
            stop, _ = self.shared.agree(request.exit_code)
        if stop is None:
            return
        if self.finished:
            self.stop_asked = stop  # what is left is to write the model; then the run ends as it was asked to
            return
        raise Interrupted(
            f"stopped at step {self.step} of {self.total_steps}; everything is saved in {self.folder}. "
            "The same command, without --fresh, goes on from there.",
            stop,
        )

    def _save(self) -> None:
        started = time.monotonic()
        self._refuse_nan()
        self._refuse_nan_weights()
        tensors = self._tensors()
        if self.shared.is_main:
            checkpoint = Checkpoint(
                schema=SCHEMA,
                step=self.step,
                steps=self.total_steps,
                finished=self.finished,
                seconds=self.seconds,
                history=self.history,
                best_epoch=self.best_epoch,
                changes=self.changes,
            )
            inside = self.step % self.steps_per_epoch > 0  # else it is what a run that goes on remembers anyway
            good = {f"{GOOD}{key}": value for key, value in self._good.items()} if inside else {}
            save_checkpoint(self.folder, checkpoint, tensors | good)
        self._last_save, self._unsaved = time.monotonic(), False
        self._save_took = self._last_save - started

    def _refuse_nan_weights(self) -> None:
        if not all(bool(value.isfinite().all()) for value in self.student.parameters()):
            raise DivergenceError(
                f"the weights are not finite after step {self.step}; the last good checkpoint in {self.folder} is "
                "kept. Lower optimizer.learning_rate or set clip_grad_norm, and start over with --fresh."
            )

    def _checkpoint_size(self) -> int:
        """Bytes of a checkpoint with all that will be in it: weights, averages, the best ones, the optimiser's."""
        optimizer = self.settings.optimizer
        moments = 2 if optimizer.name == "adamw" else int(optimizer.momentum > 0)
        networks = [self.student, self.result, self.objective, *([self.averaged] if self.averaged is not None else [])]
        size = sum(tensor.nbytes for network in networks for tensor in state(network).values())
        size += moments * sum(parameter.nbytes for parameter in self.trained)
        return size * (2 if self.settings.on_nan == "retry" else 1)

    @property
    def _retries(self) -> int:
        """How often the learning rate was halved."""
        return sum(change.what == "learning_rate" for change in self.changes)

    @property
    def _highest_rate(self) -> float:
        return self.settings.optimizer.learning_rate * 0.5**self._retries

    def _remember(self) -> None:
        """Keep the state at the end of an epoch.

        Always that one and not the last checkpoint, whose moment depends on the clock and on signals: a run that was
        stopped and one that was not go back to the same state.
        """
        if self.settings.on_nan == "retry":
            self._good = {key: value.detach().cpu().clone() for key, value in self._tensors().items()}
            self._good[STEP] = torch.tensor(self.step)

    def _retry(self, error: DivergenceError) -> None:
        """Go back to the end of the epoch before with half the learning rate, or give up."""
        if self.settings.on_nan != "retry" or self._retries == MOST_RETRIES:
            raise DivergenceError(f"{error} It went back {self._retries} times already.") if self._retries else error
        self.step, self.seconds = int(self._good[STEP]), 0.0
        self._restore({key: value.clone() for key, value in self._good.items()}, "the end of the epoch before")
        why = str(error).partition(";")[0]
        self._change(Change(what="learning_rate", value=self._highest_rate / 2, step=self.step, why=why), save=True)

    def _change(self, change: Change, *, save: bool) -> None:
        """Take note of a change, say it, and save it, so that a run that goes on keeps it; if not now, then soon."""
        self.changes += (change,)
        log.warning("%s; going on from step %d with %s %g", change.why, change.step, change.what, change.value)
        if save:
            self._save()
        self._unsaved = not save
        self.on_change(self.changes)

    def _tensors(self) -> dict[str, Tensor]:
        parts: dict[str, dict[str, Tensor]] = {
            "student": state(self.student),
            "averaged": state(self.averaged) if self.averaged is not None else {},
            "objective": state(self.objective) | self._joined_counts(),
            "best": self.best,
            "sums": self._joined_sums(),
            "random": random_states(self.accelerator.device),
        }
        for index, values in self.optimizer.state_dict()["state"].items():
            parts[f"optimizer.{index}"] = {key: value for key, value in values.items() if isinstance(value, Tensor)}
        return {f"{part}/{key}": value for part, values in parts.items() for key, value in values.items()}

    def _resume(self) -> None:
        found = load_checkpoint(self.folder)
        if found is None:
            self._remember()
            return
        checkpoint, tensors = found
        self._good = {key.removeprefix(GOOD): value for key, value in tensors.items() if key.startswith(GOOD)}
        now = {key: value for key, value in tensors.items() if not key.startswith(GOOD)}
        self._restore(now, str(self.folder / checkpoint.file))
        self.step, self.history, self.best_epoch = checkpoint.step, checkpoint.history, checkpoint.best_epoch
        self.seconds = checkpoint.seconds
        self.changes = checkpoint.changes
        if not self._good:
            self._remember()
        if self.changes:
            self.on_change(self.changes)  # a kill may have come between the checkpoint and this
        if not self.finished:
            log.info("going on from step %d of %d", self.step, self.total_steps)

    def _restore(self, tensors: dict[str, Tensor], where: str) -> None:
        """Bring back weights, optimiser, averages, the method's state, sums and torch's generator."""
        parts: dict[str, dict[str, Tensor]] = {}
        for name, value in tensors.items():
            part, _, key = name.partition("/")
            parts.setdefault(part, {})[key] = value
        loaded = {"student": self.student, "averaged": self.averaged, "objective": self.objective}
        for part, module in loaded.items():
            if module is not None:
                load_tensors(module, parts.get(part, {}), where, WAY_OUT)
        device = self.accelerator.device
        self.best = {key: value.to(device) for key, value in parts.get("best", {}).items()}
        self.sums = {key: value.to(device) for key, value in parts.get("sums", {}).items()}
        optimizer: dict[str, Any] = self.optimizer.state_dict()
        optimizer["state"] = {
            int(part.removeprefix("optimizer.")): values
            for part, values in parts.items()
            if part.startswith("optimizer.")
        }
        self.optimizer.load_state_dict(optimizer)
        set_random_states(parts.get("random", {}), device)
        for name in self.objective.summed if not self.shared.is_main else ():  # the main process has all of them
            self.objective.get_buffer(name).zero_()

    def _precision(self) -> AbstractContextManager[object]:
        if self.settings.precision == "fp32":
            return nullcontext()
        return torch.autocast(self.accelerator.device.type, torch.bfloat16)
