"""The same function, computed faster: what a model is while it is only attacked and not trained."""

import itertools
from collections import Counter
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from types import MethodType

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from crdnd.attacks._base import Classifier, input_gradient
from crdnd.attacks._matrices import LARGEST_MATRIX, Chain, PixelMatrix, find_chain
from crdnd.attacks._tiles import FEW_WEIGHTS, fits, tiled, tiles_pay, transformed
from crdnd.models import evaluating

AGREEMENT = 1e-5
"""Largest relative difference of a sample's logits and input gradient between the fast and the plain computation."""
PROBE = 8
"""How many images are enough to see whether they agree."""
LARGEST_LAST = 1 << 20
"""Above so many weights a convolution with channels last takes up to twice the time: 256 x 512 x 3 x 3 and more."""


@dataclass
class _Switch:
    """Whether the patched modules compute the fast way."""

    on: bool = True


@dataclass(frozen=True)
class _Call:
    """The one call of a convolution in a pass."""

    norm: nn.BatchNorm2d | None
    """What reads its output, and nothing else does."""
    pixels: PixelMatrix | None
    """How it is one product with a matrix, where that beats a convolution: its call costs more than its sums."""
    tiles: bool
    """Whether it is computed in tiles, which saves multiplications."""


@dataclass(frozen=True)
class _Output:
    """What a convolution returned."""

    convolution: nn.Conv2d
    maps: Tensor
    """Kept alive, so that its id stays its own."""
    version: int
    """How often it had been changed in place."""
    node: object
    """The operation that it came from, in the graph of the pass."""


@contextmanager
def frozen(
    model: nn.Module, probe: Tensor, *, fold: bool = True, channels_last: bool | None = None
) -> Generator[Classifier]:
    """Eval mode, no parameter gradients, and convolutions computed the fast way while the weights stand still.

    Args:
        model: images -> logits.
        probe: some natural images (B, C, H, W).
        fold: as for `Folding`.
        channels_last: as for `Folding`.

    Yields:
        The logits of the model as it is, without gradients, to judge what was found.
    """
    required = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with evaluating(model):
        try:
            for parameter in required:
                parameter.requires_grad_(False)
            folding = Folding(model, probe.detach(), fold=fold, channels_last=channels_last)
            with folding.applied() as switch:

                def plain(x: Tensor) -> Tensor:
                    switch.on = False
                    try:
                        with torch.no_grad():
                            return model(x)
                    finally:
                        switch.on = True

                yield plain
        finally:
            for parameter in required:
                parameter.requires_grad_(True)


