"""APGD-DLR: AutoPGD on the difference of logits ratio, Croce and Hein 2020 (arXiv 2003.01690).

With two classes, where the ratio is not defined, it ascends the margin.
"""

from crdnd.attacks._apgd import AutoPGD
from crdnd.losses import dlr

ATTACK = AutoPGD(
    summary="AutoPGD, 100 iterations on the difference of logits ratio",
    paper="Croce and Hein 2020, arXiv 2003.01690",
    loss=dlr,
)
