"""PGD-AT: adversarial training, Madry et al. 2018 (arXiv 1706.06083). Also called SAT.

    x' = argmax_{x' in B(x, eps)}  CE(S(x'), y)      10 steps of eps/4, uniform start, batch norm in train mode
    min_S  CE(S(x'), y)

    paper        here
    f(x + d)     v["s_adv"]

Differs from its paper: nothing. Train mode during the attack is what the field's common code does (Rice et al. 2020,
arXiv 2002.11569); set `attack.mode: eval` for the other convention.
"""

from crdnd.losses import cross_entropy
from crdnd.objectives._base import LossTerms, Objective, TrainingAttack, Views


class PGDAT(Objective):
    """Cross-entropy on adversarial images."""

    paper = "Madry et al. 2018, arXiv 1706.06083"
    needs = frozenset({"s_adv"})
    attack = TrainingAttack(loss="ce", start="uniform", mode="train")

    def terms(self, v: Views) -> LossTerms:
        """CE(S(x'), y)."""
        return LossTerms(ce_adv=cross_entropy(v["s_adv"], v.target))


METHOD = PGDAT
