"""FGSM, Goodfellow et al. 2015 (arXiv 1412.6572): x' = Proj(x + eps * sign(grad CE)), one step, no random start.

Some evaluation scripts of the field start it at a random point and call it FGSM all the same; this one does not.
"""

from crdnd.attacks._pgd import TableAttack
from crdnd.losses import cross_entropy

ATTACK = TableAttack(
    summary="one step of eps on cross-entropy, no random start",
    paper="Goodfellow et al. 2015, arXiv 1412.6572",
    loss=cross_entropy,
    steps=1,
    step=1.0,
    start="none",
)
