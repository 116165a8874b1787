"""A 3x3 convolution as products of tiles, with a quarter of the multiplications.

Winograd's minimal filtering; Lavin and Gray 2016 (arXiv 1509.09308), F(4x4, 3x3): a tile of 4x4 outputs depends on 6x6
inputs, and costs 36 products in place of 144. The transforms pay where there are many channels for each pixel.
"""

from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FEWEST_WEIGHTS, MOST_WEIGHTS = 128 * 128, 512 * 512
"""Channels in times channels out, below which the transforms cost more than the products save, and above which four
times the weights are too much memory."""
FEW_WEIGHTS = 256 * 256
"""Up to so many the weights are transformed in every pass, which costs little time and keeps no memory; above them once
for all passes, and not while they learn."""
INSIDE, TILE = 4, 6
POINTS = (0.0, 0.75, -0.75, 1.5, -1.5)
"""Where the polynomials are evaluated, beside infinity. With the usual 0, 1, -1, 2, -2 rounding is twice as large."""
CHUNK = 1 << 21
"""Numbers in the transformed inputs that are worked on at once, so that they stay in the processor's cache."""


def tiles_pay(convolution: nn.Conv2d, inputs: Sequence[int]) -> bool:
    """Whether a convolution of images (C, H, W) can be computed this way, and is faster so: on a CPU alone."""
    return (
        convolution.weight.device.type == "cpu"
        and convolution.weight.dtype in (torch.float32, torch.float64)
        and convolution.kernel_size == (3, 3)
        and convolution.stride == (1, 1)
        and convolution.padding == (1, 1)
        and convolution.dilation == (1, 1)
        and convolution.padding_mode == "zeros"
        and convolution.groups == 1
        and FEWEST_WEIGHTS <= convolution.in_channels * convolution.out_channels <= MOST_WEIGHTS
        and fits(inputs)
    )


def fits(inputs: Sequence[int]) -> bool:
    """Whether tiles cover images (..., H, W)."""
    return inputs[-1] % INSIDE == 0 and inputs[-2] % INSIDE == 0


def transformed(weight: Tensor) -> Tensor:
    """The weights (K, C, 3, 3) as they stand in the products, (36, K, C)."""
    _, of_weights, _ = _transforms(weight.dtype)
    outputs, channels = weight.shape[:2]
    return (of_weights @ weight.reshape(outputs * channels, 9).T).view(-1, outputs, channels)


def tiled(x: Tensor, weights: Tensor, bias: Tensor | None) -> Tensor:
    """The convolution. (B, C, H, W) -> (B, K, H, W), channels last.

    Args:
        x: images, of which H and W are multiples of 4.
        weights: as they are, (K, C, 3, 3), or what `transformed` made of them, (36, K, C), which is then kept.
        bias: (K,) or None.
    """
    return cast("Tensor", _Tiled.apply(x, weights, bias))


