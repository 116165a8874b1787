"""The validation metric: it chooses `best`, and never sees test data."""

import torch
from torch import nn

from crdnd.attacks import PROBE, TableAttack, adversarial, frozen, true_float32, verdicts
from crdnd.counts import Count
from crdnd.data import ImageData
from crdnd.engine.history import Validation
from crdnd.losses import cross_entropy, margin
from crdnd.threat import ThreatModel

# Cross-entropy alone would reward models whose logits are small, which are weak against every other attack.
ATTACKS = [
    TableAttack(
        name=f"validation_{loss.__name__}", summary="", paper="", loss=loss, steps=10, step=0.25, start="uniform"
    )
    for loss in (cross_entropy, margin)
]


def validate(model: nn.Module, data: ImageData, threat: ThreatModel, batch_size: int) -> Validation:
    """Natural accuracy, and the per-sample worst case of PGD on cross-entropy and PGD on the margin.

    Both take 10 steps of eps/4 from starts that are the same every time. The second attacks only what the first left
    standing, which changes no verdict.
    """
    probe, _ = data.batch(torch.arange(min(PROBE, len(data)), device=data.device))
    with true_float32(), frozen(model, probe):
        right = verdicts(model, data, batch_size=batch_size)
        standing = right.nonzero()[:, 0]
        for attack in ATTACKS:
            holds = verdicts(
                model,
                data,
                lambda x, y, ids, attack=attack: adversarial(model, attack, x, y, ids, threat, seed=0),
                ids=standing,
                batch_size=batch_size,
            )
            standing = standing[holds]
    return Validation(
        clean=Count(correct=int(right.sum()), n=len(data)), robust=Count(correct=len(standing), n=len(data))
    )
