"""Square, Andriushchenko et al. 2020 (arXiv 1912.00049): random search with squares, no gradients, 5,000 queries.

linf: a random square of the image is set to a random corner of the ball, channel by channel, and kept if the margin
rises. l2: the perturbation of one window is moved to another one, as a bump. The size of the squares shrinks with the
queries. The last part of AutoAttack.

Differs from the official code: every sample has its own squares, drawn over all places (the official code shares one
square in a batch and never draws the last row and column), so that a verdict does not depend on the batch. A tie that
leaves the prediction right is no success, and the search goes on: logits of a quantised model are often equal.
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from crdnd.attacks._base import Attack, Classifier, Round
from crdnd.losses import margin
from crdnd.random import Stream
from crdnd.threat import ThreatModel

SCHEDULE = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)
"""After each of these queries the share of the image that a square covers is halved."""
DRAWN = 64
"""Queries whose draws are made at once: a draw costs far less than the call that makes it."""
BLOCK = 512
"""Queries of a round, a multiple of the above: on a large network without a GPU all 5,000 take hours."""
_TINY = 1e-12


@dataclass(frozen=True, kw_only=True)
class Square(Attack):
    """The attack with its constants."""

    queries: int = 5000
    first_share: float = 0.8
    """Of the image, that the first squares cover: p of the paper."""
    restarts: int = 1

    needs_gradients: ClassVar[bool] = False

    def rounds(self, num_classes: int) -> list[Round]:
        """The queries of each restart, in blocks."""
        return [
            Round(
                self.name, restart, functools.partial(self._search, min(first + BLOCK, self.queries)), block,
                functools.partial(self._go_on, first, min(first + BLOCK, self.queries)) if block else None,
            )
            for restart in range(self.restarts)
            for block, first in enumerate(range(0, self.queries, BLOCK))
        ]  # fmt: skip

    def _search(
        self, stop: int, model: Classifier, x: Tensor, y: Tensor, threat: ThreatModel, stream: Stream
    ) -> Tensor:
        start = _stripes if threat.norm == "linf" else _bumps
        return self._go_on(0, stop, model, x, y, threat, stream, start(x, threat.eps, stream))

    def _go_on(
        self, first: int, stop: int, model: Classifier, x: Tensor, y: Tensor, threat: ThreatModel, stream: Stream,
        best: Tensor,
    ) -> Tensor:  # fmt: skip
        """Queries first to stop - 1, from the best points that the ones before found."""
        proposals_of = _Squares if threat.norm == "linf" else _Moves
        result, index = x.clone(), torch.arange(len(x), device=x.device)
        highest = _margin(model, best, y)
        proposals = None
        for query in range(first, stop):
            fooled = highest >= 0
            if fooled.any():
                result[index[fooled]] = best[fooled]
                rows = ~fooled
                index, x, y, best, highest = (value[rows] for value in (index, x, y, best, highest))
                if proposals is not None:
                    proposals.keep(rows)
            if not len(index):
                return result
            if proposals is None or query % DRAWN == 0:
                block = query - query % DRAWN
                draws = stream.take(index).child("squares", block).uniform((DRAWN, _DRAWS + 2 * x.shape[1]))
                proposals = proposals_of(x, threat.eps, draws, [self.share(block + k) for k in range(DRAWN)])
            x_new = proposals(best, query % DRAWN)
            value = _margin(model, x_new, y)
            better = (value > highest) | (value >= 0)
            best[better], highest[better] = x_new[better], value[better]  # few rows, most queries raise nothing
        result[index] = best
        return result

    def share(self, query: int) -> float:
        """The share of the image that a square covers in this query, counted from 0."""
        return self.first_share / 2 ** sum(query > bound for bound in SCHEDULE)


def _margin(model: Classifier, x: Tensor, y: Tensor) -> Tensor:
    """The margin, and below 0 where another class draws level but the label is still the prediction."""
    with torch.no_grad():
        logits = model(x)
        found = margin(logits, y)
        return found.masked_fill((found == 0) & (logits.argmax(1) == y), -torch.finfo(found.dtype).tiny)


_DRAWS = 5
"""Uniform numbers of a query besides two for each channel: four for corners, one for the bump's direction."""


