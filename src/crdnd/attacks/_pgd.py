"""Projected gradient ascent, the loop under the table attacks and under every training attack."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from crdnd.random import Stream
from crdnd.threat import Start, ThreatModel

Classifier = Callable[[Tensor], Tensor]
"""Images (B, C, H, W) in [0, 1] -> logits (B, K)."""

PerSampleLoss = Callable[[Tensor], Tensor]
"""Inputs (B, ...) -> one loss per sample (B,), to be maximised."""


def pgd(
    loss: PerSampleLoss,
    x: Tensor,
    threat: ThreatModel,
    *,
    steps: int,
    step: float,
    start: Start = "uniform",
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
        start: "none" at x, "uniform" in the ball, "gaussian" at x + 0.001 N(0, 1).
        stream: draws for the start; without one, samples are numbered by their place in the batch.

    Returns:
        Adversarial inputs (B, ...), detached, legal under `threat`.

    >>> w, x0 = torch.tensor([1.0, -2.0]), torch.tensor([[0.5, 0.5]])
    >>> pgd(lambda z: z @ w, x0, ThreatModel(norm="linf", eps=0.1), steps=3, step=1.0, start="none")
    tensor([[0.6000, 0.4000]])
    """
    x = x.detach()
    stream = stream or Stream.of("pgd", ids=torch.arange(len(x), device=x.device))
    x_adv = threat.start(x, start, stream)
    for _ in range(steps):
        x_adv.requires_grad_(True)
        with torch.enable_grad():
            # A sum, not a mean: each sample's gradient is free of the batch size. `grad` with respect to the input
            # alone also spares the model the cost, and the litter, of parameter gradients.
            (gradient,) = torch.autograd.grad(loss(x_adv).sum(), x_adv)
        x_adv = threat.ascend(x_adv.detach(), gradient, x, step)
    return x_adv


@dataclass(frozen=True, slots=True, kw_only=True)
class TableAttack:
    """A named attack of the field's tables: PGD with everything fixed, judged at its last iterate."""

    summary: str
    paper: str
    loss: Callable[[Tensor, Tensor], Tensor]
    """(logits (B, K), labels (B,)) -> (B,)."""
    steps: int
    step: float
    start: Start

    def __call__(self, model: Classifier, x: Tensor, y: Tensor, threat: ThreatModel, stream: Stream) -> Tensor:
        """Adversarial inputs for `model`, (B, ...); see `pgd`."""
        return pgd(
            lambda z: self.loss(model(z), y),
            x,
            threat,
            steps=self.steps,
            step=self.step,
            start=self.start,
            stream=stream,
        )

    def settings(self) -> dict[str, str | int | float]:
        """What the attack is, for the protocol of a result."""
        return {key: getattr(self, key) for key in ("steps", "step", "start")} | {"loss": self.loss.__name__}
