"""IAD-II: introspective adversarial distillation with two teachers, Zhu et al. 2022 (arXiv 2106.04928).

    x' = argmax_{x' in B(x, eps)}  CE(S(x'), y)      10 steps, uniform start, batch norm in train mode
    min_S  l1 CE(S(x'), y) + l2 [w KL(T(x') || S(x')) + (1 - w) KL(S(x) || S(x'))] + l3 KL(T2(x') || S(x')),
           w = T_y(x')^beta

    paper            here              paper            here
    S(x), S(x')      v["s_nat"],       lambda_1         what the two teachers leave of 1
                     v["s_adv"]        lambda_2         weight_robust
    T_at(x')         v["t_adv"]        lambda_3         weight_natural
    T_st(x')         v["t2_adv"]       alpha            w: how far the robust teacher is trusted on this sample

It is AKD2 at tau 1 in which the student's own natural prediction stands in for the robust teacher where that one fails.
For the first `warmup` of the run the robust teacher is trusted alone (w = 1); 40 of 200 epochs in the authors' code.

Differs from its paper: nothing in the loss, which is that of the authors' code. The robust teacher sees x' here, while
IAD-I compares with its prediction on x. S(x) is not detached.
"""

from pydantic import Field

from crdnd.losses import cross_entropy, kl
from crdnd.objectives._base import LossTerms, Objective, TrainingAttack, Views
from crdnd.objectives._trust import trust
from crdnd.objectives.akd import TwoTeacherSettings


class Settings(TwoTeacherSettings):
    """IAD-II's settings."""

    weight_robust: float = Field(
        default=0.5, ge=0, le=1, description="Weight of what the robust teacher and the student share."
    )
    weight_natural: float = Field(default=0.25, ge=0, le=1, description="Weight of the naturally trained teacher's.")
    beta: float = Field(default=0.1, ge=0, description="Exponent of the trust T_y(x')^beta (section 4 of the paper).")
    warmup: float = Field(default=0.2, ge=0, le=1, description="Part of the run that trusts the teacher alone: 40/200.")


class IAD2(Objective):
    """Labels and two teachers on adversarial images; the student itself where the robust teacher fails."""

    paper = "Zhu et al. 2022, arXiv 2106.04928"
    needs = frozenset({"s_nat", "s_adv", "t_adv", "t2_adv"})
    attack = TrainingAttack(loss="ce", start="uniform", mode="train")
    repairable = False  # T_y(x') is how far it is trusted
    settings: Settings
    settings_class = Settings

    def terms(self, v: Views) -> LossTerms:
        """The labels' term, the robust teacher's, the student's own and the natural teacher's."""
        chosen, trusted = self.settings, trust(v, self.settings.beta, self.settings.warmup)
        return LossTerms(
            ce_adv=chosen.weight_labels * cross_entropy(v["s_adv"], v.target),
            kl_robust=chosen.weight_robust * trusted * kl(v["t_adv"], v["s_adv"]),
            kl_self=chosen.weight_robust * (1 - trusted) * kl(v["s_nat"], v["s_adv"]),
            kl_natural=chosen.weight_natural * kl(v["t2_adv"], v["s_adv"]),
        )


METHOD = IAD2