def _signs(uniform: Tensor) -> Tensor:
    return torch.where(uniform < 0.5, -1.0, 1.0)


def _first(corner: Tensor, size: int | Tensor, extent: int) -> Tensor:
    """Where on an axis windows of a size begin; corner uniform in [0, 1), int64 of its shape."""
    return (corner * (extent - size + 1)).long()


def _covered(first: Tensor, size: int | Tensor, extent: int) -> Tensor:
    """Which places of an axis windows cover. (...) -> bool (..., extent)."""
    places = torch.arange(extent, device=first.device)
    return (places >= first[..., None]) & (places < (first + size)[..., None])


def _stripes(x: Tensor, eps: float, stream: Stream) -> Tensor:
    """The start under linf: vertical stripes at the faces of the ball."""
    signs = _signs(stream.child("stripes").uniform((x.shape[1], 1, x.shape[3]), x.dtype)).to(x.dtype)
    return (x + eps * signs).clamp(0, 1)


class _Squares:
    """The next queries under linf: the best point so far with one square set to a corner of the ball.

    Args:
        x: natural images (B, C, H, W).
        eps: of the ball.
        draws: for so many queries, (B, queries, ...).
        shares: of the image, that each query's square covers.
    """

    def __init__(self, x: Tensor, eps: float, draws: Tensor, shares: Sequence[float]) -> None:
        channels, height, width = x.shape[1:]
        sizes = [min(max(round(math.sqrt(share * height * width)), 1), height, width) for share in shares]
        size = torch.tensor(sizes, device=x.device)
        self.low, self.high = (x - eps).clamp(0, 1), (x + eps).clamp(0, 1)
        self.rows, self.columns = (
            _covered(_first(draws[..., axis], size, extent), size, extent).to(x.dtype)
            for axis, extent in enumerate((height, width))
        )
        self.up = (draws[..., _DRAWS : _DRAWS + channels, None, None] >= 0.5).to(x.dtype)

    def keep(self, rows: Tensor) -> None:
        """Let the other samples go."""
        self.low, self.high, self.up = self.low[rows], self.high[rows], self.up[rows]
        self.rows, self.columns = self.rows[rows], self.columns[rows]

    def __call__(self, best: Tensor, query: int) -> Tensor:
        """What is tried; the query is counted within its draws."""
        inside = self.rows[:, query, :, None] * self.columns[:, query, None, :]
        # At weights of 0 and 1 this is a choice, and on a CPU a much faster one than by a mask.
        return torch.lerp(best, torch.lerp(self.low, self.high, self.up[:, query]), inside[:, None])


@functools.cache
def _bump(size: int) -> Tensor:
    """Two opposite hills of nested rectangles side by side, length 1, float64 (size, size)."""

    def hill(height: int, width: int) -> Tensor:
        places = torch.zeros(height, width, dtype=torch.float64)
        top, left = height // 2, width // 2
        for ring in range(max(top, left) + 1):
            across = slice(max(left - ring, 0), left + ring + 1)
            places[max(top - ring, 0) : top + ring + 1, across] += 1 / (ring + 1) ** 2
        return places / places.norm().clamp(min=_TINY)

    upper = size // 2
    halves = [hill(upper, size), -hill(size - upper, size)] if upper else [-hill(size, size)]
    bump = torch.cat(halves)
    return bump / bump.norm()


