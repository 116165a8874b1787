"""ONNX graphs: the model's and the resize's, joined, with what they are in their metadata."""

import functools
import importlib
from collections.abc import Mapping
from typing import Any

import torch
from torch.export import ExportedProgram

from crdnd.errors import InputError, first_line
from crdnd.export._program import INPUT, OUTPUT, Fitting, Shape, quiet, traced

OPSET = 18
FITTED = "fitted"
"""Between the resize and the model."""
PACKAGES = ("onnx", "onnxscript", "onnxruntime")


def check_packages() -> None:
    """Raise an InputError unless everything is installed that an ONNX file is made and measured with."""
    for name in PACKAGES:
        try:
            importlib.import_module(name)
        except ImportError:
            raise InputError(f"exporting to ONNX needs {name}: pip install 'crdnd[export]'.") from None


def onnx_graph(program: ExportedProgram) -> Any:
    """A model's program as an ONNX model from `fitted` (batch, C, H, W) to `logits` (batch, K)."""
    return _converted(program, FITTED, OUTPUT)


def joined(core: Any, shape: Shape, metadata: Mapping[str, str]) -> Any:
    """The resize before a model: from `images` (batch, C, height, width) of any size to `logits` (batch, K).

    Args:
        core: the ONNX model from `fitted` to `logits`, in float32 or quantised.
        shape: (C, H, W) that it takes.
        metadata: what a reader of the file should know.
    """
    import onnx.compose

    front = onnx.compose.add_prefix(_resize(shape), "resize.", rename_inputs=False, rename_outputs=False)
    front.ir_version = core.ir_version
    whole = onnx.compose.merge_models(front, core, io_map=[(FITTED, FITTED)])
    # Joining forgets how the open sizes were called.
    for entry, names in ((whole.graph.input[0], ("batch", "", "height", "width")), (whole.graph.output[0], ("batch",))):
        for side, name in zip(entry.type.tensor_type.shape.dim, names, strict=False):
            if name:
                side.dim_param = name
    whole.producer_name = "crdnd"
    onnx.helper.set_model_props(whole, dict(metadata))
    return whole


@functools.cache
def _resize(shape: Shape) -> Any:
    """The ONNX model from `images` to `fitted`."""
    return _converted(traced(Fitting(shape), shape, any_size=True), INPUT, FITTED)


def _converted(program: ExportedProgram, source: str, target: str) -> Any:
    with quiet():
        try:
            converted: Any = torch.onnx.export(
                program, dynamo=True, input_names=[source], output_names=[target], opset_version=OPSET,
                external_data=False, verbose=False,
            )  # fmt: skip
        except Exception as error:  # as for the tracer
            raise InputError(f"the model cannot be written as ONNX: {first_line(error)}") from None
    return converted.model_proto
