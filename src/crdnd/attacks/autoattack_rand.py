"""AutoAttack in its version for models that are random at test time, Croce and Hein 2020 (arXiv 2003.01690).

APGD-CE and APGD-DLR, each gradient averaged over 20 passes. Its verdicts are as random as the model.
"""

import dataclasses
from typing import cast

from crdnd.attacks._apgd import AutoPGD
from crdnd.attacks._load import load_attack
from crdnd.attacks._sequence import Sequence

EOT = 20

ATTACK = Sequence(
    summary="APGD-CE and APGD-DLR in turn, gradients averaged over 20 passes (the rand version)",
    paper="Croce and Hein 2020, arXiv 2003.01690",
    parts=tuple(dataclasses.replace(cast("AutoPGD", load_attack(name)), eot=EOT) for name in ("apgd_ce", "apgd_dlr")),
)