class _Tiled(torch.autograd.Function):
    """Both directions are the same three products, in reverse."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weights: Tensor, bias: Tensor | None) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weights)
        ctx.shape, ctx.raw = x.shape, weights.ndim == 4
        weights = transformed(weights) if ctx.raw else weights
        _, _, of_outputs = _transforms(x.dtype)
        # Not the view of another tensor: what comes next may work in place.
        shape = len(x), weights.shape[1], *x.shape[2:]
        found = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
        for part in _chunks(x.shape, weights):
            products = torch.bmm(_inner(x[part]), weights.transpose(1, 2))
            squares = _squares(found[part].permute(0, 2, 3, 1))
            outputs = (of_outputs @ products.flatten(1)).view(INSIDE, INSIDE, *squares.shape[:3], -1)
            outputs = outputs.permute(2, 3, 4, 0, 1, 5)
            if bias is None:
                squares.copy_(outputs)
            else:
                torch.add(outputs, bias, out=squares)
        return found

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, weights = ctx.saved_tensors
        weights = transformed(weights) if ctx.raw else weights
        of_inputs, _, of_outputs = _transforms(gradient.dtype)
        count, channels, height, width = ctx.shape
        found = gradient.new_zeros(count, height + 2, width + 2, channels) if ctx.needs_input_grad[0] else None
        of_weights = torch.zeros_like(weights) if x is not None else None
        for part in _chunks(ctx.shape, weights):
            squares = _squares(gradient[part].permute(0, 2, 3, 1).contiguous())
            outer = of_outputs.T @ squares.permute(3, 4, 0, 1, 2, 5).reshape(INSIDE**2, -1)
            outer = outer.view(TILE**2, -1, weights.shape[1])
            if of_weights is not None:
                of_weights.baddbmm_(outer.transpose(1, 2), _inner(cast("Tensor", x)[part]))
            if found is not None:
                inner = of_inputs.T @ torch.bmm(outer, weights).flatten(1)
                inner = inner.view(TILE, TILE, *squares.shape[:3], channels).permute(2, 3, 4, 0, 1, 5)
                patches = _patches(found[part])
                for down in (0, 1):  # neighbours overlap, every other tile does not
                    for right in (0, 1):
                        patches[:, down::2, right::2] += inner[:, down::2, right::2]
        if of_weights is not None and ctx.raw:
            _, evaluated, _ = _transforms(gradient.dtype)
            of_weights = (of_weights.flatten(1).T @ evaluated).view(*weights.shape[1:], 3, 3)
        of_x = None if found is None else found[:, 1:-1, 1:-1].permute(0, 3, 1, 2)
        return of_x, of_weights, gradient.sum((0, 2, 3)) if ctx.needs_input_grad[2] else None


def _inner(x: Tensor) -> Tensor:
    """The inputs as they stand in the products, (B, C, H, W) -> (36, tiles, C)."""
    of_inputs, _, _ = _transforms(x.dtype)
    patches = _patches(F.pad(x.permute(0, 2, 3, 1), (0, 0, 1, 1, 1, 1)))
    return (of_inputs @ patches.permute(3, 4, 0, 1, 2, 5).reshape(TILE**2, -1)).view(TILE**2, -1, x.shape[1])


def _chunks(shape: torch.Size, weights: Tensor) -> Iterator[slice]:
    count, _, height, width = shape
    each = height * width // INSIDE**2 * TILE**2 * max(weights.shape[1:])
    size = max(1, CHUNK // each)
    return (slice(first, first + size) for first in range(0, count, size))


def _patches(padded: Tensor) -> Tensor:
    """Overlapping views of 6x6 pixels, (B, H + 2, W + 2, C) -> (B, H / 4, W / 4, 6, 6, C)."""
    count, height, width, channels = padded.shape
    image, row, column, channel = padded.stride()
    return padded.as_strided(
        (count, height // INSIDE, width // INSIDE, TILE, TILE, channels),
        (image, INSIDE * row, INSIDE * column, row, column, channel),
        padded.storage_offset(),
    )


def _squares(maps: Tensor) -> Tensor:
    """Views of 4x4 pixels, (B, H, W, K) -> (B, H / 4, W / 4, 4, 4, K)."""
    return maps.unflatten(1, (-1, INSIDE)).unflatten(3, (-1, INSIDE)).transpose(2, 3)


@cache
def _transforms(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Matrices of inputs (36, 36), weights (36, 9) and outputs (16, 36) that flatten both axes of a tile into one.

    Toom and Cook's product of polynomials: evaluate both at the points, multiply, interpolate. The filter is its
    transpose. Powers of two move between inputs and weights, such that neither is large.
    """

    def evaluation(terms: int) -> Tensor:
        rows = [[point**power for power in range(terms)] for point in POINTS]
        return torch.tensor([*rows, [0.0] * (terms - 1) + [1.0]], dtype=torch.float64)

    inputs = torch.linalg.inv(evaluation(TILE)).T
    scale = torch.exp2(inputs.abs().amax(1, keepdim=True).log2().round())
    flat = [torch.kron(one, one).to(dtype) for one in (inputs / scale, evaluation(3) * scale, evaluation(INSIDE).T)]
    return flat[0], flat[1], flat[2]
