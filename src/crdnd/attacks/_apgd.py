"""AutoPGD, Croce and Hein 2020 (arXiv 2003.01690): ascent with momentum whose step halves where it stops paying.

Every sample has its own step and its own state, and leaves as soon as it is fooled: that changes no other sample and no
verdict, because a fooled sample stays fooled.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from crdnd.attacks._base import Attack, Classifier, Round, input_gradient
from crdnd.attacks._targets import target_of_rank
from crdnd.losses import dlr_targeted
from crdnd.random import Stream
from crdnd.threat import ThreatModel

MOMENTUM = 0.75
"""Weight of the new step against the one before: alpha of the paper."""
PAYING = 0.75
"""Share of iterations that must have raised the loss between two looks: rho of the paper."""

LossToTarget = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(logits (B, K), labels (B,), whatever else a sample has (B,)) -> (B,)."""


def looks(iterations: int) -> list[int]:
    """After which iterations the step is looked at: the first gap is 22%, each next one 3% less, none below 6%.

    >>> looks(100)
    [22, 41, 57, 70, 80, 87, 93, 99]
    """
    gap, least, less = (max(int(share * iterations), 1) for share in (0.22, 0.06, 0.03))
    found, at = list[int](), gap
    while at <= iterations:
        found.append(at)
        gap = max(gap - less, least)
        at += gap
    return found


@dataclass
class _State:
    """One row for each sample that still stands."""

    index: Tensor
    x: Tensor
    y: Tensor
    target: Tensor
    x_adv: Tensor
    x_previous: Tensor
    gradient: Tensor
    loss: Tensor
    best: Tensor
    best_gradient: Tensor
    best_loss: Tensor
    best_loss_at_look: Tensor
    step: Tensor
    """In units of eps, (B, 1, ...)."""
    rises: Tensor
    """Iterations since the last look that raised the loss."""
    halved: Tensor

    def keep(self, rows: Tensor) -> None:
        """Let all others go."""
        for field in fields(self):
            setattr(self, field.name, getattr(self, field.name)[rows])


def auto_pgd(
    model: Classifier,
    loss: LossToTarget,
    x: Tensor,
    y: Tensor,
    target: Tensor,
    threat: ThreatModel,
    stream: Stream,
    *,
    iterations: int,
    eot: int = 1,
) -> Tensor:
    """The first adversarial input that AutoPGD meets for each sample, or its point of highest loss.

    Args:
        model: images -> logits.
        loss: to be maximised, one value a sample.
        x: natural images (B, C, H, W).
        y: labels (B,).
        target: handed to the loss (B,).
        threat: the set to stay in.
        stream: draws for the start, in a random direction at distance eps.
        iterations: ascent steps; the model is called `eot * (iterations + 1)` times on a sample that stands.
        eot: gradients averaged in each step, for models that are random.
    """
    result = x.clone()
    x_adv = threat.start(x, "surface", stream)
    value, gradient, fooled = _look(model, loss, x_adv, y, target, eot)
    result[fooled] = x_adv[fooled]
    state = _State(
        index=torch.arange(len(x), device=x.device), x=x, y=y, target=target,
        x_adv=x_adv, x_previous=x_adv, gradient=gradient, loss=value,
        best=x_adv.clone(), best_gradient=gradient.clone(), best_loss=value, best_loss_at_look=value,
        step=x.new_full((len(x), *(1,) * (x.ndim - 1)), 2.0),
        rises=torch.zeros_like(y), halved=torch.ones_like(fooled),
    )  # fmt: skip
    state.keep(~fooled)
    last_look, times = 0, looks(iterations)
    for iteration in range(1, iterations + 1):
        if not len(state.index):
            return result
        fooled = _advance(state, model, loss, threat, eot, first=iteration == 1)
        result[state.index[fooled]] = state.x_adv[fooled]
        if fooled.any():
            state.keep(~fooled)
        if iteration in times:
            _halve_where_it_stopped_paying(state, iteration - last_look)
            last_look = iteration
    result[state.index] = state.best
    return result


