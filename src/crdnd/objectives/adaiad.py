"""AdaIAD: AdaAD joined with introspective distillation (IAD-I), Huang et al. 2023 (CVPR).

    x' = argmax_{x' in B(x, eps)}  KL(T(x') || S(x'))      10 steps, start 0.001 N(0, 1), batch norm in eval mode
    min_S  w KL(T(x') || S(x')) + (1 - w) KL(S(x) || S(x')),      w = T_y(x')^beta

    paper    here                     paper          here
    T(x')    v["t_adv"]               S(x), S(x')    v["s_nat"], v["s_adv"]
    alpha    w: how far the teacher is trusted on this sample

For the first `warmup` of the run the student trusts the teacher alone (w = 1); 60 of 200 epochs in the authors' code.

Differs from its paper: the authors' code was read, the paper's equation was not. `form: paper` is the published
equation of IAD-I with T(x') for T(x). `form: code` is the authors' code, in which the teacher's term keeps the weight 1
and is tau^2 KL(T_tau(x') || S_tau(x')) with a tau of 30, to be set besides. In both, tau is on the teacher's term
alone, S(x) is not detached, and the KL is a mean over the batch of a sum over classes.
"""

from typing import Literal

from pydantic import Field

from crdnd.losses import kl
from crdnd.objectives._base import LossTerms, Objective, ObjectiveSettings, TrainingAttack, Views
from crdnd.objectives._trust import trust


class Settings(ObjectiveSettings):
    """AdaIAD's settings."""

    beta: float = Field(default=0.1, ge=0, description="Exponent of the trust T_y(x')^beta.")
    warmup: float = Field(default=0.3, ge=0, le=1, description="Part of the run that trusts the teacher alone: 60/200.")
    tau: float = Field(default=1.0, gt=0, description="Temperature of the teacher's term; 30 in the authors' code.")
    form: Literal["paper", "code"] = Field(default="paper", description="code: the teacher's term always has weight 1.")


class AdaIAD(Objective):
    """The teacher where it holds at x', the student's own natural prediction where not."""

    paper = "Huang et al. 2023, CVPR"
    needs = frozenset({"s_nat", "s_adv", "t_adv"})
    attack = TrainingAttack(loss="adaad", start="gaussian", mode="eval")
    repairable = False  # T_y(x') is how far it is trusted
    settings: Settings
    settings_class = Settings

    def terms(self, v: Views) -> LossTerms:
        """The teacher's term and the student's own."""
        tau, trusted = self.settings.tau, trust(v, self.settings.beta, self.settings.warmup)
        weight = trusted if self.settings.form == "paper" else 1.0
        return LossTerms(
            kl_teacher=weight * tau**2 * kl(v["t_adv"], v["s_adv"], tau),
            kl_self=(1 - trusted) * kl(v["s_nat"], v["s_adv"]),
        )


METHOD = AdaIAD
