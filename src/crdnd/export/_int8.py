"""int8 by ONNX Runtime's quantiser, and a twin of the quantised graph that can be differentiated."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx, nn
from torch.export import ExportedProgram

from crdnd.export._onnx import FITTED
from crdnd.export._program import plain_module, quiet

BATCH = 32
QUANTISED, PUT_BEFORE = "_quantized", "_QuantizeLinear_Input"
"""What ONNX Runtime's quantiser puts behind the name of a weight, and of an output before it is rounded."""
OPERATORS = (
    "Conv", "Gemm", "MatMul", "Add", "Relu", "Clip", "Concat", "Pad", "Slice", "Reshape", "Transpose", "MaxPool",
    "AveragePool", "GlobalAveragePool",
)  # fmt: skip
"""What is computed in int8; all else, such as a batch norm that no convolution took in, stays float32."""
SAME = 1e-4
"""Largest difference, relative to the largest value, of one tensor computed by ONNX Runtime and by torch."""


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
        activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8, op_types_to_quantize=list(OPERATORS),
        # Logits stay float32: in 256 steps two classes could tie, and a tie is no answer.
        extra_options={"OpTypesToExcludeOutputQuantization": ["Gemm", "MatMul"]},
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


def twin_of(program: ExportedProgram, core: Any, proto: Any, example: Tensor) -> nn.Module:
    """A torch module that computes nearly what a quantised model computes, with gradients: for white-box attacks.

    Its weights are the file's, dequantised. Where the file rounds an activation to uint8 it rounds too, and passes the
    gradient straight through, except where the value was clipped.

    Args:
        program: of the float32 model that was quantised.
        core: that model as ONNX.
        proto: the quantised model.
        example: some images (B, C, H, W), by which the tensors of one graph are found in the other.
    """
    with quiet():
        module = plain_module(program.run_decompositions({}))  # without operations in place
    weights, held = dequantised(proto), _initialisers(proto)
    module.requires_grad_(False)
    steps = {
        entry.input[0].removesuffix(PUT_BEFORE): (float(held[entry.input[1]]), int(held[entry.input[2]]))
        for entry in proto.graph.node
        if entry.op_type == "QuantizeLinear"
    }
    for node, name in _same(module, core, list(steps), example):
        scale, zero = steps[name]
        with module.graph.inserting_after(node):
            rounding = module.graph.call_function(torch.fake_quantize_per_tensor_affine)
        node.replace_all_uses_with(rounding)
        rounding.args = (node, scale, zero, 0, 255)
    for name, value in [*module.named_parameters(), *module.named_buffers()]:
        if name in weights:
            value.copy_(weights[name].reshape(value.shape))
    module.recompile()
    return module


def _same(module: fx.GraphModule, core: Any, names: list[str], example: Tensor) -> list[tuple[fx.Node, str]]:
    """Which node of a module computes which tensor of an ONNX model.

    The exporter renames what it converts, so tensors are told by their values on some images.
    """
    import onnx
    import onnxruntime

    watched = onnx.ModelProto()
    watched.CopyFrom(core)
    known = {entry.name for entry in watched.graph.output}
    watched.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names if name not in known)
    session: Any = onnxruntime.InferenceSession(watched.SerializeToString(), providers=["CPUExecutionProvider"])
    values = dict(zip(names, session.run(names, {FITTED: example.numpy()}), strict=True))
    seen = _Values(module)
    with torch.no_grad():
        seen.run(example)
    found: list[tuple[fx.Node, str]] = []
    for node, value in seen.values.items():
        alike = [name for name in values if _equal(value, torch.from_numpy(values[name]))]
        if alike:
            found.append((node, alike[0]))
            del values[alike[0]]
    return found


class _Values(fx.Interpreter):
    """Runs a module and keeps what each call in it returns."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.values: dict[fx.Node, Tensor] = {}

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if n.op == "call_function" and isinstance(result, Tensor):
            self.values[n] = result
        return result


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and bool((a - b).abs().max() <= SAME * b.abs().max())


def _initialisers(proto: Any) -> dict[str, NDArray[Any]]:
    import onnx.numpy_helper

    return {entry.name: onnx.numpy_helper.to_array(entry) for entry in proto.graph.initializer}
