"""int8 by ONNX Runtime's quantiser, and a twin of the quantised graph that can be differentiated."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.export import ExportedProgram

from crdnd.export._onnx import FITTED
from crdnd.export._program import plain_module

BATCH = 32
QUANTISED, SCALE, ZERO = "_quantized", "_scale", "_zero_point"
"""What ONNX Runtime's quantiser puts behind the name of a tensor."""


def quantised(core: Any, calibration: Tensor, folder: Path) -> Any:
    """The ONNX model with weights in int8, one scale a channel, and activations in uint8, one scale a tensor.

    Weights take 7 of the 8 bits: the products of uint8 and int8 are added in pairs of 16 bits on CPUs without VNNI,
    which would overflow with 8, and the file would be another function there.

    Args:
        core: the float32 model from `fitted` to `logits`, batch norms folded.
        calibration: images (N, C, H, W) of the model's own size in [0, 1], which say how far activations go.
        folder: for files on the way.
    """
    import onnx
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    class Images(CalibrationDataReader):
        def __init__(self) -> None:
            self.parts: Iterator[dict[str, NDArray[np.float32]]] = iter(
                [{FITTED: part.numpy()} for part in calibration.split(BATCH)]
            )

        def get_next(self) -> Any:
            return next(self.parts, None)

    prepared, target = onnx.ModelProto(), folder / "int8.onnx"
    prepared.CopyFrom(core)
    # Its batch norms are folded and its shapes known: what the quantiser would ask for otherwise.
    onnx.helper.set_model_props(prepared, {"onnx.quant.pre_process": "onnxruntime.quant"})
    quantize_static(
        prepared, target, Images(), quant_format=QuantFormat.QDQ, per_channel=True, reduce_range=True,
        activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8,
    )  # fmt: skip
    found = onnx.load(target)
    del found.metadata_props[:]
    return found


def dequantised(proto: Any) -> dict[str, Tensor]:
    """The weights of a quantised ONNX model as float32, what it computes with, by their names in the model."""
    held = _initialisers(proto)
    found: dict[str, Tensor] = {}
    for node in proto.graph.node:
        if node.op_type == "DequantizeLinear" and node.input[0] in held:
            value, scale, zero = (held[name] for name in node.input)
            axis = next((entry.i for entry in node.attribute if entry.name == "axis"), 1)
            along = [-1 if side == axis else 1 for side in range(value.ndim)] if scale.ndim else []
            levels = value.astype(np.int64) - (zero.astype(np.int64).reshape(along) if scale.ndim else int(zero))
            exact = levels.astype(np.float32) * (scale.reshape(along) if scale.ndim else scale)
            found[node.input[0].removesuffix(QUANTISED)] = torch.from_numpy(exact.astype(np.float32))
    return found


def twin_of(program: ExportedProgram, proto: Any) -> nn.Module:
    """A torch module that computes nearly what a quantised model computes, with gradients: for white-box attacks.

    Its weights are the file's, dequantised. Where the file rounds an activation to uint8 it rounds too, and passes the
    gradient straight through, except where the value was clipped.

    Args:
        program: of the float32 model that was quantised.
        proto: the quantised model.
    """
    module, weights, held = plain_module(program), dequantised(proto), _initialisers(proto)
    for name, parameter in [*module.named_parameters(), *module.named_buffers()]:
        parameter.requires_grad_(False)
        if name in weights:
            parameter.copy_(weights[name].reshape(parameter.shape))
    for node in list(module.graph.nodes):
        if node.op == "call_function" and node.name + SCALE in held:
            scale, zero = float(held[node.name + SCALE]), int(held[node.name + ZERO])
            with module.graph.inserting_after(node):
                rounded = module.graph.call_function(torch.fake_quantize_per_tensor_affine)
            node.replace_all_uses_with(rounded)
            rounded.args = (node, scale, zero, 0, 255)
    module.recompile()
    return module


def _initialisers(proto: Any) -> dict[str, NDArray[Any]]:
    import onnx.numpy_helper

    return {entry.name: onnx.numpy_helper.to_array(entry) for entry in proto.graph.initializer}
