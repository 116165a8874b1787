"""Networks of few pixels as products with matrices: there, a layer's call costs more than its sums.

A convolution is a matrix from all pixels of its input to all pixels of its output. With fixed weights, everything
between two ReLUs (normalisation, convolution, batch norm; mean, linear layer) is one such matrix and an offset.
"""

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.autograd.function import once_differentiable

LARGEST_MATRIX = 1 << 17
"""Up to so many entries, a product with the matrix beats a convolution on a CPU."""

Pointwise = Callable[[], tuple[Tensor, Tensor]]
"""Scale and offset of each channel, two (C,), with the weights as they are now."""


class PixelMatrix:
    """Where a convolution's weights stand in the matrix from its input's pixels to its output's.

    Args:
        convolution: padded with zeros, if at all.
        inputs: shape of one image's maps (C, H, W) before it.
        outputs: shape of one image's maps after it.
        rows_first: whether pixels are counted row by row, (H, C, W), so that neighbouring rows are one range, or
            channel by channel, as they lie in memory.
    """

    def __init__(
        self, convolution: nn.Conv2d, inputs: torch.Size, outputs: torch.Size, *, rows_first: bool = False
    ) -> None:
        self.inputs, self.outputs = inputs, outputs
        weight = convolution.weight.detach()
        # Every entry of the matrix holds one weight or none: two pixels meet in one place of the kernel at most.
        numbers = torch.arange(1, weight.numel() + 1, dtype=torch.float64).reshape(weight.shape)
        pixels = torch.eye(inputs.numel(), dtype=torch.float64).reshape(-1, *inputs)
        maps = convolution._conv_forward(pixels, numbers, None)  # pyright: ignore[reportPrivateUsage]
        if rows_first:
            maps = maps.reshape(*inputs, *outputs).permute(1, 0, 2, 4, 3, 5)
        entries = maps.flatten()
        self.places = entries.nonzero()[:, 0]
        self._weights = entries[self.places].long() - 1

    def __call__(self, weight: Tensor) -> Tensor:
        """The matrix of these weights, (pixels in, pixels out); gradients find their way through it."""
        shape = self.inputs.numel(), self.outputs.numel()
        entries = weight.flatten().gather(0, self._weights)
        return weight.new_zeros(shape[0] * shape[1]).scatter_(0, self.places, entries).reshape(shape)

    def spread(self, bias: Tensor) -> Tensor:
        """A value for each channel (C,) at every pixel that comes out, channel by channel (C * H * W,)."""
        return bias.repeat_interleave(self.outputs[1:].numel())


@dataclass(frozen=True)
class _Product:
    """A matrix and an offset in parts: (pixels before, pixels behind, matrix, offset) for ranges of what it yields."""

    parts: tuple[tuple[slice, slice, Tensor, Tensor], ...]
    before: int
    behind: int

    def forward(self, x: Tensor) -> Tensor:
        """(B, before) -> (B, behind)."""
        y = x.new_empty(len(x), self.behind)
        for before, behind, matrix, offset in self.parts:
            torch.addmm(offset, x[:, before], matrix, out=y[:, behind])
        return y

    def backward(self, gradient: Tensor) -> Tensor:
        """(B, behind) -> (B, before)."""
        x = gradient.new_zeros(len(gradient), self.before)
        for before, behind, matrix, _ in self.parts:
            x[:, before].addmm_(gradient[:, behind], matrix.T)
        return x


