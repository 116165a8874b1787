"""The nearest point of a hyperplane inside the box, which FAB needs twice an iteration."""

import torch
from torch import Tensor

from crdnd.threat import Norm

STEPS = 50
"""Newton needs 3 to 6 of them; this bounds the loop where rounding keeps it busy."""


def to_hyperplane(x: Tensor, w: Tensor, gap: Tensor, norm: Norm) -> Tensor:
    """The shortest d with <w, x + d> = <w, x> - gap and x + d in [0, 1], or the furthest one towards it.

    Every pixel moves against its w by min(lambda u, room), where u is 1 for linf and |w| for l2 and room is what the
    box leaves; lambda is chosen so that <w, d> = -gap. What all pixels together contribute is a concave, piecewise
    linear function of lambda, so Newton's method from 0 climbs to the answer without overshooting, and nothing has to
    be sorted.

    Args:
        x: points in [0, 1], (B, D).
        w: the hyperplanes' normals (B, D).
        gap: <w, x> minus its value on the hyperplane, (B,).
        norm: which length is to be the shortest.

    Returns:
        (B, D).
    """
    direction = -w.sign() * gap.sign()[:, None]
    room = torch.where(direction > 0, 1 - x, x)
    weight = w.abs()
    slopes = weight if norm == "linf" else weight.square()
    needed = gap.abs()
    scale = torch.zeros_like(gap)
    moves = torch.zeros_like(w)
    for _ in range(STEPS):
        missing = needed - torch.linalg.vecdot(weight, moves)
        slope = torch.linalg.vecdot(slopes, (moves < room).to(w.dtype))
        climbing = (missing > 1e-7 * needed) & (slope > 0)
        if not climbing.any():
            break
        scale = torch.where(climbing, scale + missing / slope, scale)
        moves = torch.minimum(scale[:, None] if norm == "linf" else scale[:, None] * weight, room)
    return direction * moves
