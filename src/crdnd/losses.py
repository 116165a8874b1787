"""Per-sample losses: sum over classes, one value a sample, never a mean over the batch.

`B` is the batch, `K` the classes. A mean over classes would make a term K times smaller, so that the balance between
terms would change with the number of classes; that is how the published numbers of this field came apart.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

_TINY = 1e-12


def cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """-log softmax(logits)_y, or -sum_k p_k log softmax(logits)_k where the target is soft. -> (B,).

    Args:
        logits: (B, K).
        target: labels y, int64 (B,), or soft labels p (B, K), in the type of the logits.
    """
    return F.cross_entropy(logits, target, reduction="none")


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


def gradient_match(t_plus: Tensor, t_minus: Tensor, s_plus: Tensor, s_minus: Tensor) -> Tensor:
    """KL(softmax(T(x + d) - T(x - d)) || softmax(S(x + d) - S(x - d))), four times (B, K) -> (B,).

    Indirect gradient distillation matching, Lee et al. 2025 (ICLR): where both networks are nearly linear around x, the
    difference of two predictions is twice the change of the logits along d, so that matching differences matches input
    gradients without computing any.
    """
    return kl(t_plus - t_minus, s_plus - s_minus)


def repaired(logits: Tensor, y: Tensor) -> Tensor:
    """A wrong prediction with the label's and the largest logit swapped; a right one as it is. (B, K), (B,) -> (B, K).

    The error correction of Park and Min 2024 (DGAD, ECCV): the label becomes the prediction, everything else that the
    teacher says about the other classes is kept.
    """
    top = logits.argmax(1, keepdim=True)
    label = y[:, None]
    at_top, at_label = logits.gather(1, top), logits.gather(1, label)
    return logits.scatter(1, top, at_label).scatter(1, label, at_top)


def dlr(logits: Tensor, y: Tensor) -> Tensor:
    """The difference of logits ratio, margin / (z_(1) - z_(3)) with z sorted downwards. (B, K), (B,) -> (B,).

    Croce and Hein 2020 (arXiv 2003.01690), equation 6: blind to the shift and the scale of the logits. It needs three
    classes; with two, where z_(3) does not exist, it is the margin.
    """
    if logits.shape[1] < 3:
        return margin(logits, y)
    top = logits.topk(3, dim=1).values
    return margin(logits, y) / (top[:, 0] - top[:, 2] + _TINY)


def dlr_targeted(logits: Tensor, y: Tensor, target: Tensor) -> Tensor:
    """(z_t - z_y) / (z_(1) - (z_(3) + z_(4)) / 2) with z sorted downwards. (B, K), (B,), (B,) -> (B,).

    Croce and Hein 2020 (arXiv 2003.01690), equation 7. It needs four classes; with three the denominator is
    z_(1) - z_(3), and with two there is none.
    """
    lead = logits.gather(1, target[:, None])[:, 0] - logits.gather(1, y[:, None])[:, 0]
    if logits.shape[1] < 3:
        return lead
    top = logits.topk(min(4, logits.shape[1]), dim=1).values
    return lead / (top[:, 0] - top[:, 2:].mean(1) + _TINY)
