"""PGD_SAT, Madry et al. 2018 (arXiv 1706.06083), as the tables of robust distillation use it.

20 steps of eps/4 (2/255 at 8/255) on cross-entropy from a uniform start, one restart, the last iterate.
"""

from crdnd.attacks._pgd import TableAttack
from crdnd.losses import cross_entropy

ATTACK = TableAttack(
    summary="20 steps of eps/4 on cross-entropy, uniform start",
    paper="Madry et al. 2018, arXiv 1706.06083",
    loss=cross_entropy,
    steps=20,
    step=0.25,
    start="uniform",
)