class Folding:
    """A way to compute a model in eval mode faster.

    Batch norm goes into the convolution before it, channels last; a convolution of few pixels becomes one product
    with a matrix, one of many channels a product of tiles. Nothing is copied and nobody else's `forward` is
    replaced but that of plain convolutions and batch norms, for as long as it is applied; hooks and counters of the
    user's see every pass. Where the result on the probe, with batch norms of another scale, is not the same up to
    rounding, or the model is random, it does nothing.

    Args:
        model: images -> logits, in eval mode.
        probe: some natural images (B, C, H, W).
        fold: whether more than the layout changes.
        channels_last: whether the layout changes; None where that pays in float32.
    """

    def __init__(
        self, model: nn.Module, probe: Tensor, *, fold: bool = True, channels_last: bool | None = None
    ) -> None:
        self._model = model
        self._calls: dict[nn.Conv2d, _Call | None] = {}
        self._layout = torch.contiguous_format
        self._chain: Chain | None = None
        convolutions = [m for m in model.modules() if type(m) is nn.Conv2d and "forward" not in vars(m)]
        # Channels last pays where there are channels to put last: grey images are 20% slower with it. On a GPU it is
        # made for TF32 and half precision, which no evaluation computes in.
        last = channels_last or (channels_last is None and probe.shape[1] > 1 and probe.device.type == "cpu")
        if not convolutions or not (fold or last):
            return
        with _rescaled(model):
            seen, calls = _trace(model, probe)
            layouts = [torch.channels_last, torch.contiguous_format] if last else [torch.contiguous_format]
            if not fold:
                calls = {c: _Call(None, None, tiles=False) for c in calls}
            small = {c: call.pixels for c, call in calls.items() if call.pixels is not None}
            self._chain = find_chain(model, small, probe.shape[1:])
            plain = {c: replace(call, tiles=False) for c, call in calls.items()}
            ways = [calls, plain] if calls != plain else [plain]
            for way, layout in itertools.product(ways, layouts):
                self._calls, self._layout = {c: way.get(c) for c in convolutions}, layout
                try:
                    with self.applied():
                        if all(_agree(a, b) for a, b in zip(seen, answers(model, probe), strict=True)):
                            return
                except RuntimeError:
                    pass  # as a `view` of what lies in another layout than its author thought
            self._calls, self._chain = {}, None

    def __str__(self) -> str:
        """What is computed another way, such as '20 batch norms folded, 7 convolutions in tiles'."""
        calls = [call for call in self._calls.values() if call is not None]
        counts = {
            "batch norms folded": sum(call.norm is not None for call in calls),
            "convolutions as products": sum(call.pixels is not None for call in calls),
            "convolutions in tiles": sum(call.tiles for call in calls),
            "convolutions with channels last": sum(
                _layout(c, self._layout) is torch.channels_last for c in self._calls
            ),
        }
        return ", ".join(f"{count} {what}" for what, count in counts.items() if count)

    @contextmanager
    def applied(self, *, norms: bool = True) -> Generator[_Switch]:
        """Compute the fast way, with the weights as they are now, for the body's time.

        Without `norms` batch norms stay as they are, as they must in train mode.
        """
        switch, patched = _Switch(), list[nn.Module]()
        try:
            for convolution, call in self._calls.items():
                call = call if norms or call is None else replace(call, norm=None)
                convolution.forward = MethodType(_fast(convolution, call, self._layout, switch), convolution)
                patched.append(convolution)
                if call is not None and call.norm is not None:
                    call.norm.forward = MethodType(_nothing_where(switch), call.norm)
                    patched.append(call.norm)
            if self._chain is not None and norms:
                self._model.forward = MethodType(_as_products(self._chain, switch), self._model)
                patched.append(self._model)
            yield switch
        finally:
            for module in patched:
                del module.forward  # the instance's own; the class's is found again

    @contextmanager
    def training(self) -> Generator[None]:
        """Compute convolutions as products, in tiles or in their layout while the weights learn, in any mode."""
        patched = list[nn.Module]()
        try:
            for convolution, call in self._calls.items():
                if call is not None and call.pixels is not None:
                    convolution.forward = MethodType(_learning(call.pixels), convolution)
                    patched.append(convolution)
                elif call is not None and call.tiles and _few(convolution):
                    convolution.forward = MethodType(_learning_in_tiles(convolution, self._layout), convolution)
                    patched.append(convolution)
                elif self._layout is torch.channels_last:
                    convolution.forward = MethodType(_laid_out(_layout(convolution, self._layout)), convolution)
                    patched.append(convolution)
            yield
        finally:
            for module in patched:
                del module.forward


