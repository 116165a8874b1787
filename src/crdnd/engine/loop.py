"""The training run: epochs of steps, validation, checkpoints, and an exact resume.

Order, augmentation and attack starts are pure functions of (seed, epoch, sample), the learning rate of the step. So
all that a resume must bring back is: weights, optimiser, averages, the objective's state, the sums of the unfinished
epoch, and torch's own generator (for modules such as dropout).
"""

import copy
import logging
import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from crdnd.attacks import PROBE
from crdnd.data import Splits, augment
from crdnd.engine.checkpoint import SCHEMA, WAY_OUT, Checkpoint, load_checkpoint, save_checkpoint
from crdnd.engine.history import Epoch, Validation
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
from crdnd.engine.processes import SharedBatch
from crdnd.engine.schedule import learning_rate_factor
from crdnd.engine.settings import TrainSettings
from crdnd.engine.signals import StopRequest, stop_requests
from crdnd.engine.step import Batch, Step
from crdnd.engine.validate import validate
from crdnd.engine.weights import average, keeping_statistics, perturbable, perturbed, reestimate_batch_norm
from crdnd.errors import DivergenceError, Interrupted, RunError
from crdnd.models import load_tensors, state
from crdnd.objectives import Objective, TrainingAttack, attack_needs
from crdnd.random import Stream, permutation

log = logging.getLogger("crdnd")

SECONDS_BETWEEN_SAVES = 10.0
# How often a device other than the CPU is asked whether the loss is still finite; asking stops its queue.
STEPS_BETWEEN_LOOKS = 50


@dataclass(frozen=True)
class Progress:
    """Where a run is; handed to its listener after every step."""

    step: int
    steps: int
    history: tuple[Epoch, ...]


