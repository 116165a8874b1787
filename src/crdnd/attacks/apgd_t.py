"""APGD-T: AutoPGD on the targeted difference of logits ratio, Croce and Hein 2020 (arXiv 2003.01690).

100 iterations towards each of the 9 wrong classes with the largest logits; towards all of them where there are fewer.
With three classes the ratio's denominator is z_(1) - z_(3), with two there is none. The second part of AutoAttack.
"""

from crdnd.attacks._apgd import TargetedAutoPGD

ATTACK = TargetedAutoPGD(
    summary="AutoPGD, 100 iterations on the targeted difference of logits ratio to each of 9 classes",
    paper="Croce and Hein 2020, arXiv 2003.01690",
)
