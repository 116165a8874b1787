"""TRADES, Zhang et al. 2019 (arXiv 1901.08573).

    x' = argmax_{x' in B(x, eps)}  KL(S(x) || S(x'))      10 steps, start 0.001 N(0, 1), batch norm in eval mode
    min_S  CE(S(x), y) + beta * KL(S(x) || S(x'))

    paper       here             paper        here
    f(X)        v["s_nat"]       f(X')        v["s_adv"]
    1/lambda    beta

The natural prediction is NOT detached in the outer KL: gradients reach the student through both arguments, as in the
authors' code. Detaching it is a common mistake that has been measured to cost 2.7 to 4 points under AutoAttack.

Differs from its paper: the step is eps/4 as for all methods here; the authors use 0.007 at eps 0.031.
"""

from pydantic import Field

from crdnd.losses import cross_entropy, kl
from crdnd.objectives._base import LossTerms, Objective, ObjectiveSettings, TrainingAttack, Views


class Settings(ObjectiveSettings):
    """TRADES' settings."""

    beta: float = Field(default=6.0, ge=0, description="Weight of the divergence, 1/lambda in the paper (section 5).")


class TRADES(Objective):
    """Natural cross-entropy plus the divergence that an attack can cause."""

    paper = "Zhang et al. 2019, arXiv 1901.08573"
    needs = frozenset({"s_nat", "s_adv"})
    attack = TrainingAttack(loss="trades", start="gaussian", mode="eval")
    settings: Settings
    settings_class = Settings

    def terms(self, v: Views) -> LossTerms:
        """CE(S(x), y) and beta KL(S(x) || S(x'))."""
        return LossTerms(
            ce_nat=cross_entropy(v["s_nat"], v.target),
            kl_adv=self.settings.beta * kl(v["s_nat"], v["s_adv"]),
        )


METHOD = TRADES
