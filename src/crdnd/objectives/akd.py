"""AKD2: adversarial training smoothed by two teachers, Chen et al. 2021 (ICLR, openreview qZzy5urZw9).

    x' = argmax_{x' in B(x, eps)}  CE(S(x'), y)      10 steps, uniform start, batch norm in train mode
    min_S  l1 CE(S(x'), y) + l2 tau^2 KL(T2_tau(x') || S_tau(x')) + l3 tau^2 KL(T_tau(x') || S_tau(x'))

    paper             here               paper           here
    f(x + d)          v["s_adv"]         lambda_1        what the two teachers leave of 1
    f_std(x + d)      v["t2_adv"]        lambda_2        weight_natural
    f_adv(x + d)      v["t_adv"]         lambda_3        weight_robust

T is the robust teacher, T2 the naturally trained one; both see x'. The weights add up to 1, because a common factor on
all three is `loss_scale`.

Differs from its paper: the weights 0.3, 0.1, 0.6 and tau 2 are those of the authors' code. Its soft cross-entropy is
written as a KL here, which has the same gradient. The name AKD2 and the form with `weight_robust: 0.5`,
`weight_natural: 0.25`, `tau: 1` come from the code of Zhu et al. 2022 (arXiv 2106.04928), whose tables quote it.
The paper's averaging of weights (SWA) is a matter of the run, not of the loss.
"""

from typing import Self

from pydantic import Field, model_validator

from crdnd.losses import cross_entropy, kl
from crdnd.objectives._base import LossTerms, Objective, ObjectiveSettings, TrainingAttack, Views


class TwoTeacherSettings(ObjectiveSettings):
    """How much each teacher weighs; the labels get the rest of 1."""

    weight_robust: float = Field(default=0.6, ge=0, le=1, description="Weight of the robust teacher's term.")
    weight_natural: float = Field(default=0.1, ge=0, le=1, description="Weight of the naturally trained teacher's.")

    @property
    def weight_labels(self) -> float:
        """What the teachers leave of 1."""
        return 1 - self.weight_robust - self.weight_natural

    @model_validator(mode="after")
    def _leave_something_or_nothing(self) -> Self:
        if self.weight_robust + self.weight_natural > 1:
            raise ValueError(
                f"weight_robust {self.weight_robust} and weight_natural {self.weight_natural} add up to more than 1; "
                "the labels get what they leave of it."
            )
        return self


class Settings(TwoTeacherSettings):
    """AKD2's settings."""

    tau: float = Field(default=2.0, gt=0, description="Temperature of the teachers' terms.")


class AKD(Objective):
    """Labels and two teachers on adversarial images."""

    paper = "Chen et al. 2021, ICLR"
    needs = frozenset({"s_adv", "t_adv", "t2_adv"})
    attack = TrainingAttack(loss="ce", start="uniform", mode="train")
    settings: Settings
    settings_class = Settings

    def terms(self, v: Views) -> LossTerms:
        """The labels' term, the robust teacher's and the natural one's."""
        chosen = self.settings
        return LossTerms(
            ce_adv=chosen.weight_labels * cross_entropy(v["s_adv"], v.target),
            kl_robust=chosen.weight_robust * chosen.tau**2 * kl(v["t_adv"], v["s_adv"], chosen.tau),
            kl_natural=chosen.weight_natural * chosen.tau**2 * kl(v["t2_adv"], v["s_adv"], chosen.tau),
        )


METHOD = AKD
