"""KD: knowledge distillation, Hinton et al. 2015 (arXiv 1503.02531).

    min_S  alpha tau^2 KL(T_tau(x) || S_tau(x)) + (1 - alpha) CE(S(x), y)

    paper           here             paper           here
    v_i             v["t_nat"]       z_i             v["s_nat"]
    T               tau

Nothing is maximised: the control that shows what imitating a robust teacher on natural images is worth under attack.

Differs from its paper: its section 2 sums the cross-entropy with the soft labels, whose gradient is that of the KL. It
leaves alpha and tau open (labels get "a considerably lower weight", temperatures go from 1 to 20); the defaults are
those of Tian et al. 2020 (arXiv 1910.10699), 0.9 and 4.
"""

from pydantic import Field

from crdnd.losses import cross_entropy, kl
from crdnd.objectives._base import LossTerms, Objective, ObjectiveSettings, Views


class Settings(ObjectiveSettings):
    """KD's settings."""

    alpha: float = Field(default=0.9, ge=0, le=1, description="Weight of the distillation; the labels get 1 - alpha.")
    tau: float = Field(default=4.0, gt=0, description="Temperature of both predictions.")


class KD(Objective):
    """The student imitates the teacher on natural images."""

    paper = "Hinton et al. 2015, arXiv 1503.02531"
    needs = frozenset({"s_nat", "t_nat"})
    attack = None
    settings: Settings
    settings_class = Settings

    def terms(self, v: Views) -> LossTerms:
        """alpha tau^2 KL(T_tau(x) || S_tau(x)) and (1 - alpha) CE(S(x), y)."""
        alpha, tau = self.settings.alpha, self.settings.tau
        return LossTerms(
            ce_nat=(1 - alpha) * cross_entropy(v["s_nat"], v.target),
            kl_nat=alpha * tau**2 * kl(v["t_nat"], v["s_nat"], tau),
        )


METHOD = KD
