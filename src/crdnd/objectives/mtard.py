"""MTARD: multi-teacher adversarial robustness distillation, Zhao et al. 2022 (ECCV; extended in arXiv 2306.16170).

    x' = argmax_{x' in B(x, eps)}  CE(S(x'), y)      10 steps, start 0.001 N(0, 1), batch norm in eval mode
    min_S  w_adv KL(T(x') || S(x')) + w_nat KL(T2(x) || S(x)),      w_adv = 1 - w_nat

    w_nat <- w_nat - r (w_nat - rel_nat / (rel_adv + rel_nat)),     rel = the term's KL / its KL on the first batch

    paper         here                      paper         here
    S(x), S(x')   v["s_nat"], v["s_adv"]    w_nat         weight_nat, 1/2 at first
    T_adv(x')     v["t_adv"]                L(0)          initial
    T_nat(x)      v["t2_nat"]               r_w           rate

The robust teacher T speaks on x', the naturally trained T2 on x. The term that has fallen less since the first batch
gets more weight, so that the student learns from both at the same pace.

Differs from its paper: the authors' code moves the weights before it uses them on a batch; here they move after the
batch's update, so each takes effect one batch later. Its KL is averaged over classes, which `loss_scale: 1/K`
reproduces; the weights do not depend on it. The rate falls at `drops` whatever the learning rate does; in the paper
both fall together. The extended version's temperatures, which balance the teachers' entropies, are not in this loss.
"""

import torch
from pydantic import Field, field_validator
from torch import Tensor

from crdnd.config import parse_fractions
from crdnd.losses import kl
from crdnd.objectives._base import LossTerms, Objective, ObjectiveSettings, Sizes, TrainingAttack, Views

_TINY = 1e-12


class Settings(ObjectiveSettings):
    """MTARD's settings."""

    rate: float = Field(default=0.025, ge=0, le=1, description="How far a batch moves the weights: r_w of the paper.")
    drops: tuple[float, ...] = Field(
        default=(215 / 300, 260 / 300, 285 / 300),
        description="Where `rate` falls to a tenth, as fractions of the run: epochs 215, 260 and 285 of 300.",
    )

    _read_drops = field_validator("drops", mode="before")(parse_fractions)


class MTARD(Objective):
    """A robust teacher on adversarial images and a natural one on natural images, at the same pace."""

    paper = "Zhao et al. 2022, ECCV"
    needs = frozenset({"s_nat", "s_adv", "t_adv", "t2_nat"})
    attack = TrainingAttack(loss="ce", start="gaussian", mode="eval")
    settings: Settings
    settings_class = Settings
    weight_nat: Tensor
    initial: Tensor
    seen: Tensor

    def __init__(self, num_classes: int, *, sizes: Sizes | None = None, **settings: object) -> None:
        super().__init__(num_classes, sizes=sizes, **settings)
        self.register_buffer("weight_nat", torch.tensor(0.5, dtype=torch.float64))
        # [nat, adv]: the mean KL on the first batch, and whether there was one.
        self.register_buffer("initial", torch.zeros(2, dtype=torch.float64))
        self.register_buffer("seen", torch.tensor(False))

    def terms(self, v: Views) -> LossTerms:
        """w_nat KL(T2(x) || S(x)) and w_adv KL(T(x') || S(x'))."""
        nat, adv = self._divergences(v)
        return LossTerms(kl_nat=self.weight_nat * nat, kl_adv=(1 - self.weight_nat) * adv)

    def observe(self, v: Views) -> None:
        """Move the weights by the batch's mean divergences, without asking the device for a number."""
        means = torch.stack([divergence.detach().mean() for divergence in self._divergences(v)])
        now = self.processes.mean(means).to(self.initial)
        self.initial.copy_(torch.where(self.seen, self.initial, now))
        self.seen.fill_(True)
        relative = now / self.initial.clamp(min=_TINY) + _TINY  # 1/2 for each where nothing is left to learn
        rate = self.settings.rate * 0.1 ** sum(v.progress >= drop for drop in self.settings.drops)
        self.weight_nat.sub_(rate * (self.weight_nat - relative[0] / relative.sum()))

    def _divergences(self, v: Views) -> tuple[Tensor, Tensor]:
        """KL(T2(x) || S(x)) and KL(T(x') || S(x')), each (B,)."""
        return kl(v["t2_nat"], v["s_nat"]), kl(v["t_adv"], v["s_adv"])


METHOD = MTARD
