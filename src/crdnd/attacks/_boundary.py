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
    direction = w.sign().mul_(-gap.sign()[:, None])
    # On a CPU a choice by a mask costs many times what a difference does.
    room, weight = (direction.clamp(min=0) - x).abs_(), w.abs()
    rows = torch.arange(len(gap), device=gap.device)
    scale, missing = torch.zeros_like(gap), gap.abs()
    needed, left, pull, moves = missing, room, weight, None
    for _ in range(STEPS):
        free = (left if moves is None else left - moves).sign()
        slope = torch.linalg.vecdot(pull if norm == "linf" else pull.square(), free)
        climbing = (missing > 1e-7 * needed) & (slope > 0)
        if not climbing.any():
            break
        scale[rows] += torch.where(climbing, missing / slope, 0)
        if 2 * int(climbing.sum()) < len(rows):  # two steps are enough for most points; the rest goes on alone
            rows, needed, left, pull = (value[climbing] for value in (rows, needed, left, pull))
        moves = _moves(scale[rows], pull, left, norm)
        missing = needed - torch.linalg.vecdot(pull, moves)
    return _moves(scale, weight, room, norm).mul_(direction)


def _moves(scale: Tensor, weight: Tensor, room: Tensor, norm: Norm) -> Tensor:
    """How far every pixel goes, min(lambda u, room). (B,), (B, D), (B, D) -> (B, D)."""
    return torch.minimum(scale[:, None] if norm == "linf" else scale[:, None] * weight, room)
