"""FAB-T: the targeted fast adaptive boundary attack, Croce and Hein 2020 (arXiv 1907.02044).

Looks for the nearest adversarial input: x' is moved to where the linearised lead of the target class over the label is
zero, and pulled towards x. 100 iterations for each of 9 targets, no random start, alpha_max 0.1, eta 1.05, beta 0.9; a
sample leaves as soon as the input found lies within eps. The third part of AutoAttack.
"""

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from crdnd.attacks._base import Attack, Classifier, Round, input_gradient
from crdnd.attacks._boundary import to_hyperplane
from crdnd.attacks._targets import target_of_rank
from crdnd.random import Stream
from crdnd.threat import ThreatModel


@dataclass(frozen=True, kw_only=True)
class FAB(Attack):
    """The attack with its constants, in the paper's names."""

    iterations: int = 100
    targets: int = 9
    alpha_max: float = 0.1
    eta: float = 1.05
    beta: float = 0.9

    def rounds(self, num_classes: int) -> list[Round]:
        """One for each target, at most as many as there are wrong classes."""
        ranks = range(min(self.targets, num_classes - 1))
        return [Round(self.name, rank, functools.partial(self._search, rank)) for rank in ranks]

    def _search(
        self,
        rank: int,
        model: Classifier,
        x: Tensor,
        y: Tensor,
        threat: ThreatModel,
        stream: Stream,
    ) -> Tensor:
        result = x.clone()
        target = target_of_rank(model, x, y, rank)
        index, x_adv = torch.arange(len(x), device=x.device), x
        for _ in range(self.iterations):
            x_adv = self._towards_the_boundary(model, x, x_adv, y, target, threat)
            with torch.no_grad():
                fooled = model(x_adv).argmax(1) != y
            found = fooled & (threat.distance(x_adv, x) <= threat.eps)
            result[index[found]] = x_adv[found]
            stay = torch.where(fooled, self.beta, 1.0).to(x.dtype).reshape(-1, *(1,) * (x.ndim - 1))
            x_adv = torch.lerp(x, x_adv, stay)
            if found.any():
                rows = ~found
                index, x, x_adv, y, target = (value[rows] for value in (index, x, x_adv, y, target))
                if not len(index):
                    break
        return result

    def _towards_the_boundary(
        self, model: Classifier, x: Tensor, x_adv: Tensor, y: Tensor, target: Tensor, threat: ThreatModel
    ) -> Tensor:
        """The next point: between the projections of x' and of x onto the linearised boundary, a little beyond it."""
        lead, w = _linearised(model, x_adv, y, target)
        w = w.flatten(1)
        lead_at_x = lead + (w * (x - x_adv).flatten(1)).sum(1)
        both = to_hyperplane(
            torch.cat([x_adv.flatten(1), x.flatten(1)]), w.repeat(2, 1), torch.cat([lead, lead_at_x]), threat.norm
        )
        length = both.abs().amax(1) if threat.norm == "linf" else both.norm(dim=1)
        from_adv, from_x = length.clamp(min=1e-8).chunk(2)
        alpha = (from_adv / (from_adv + from_x)).clamp(max=self.alpha_max).reshape(-1, *(1,) * (x.ndim - 1))
        move_adv, move_x = both.reshape(2, *x.shape)
        beyond_adv = torch.add(x_adv, move_adv, alpha=self.eta)
        beyond_x = torch.add(x, move_x, alpha=self.eta)
        return torch.lerp(beyond_adv, beyond_x, alpha).clamp_(0, 1)


def _linearised(model: Classifier, x_adv: Tensor, y: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """z_t - z_y and its gradient; a NaN counts as no slope. (B,), (B, C, H, W)."""
    x_adv = x_adv.detach().requires_grad_(True)
    with torch.enable_grad():
        logits = model(x_adv)
        lead = logits.gather(1, target[:, None])[:, 0] - logits.gather(1, y[:, None])[:, 0]
        gradient = input_gradient(lead.sum(), x_adv)
    return lead.detach().nan_to_num(0.0, 0.0, 0.0), gradient.nan_to_num(0.0, 0.0, 0.0)


ATTACK = FAB(
    summary="fast adaptive boundary attack, 100 iterations towards each of 9 classes",
    paper="Croce and Hein 2020, arXiv 1907.02044",
)
