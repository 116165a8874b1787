"""Models from pixels in [0, 1] to logits. One file, one architecture; any other `torch.nn.Module` will do as well."""

from crdnd import registry
from crdnd.models._about import About
from crdnd.models._adapted import Adapted, adapted, fitted, input_shape
from crdnd.models._base import (
    Architecture,
    Normalized,
    create_model,
    device_of,
    evaluating,
    normalizes,
    parameter_count,
    seeded,
)
from crdnd.models._exported import ExportedModel
from crdnd.models._extras import TIMM
from crdnd.models._folder import (
    CARD,
    WEIGHTS,
    ModelCard,
    is_model_folder,
    load_model,
    load_tensors,
    parse_tensors,
    read_card,
    save_model,
    state,
    weights_sha256,
)
from crdnd.models._foreign import OnnxModel, has_gradients, lets_gradients_through, load_weights, resolve_model
from crdnd.models._hub import EVALUATION, EXPORTS, PAGE, Pulled, exported_files, parse_hub, pull_model, push_files
from crdnd.models._named import NORMALIZATION, StatedNormalization
from crdnd.models._remote import is_remote, local_model, remote_name
from crdnd.models._spec import parse_spec

__all__ = [
    "CARD",
    "EVALUATION",
    "EXPORTS",
    "NORMALIZATION",
    "PAGE",
    "TIMM",
    "WEIGHTS",
    "About",
    "Adapted",
    "Architecture",
    "ExportedModel",
    "ModelCard",
    "Normalized",
    "OnnxModel",
    "Pulled",
    "StatedNormalization",
    "adapted",
    "create_model",
    "device_of",
    "evaluating",
    "exported_files",
    "fitted",
    "has_gradients",
    "input_shape",
    "is_model_folder",
    "is_remote",
    "lets_gradients_through",
    "load_model",
    "load_tensors",
    "load_weights",
    "local_model",
    "model_names",
    "normalizes",
    "parameter_count",
    "parse_hub",
    "parse_spec",
    "parse_tensors",
    "pull_model",
    "push_files",
    "read_card",
    "remote_name",
    "resolve_model",
    "save_model",
    "seeded",
    "state",
    "weights_sha256",
]


def model_names() -> list[str]:
    """The registry's keys."""
    return registry.names("models")
