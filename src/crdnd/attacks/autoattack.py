"""AutoAttack in its standard version, Croce and Hein 2020 (arXiv 2003.01690).

APGD-CE, APGD-T, FAB-T and Square, in this order and with their defaults, each on what the ones before left standing.
It starts from the images that are classified right, whatever other attacks ran beside it, so that its accuracy means
what the field means by it.
"""

from crdnd.attacks._load import load_attack
from crdnd.attacks._sequence import Sequence

ATTACK = Sequence(
    summary="APGD-CE, APGD-T, FAB-T and Square in turn (the standard version)",
    paper="Croce and Hein 2020, arXiv 2003.01690",
    parts=tuple(load_attack(name) for name in ("apgd_ce", "apgd_t", "fab_t", "square")),
)
