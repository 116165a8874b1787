"""A model as a graph of aten calls: with the resize in front of it, and with batch norms inside its convolutions."""

import logging
import warnings
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram
from torch.nn.utils.fusion import fuse_conv_bn_weights

from crdnd.errors import InputError, first_line
from crdnd.models import evaluating, fitted

INPUT, OUTPUT = "images", "logits"
EXAMPLES = 5
"""Images in the example that a model is traced with: neither 0 nor 1, which a tracer takes for constants."""
Shape = tuple[int, int, int]


class Fitting(nn.Module):
    """The resize alone: images (B, C, height, width) of any size -> (B, *shape)."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape

    def forward(self, images: Tensor) -> Tensor:
        """Images as the model takes them."""
        return fitted(images, self.shape)


class Whole(nn.Module):
    """A model behind the resize: images (B, C, height, width) of any size -> logits (B, K)."""

    def __init__(self, model: nn.Module, shape: Shape) -> None:
        super().__init__()
        self.model, self.shape = model, shape

    def forward(self, images: Tensor) -> Tensor:
        """Logits of images in [0, 1]."""
        return self.model(fitted(images, self.shape))


def traced(module: nn.Module, shape: Shape, *, any_size: bool) -> ExportedProgram:
    """The graph of a module for any number of images.

    Args:
        module: images (B, C, H, W) -> a tensor.
        shape: (C, H, W) of the model.
        any_size: whether height and width are open too.

    Raises:
        InputError: it cannot be traced, or its graph holds for one number of images only.
    """
    channels, height, width = shape
    sizes = {0: Dim("batch")}
    if any_size:
        height, width = height + 3, width + 7
        sizes |= {2: Dim("height"), 3: Dim("width")}
    example = torch.full((EXAMPLES, channels, height, width), 0.5)
    with evaluating(module), torch.no_grad(), quiet():
        try:
            program = torch.export.export(module, (example,), dynamic_shapes=(sizes,), strict=False)
        except Exception as error:  # the tracer's errors have no base of their own
            raise InputError(f"the model cannot be exported for any number of images: {first_line(error)}") from None
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # names the paths of this machine
    return program


def folded(program: ExportedProgram, shape: Shape) -> ExportedProgram:
    """The same function with every batch norm that follows a convolution inside the convolution's weights."""
    module = plain_module(program)
    aten = torch.ops.aten
    for norm in module.graph.find_nodes(op="call_function", target=aten.batch_norm.default):
        convolution = cast("fx.Node", norm.args[0])
        if convolution.target is not aten.conv2d.default or len(convolution.users) > 1:
            continue
        images, weight, bias, *others = (*convolution.args, None)[: max(len(convolution.args), 3)]
        scale, shift, mean, variance = (_value(module, argument) for argument in norm.args[1:5])
        fused = fuse_conv_bn_weights(
            cast("Tensor", _value(module, weight)), _value(module, bias), cast("Tensor", mean),
            cast("Tensor", variance), cast("float", norm.args[7]), scale, shift,
        )  # fmt: skip
        names = [f"{convolution.name}_{part}" for part in ("weight", "bias")]
        for name, value in zip(names, fused, strict=True):
            module.register_parameter(name, nn.Parameter(value.detach(), requires_grad=False))
        with module.graph.inserting_before(convolution):
            convolution.args = (images, *(module.graph.get_attr(name) for name in names), *others)
        norm.replace_all_uses_with(convolution)
        module.graph.erase_node(norm)
    module.graph.eliminate_dead_code()
    module.recompile()
    return traced(module, shape, any_size=False)


def plain_module(program: ExportedProgram) -> fx.GraphModule:
    """A program as a module that can be changed, and asked for evaluation mode, which changes nothing."""
    found = program.module(check_guards=False)
    return fx.GraphModule(found, found.graph)


def _value(module: fx.GraphModule, argument: Any) -> Tensor | None:
    """What an argument of a graph is: a weight or a buffer of its module."""
    if argument is None:
        return None
    value: Any = module
    for part in str(argument.target).split("."):
        value = getattr(value, part)
    return value


@contextmanager
def quiet() -> Generator[None]:
    """Without what torch's exporters say of themselves."""
    log = logging.getLogger("torch.onnx._internal.exporter._registration")  # that torchvision is not installed
    before = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            # torch copies its own deprecated class.
            warnings.filterwarnings("ignore", message=".*LeafSpec.* is deprecated", category=FutureWarning)
            yield
    finally:
        log.setLevel(before)
