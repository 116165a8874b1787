"""How far a method trusts the teacher on each sample."""

import torch.nn.functional as F
from torch import Tensor

from crdnd.objectives._base import Views


def trust(v: Views, beta: float, warmup: float) -> Tensor:
    """T_y(x')^beta from the view `t_adv`, and 1 during the warm-up, (B,) in [0, 1].

    Zhu et al. 2022 (arXiv 2106.04928), section 4.

    Args:
        v: the views.
        beta: the exponent; at 0 the teacher is trusted everywhere.
        warmup: the part of the run in which the teacher is trusted everywhere.
    """
    true_class = F.softmax(v["t_adv"], dim=1).gather(1, v.y[:, None])[:, 0]
    return true_class ** (beta if v.progress >= warmup else 0.0)
