"""Natural training: the control without any attack.

    min_S  CE(S(x), y)

    paper    here
    S(x)     v["s_nat"]

Nothing is maximised. A network trained like this shows how much of a test set the attacks can break.
"""

from crdnd.losses import cross_entropy
from crdnd.objectives._base import LossTerms, Objective, Views


class Natural(Objective):
    """Cross-entropy on natural images."""

    paper = "the control: cross-entropy on natural images"
    needs = frozenset({"s_nat"})
    attack = None

    def terms(self, v: Views) -> LossTerms:
        """CE(S(x), y)."""
        return LossTerms(ce_nat=cross_entropy(v["s_nat"], v.target))


METHOD = Natural
