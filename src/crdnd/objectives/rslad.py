"""RSLAD: robust soft label adversarial distillation, Zi et al. 2021 (arXiv 2108.07969).

    x' = argmax_{x' in B(x, eps)}  KL(T(x) || S(x'))      10 steps, start 0.001 N(0, 1), batch norm in eval mode
    min_S  (1 - alpha) KL(T(x) || S(x)) + alpha KL(T(x) || S(x'))

    paper    here             paper    here
    T(x)     v["t_nat"]       S(x)     v["s_nat"]
    alpha    alpha            S(x')    v["s_adv"]

No label enters: the robust teacher's soft labels supervise both steps.

Differs from its paper: nothing in the loss; the authors' code averages the KL over classes, which `loss_scale: 1/K`
reproduces.
"""

from pydantic import Field

from crdnd.losses import kl
from crdnd.objectives._base import LossTerms, Objective, ObjectiveSettings, TrainingAttack, Views


class Settings(ObjectiveSettings):
    """RSLAD's settings."""

    alpha: float = Field(default=5 / 6, ge=0, le=1, description="Weight of the adversarial term (section 4.1).")


class RSLAD(Objective):
    """Robust soft labels in the attack and in both terms of the loss."""

    paper = "Zi et al. 2021, arXiv 2108.07969"
    needs = frozenset({"s_nat", "s_adv", "t_nat"})
    attack = TrainingAttack(loss="kl_teacher", start="gaussian", mode="eval")
    settings: Settings
    settings_class = Settings

    def terms(self, v: Views) -> LossTerms:
        """(1 - alpha) KL(T(x) || S(x)) and alpha KL(T(x) || S(x'))."""
        alpha = self.settings.alpha
        return LossTerms(
            kl_nat=(1 - alpha) * kl(v["t_nat"], v["s_nat"]),
            kl_adv=alpha * kl(v["t_nat"], v["s_adv"]),
        )


METHOD = RSLAD
