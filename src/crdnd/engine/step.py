"""One training step, top to bottom: batch -> attack -> views -> objective -> update."""

from collections.abc import Callable, Collection, Generator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from crdnd.attacks import pgd
from crdnd.errors import InputError
from crdnd.models import evaluating
from crdnd.objectives import INNER_LOSSES, LossTerms, Objective, TrainingAttack, Views, attack_needs
from crdnd.random import Stream
from crdnd.threat import ThreatModel


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
    """

    student: nn.Module
    teacher: nn.Module | None
    objective: Objective
    attack: TrainingAttack | None
    threat: ThreatModel
    precision: Callable[[], AbstractContextManager[object]] = nullcontext

    def __call__(
        self, x: Tensor, y: Tensor, stream: Stream, progress: float, target: Tensor | None = None
    ) -> tuple[LossTerms, Views]:
        """The loss terms of a batch, ready for `backward`, and the views they came from.

        Args:
            x: natural images (B, C, H, W) in [0, 1].
            y: labels (B,).
            stream: draws for the attack's start.
            progress: how much of the run is done, in [0, 1).
            target: soft labels (B, K) where the images are mixed; by default y.
        """
        needs = self.objective.needs
        views = self._look("t", "nat", x, needs | attack_needs(self.attack))
        if self.attack is not None:
            x_adv = self._attacked(self.attack, x, y, target, views, stream)
            views |= self._look("t", "adv", x_adv, needs)
        views |= self._look("s", "nat", x, needs)
        if self.attack is not None:
            views |= self._look("s", "adv", x_adv, needs)  # pyright: ignore[reportPossiblyUnboundVariable]
        v = Views(y, progress, views=views, target=target)
        return self.objective(v), v

    def _attacked(
        self,
        attack: TrainingAttack,
        x: Tensor,
        y: Tensor,
        target: Tensor | None,
        teacher_views: dict[str, Tensor],
        stream: Stream,
    ) -> Tensor:
        """x' (B, C, H, W), found with the student's batch norm in the attack's mode."""
        inner = INNER_LOSSES[attack.loss]
        with evaluating(self.student) if attack.mode == "eval" else nullcontext():
            with torch.no_grad():
                at_x = teacher_views | self._look("s", "nat", x, inner.needs)

            def ascended(z: Tensor) -> Tensor:
                return inner.loss(Views(y, views=at_x | self._look("s", "adv", z, inner.needs), target=target))

            return pgd(
                ascended,
                x,
                self.threat,
                steps=attack.steps,
                step=attack.step,
                start=attack.start,
                stream=stream,
            )

    def _look(self, who: str, kind: str, x: Tensor, wanted: Collection[str]) -> dict[str, Tensor]:
        """The views of one network on one input, if any is wanted; the teacher's carry no gradient."""
        logits, features = f"{who}_{kind}", f"{who}_{kind}_features"
        if logits not in wanted and features not in wanted:
            return {}
        network = self.student if who == "s" else self.teacher
        assert network is not None, "make_objective refuses a method that looks at a missing teacher"  # noqa: S101
        # One precision context for each pass: autocast keeps its casts of the weights until the context ends, and those
        # made without gradients would silently serve a pass that needs them.
        with torch.set_grad_enabled(who == "s" and torch.is_grad_enabled()), self.precision():
            if features not in wanted:
                return {logits: _at_least_float32(network(x))}
            with last_linear_input(network) as captured:
                output = network(x)
            return {logits: _at_least_float32(output), features: _at_least_float32(captured[-1])}


def _at_least_float32(z: Tensor) -> Tensor:
    return z.float() if z.dtype in (torch.float16, torch.bfloat16) else z


@contextmanager
def last_linear_input(network: nn.Module) -> Generator[list[Tensor]]:
    """Collect what goes into the network's last linear layer, (B, D) for each pass in the body."""
    linears = [module for module in network.modules() if isinstance(module, nn.Linear)]
    if not linears:
        raise InputError(f"{type(network).__name__} has no linear layer to read features from.")
    captured: list[Tensor] = []
    handle = linears[-1].register_forward_pre_hook(lambda _, inputs: captured.append(inputs[0]))
    try:
        yield captured
    finally:
        handle.remove()
