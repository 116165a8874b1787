"""C&W L2, Carlini and Wagner 2017 (arXiv 1608.04644): the smallest l2 perturbation that fools the model.

    min_w ||x' - x||_2^2 + c max(z_y(x') - max_{j != y} z_j(x'), 0),   x' = low + (high - low) (tanh(w) + 1) / 2

by Adam, with a binary search over c for every sample. Differs from the paper: 200 iterations and 9 steps of the search
instead of 10,000 and 20; a sample leaves once its perturbation lies within eps, because only the verdict is asked for.
Under l2, low and high are 0 and 1. Under linf they are the faces of the ball in the box, so that the same search, with
the same objective, is confined to what that adversary may do.
"""

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from crdnd.attacks._base import Attack, Classifier, Round, input_gradient
from crdnd.losses import margin
from crdnd.random import Stream
from crdnd.threat import ThreatModel

_INSIDE = 1 - 1e-6
"""How near tanh comes to a face of the box at the start: on the face itself its gradient is 0."""


@dataclass
class _State:
    """One row for each sample that still stands."""

    index: Tensor
    x: Tensor
    y: Tensor
    low: Tensor
    high: Tensor
    start: Tensor
    """w of the natural image."""
    c: Tensor
    c_low: Tensor
    c_high: Tensor

    def keep(self, rows: Tensor) -> None:
        """Let all others go."""
        for field in fields(self):
            setattr(self, field.name, getattr(self, field.name)[rows])


@dataclass(frozen=True, kw_only=True)
class CarliniWagnerL2(Attack):
    """The attack with its constants."""

    search_steps: int = 9
    iterations: int = 200
    learning_rate: float = 0.01
    first_c: float = 1e-2

    def rounds(self, num_classes: int) -> list[Round]:
        """One: the search needs what its own steps found."""
        return [Round(self.name, 0, self._search)]

    def _search(
        self,
        model: Classifier,
        x: Tensor,
        y: Tensor,
        threat: ThreatModel,
        stream: Stream,
    ) -> Tensor:
        result = x.clone()
        low, high = torch.zeros_like(x), torch.ones_like(x)
        if threat.norm == "linf":
            low, high = (x - threat.eps).clamp(min=0), (x + threat.eps).clamp(max=1)
        width = (high - low).clamp(min=torch.finfo(x.dtype).tiny)
        constant = x.new_full((len(x),), self.first_c)
        state = _State(
            index=torch.arange(len(x), device=x.device), x=x, y=y, low=low, high=high,
            start=torch.atanh((2 * (x - low) / width - 1) * _INSIDE),
            c=constant, c_low=torch.zeros_like(constant), c_high=torch.full_like(constant, torch.inf),
        )  # fmt: skip
        for _ in range(self.search_steps):
            fooled = self._descend(state, model, threat, result)
            if not len(state.index):
                break
            state.c_high = torch.where(fooled, torch.minimum(state.c_high, state.c), state.c_high)
            state.c_low = torch.where(fooled, state.c_low, torch.maximum(state.c_low, state.c))
            middle = (state.c_low + state.c_high) / 2
            state.c = torch.where(state.c_high.isinf(), 10 * state.c, middle)
        return result

    def _descend(self, state: _State, model: Classifier, threat: ThreatModel, result: Tensor) -> Tensor:
        """Minimise for the present c; returns who was fooled at any distance, of those that go on, bool (B,)."""
        w = state.start
        mean, square = torch.zeros_like(w), torch.zeros_like(w)
        fooled_once = torch.zeros_like(state.y, dtype=torch.bool)
        for iteration in range(1, self.iterations + 1):
            x_adv, gradient, fooled = self._look(state, model, w)
            # Projected because of rounding only: at the ball's faces, low + (high - low) may miss by a bit.
            x_adv = threat.project(x_adv, state.x) if threat.norm == "linf" else x_adv
            found = fooled & (threat.distance(x_adv, state.x) <= threat.eps)
            result[state.index[found]] = x_adv[found]
            fooled_once = fooled_once | fooled
            # Adam (Kingma and Ba 2015) by hand, so that samples can leave and none depends on its neighbours.
            mean, square = 0.9 * mean + 0.1 * gradient, 0.999 * square + 0.001 * gradient**2
            step = (mean / (1 - 0.9**iteration)) / ((square / (1 - 0.999**iteration)).sqrt() + 1e-8)
            w = w - self.learning_rate * step
            if found.any():
                rows = ~found
                state.keep(rows)
                w, mean, square, fooled_once = w[rows], mean[rows], square[rows], fooled_once[rows]
                if not len(state.index):
                    break
        return fooled_once

    @staticmethod
    def _look(state: _State, model: Classifier, w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        w = w.detach().requires_grad_(True)
        with torch.enable_grad():
            x_adv = state.low + (state.high - state.low) * (torch.tanh(w) + 1) / 2
            logits = model(x_adv)
            distance = (x_adv - state.x).flatten(1).square().sum(1)
            value = distance + state.c * (-margin(logits, state.y)).clamp(min=0)
            gradient = input_gradient(value.sum(), w)
        return x_adv.detach(), gradient.nan_to_num(0.0, 0.0, 0.0), logits.detach().argmax(1) != state.y


ATTACK = CarliniWagnerL2(
    summary="smallest l2 perturbation by Adam in tanh space, 9 steps of 200 iterations",
    paper="Carlini and Wagner 2017, arXiv 1608.04644",
)
