"""Which class a targeted attack aims at."""

import torch
from torch import Tensor

from crdnd.attacks._base import Classifier


def target_of_rank(model: Classifier, x: Tensor, y: Tensor, rank: int) -> Tensor:
    """The wrong class with the (rank + 1)-th largest logit of the natural images. (B, C, H, W), (B,) -> (B,)."""
    with torch.no_grad():
        wrong = model(x).scatter(1, y[:, None], -torch.inf)
    return wrong.argsort(dim=1, descending=True, stable=True)[:, rank]