def _advance(
    state: _State, model: Classifier, loss: LossToTarget, threat: ThreatModel, eot: int, *, first: bool
) -> Tensor:
    """One iteration; returns which samples are fooled."""
    ascended = threat.ascend(state.x_adv, state.gradient, state.x, state.step)
    if first:
        moved = ascended
    else:
        momentum = (1 - MOMENTUM) * (state.x_adv - state.x_previous)
        moved = threat.project(state.x_adv + MOMENTUM * (ascended - state.x_adv) + momentum, state.x)
    value, gradient, fooled = _look(model, loss, moved, state.y, state.target, eot)
    state.x_previous, state.x_adv = state.x_adv, moved
    state.rises = state.rises + (value > state.loss)
    state.loss, state.gradient = value, gradient
    better = value > state.best_loss
    rows = better.nonzero()[:, 0]
    state.best.index_copy_(0, rows, moved[rows])
    state.best_gradient.index_copy_(0, rows, gradient[rows])
    state.best_loss = torch.where(better, value, state.best_loss)
    return fooled


def _halve_where_it_stopped_paying(state: _State, since_last_look: int) -> None:
    """Where few iterations raised the loss, or none since the last look: half the step, from the best point on."""
    few = state.rises <= PAYING * since_last_look
    stuck = ~state.halved & (state.best_loss_at_look >= state.best_loss)
    state.halved = few | stuck
    wide = state.halved.reshape(state.step.shape)
    state.step = torch.where(wide, state.step / 2, state.step)
    state.x_adv = torch.where(wide, state.best, state.x_adv)
    state.gradient = torch.where(wide, state.best_gradient, state.gradient)
    state.best_loss_at_look = state.best_loss
    state.rises = torch.zeros_like(state.rises)


def _look(
    model: Classifier, loss: LossToTarget, x_adv: Tensor, y: Tensor, target: Tensor, eot: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, gradient averaged over `eot` passes, and which samples are fooled; loss and fooled are the last pass's."""
    x_adv = x_adv.detach().requires_grad_(True)
    total = torch.zeros_like(x_adv)
    for _ in range(eot):
        with torch.enable_grad():
            logits = model(x_adv)
            value = loss(logits, y, target)
            gradient = input_gradient(value.sum(), x_adv)
        total += gradient
    return value.detach(), total / eot, logits.detach().argmax(1) != y  # pyright: ignore[reportPossiblyUnboundVariable]


@dataclass(frozen=True, kw_only=True)
class AutoPGD(Attack):
    """AutoPGD on a loss of logits and labels."""

    loss: Callable[[Tensor, Tensor], Tensor]
    iterations: int = 100
    restarts: int = 1
    eot: int = 1

    def rounds(self, num_classes: int) -> list[Round]:
        """One for each restart."""
        return [Round(self.name, restart, self._search) for restart in range(self.restarts)]

    def notes(self, num_classes: int) -> list[str]:
        """The loss that stands in where there are too few classes."""
        if self.loss.__name__ == "dlr" and num_classes < 3:
            return [f"{self.name}: the DLR loss needs 3 classes; with {num_classes} the margin was used."]
        return []

    def _search(self, model: Classifier, x: Tensor, y: Tensor, threat: ThreatModel, stream: Stream) -> Tensor:
        return auto_pgd(
            model,
            lambda logits, labels, _: self.loss(logits, labels),
            x, y, y, threat, stream, iterations=self.iterations, eot=self.eot,
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class TargetedAutoPGD(Attack):
    """AutoPGD on the targeted difference of logits ratio, one target class after the other."""

    iterations: int = 100
    targets: int = 9
    eot: int = 1

    def rounds(self, num_classes: int) -> list[Round]:
        """One for each target, at most as many as there are wrong classes."""
        ranks = range(min(self.targets, num_classes - 1))
        return [Round(self.name, rank, functools.partial(self._search, rank)) for rank in ranks]

    def notes(self, num_classes: int) -> list[str]:
        """The loss that stands in where there are too few classes."""
        if num_classes >= 4:
            return []
        instead = "z_(1) - z_(3) was its denominator" if num_classes == 3 else "z_t - z_y was used"
        return [f"{self.name}: the targeted DLR loss needs 4 classes; with {num_classes} {instead}."]

    def _search(
        self, rank: int, model: Classifier, x: Tensor, y: Tensor, threat: ThreatModel, stream: Stream
    ) -> Tensor:
        target = target_of_rank(model, x, y, rank)
        return auto_pgd(
            model, dlr_targeted, x, y, target, threat, stream, iterations=self.iterations, eot=self.eot
        )  # fmt: skip
