"""Projected gradient ascent, the loop under the table attacks and under every training attack."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from crdnd.attacks._base import Attack, Classifier, PerSampleLoss, Round, input_gradient
from crdnd.random import Stream
from crdnd.threat import Start, ThreatModel


def pgd(
    loss: PerSampleLoss,
    x: Tensor,
    threat: ThreatModel,
    *,
    steps: int,
    step: float,
    start: Start = "uniform",
    restarts: int = 1,
    stream: Stream | None = None,
) -> Tensor:
    """The last iterate of x' <- Proj(x' + step * eps * steepest(grad loss(x'))), Madry et al. 2018 (arXiv 1706.06083).

    Args:
        loss: what to maximise. Which model, labels and batch-norm mode it holds is the caller's business; this
            function touches no model, leaves no gradient behind and draws on no global random state.
        x: natural inputs (B, ...) in [0, 1].
        threat: the set the result stays in.
        steps: how many ascent steps; 0 returns the start.
        step: length of a step as a fraction of eps.
        start: "none" at x, "uniform" in the ball, "gaussian" at x + 0.001 N(0, 1), "surface" at distance eps.
        restarts: how often to begin again; each sample keeps the last iterate with the largest loss.
        stream: draws for the start; without one, samples are numbered by their place in the batch.

    Returns:
        Adversarial inputs (B, ...), detached, legal under `threat`.

    >>> w, x0 = torch.tensor([1.0, -2.0]), torch.tensor([[0.5, 0.5]])
    >>> pgd(lambda z: z @ w, x0, ThreatModel(norm="linf", eps=0.1), steps=3, step=1.0, start="none")
    tensor([[0.6000, 0.4000]])
    """
    x = x.detach()
    stream = stream or Stream.of("pgd", ids=torch.arange(len(x), device=x.device))
    if restarts > 1:
        return _best_of_restarts(loss, x, threat, steps, step, start, restarts, stream)
    x_adv = threat.start(x, start, stream)
    for _ in range(steps):
        x_adv.requires_grad_(True)
        with torch.enable_grad():
            # A sum, not a mean: each sample's gradient is free of the batch size. `grad` with respect to the input
            # alone also spares the model the cost, and the litter, of parameter gradients.
            gradient = input_gradient(loss(x_adv).sum(), x_adv)
        x_adv = threat.ascend(x_adv.detach(), gradient, x, step)
    return x_adv


def _best_of_restarts(
    loss: PerSampleLoss,
    x: Tensor,
    threat: ThreatModel,
    steps: int,
    step: float,
    start: Start,
    restarts: int,
    stream: Stream,
) -> Tensor:
    best, highest = x, x.new_full((len(x),), -torch.inf)
    for restart in range(restarts):
        found = pgd(loss, x, threat, steps=steps, step=step, start=start, stream=stream.child("restart", restart))
        with torch.no_grad():
            value = loss(found)
        better = value > highest
        best = torch.where(better.reshape(-1, *(1,) * (x.ndim - 1)), found, best)
        highest = torch.where(better, value, highest)
    return best


@dataclass(frozen=True, kw_only=True)
class TableAttack(Attack):
    """A named attack of the field's tables: PGD, judged at its last iterate on all images."""

    loss: Callable[[Tensor, Tensor], Tensor]
    """(logits (B, K), labels (B,)) -> (B,)."""
    steps: int
    step: float
    """As a fraction of eps."""
    start: Start
    restarts: int = 1

    judged_on_all: ClassVar[bool] = True

    def rounds(self, num_classes: int) -> list[Round]:
        """One for each restart."""
        return [Round(self.name, restart, self._search) for restart in range(self.restarts)]

    def __call__(self, model: Classifier, x: Tensor, y: Tensor, threat: ThreatModel, stream: Stream) -> Tensor:
        """Adversarial inputs; with one restart nothing but `pgd`, without a look at the natural images."""
        if self.restarts == 1:
            return self._search(model, x, y, threat, stream.child(self.name, 0))
        return super().__call__(model, x, y, threat, stream)

    def _search(self, model: Classifier, x: Tensor, y: Tensor, threat: ThreatModel, stream: Stream) -> Tensor:
        return pgd(
            lambda z: self.loss(model(z), y),
            x,
            threat,
            steps=self.steps,
            step=self.step,
            start=self.start,
            stream=stream,
        )
