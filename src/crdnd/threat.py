"""The threat model: which inputs an adversary may hand in. The only place that reads eps."""

import math
from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor

from crdnd.config import Frozen, parse_number
from crdnd.errors import InputError
from crdnd.random import Stream

Norm = Literal["linf", "l2"]
Start = Literal["none", "uniform", "gaussian", "surface"]

_TINY = 1e-30


class ThreatModel(Frozen):
    """The adversary's set { x' : ||x' - x||_p <= eps, 0 <= x' <= 1 }, for images x in [0, 1].

    >>> ThreatModel(norm="linf", eps="8/255").norm
    'linf'
    """

    norm: Norm = Field(default="linf", description="linf bounds every pixel, l2 the length of the whole perturbation.")
    eps: float = Field(description="Radius in the units of the images, which lie in [0, 1].")

    _read_eps = field_validator("eps", mode="before")(parse_number)

    @model_validator(mode="after")
    def _plausible(self) -> "ThreatModel":
        if not (math.isfinite(self.eps) and self.eps >= 0):
            raise ValueError(f"eps={self.eps:g} must be a number of at least 0.")
        if self.norm == "linf" and self.eps >= 1:
            raise ValueError(
                f"eps={self.eps:g} reaches over the whole pixel range; eps is in units of [0, 1], "
                f"so write {self.eps:g}/255 and not {self.eps:g}."
            )
        return self

    def check_for(self, shape: Sequence[int]) -> None:
        """Refuse an l2 radius within which every image of a shape (C, H, W) can be made grey: it is one of 255 levels.

        Raises:
            InputError: eps is that large.
        """
        if self.norm == "l2" and self.eps >= (most := math.sqrt(math.prod(shape)) / 2):
            raise InputError(
                f"threat.eps: l2 eps={self.eps:g} makes any image of shape {list(shape)} grey (from {most:.3g} on); "
                f"eps is in units of [0, 1], so write {self.eps:g}/255 and not {self.eps:g}."
            )

    def distance(self, a: Tensor, b: Tensor) -> Tensor:
        """||a - b||_p for each sample. (B, ...), (B, ...) -> (B,)."""
        delta = (a - b).flatten(1)
        return delta.abs().amax(1) if self.norm == "linf" else delta.norm(dim=1)

    def project(self, x_adv: Tensor, x: Tensor) -> Tensor:
        """The legal input nearest to x_adv under linf; under l2 a legal one on the way. (B, ...) -> (B, ...)."""
        if self.norm == "linf":
            inside = x + (x_adv - x).clamp(-self.eps, self.eps)
        else:
            delta = x_adv - x
            inside = x + delta * (self.eps / _length(delta)).clamp(max=1)
        # Ball first, box second: x lies in the box, so clamping only moves a pixel towards x and stays in the ball.
        return inside.clamp(0, 1)

    def ascend(self, x_adv: Tensor, gradient: Tensor, x: Tensor, step: float | Tensor) -> Tensor:
        """One projected step of steepest ascent; `step` is a fraction of eps, so step and eps cannot be swapped.

        It may differ between samples, (B, 1, ...). Where a gradient is NaN the pixel stays: a NaN in an image would
        pass for an adversarial example.
        """
        gradient = gradient.nan_to_num(0.0, 0.0, 0.0)
        direction = gradient.sign() if self.norm == "linf" else _unit(gradient)
        return self.project(x_adv + step * self.eps * direction, x)

    def allows(self, x_adv: Tensor, x: Tensor) -> Tensor:
        """Which inputs are legal, up to rounding. (B, ...), (B, ...) -> bool (B,)."""
        slack = 4 * torch.finfo(x.dtype).eps
        near = self.distance(x_adv, x) <= self.eps * (1 + 8 * slack) + slack
        inside = ((x_adv >= 0) & (x_adv <= 1)).flatten(1).all(1)  # False where a pixel is NaN
        return near & inside

    def start(self, x: Tensor, kind: Start, stream: Stream) -> Tensor:
        """Where an attack begins.

        Args:
            x: natural inputs (B, ...).
            kind: "none" at x; "uniform" in the ball; "gaussian" at x + 0.001 N(0, 1), as TRADES and RSLAD do;
                "surface" in a random direction at distance eps, as AutoPGD does.
            stream: the draws.
        """
        if kind == "none":
            return x.clone()
        shape = tuple(x.shape[1:])
        if kind == "gaussian":
            return self.project(x + 0.001 * stream.normal(shape, x.dtype), x)
        if self.norm == "linf":
            direction = 2 * stream.uniform(shape, x.dtype) - 1
            if kind == "surface":
                direction = direction / direction.flatten(1).abs().amax(1).reshape(-1, *(1,) * len(shape))
            return self.project(x + self.eps * direction, x)
        # A normal draw gives the direction; the radius law u^(1/d) makes the volume uniform, not the radius.
        direction = stream.child("direction").normal(shape, x.dtype)
        if kind == "surface":
            return self.project(x + self.eps * _unit(direction), x)
        radius = stream.child("radius").uniform((1,) * len(shape), x.dtype) ** (1 / math.prod(shape))
        return self.project(x + self.eps * radius * _unit(direction), x)

    def __str__(self) -> str:
        """Such as 'linf eps=0.1'."""
        return f"{self.norm} eps={self.eps:.4g}"


def _unit(z: Tensor) -> Tensor:
    """Each sample at l2 norm 1; zeros stay zeros. (B, ...) -> (B, ...)."""
    # By the largest entry first: the squares of a saturated loss's gradient, 1e-26 and less, would all be 0 in float32.
    largest = z.flatten(1).abs().amax(1).clamp(min=torch.finfo(z.dtype).tiny)
    z = z / largest.reshape(-1, *(1,) * (z.ndim - 1))
    return z / _length(z)


def _length(delta: Tensor) -> Tensor:
    """The l2 norm of each sample, never 0, shaped to divide the batch. (B, ...) -> (B, 1, ...)."""
    return delta.flatten(1).norm(dim=1).clamp(min=_TINY).reshape(-1, *(1,) * (delta.ndim - 1))
