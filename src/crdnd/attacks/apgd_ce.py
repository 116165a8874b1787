"""APGD-CE: AutoPGD on cross-entropy, Croce and Hein 2020 (arXiv 2003.01690). The first part of AutoAttack."""

from crdnd.attacks._apgd import AutoPGD
from crdnd.losses import cross_entropy

ATTACK = AutoPGD(
    summary="AutoPGD, 100 iterations on cross-entropy",
    paper="Croce and Hein 2020, arXiv 2003.01690",
    loss=cross_entropy,
)
