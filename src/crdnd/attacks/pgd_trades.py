"""PGD_TRADES, Zhang et al. 2019 (arXiv 1901.08573), as the tables of robust distillation use it.

20 steps of 0.003 at eps 8/255, that is of 0.095625 eps, on cross-entropy from a uniform start, the last iterate.
"""

from crdnd.attacks._pgd import TableAttack
from crdnd.losses import cross_entropy

ATTACK = TableAttack(
    summary="20 steps of 0.095625 eps on cross-entropy, uniform start",
    paper="Zhang et al. 2019, arXiv 1901.08573",
    loss=cross_entropy,
    steps=20,
    step=0.003 / (8 / 255),
    start="uniform",
)