class _Products(torch.autograd.Function):
    """One matrix after the other with a ReLU between each two; gradients to the input alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, products: list[_Product]) -> Tensor:
        ctx.products, kept = products, list[Tensor]()
        for product in products[:-1]:
            x = product.forward(x).relu_()
            kept.append(x)
        ctx.save_for_backward(*kept)
        return products[-1].forward(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        kept = list(ctx.saved_tensors)
        for product in reversed(ctx.products):
            gradient = product.backward(gradient)
            if kept:
                gradient = torch.ops.aten.threshold_backward(gradient, kept.pop(), 0)
        return gradient, None


class _Stage:
    """A convolution between layers that scale and move its channels. Pixels are counted row by row, (H, C, W)."""

    def __init__(
        self, before: list[Pointwise], convolution: nn.Conv2d, behind: list[Pointwise], pixels: PixelMatrix
    ) -> None:
        self._before, self._convolution, self._behind, self._pixels = before, convolution, behind, pixels
        # A row that comes out depends on few that go in, so each half of them is a product with a part of the matrix.
        width = pixels.outputs.numel()
        half = pixels.outputs[1] // 2 * (width // pixels.outputs[1])
        rows, columns = pixels.places // width, pixels.places % width
        self._ranges = [
            (_range(rows[(columns >= part.start) & (columns < part.stop)]), part)
            for part in (slice(0, half), slice(half, width))
            if part.stop > part.start
        ]

    def product(self) -> _Product:
        """With the weights as they are now."""
        weight, bias = self._convolution.weight, self._convolution.bias
        inner, moved = _joined(self._before, weight, weight.shape[1])
        outer, offset = _joined(self._behind, weight, weight.shape[0])
        offset = offset if bias is None else offset + outer * bias
        matrix = self._pixels(weight * inner[:, None, None] * outer[:, None, None, None])
        # x * inner + moved is (x + moved / inner) * inner; padding is 0 behind that and not before it.
        offset = _everywhere(moved / inner, self._pixels.inputs) @ matrix + _everywhere(offset, self._pixels.outputs)
        parts = tuple((before, behind, matrix[before, behind], offset[behind]) for before, behind in self._ranges)
        return _Product(parts, *matrix.shape)


def _range(places: Tensor) -> slice:
    return slice(int(places.min()), int(places.max()) + 1) if len(places) else slice(0, 0)


def _joined(layers: list[Pointwise], like: Tensor, channels: int) -> tuple[Tensor, Tensor]:
    """The layers one after the other as one scale and one offset, two (C,)."""
    scale, offset = like.new_ones(channels), like.new_zeros(channels)
    for layer in layers:
        by, to = layer()
        scale, offset = scale * by, offset * by + to
    return scale, offset


def _everywhere(values: Tensor, maps: torch.Size) -> Tensor:
    """A value for each channel (C,) at every pixel (H * C * W,)."""
    channels, height, width = maps
    return values[None, :, None].expand(height, channels, width).flatten()


class Chain:
    """A small network: convolutions, each with a ReLU behind it, and one linear layer at the end.

    Args:
        model: the network.
        stages: its convolutions, with what is between the ReLUs.
        pooled: what lies between the last ReLU and the linear layer, done to every pixel alone (pixels, features).
        linear: the last layer.
        inputs: shape (C, H, W) of the images.
    """

    def __init__(
        self, model: nn.Module, stages: list[_Stage], pooled: Tensor, linear: nn.Linear, inputs: torch.Size
    ) -> None:
        self._modules = list(model.modules())
        self._stages, self._pooled, self._linear, self._inputs = stages, pooled, linear, inputs

    def compiled(self) -> Callable[[Tensor], Tensor]:
        """Images (B, C, H, W) -> logits (B, K), with the weights as they are now."""
        with torch.no_grad():
            products = [stage.product() for stage in self._stages]
            matrix = F.linear(self._pooled, self._linear.weight)
            offset = self._linear(matrix.new_zeros(self._linear.in_features))
        products.append(_Product(((slice(None), slice(None), matrix, offset),), *matrix.shape))

        def classify(x: Tensor) -> Tensor:
            return cast("Tensor", _Products.apply(x.transpose(1, 2).flatten(1), products))

        return classify

    def computes(self, x: Tensor) -> bool:
        """Whether the products are all that a pass of x is: nobody looks at a layer, nothing is cast."""
        return (
            x.shape[1:] == self._inputs
            and x.dtype == self._pooled.dtype
            and not torch.is_autocast_enabled(x.device.type)
            and not any(
                module._forward_hooks or module._forward_pre_hooks or module._backward_hooks  # pyright: ignore[reportPrivateUsage]
                or module._backward_pre_hooks for module in self._modules  # pyright: ignore[reportPrivateUsage]
            )
        )  # fmt: skip


def find_chain(model: nn.Module, matrices: Mapping[nn.Conv2d, PixelMatrix], inputs: torch.Size) -> Chain | None:
    """The model as a chain, if it is one and nothing but its weights can change what it computes.

    Args:
        model: on the CPU, in eval mode.
        matrices: of each convolution that is called once and is small enough, pixels counted in any way.
        inputs: shape (C, H, W) of the images.
    """
    if not matrices or not all(_is_pure(module) for module in model.modules()):
        return None
    try:
        nodes = list(fx.symbolic_trace(model).graph.nodes)
    except Exception:  # whatever cannot be traced is no chain
        return None
    found = _Reader(model, matrices)
    current = nodes[0]
    for node in nodes[1:]:
        if node.op == "get_attr":
            continue
        others = [other for other in node.all_input_nodes if other is not current]
        alone = len(current.users) == 1 and all(other.op == "get_attr" for other in others)
        if node.op == "output":
            return found.chain(inputs) if alone and node.args[0] is current else None
        if not (alone and node.args and node.args[0] is current and found.reads(node)):
            return None
        current = node
    return None


def _is_pure(module: nn.Module) -> bool:
    """Whether a module's code is known: torch's own, or an architecture of this package."""
    known = type(module) in (*_LAYERS, nn.Sequential) or type(module).__module__.startswith("crdnd.models.")
    return known and "forward" not in vars(module)


class _Reader:
    """Takes a network's operations one after the other, as long as they make a chain."""

    def __init__(self, model: nn.Module, matrices: Mapping[nn.Conv2d, PixelMatrix]) -> None:
        self._model, self._matrices = model, matrices
        self._stages: list[_Stage] = []
        self._before: list[Pointwise] = []
        self._convolution: nn.Conv2d | None = None
        self._behind: list[Pointwise] = []
        self._pools: list[Callable[[Tensor], Tensor]] = []
        self._linear: nn.Linear | None = None
        self._last = torch.Size()

    def reads(self, node: fx.Node) -> bool:
        """Whether the chain goes on with this operation."""
        layer = self._model.get_submodule(str(node.target)) if node.op == "call_module" else node.target
        if self._linear is not None:
            return False
        if isinstance(layer, nn.Identity | nn.Dropout):
            return True
        if isinstance(layer, nn.Conv2d):
            return self._convolves(layer)
        if isinstance(layer, nn.BatchNorm2d):
            # Before a convolution its scale may become 0, by which `product` divides.
            known = layer.running_mean is not None and self._convolution is not None
            return known and self._scales(lambda: _of_norm(layer))
        if layer in (operator.sub, operator.truediv) and isinstance(node.args[1], fx.Node):
            value = operator.attrgetter(str(node.args[1].target))(self._model)
            by_channel = value.ndim == 4 and value.shape[1] == value.numel()
            one, zero = torch.ones_like(value).flatten(), torch.zeros_like(value).flatten()
            if layer is operator.sub:
                return by_channel and self._scales(lambda: (one, -value.flatten()))
            return by_channel and self._scales(lambda: (1 / value.flatten(), zero))
        if isinstance(layer, nn.ReLU) or layer in (F.relu, torch.relu, "relu"):
            return self._ends_stage()
        if isinstance(layer, nn.Linear):
            self._linear = layer
            return self._rests()
        if isinstance(layer, nn.AdaptiveAvgPool2d | nn.AvgPool2d | nn.Flatten):
            self._pools.append(layer)
            return self._rests()
        if layer in ("mean", "flatten"):
            self._pools.append(lambda z: getattr(z, str(layer))(*node.args[1:], **node.kwargs))
            return self._rests()
        return False

    def _convolves(self, layer: nn.Conv2d) -> bool:
        fits = self._convolution is None and not self._pools and layer in self._matrices and layer.groups == 1
        self._convolution = layer
        return fits

    def _scales(self, layer: Pointwise) -> bool:
        (self._before if self._convolution is None else self._behind).append(layer)
        return not self._pools

    def _ends_stage(self) -> bool:
        if self._convolution is None or self._pools:
            return False
        known = self._matrices[self._convolution]
        pixels = PixelMatrix(self._convolution, known.inputs, known.outputs, rows_first=True)
        self._stages.append(_Stage(self._before, self._convolution, self._behind, pixels))
        self._last = pixels.outputs
        self._before, self._convolution, self._behind = [], None, []
        return True

    def _rests(self) -> bool:
        """Whether nothing waits for a ReLU that will not come."""
        return bool(self._stages) and self._convolution is None and not self._before

    def chain(self, inputs: torch.Size) -> Chain | None:
        """What has been read, if it ends as a chain does."""
        if self._linear is None:
            return None
        channels, height, width = self._last
        pixels = torch.eye(self._last.numel(), dtype=self._linear.weight.dtype)
        maps = pixels.reshape(-1, height, channels, width).transpose(1, 2)
        for pool in self._pools:
            maps = pool(maps)
        if maps.shape[1:] != (self._linear.in_features,):
            return None
        return Chain(self._model, self._stages, maps, self._linear, inputs)


def _of_norm(norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """Scale and offset of a batch norm in eval mode; in float64 up to the one rounding at the end."""
    mean, variance = norm.running_mean, norm.running_var
    assert mean is not None and variance is not None  # noqa: S101, PT018
    scale = (variance.double() + norm.eps).rsqrt()
    if norm.affine:
        scale = scale * norm.weight.double()
    offset = -mean.double() * scale
    if norm.affine:
        offset = offset + norm.bias.double()
    return scale.to(mean.dtype), offset.to(mean.dtype)


_LAYERS = (
    nn.Conv2d, nn.BatchNorm2d, nn.ReLU, nn.Linear, nn.Flatten, nn.AdaptiveAvgPool2d, nn.AvgPool2d, nn.Identity,
    nn.Dropout,
)  # fmt: skip
