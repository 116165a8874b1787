"""Per-sample losses: sum over classes, one value a sample, never a mean over the batch.

`B` is the batch, `K` the classes. A mean over classes would make a term K times smaller, so that the balance between
terms would change with the number of classes; that is how the published numbers of this field came apart.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    """-log softmax(logits)_y. (B, K), (B,) -> (B,)."""
    return F.cross_entropy(logits, y, reduction="none")


def margin(logits: Tensor, y: Tensor) -> Tensor:
    """max_{j != y} z_j - z_y: positive when the prediction is wrong. (B, K), (B,) -> (B,).

    The loss of Carlini and Wagner 2017 (arXiv 1608.04644) without its cap.
    """
    true = logits.gather(1, y[:, None])
    others = logits.scatter(1, y[:, None], -torch.inf)
    return others.amax(1) - true[:, 0]


def kl(target: Tensor, student: Tensor, tau: float = 1.0) -> Tensor:
    """KL(softmax(target / tau) || softmax(student / tau)). (B, K), (B, K) -> (B,)."""
    log_t, log_s = F.log_softmax(target / tau, dim=1), F.log_softmax(student / tau, dim=1)
    return (log_t.exp() * (log_t - log_s)).sum(dim=1)
