"""One training step, top to bottom: batch -> attack -> views -> objective -> update."""

from collections.abc import Callable, Collection
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from crdnd.attacks import Folding, pgd
from crdnd.engine.generator import random_states, set_random_states
from crdnd.engine.weights import keeping_statistics
from crdnd.errors import InputError
from crdnd.losses import gradient_match, repaired
from crdnd.models import evaluating
from crdnd.objectives import INNER_LOSSES, LossTerms, Objective, TrainingAttack, View, Views, attack_needs
from crdnd.random import Stream
from crdnd.threat import ThreatModel

IGDM_VIEWS: frozenset[View] = frozenset({"s_adv", "s_mirror", "t_adv", "t_mirror"})


@dataclass(frozen=True)
class Batch:
    """Images, labels, what the attack made of them, and what the teachers see in both."""

    x: Tensor
    y: Tensor
    target: Tensor
    x_adv: Tensor | None
    teachers: dict[str, Tensor]
    draws: Stream
    progress: float

    def parts(self, size: int | None) -> list["Batch"]:
        """The batch in micro-batches of at most so many images, as even as can be; whole where None."""
        if size is None or size >= len(self.x):
            return [self]
        places = torch.arange(len(self.x), device=self.x.device)
        return [self._take(rows) for rows in places.tensor_split(-(-len(self.x) // size))]

    def _take(self, rows: Tensor) -> "Batch":
        return Batch(
            self.x[rows],
            self.y[rows],
            self.target[rows],
            None if self.x_adv is None else self.x_adv[rows],
            {name: view[rows] for name, view in self.teachers.items()},
            self.draws.take(rows),
            self.progress,
        )


@dataclass
class Passes:
    """How many images went through each network, counted on the way; recomputed by nobody.

    What a teacher said before counts as if it were asked again: passes are what a method costs, wherever a run was
    stopped and whatever it keeps; its seconds show what that saved.
    """

    student: int = 0
    teacher: int = 0


@dataclass(frozen=True)
class Step:
    """What stays the same from step to step.

    Args:
        student: the network that learns, in train mode.
        teacher: the frozen network, in eval mode; None where the objective needs none.
        objective: the method.
        attack: its inner maximisation; None trains on natural images alone.
        threat: the set the attack searches.
        precision: a context in which the networks run, such as an autocast.
        second_teacher: another frozen network, for methods that look at two.
        repair: whether a teacher that is wrong about a sample has its two logits in question swapped.
        igdm: weight of the matching of input gradients, at the end of the run; None leaves it out.
        folding: how the student is computed faster, while it is attacked and while it learns.
        call: how a network is called, such as through a compiler.
    """

    student: nn.Module
    teacher: nn.Module | None
    objective: Objective
    attack: TrainingAttack | None
    threat: ThreatModel
    precision: Callable[[], AbstractContextManager[object]] = nullcontext
    second_teacher: nn.Module | None = None
    repair: bool = False
    igdm: float | None = None
    folding: Folding | None = None
    call: Callable[[nn.Module, Tensor], Tensor] = nn.Module.__call__
    passes: Passes = field(default_factory=Passes)

    def __call__(
        self, x: Tensor, y: Tensor, stream: Stream, progress: float, target: Tensor | None = None
    ) -> tuple[LossTerms, Views]:
        """The loss terms of a batch, ready for `backward`, and the views they came from.

        Args:
            x: natural images (B, C, H, W) in [0, 1].
            y: labels (B,).
            stream: draws for the attack's start, and for methods that draw.
            progress: how much of the run is done, in [0, 1).
            target: mixed labels (B, K), where augmentation mixes.
        """
        return self.terms(self.prepare(x, y, stream, progress, target))

    @property
    def needs(self) -> frozenset[View]:
        """The views that the method and its parts look at."""
        return self.objective.needs | (IGDM_VIEWS if self.igdm is not None else frozenset())

    def prepare(
        self,
        x: Tensor,
        y: Tensor,
        stream: Stream,
        progress: float,
        target: Tensor | None = None,
        known: dict[str, Tensor] | None = None,
        micro_batch: int | None = None,
    ) -> Batch:
        """Attack the student, and ask the teachers about x and x': all that stays when the student's weights move.

        `known` is what the teachers say of x, where they have been asked before. With `micro_batch` no network sees
        more images at once than that.
        """
        given = Batch(x, y, y if target is None else target, None, known or {}, stream, progress)
        parts = [self._prepared(part) for part in given.parts(micro_batch)]
        if len(parts) == 1:
            return parts[0]
        attacked = [part.x_adv for part in parts if part.x_adv is not None]
        return replace(
            given,
            x_adv=torch.cat(attacked) if attacked else None,
            teachers=_joined([part.teachers for part in parts]),
        )

    def backward(self, batch: Batch, micro_batch: int | None = None) -> tuple[LossTerms, Views]:
        """Add the gradients of the batch's mean loss to those of the student and of the method.

        With `micro_batch` no network sees more images at once than that. Where the method relates samples, the loss is
        that of the whole batch all the same: the student's predictions are made part by part without a graph, the loss
        is taken back to them, and then each part is looked at again and taken back to the weights. Either way the
        gradients are those of the whole batch up to rounding, but for batch norms in train mode, which normalise by
        their part and move their statistics once for each.

        Returns:
            The terms and the views of the whole batch.
        """
        parts = batch.parts(micro_batch)
        if len(parts) == 1:
            terms, views = self.terms(batch)
            terms.total.backward()
            return terms, views
        if self.objective.relates_samples:
            return self._backward_through_views(batch, parts)
        found: list[dict[str, Tensor]] = []
        seen: list[dict[str, Tensor]] = []
        for part in parts:
            student = self._student(part)
            terms = self._scored(self._views(part, student))
            (terms.per_sample.sum() / len(batch.x)).backward()
            found.append({name: term.detach() for name, term in terms.terms.items()})
            seen.append({name: view.detach() for name, view in student.items()})
        return LossTerms(**_joined(found)), self._views(batch, _joined(seen))

    def _backward_through_views(self, batch: Batch, parts: list[Batch]) -> tuple[LossTerms, Views]:
        states: list[dict[str, Tensor]] = []
        seen: list[dict[str, Tensor]] = []
        for part in parts:
            states.append(random_states(batch.x.device))
            with torch.no_grad():
                seen.append(self._student(part))
        leaves = {name: view.requires_grad_(True) for name, view in _joined(seen).items()}
        views = self._views(batch, leaves)
        terms = self._scored(views)
        terms.total.backward()
        slopes = {
            name: leaf.grad.split([len(part.x) for part in parts])
            for name, leaf in leaves.items()
            if leaf.grad is not None
        }
        with keeping_statistics(self.student):
            for index, part in enumerate(parts):
                set_random_states(states[index], batch.x.device)  # the same units are dropped again
                again = self._student(part)
                torch.autograd.backward([again[name] for name in slopes], [slopes[name][index] for name in slopes])
        return terms, views

    def _prepared(self, given: Batch) -> Batch:
        x, y, target, stream, progress = given.x, given.y, given.target, given.draws, given.progress
        wanted = self.needs | attack_needs(self.attack)
        teachers = dict(given.teachers) or self._of_teachers("nat", x, y, wanted)
        if given.teachers:
            self.passes.teacher += len(x) * len({name.partition("_")[0] for name in given.teachers})
        x_adv = None
        if self.attack is not None:
            x_adv = self._attacked(self.attack, Batch(x, y, target, None, teachers, stream, progress))
            teachers |= self._of_teachers("adv", x_adv, y, self.needs)
            teachers |= self._of_teachers("mirror", 2 * x - x_adv, y, self.needs)
            if "t_linear" in self.needs:
                teachers["t_linear"] = _linear(teachers, x, x_adv, y)
        return Batch(x, y, target, x_adv, teachers, stream, progress)

    def terms(self, batch: Batch) -> tuple[LossTerms, Views]:
        """The student's views of a batch, and the terms that follow."""
        v = self._views(batch, self._student(batch))
        return self._scored(v), v

    def _student(self, batch: Batch) -> dict[str, Tensor]:
        with self.folding.training() if self.folding is not None else nullcontext():
            views = self._of_student("nat", batch.x, self.needs)
            if batch.x_adv is not None:
                views |= self._of_student("adv", batch.x_adv, self.needs)
                views |= self._of_student("mirror", 2 * batch.x - batch.x_adv, self.needs)
        return views

    def _views(self, batch: Batch, student: dict[str, Tensor]) -> Views:
        return Views(batch.y, batch.progress, views=batch.teachers | student, target=batch.target, draws=batch.draws)

    def _scored(self, v: Views) -> LossTerms:
        terms = self.objective(v)
        if self.igdm is not None:
            match = gradient_match(v["t_adv"], v["t_mirror"], v["s_adv"], v["s_mirror"])
            terms = LossTerms(**terms.terms, igdm=self.igdm * self.objective.settings.loss_scale * v.progress * match)
        return terms

    def _attacked(self, attack: TrainingAttack, batch: Batch) -> Tensor:
        """x' (B, C, H, W), found with the student's batch norm in the attack's mode."""
        inner = INNER_LOSSES[attack.loss]
        x, y = batch.x, batch.y
        as_eval = attack.mode == "eval"
        with (
            evaluating(self.student) if as_eval else nullcontext(),
            self.folding.applied(norms=as_eval) if self.folding is not None else nullcontext(),
        ):
            with torch.no_grad():
                at_x = batch.teachers | self._of_student("nat", x, inner.needs)

            def loss(z: Tensor) -> Tensor:
                views = at_x | self._of_student("adv", z, inner.needs)
                if "t_adv" in inner.needs:
                    views |= self._of_teachers("adv", z, y, {"t_adv"})
                if "t_linear" in inner.needs:
                    views["t_linear"] = _linear(at_x, x, z, y)
                return inner.loss(Views(y, views=views, target=batch.target))

            return pgd(
                loss, x, self._threat(attack, batch.progress),
                steps=attack.steps, step=attack.step, start=attack.start, restarts=attack.restarts, stream=batch.draws,
            )  # fmt: skip

    def _threat(self, attack: TrainingAttack, progress: float) -> ThreatModel:
        """The threat model with the eps of this moment."""
        if progress >= attack.eps_warmup:
            return self.threat
        return self.threat.model_copy(update={"eps": self.threat.eps * progress / attack.eps_warmup})

    def _of_student(self, kind: str, x: Tensor, wanted: Collection[str]) -> dict[str, Tensor]:
        found = self._look(self.student, f"s_{kind}", x, wanted)
        self.passes.student += len(x) if found else 0
        return found

    def _of_teachers(self, kind: str, x: Tensor, y: Tensor, wanted: Collection[str]) -> dict[str, Tensor]:
        """The teachers' views of one input, with gradients to it where it asks for them, as in an attack."""
        found: dict[str, Tensor] = {}
        for who, network in (("t", self.teacher), ("t2", self.second_teacher)):
            name, slope_wanted = f"{who}_{kind}", who == "t" and kind == "nat" and "t_linear" in wanted
            asked = {*wanted, name} if slope_wanted else wanted
            with torch.set_grad_enabled(slope_wanted or (x.requires_grad and torch.is_grad_enabled())):
                z = x.detach().requires_grad_(True) if slope_wanted else x
                views = self._look(network, name, z, asked)
                self.passes.teacher += len(x) if views else 0
                if self.repair and name in views:
                    views[name] = repaired(views[name], y)
                if slope_wanted:
                    of_label = views[name].gather(1, y[:, None]).sum()
                    (views["t_slope"],) = torch.autograd.grad(of_label, z)
                    views = {key: value.detach() for key, value in views.items()}
            found |= views
        return found

    def _look(self, network: nn.Module | None, logits: str, x: Tensor, wanted: Collection[str]) -> dict[str, Tensor]:
        """The views of one network on one input, if any is wanted."""
        features = f"{logits}_features"
        if logits not in wanted and features not in wanted:
            return {}
        assert network is not None, "make_objective refuses a method that looks at a missing teacher"  # noqa: S101
        # One precision context for each pass: autocast keeps its casts of the weights until the context ends, and those
        # made without gradients would silently serve a pass that needs them.
        with self.precision():
            if features not in wanted:
                return {logits: _at_least_float32(self.call(network, x))}
            found = logits_and_features(network, x)
        return {name: _at_least_float32(value) for name, value in zip((logits, features), found, strict=True)}


def _joined(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def _linear(teachers: dict[str, Tensor], x: Tensor, x_adv: Tensor, y: Tensor) -> Tensor:
    """T(x) with the label's logit moved by its first-order change from x to x', (B, K)."""
    change = (teachers["t_slope"] * (x_adv - x)).flatten(1).sum(1, keepdim=True)
    return teachers["t_nat"].scatter_add(1, y[:, None], change.to(teachers["t_nat"]))


def _at_least_float32(z: Tensor) -> Tensor:
    return z.float() if z.dtype in (torch.float16, torch.bfloat16) else z


def logits_and_features(network: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """Logits (B, K) of images x, and their features (B, D): what goes into the last linear layer that the pass calls.

    Raises:
        InputError: it calls none on a row of numbers for each image.
    """
    inputs: list[Tensor] = []

    def note(_: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        inputs[:] = arguments[:1]

    hooks = [one.register_forward_pre_hook(note) for one in network.modules() if isinstance(one, nn.Linear)]
    try:
        logits = network(x)
    finally:
        for hook in hooks:
            hook.remove()
    if not inputs or inputs[0].ndim != 2 or len(inputs[0]) != len(x):
        raise InputError(f"{type(network).__name__} has no linear layer at its end to read features from.")
    return logits, inputs[0]


def feature_size(network: nn.Module, x: Tensor) -> int:
    """How wide the features of a network are, seen on images x; raises as `logits_and_features` does."""
    with evaluating(network), torch.no_grad():
        return logits_and_features(network, x)[1].shape[1]
