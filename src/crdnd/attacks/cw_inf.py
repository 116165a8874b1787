"""CW_inf: PGD on the margin of Carlini and Wagner 2017 (arXiv 1608.04644), 30 steps of eps/4 from a uniform start.

The tables state a confidence of 50; this is the same attack as long as no margin grows beyond 50. Unlike cross-entropy
the margin does not go flat with small logits, so a model that fares much better under PGD_SAT than here owes it to the
scale of its logits and not to robustness.
"""

from crdnd.attacks._pgd import TableAttack
from crdnd.losses import margin

ATTACK = TableAttack(
    summary="30 steps of eps/4 on the margin max_{j != y} z_j - z_y, uniform start",
    paper="Carlini and Wagner 2017, arXiv 1608.04644",
    loss=margin,
    steps=30,
    step=0.25,
    start="uniform",
)
