"""AdaAD: adaptive adversarial distillation, Huang et al. 2023 (CVPR).

    x' = argmax_{x' in B(x, eps)}  KL(T(x') || S(x'))      10 steps, start 0.001 N(0, 1), batch norm in eval mode
    min_S  alpha KL(T(x') || S(x')) + (1 - alpha) KL(T(x) || S(x))

    paper    here             paper    here
    T(x)     v["t_nat"]       S(x)     v["s_nat"]
    T(x')    v["t_adv"]       S(x')    v["s_adv"]
    alpha    alpha

The attack looks for where the two networks disagree: its gradient also goes through the teacher, which makes a step
about as dear as attacking both networks. No label enters.

Differs from its paper: nothing in the loss. The authors' code averages the KL over classes on CIFAR-10, which
`loss_scale: 1/K` reproduces, and sums it on CIFAR-100.
"""

from pydantic import Field

from crdnd.losses import kl
from crdnd.objectives._base import LossTerms, Objective, ObjectiveSettings, TrainingAttack, Views


class Settings(ObjectiveSettings):
    """AdaAD's settings."""

    alpha: float = Field(default=1.0, ge=0, le=1, description="Weight of the adversarial term; x gets 1 - alpha.")


class AdaAD(Objective):
    """The student imitates the teacher where the two disagree most."""

    paper = "Huang et al. 2023, CVPR"
    needs = frozenset({"s_nat", "s_adv", "t_nat", "t_adv"})
    attack = TrainingAttack(loss="adaad", start="gaussian", mode="eval")
    settings: Settings
    settings_class = Settings

    def terms(self, v: Views) -> LossTerms:
        """(1 - alpha) KL(T(x) || S(x)) and alpha KL(T(x') || S(x'))."""
        alpha = self.settings.alpha
        return LossTerms(
            kl_nat=(1 - alpha) * kl(v["t_nat"], v["s_nat"]),
            kl_adv=alpha * kl(v["t_adv"], v["s_adv"]),
        )


METHOD = AdaAD