Listener = Callable[[Progress], None]


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
        accelerator: device, processes and trackers.
        listener: called after every step.
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
        listener: Listener | None = None,
    ) -> None:
        device = accelerator.device
        self.settings, self.folder, self.accelerator, self.listener = settings, folder, accelerator, listener
        self.train_data, self.validation_data = data.train.to(device), data.validation.to(device)
        self.student, self.teachers = student.to(device), teachers
        averages = settings.ema is not None or settings.swa is not None
        self.averaged = copy.deepcopy(self.student).eval() if averages else None
        self.objective = objective.to(device)
        self.objective.processes = SharedBatch(accelerator)
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
        processes = accelerator.num_processes
        self.batch_size = min(settings.batch_size, len(self.train_data) // processes * processes)
        self.steps_per_epoch = len(self.train_data) // self.batch_size  # an incomplete last batch is left out
        self.total_steps = settings.epochs * self.steps_per_epoch
        share = torch.arange(self.batch_size // processes, device=device)
        needs = self.step_function.needs | attack_needs(attack)
        self._memory = teacher_memory(
            teachers, lambda: self.train_data.batch(share)[0], len(self.train_data), needs, settings, self.levers
        )

        self.step = 0
        self.history: tuple[Epoch, ...] = ()
        self.best: dict[str, Tensor] = {}
        self.best_epoch: int | None = None
        self.sums: dict[str, Tensor] = {}
        self.seconds = 0.0
        self._order_of = (-1, torch.empty(0))
        self._last_save = 0.0

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
            stack.enter_context(teaching(self.teachers, self._probe, self.settings))
            stack.enter_context(arithmetic(self.settings, self.accelerator.device))
            request = stack.enter_context(stop_requests())
            self._resume()
            self._last_save = time.monotonic()
            while self.step < self.total_steps:
                started = time.monotonic()
                self._one_step()
                self.seconds += time.monotonic() - started
                ends_epoch = self.step % self.steps_per_epoch == 0
                if ends_epoch:
                    self._end_epoch()
                self._save_if_due(ends_epoch, request)
                if self.listener:
                    self.listener(Progress(self.step, self.total_steps, self.history))

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
            self._save()
            raise
        if index + 1 < self.steps_per_epoch:
            self.train_data.expect(self._ids(epoch, index + 1))
        known = self._memory.recall(ids) if self._memory is not None else None
        here, ids = ids, without_waiting(ids, self.accelerator.device)
        y = self.train_data.y[ids]
        kind = self.settings.augmentation_at(epoch / self.settings.epochs)
        draws = Stream.of("augment", self.settings.seed_for("augment"), epoch, ids=ids)
        x, target = augment(x, y, self.objective.num_classes, kind, draws)

        passes = self.step_function.passes
        passes.student = passes.teacher = 0
        stream = Stream.of("train", self.settings.seed_for("attack"), epoch, ids=ids)
        batch = self.step_function.prepare(x, y, stream, progress, target, known)
        if self._memory is not None and known is None:
            self._memory.keep(here, batch.teachers)
        for group in self.optimizer.param_groups:
            group["lr"] = self.settings.optimizer.learning_rate * learning_rate_factor(self.settings.schedule, progress)
        self.optimizer.zero_grad(set_to_none=True)
        with self._worst_weights(batch):
            terms, views = self.step_function.terms(batch)
            loss = terms.total
            self.accelerator.backward(loss)
        self._share_gradients()
        if self.settings.clip_grad_norm is not None:
            torch.nn.utils.clip_grad_norm_(self.trained, self.settings.clip_grad_norm)
        self.optimizer.step()
        with torch.no_grad():
            self.objective.observe(views)
        if self.averaged is not None and self.settings.ema is not None:
            average(self.averaged, self.student, 1 - self.settings.ema)
        values = {"loss": loss, **{f"terms.{name}": term.mean() for name, term in terms.terms.items()}}
        for name, count in (("student", passes.student), ("teacher", passes.teacher)):
            values[f"passes.{name}"] = torch.full((), count / len(x), dtype=torch.float64, device=loss.device)
        self._note(values)
        self.step += 1

    def _worst_weights(self, batch: Batch) -> AbstractContextManager[None]:
        """The weights at which the loss is taken: as they are, or moved to where it is larger (AWP)."""
        awp = self.settings.awp
        if awp is None or batch.progress < awp.warmup:
            return nullcontext()
        weights = perturbable(self.student)
        with keeping_statistics(self.student):
            loss = self.step_function.terms(batch)[0].total
            gradients = torch.autograd.grad(loss, weights, allow_unused=True, materialize_grads=True)
        gradients = [cast("Tensor", self.accelerator.reduce(gradient, "mean")) for gradient in gradients]
        return perturbed(weights, gradients, awp.gamma)

    def _ids(self, epoch: int, index: int) -> Tensor:
        """This process's share of a batch, int64 on the CPU; draws are keyed by sample and do not depend on it."""
        ids = self._order(epoch)[index * self.batch_size : (index + 1) * self.batch_size]
        return ids[self.accelerator.process_index :: self.accelerator.num_processes]

    def _order(self, epoch: int) -> Tensor:
        """The epoch's order of the samples, int64 (N,); worked out once an epoch."""
        if self._order_of[0] != epoch:
            self._order_of = epoch, permutation(len(self.train_data), "order", self.settings.seed_for("order"), epoch)
        return self._order_of[1]

    def _share_gradients(self) -> None:
        """Average the gradients over the processes; with equal shares that is the gradient of the joined batch."""
        if self.accelerator.num_processes > 1:
            for parameter in self.trained:
                if parameter.grad is not None:
                    parameter.grad = cast("Tensor", self.accelerator.reduce(parameter.grad, "mean"))

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
                f"{self.folder} is kept. Lower optimizer.learning_rate (now {self.settings.optimizer.learning_rate:g}) "
                "or set clip_grad_norm, and start over with --fresh."
            )

    def _end_epoch(self) -> None:
        self._refuse_nan()
        epoch = self.step // self.steps_per_epoch
        sums = {name: cast("Tensor", self.accelerator.reduce(value, "mean")) for name, value in self.sums.items()}
        means = {name: value.item() / self.steps_per_epoch for name, value in sums.items()}
        self._average_epoch(epoch)
        due = epoch % self.settings.validate_every == 0 or epoch == self.settings.epochs
        validation = self._validate(epoch) if due else None
        entry = Epoch(
            epoch=epoch,
            loss=means["loss"],
            terms={name.removeprefix("terms."): mean for name, mean in means.items() if name.startswith("terms.")},
            learning_rate=self.optimizer.param_groups[0]["lr"],
            seconds=round(self.seconds, 3),
            student_passes=means.get("passes.student", 0.0),
            teacher_passes=means.get("passes.teacher", 0.0),
            validation=validation,
        )
        self.history += (entry,)
        self.sums, self.seconds = {}, 0.0
        for name in self.objective.summed if self.accelerator.num_processes > 1 else ():
            counted = self.objective.get_buffer(name)
            counted.copy_(cast("Tensor", self.accelerator.reduce(counted, "sum")))
        self.objective.end_epoch()
        self._report(entry)

    def _average_epoch(self, epoch: int) -> None:
        """Take the weights at the end of an epoch into their average (SWA); before its start they are the average."""
        if self.averaged is not None and self.settings.swa is not None:
            first = math.floor(self.settings.swa * self.settings.epochs) + 1
            average(self.averaged, self.student, 1 / max(1, epoch - first + 1))

    def _validate(self, epoch: int) -> Validation:
        if self.averaged is not None:
            reestimate_batch_norm(self.averaged, self.train_data, self.batch_size)
        validation = validate(self.result, self.validation_data, self.settings.threat, self.settings.batch_size)
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
        values = {"loss": entry.loss, "learning_rate": entry.learning_rate, **entry.terms}
        if found:
            values |= {"validation/clean": found.clean.percent, "validation/robust": found.robust.percent}
        self.accelerator.log(values, step=self.step)

    def _save_if_due(self, ends_epoch: bool, request: StopRequest) -> None:
        every = self.settings.save_every_steps
        late = time.monotonic() - self._last_save > SECONDS_BETWEEN_SAVES
        due = self.step % every == 0 if every else ends_epoch and late
        saved = due or self.finished or request.exit_code is not None
        if saved:
            self._save()
        # A signal that comes after the look above waits for the next step, unless this state happens to be saved.
        stop = request.exit_code if saved else None
        if stop is not None and not self.finished:
            raise Interrupted(
                f"stopped at step {self.step} of {self.total_steps}; everything is saved in {self.folder}. "
                "The same command goes on from there.",
                stop,
            )

    def _save(self) -> None:
        self._refuse_nan()
        if not all(bool(value.isfinite().all()) for value in self.student.parameters()):
            raise DivergenceError(
                f"the weights are not finite after step {self.step}; the last good checkpoint in {self.folder} is "
                "kept. Lower optimizer.learning_rate or set clip_grad_norm, and start over with --fresh."
            )
        if self.accelerator.is_main_process:
            checkpoint = Checkpoint(
                schema=SCHEMA,
                step=self.step,
                finished=self.finished,
                seconds=self.seconds,
                history=self.history,
                best_epoch=self.best_epoch,
            )
            save_checkpoint(self.folder, checkpoint, self._tensors())
        self._last_save = time.monotonic()

    def _tensors(self) -> dict[str, Tensor]:
        parts: dict[str, dict[str, Tensor]] = {
            "student": state(self.student),
            "averaged": state(self.averaged) if self.averaged is not None else {},
            "objective": state(self.objective),
            "best": self.best,
            "sums": self.sums,
            "random": _random_states(),
        }
        for index, values in self.optimizer.state_dict()["state"].items():
            parts[f"optimizer.{index}"] = {key: value for key, value in values.items() if isinstance(value, Tensor)}
        return {f"{part}/{key}": value for part, values in parts.items() for key, value in values.items()}

    def _resume(self) -> None:
        found = load_checkpoint(self.folder)
        if found is None:
            return
        checkpoint, tensors = found
        parts: dict[str, dict[str, Tensor]] = {}
        for name, value in tensors.items():
            part, _, key = name.partition("/")
            parts.setdefault(part, {})[key] = value
        loaded = {"student": self.student, "averaged": self.averaged, "objective": self.objective}
        for part, module in loaded.items():
            if module is not None:
                load_tensors(module, parts.get(part, {}), str(self.folder / checkpoint.file), WAY_OUT)
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
        _set_random_states(parts.get("random", {}))
        self.step, self.history, self.best_epoch = checkpoint.step, checkpoint.history, checkpoint.best_epoch
        self.seconds = checkpoint.seconds
        if not self.finished:
            log.info("going on from step %d of %d", self.step, self.total_steps)

    def _precision(self) -> AbstractContextManager[object]:
        if self.settings.precision == "fp32":
            return nullcontext()
        return torch.autocast(self.accelerator.device.type, torch.bfloat16)


def _random_states() -> dict[str, Tensor]:
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states |= {f"cuda{index}": value for index, value in enumerate(torch.cuda.get_rng_state_all())}
    return states


def _set_random_states(states: dict[str, Tensor]) -> None:
    if "cpu" in states:
        torch.set_rng_state(states["cpu"])
    cuda = [states[key] for key in sorted(states) if key.startswith("cuda")]
    if cuda and torch.cuda.is_available() and len(cuda) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(cuda)
