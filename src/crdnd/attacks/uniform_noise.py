"""Uniform noise: draws from the ball without a look at the model. Not an attack but the control of every attack.

A sample stands if it is right under all draws. Where noise fools a model as often as a gradient attack does, the
gradients are of no use (docs/checks.md).
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from crdnd.attacks._base import Attack, Classifier, Round
from crdnd.random import Stream
from crdnd.threat import ThreatModel


@dataclass(frozen=True, kw_only=True)
class UniformNoise(Attack):
    """Draws that are uniform in the ball."""

    draws: int = 100

    needs_gradients: ClassVar[bool] = False

    def rounds(self, num_classes: int) -> list[Round]:
        """One."""
        return [Round(self.name, 0, self._search)]

    def _search(self, model: Classifier, x: Tensor, y: Tensor, threat: ThreatModel, stream: Stream) -> Tensor:
        result, rows = x.clone(), torch.arange(len(x), device=x.device)
        for draw in range(self.draws):
            noisy = threat.start(x[rows], "uniform", stream.take(rows).child(draw))
            with torch.no_grad():
                fooled = model(noisy).argmax(1) != y[rows]
            result[rows[fooled]] = noisy[fooled]
            rows = rows[~fooled]
            if not len(rows):
                break
        return result


ATTACK = UniformNoise(
    summary="100 draws that are uniform in the ball; the control, no attack",
    paper="as the uniform start of Madry et al. 2018, arXiv 1706.06083",
)
