"""The same function, computed faster: what a model is while it is only attacked and not trained."""

from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from types import MethodType

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from crdnd.attacks._base import Classifier, input_gradient
from crdnd.models import evaluating

AGREEMENT = 1e-5
"""Largest relative difference of a sample's logits and input gradient between the fast and the plain computation."""


@dataclass
class _Switch:
    """Whether the patched modules compute the fast way."""

    on: bool = True


@contextmanager
def frozen(model: nn.Module, probe: Tensor) -> Generator[Classifier]:
    """Eval mode, no parameter gradients, batch norm folded into the convolutions before it, channels last.

    Nothing is copied and nobody else's `forward` is replaced but that of plain convolutions and batch norms, for the
    body's time; hooks and counters of the user's see every pass. Where the result on the probe is not the same up to
    rounding, or the model is random, all this but eval mode is left out.

    Args:
        model: images -> logits.
        probe: some natural images (B, C, H, W).

    Yields:
        The logits of the model as it is, without gradients, to judge what was found.
    """
    required = [parameter for parameter in model.parameters() if parameter.requires_grad]
    patched: list[nn.Module] = []
    switch = _Switch()

    def plain(x: Tensor) -> Tensor:
        switch.on = False
        try:
            with torch.no_grad():
                return model(x)
        finally:
            switch.on = True

    with evaluating(model):
        try:
            for parameter in required:
                parameter.requires_grad_(False)
            patched += _patch_if_the_same(model, probe.detach(), switch)
            yield plain
        finally:
            _restore(patched)
            for parameter in required:
                parameter.requires_grad_(True)


def _patch_if_the_same(model: nn.Module, probe: Tensor, switch: _Switch) -> list[nn.Module]:
    convolutions = [module for module in model.modules() if type(module) is nn.Conv2d and "forward" not in vars(module)]
    if not convolutions:
        return []
    seen, pairs = _trace(model, probe)
    # Channels last pays where there are channels to put last; grey images are 20% slower with it.
    layouts = [torch.contiguous_format] if probe.shape[1] == 1 else [torch.channels_last, torch.contiguous_format]
    for layout in layouts:
        patched: list[nn.Module] = []
        try:
            for convolution in convolutions:
                norm = pairs.get(convolution)
                _fold(convolution, norm, layout, switch)
                patched += [convolution] if norm is None else [convolution, norm]
            same = all(_agree(a, b) for a, b in zip(seen, answers(model, probe), strict=True))
        except RuntimeError:
            same = False  # as a `view` of what lies in another layout than its author thought
        except BaseException:
            _restore(patched)
            raise
        if same:
            return patched
        _restore(patched)
    return []


def _trace(model: nn.Module, probe: Tensor) -> tuple[tuple[Tensor, Tensor], dict[nn.Conv2d, nn.BatchNorm2d]]:
    """One pass of the model as it is, and which batch norm reads which convolution's output."""
    outputs: dict[int, tuple[nn.Conv2d, Tensor]] = {}
    calls: dict[nn.Module, int] = {}
    pairs: dict[nn.Conv2d, nn.BatchNorm2d] = {}

    def note(module: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> None:
        calls[module] = calls.get(module, 0) + 1
        if isinstance(module, nn.Conv2d):
            outputs[id(output)] = module, output  # kept alive, so that its id stays its own
        elif isinstance(module, nn.BatchNorm2d) and id(arguments[0]) in outputs:
            pairs[outputs[id(arguments[0])][0]] = module

    kinds = (nn.Conv2d, nn.BatchNorm2d)
    hooks = [module.register_forward_hook(note) for module in model.modules() if type(module) in kinds]
    try:
        seen = answers(model, probe)
    finally:
        for hook in hooks:
            hook.remove()
    once = {
        convolution: norm
        for convolution, norm in pairs.items()
        if calls[convolution] == calls[norm] == 1 and norm.running_mean is not None and "forward" not in vars(norm)
    }
    return seen, once


def _fold(convolution: nn.Conv2d, norm: nn.BatchNorm2d | None, layout: torch.memory_format, switch: _Switch) -> None:
    """Let the convolution compute with fixed weights, the norm's included, and the norm do nothing."""
    with torch.no_grad():
        weight, bias = convolution.weight, convolution.bias
        if norm is not None and norm.running_mean is not None and norm.running_var is not None:
            # In float64, so that only one rounding is added.
            folded, shift = fuse_conv_bn_weights(
                weight.double(), None if bias is None else bias.double(), norm.running_mean.double(),
                norm.running_var.double(), norm.eps, *_affine(norm),
            )  # fmt: skip
            weight, bias = folded.to(weight.dtype), shift.to(weight.dtype)
        weight = weight.detach().contiguous(memory_format=layout)
        bias = None if bias is None else bias.detach()

    def convolve(self: nn.Conv2d, x: Tensor) -> Tensor:
        if not switch.on:
            return nn.Conv2d.forward(self, x)
        return self._conv_forward(x.contiguous(memory_format=layout), weight, bias)  # pyright: ignore[reportPrivateUsage]

    def normalise(self: nn.BatchNorm2d, x: Tensor) -> Tensor:
        return x if switch.on else nn.BatchNorm2d.forward(self, x)

    convolution.forward = MethodType(convolve, convolution)
    if norm is not None:
        norm.forward = MethodType(normalise, norm)


def _affine(norm: nn.BatchNorm2d) -> tuple[Tensor | None, Tensor | None]:
    return (norm.weight.double(), norm.bias.double()) if norm.affine else (None, None)


def _restore(patched: list[nn.Module]) -> None:
    for module in patched:
        del module.forward  # the instance's own; the class's is found again


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