def _trace(model: nn.Module, probe: Tensor) -> tuple[tuple[Tensor, Tensor], dict[nn.Conv2d, _Call]]:
    """One pass of the model as it is, and how it calls those convolutions that it calls once."""
    outputs: dict[int, _Output] = {}
    times: dict[nn.Module, int] = {}
    readers: dict[nn.BatchNorm2d, _Output] = {}
    shapes: dict[nn.Conv2d, tuple[torch.Size, torch.Size]] = {}
    logits: list[Tensor] = []

    def note(module: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> None:
        times[module] = times.get(module, 0) + 1
        if isinstance(module, nn.Conv2d):
            shapes[module] = arguments[0].shape[1:], output.shape[1:]
            if output.grad_fn is not None:  # without a graph nobody can say who reads it
                outputs[id(output)] = _Output(module, output, output._version, output.grad_fn)
        elif isinstance(module, nn.BatchNorm2d):
            read = outputs.get(id(arguments[0]))
            if read is not None and read.version == arguments[0]._version:  # and not `maps += shortcut` in between
                readers[module] = read

    def end(module: nn.Module, arguments: object, output: Tensor) -> None:
        logits.append(output)

    kinds = (nn.Conv2d, nn.BatchNorm2d)
    hooks = [module.register_forward_hook(note) for module in model.modules() if type(module) in kinds]
    hooks.append(model.register_forward_hook(end))
    try:
        seen = answers(model, probe)
    finally:
        for hook in hooks:
            hook.remove()
    uses = _uses(logits[0])
    norms = {
        read.convolution: norm
        for norm, read in readers.items()
        if uses[read.node] == 1 and times[norm] == 1 and norm.running_mean is not None and "forward" not in vars(norm)
    }
    calls: dict[nn.Conv2d, _Call] = {}
    for convolution, (inputs, maps) in shapes.items():
        if times[convolution] == 1:
            pixels = _pixels(convolution, inputs, maps)
            tiles = pixels is None and tiles_pay(convolution, inputs)
            calls[convolution] = _Call(norms.get(convolution), pixels, tiles)
    return seen, calls


def _uses(logits: Tensor) -> Counter[object]:
    """How often each operation's result is read on the way to the logits."""
    found, known, left = Counter[object](), {logits.grad_fn}, [logits.grad_fn]
    while left:
        node = left.pop()
        after = [] if node is None else [one for one, _ in node.next_functions if one is not None]
        found.update(after)
        left += set(after) - known
        known.update(after)
    return found


@contextmanager
def _rescaled(model: nn.Module) -> Generator[None]:
    """Batch norms of another scale for the body's time: a new one changes so little that leaving it out agrees.

    By turns larger and smaller, so that the network's answers keep their size; and not shifted, which might leave its
    rectifiers nothing.
    """
    norms = [one for one in model.modules() if type(one) is nn.BatchNorm2d]
    kept = [one.running_var for one in norms]
    for index, (norm, variance) in enumerate(zip(norms, kept, strict=True)):
        norm.running_var = None if variance is None else variance * (0.5 if index % 2 else 2)
    try:
        yield
    finally:
        for norm, variance in zip(norms, kept, strict=True):
            norm.running_var = variance


def _pixels(convolution: nn.Conv2d, inputs: torch.Size, outputs: torch.Size) -> PixelMatrix | None:
    small = inputs.numel() * outputs.numel() <= LARGEST_MATRIX
    if not small or convolution.weight.device.type != "cpu" or convolution.padding_mode != "zeros":
        return None
    return PixelMatrix(convolution, inputs, outputs)


def _fast(
    convolution: nn.Conv2d, call: _Call | None, layout: torch.memory_format, switch: _Switch
) -> Callable[[nn.Conv2d, Tensor], Tensor]:
    """The convolution with fixed weights, the norm's included; as one matrix product where that is faster."""
    pixels, tiles = (call.pixels, call.tiles) if call else (None, False)
    layout = _layout(convolution, layout)

    # Not before they are asked for: where the model is a chain of products, they never are.
    @cache
    def folded(dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        with torch.no_grad():
            weight, bias = _folded(convolution, call.norm if call else None)
            return weight.contiguous(memory_format=layout).to(dtype), None if bias is None else bias.to(dtype)

    @cache
    def product() -> tuple[Tensor, Tensor | None]:
        assert pixels is not None  # noqa: S101
        weight, bias = folded(convolution.weight.dtype)
        return pixels(weight).T, None if bias is None else pixels.spread(bias)

    @cache
    def in_tiles() -> tuple[Tensor, Tensor | None]:
        with torch.no_grad():
            weight, bias = _folded(convolution, call.norm if call else None)
            return weight if _few(convolution) else transformed(weight), bias

    def cast(x: Tensor) -> torch.dtype:
        """The weights' type in this pass: an autocast would cast them again in every one."""
        dtype, kind = convolution.weight.dtype, x.device.type
        autocast = dtype is torch.float32 and torch.is_autocast_enabled(kind)
        return torch.get_autocast_dtype(kind) if autocast else dtype

    def convolve(self: nn.Conv2d, x: Tensor) -> Tensor:
        if not switch.on:
            return nn.Conv2d.forward(self, x)
        if pixels is not None and x.shape[1:] == pixels.inputs:
            return F.linear(x.flatten(1), *product()).unflatten(1, pixels.outputs)
        if tiles and fits(x.shape) and not torch.is_autocast_enabled(x.device.type):
            return tiled(x, *in_tiles())
        maps = x.contiguous(memory_format=layout)
        return self._conv_forward(maps, *folded(cast(x)))  # pyright: ignore[reportPrivateUsage]

    return convolve


def _learning(pixels: PixelMatrix) -> Callable[[nn.Conv2d, Tensor], Tensor]:
    """The convolution as a product, through which gradients reach its weights."""

    def convolve(self: nn.Conv2d, x: Tensor) -> Tensor:
        if x.shape[1:] != pixels.inputs:
            return nn.Conv2d.forward(self, x)
        bias = None if self.bias is None else pixels.spread(self.bias)
        return F.linear(x.flatten(1), pixels(self.weight).T, bias).unflatten(1, pixels.outputs)

    return convolve


def _learning_in_tiles(convolution: nn.Conv2d, layout: torch.memory_format) -> Callable[[nn.Conv2d, Tensor], Tensor]:
    """The convolution in tiles, through which gradients reach its weights."""
    otherwise = _laid_out(_layout(convolution, layout))

    def convolve(self: nn.Conv2d, x: Tensor) -> Tensor:
        if not fits(x.shape) or torch.is_autocast_enabled(x.device.type):
            return otherwise(self, x)
        return tiled(x, self.weight, self.bias)

    return convolve


def _few(convolution: nn.Conv2d) -> bool:
    return convolution.in_channels * convolution.out_channels <= FEW_WEIGHTS


def _laid_out(layout: torch.memory_format) -> Callable[[nn.Conv2d, Tensor], Tensor]:
    """The convolution with images and weights in one layout, whatever they came in."""

    def convolve(self: nn.Conv2d, x: Tensor) -> Tensor:
        weight = self.weight.contiguous(memory_format=layout)
        maps = x.contiguous(memory_format=layout)
        return self._conv_forward(maps, weight, self.bias)  # pyright: ignore[reportPrivateUsage]

    return convolve


def _layout(convolution: nn.Conv2d, layout: torch.memory_format) -> torch.memory_format:
    on_cpu = convolution.weight.device.type == "cpu"
    return torch.contiguous_format if on_cpu and convolution.weight.numel() > LARGEST_LAST else layout


def _as_products(chain: Chain, switch: _Switch) -> Callable[[nn.Module, Tensor], Tensor]:
    products = chain.compiled()

    def classify(self: nn.Module, x: Tensor) -> Tensor:
        return products(x) if switch.on and chain.computes(x) else type(self).forward(self, x)

    return classify


def _nothing_where(switch: _Switch) -> Callable[[nn.BatchNorm2d, Tensor], Tensor]:
    def normalise(self: nn.BatchNorm2d, x: Tensor) -> Tensor:
        return x if switch.on else nn.BatchNorm2d.forward(self, x)

    return normalise


def _folded(convolution: nn.Conv2d, norm: nn.BatchNorm2d | None) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of the convolution with the norm that follows it, detached."""
    weight, bias = convolution.weight.detach(), None if convolution.bias is None else convolution.bias.detach()
    if norm is None or norm.running_mean is None or norm.running_var is None:
        return weight, bias
    # In float64, so that only one rounding is added.
    folded, shift = fuse_conv_bn_weights(
        weight.double(), None if bias is None else bias.double(), norm.running_mean.double(),
        norm.running_var.double(), norm.eps, *_affine(norm),
    )  # fmt: skip
    return folded.to(weight.dtype), shift.to(weight.dtype)


def _affine(norm: nn.BatchNorm2d) -> tuple[Tensor | None, Tensor | None]:
    return (norm.weight.double(), norm.bias.double()) if norm.affine else (None, None)


def answers(model: nn.Module, probe: Tensor) -> tuple[Tensor, Tensor]:
    """Logits, and the gradient of a combination of them that no symmetry makes vanish. (B, K), (B, C, H, W)."""
    x = probe.clone().requires_grad_(True)
    with torch.enable_grad():
        logits = model(x)
        weights = torch.linspace(-1, 1, logits.shape[1], device=logits.device, dtype=logits.dtype)
        gradient = input_gradient((logits * weights).sum(), x)
    return logits.detach(), gradient


def _agree(a: Tensor, b: Tensor) -> bool:
    """Whether most samples are the same up to rounding.

    Most and not all: where a unit's input is all but 0, rounding decides on which side of its kink it lies, and that
    one sample's gradient changes by much more. The plain model's own gradient is then no closer to the exact one.
    """
    difference, size = ((z.flatten(1).norm(dim=1)) for z in (a - b, a))
    return bool((difference <= AGREEMENT * size).float().mean() > 0.5)