def _bumps(x: Tensor, eps: float, stream: Stream) -> Tensor:
    """The start under l2: bumps of random sign on a grid of about 5 x 5."""
    channels, height, width = x.shape[1:]
    size = max(min(height, width) // 5, 1)
    down, across = height // size, width // size
    draws = stream.child("bumps").uniform((channels + 1, down * across), x.dtype)
    signs, turned = _signs(draws[:, :channels]).to(x.dtype), draws[:, channels] < 0.5
    bump = _bump(size).to(x)
    delta = torch.zeros_like(x)
    top, left = (height - down * size) // 2, (width - across * size) // 2
    for tile in range(down * across):
        i, j = top + tile // across * size, left + tile % across * size
        shape = torch.where(turned[:, None, None, tile, None], bump.T, bump)
        delta[:, :, i : i + size, j : j + size] = signs[:, :, tile, None, None] * shape
    return (x + eps * _unit(delta, (1, 2, 3))).clamp(0, 1)


class _Moves:
    """The next queries under l2; as `_Squares`."""

    def __init__(self, x: Tensor, eps: float, draws: Tensor, shares: Sequence[float]) -> None:
        self.x, self.eps, self.draws, self.shares = x, eps, draws, shares

    def keep(self, rows: Tensor) -> None:
        """Let the other samples go."""
        self.x, self.draws = self.x[rows], self.draws[rows]

    def __call__(self, best: Tensor, query: int) -> Tensor:
        """What is tried; the query is counted within its draws."""
        return _move(self.x, best, self.eps, self.shares[query], self.draws[:, query])


def _move(x: Tensor, best: Tensor, eps: float, share: float, draws: Tensor) -> Tensor:
    """The best point so far with the perturbation of one window moved to another one, as a bump."""
    channels, height, width = x.shape[1:]
    size = max(round(math.sqrt(share * height * width)), 3)
    size = min(size + 1 - size % 2, height, width)
    delta = best - x
    top, left = _first(draws[:, 0], size, height), _first(draws[:, 1], size, width)
    offsets = torch.arange(size, device=x.device)
    rows, columns = top[:, None] + offsets, left[:, None] + offsets
    sample = torch.arange(len(x), device=x.device)[:, None, None]
    to = (sample, slice(None), rows[:, :, None], columns[:, None, :])
    away = _rectangle(_first(draws[:, 2], size, height), _first(draws[:, 3], size, width), size, x)
    mass = (delta.square() * (away | _rectangle(top, left, size, x))).sum((2, 3), keepdim=True)
    spare = (eps**2 - delta.square().sum((1, 2, 3), keepdim=True)).clamp(min=0)
    signs = _signs(draws[:, _DRAWS : _DRAWS + channels]).to(x.dtype)[:, :, None, None]
    bump = _bump(size).to(x)
    shape = torch.where((draws[:, 4] < 0.5)[:, None, None], bump.T, bump)[:, None]
    # Indexing with arrays around a slice puts the arrays' axes first: (B, size, size, C).
    old = _unit(delta[to].permute(0, 3, 1, 2), (2, 3))
    new = _unit(shape * signs + old, (2, 3)) * (spare / channels + mass).sqrt()
    delta = torch.where(away, torch.zeros_like(delta), delta)
    delta[to] = new.permute(0, 2, 3, 1)
    return (x + eps * _unit(delta, (1, 2, 3))).clamp(0, 1)


def _rectangle(top: Tensor, left: Tensor, size: int, x: Tensor) -> Tensor:
    """Which pixels of images x lie in the windows that begin there. (B,), (B,) -> bool (B, 1, H, W)."""
    rows, columns = _covered(top, size, x.shape[2]), _covered(left, size, x.shape[3])
    return rows[:, None, :, None] & columns[:, None, None, :]


def _unit(z: Tensor, axes: tuple[int, ...]) -> Tensor:
    """Length 1 over these axes; zeros stay zeros."""
    return z / z.square().sum(axes, keepdim=True).sqrt().clamp(min=_TINY)


ATTACK = Square(
    summary="random search with squares, 5,000 queries, no gradients",
    paper="Andriushchenko et al. 2020, arXiv 1912.00049",
)
