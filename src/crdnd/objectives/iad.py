"""IAD-I: introspective adversarial distillation, Zhu et al. 2022 (arXiv 2106.04928).

    x' = argmax_{x' in B(x, eps)}  CE(S(x'), y)      10 steps, uniform start, batch norm in train mode
    min_S  w KL(T(x) || S(x')) + (1 - w) KL(S(x) || S(x')),      w = T_y(x')^beta

    paper              here             paper              here
    T(x), T(x')        v["t_nat"],      S(x), S(x')        v["s_nat"], v["s_adv"]
                       v["t_adv"]       alpha              w: how far the teacher is trusted on this sample

For the first `warmup` of the run the student trusts the teacher alone (w = 1); 60 of 200 epochs in the paper.

Differs from its paper: nothing by default. `form: code` is the authors' code, in which the teacher's term keeps the
weight 1. In both S(x) is not detached, and the KL is a mean over the batch of a sum over classes.
"""

from typing import Literal

from pydantic import Field

from crdnd.losses import kl
from crdnd.objectives._base import LossTerms, Objective, ObjectiveSettings, TrainingAttack, Views
from crdnd.objectives._trust import trust


class Settings(ObjectiveSettings):
    """IAD's settings."""

    beta: float = Field(default=0.1, ge=0, description="Exponent of the trust T_y(x')^beta (section 4 of the paper).")
    warmup: float = Field(default=0.3, ge=0, le=1, description="Part of the run that trusts the teacher alone: 60/200.")
    form: Literal["paper", "code"] = Field(default="paper", description="code: the teacher's term always has weight 1.")


class IAD(Objective):
    """The teacher where it holds under the student's attack, the student's own natural prediction where not."""

    paper = "Zhu et al. 2022, arXiv 2106.04928"
    needs = frozenset({"s_nat", "s_adv", "t_nat", "t_adv"})
    attack = TrainingAttack(loss="ce", start="uniform", mode="train")
    repairable = False  # T_y(x') is how far it is trusted
    settings: Settings
    settings_class = Settings

    def terms(self, v: Views) -> LossTerms:
        """The teacher's term and the student's own."""
        trusted = trust(v, self.settings.beta, self.settings.warmup)
        weight = trusted if self.settings.form == "paper" else 1.0
        return LossTerms(
            kl_teacher=weight * kl(v["t_nat"], v["s_adv"]),
            kl_self=(1 - trusted) * kl(v["s_nat"], v["s_adv"]),
        )


METHOD = IAD
