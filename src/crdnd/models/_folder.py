"""Model folders: `model.safetensors` with the weights and `model.json` with everything else. Nothing in them is run."""

import shlex
from pathlib import Path
from typing import Any, Literal

import safetensors.torch
import torch
from pydantic import Field
from safetensors import SafetensorError
from torch import Tensor, nn

from crdnd.config import Frozen, build
from crdnd.errors import InputError
from crdnd.io import atomic_write_bytes, atomic_write_text, json_object, make_folder, read_bytes, read_verified, sha256
from crdnd.models._base import Architecture, Normalized, create_model
from crdnd.threat import ThreatModel

WEIGHTS, CARD = "model.safetensors", "model.json"
WAY_OUT = "run the command that made it again, or copy it again"


class ModelCard(Frozen):
    """The document `crdnd.model/1`: what a model is and how it came to be."""

    schema_: Literal["crdnd.model/1"] = Field(default="crdnd.model/1", alias="schema")
    sha256: str = ""
    """Of the weights file."""
    architecture: Architecture | None = None
    """None for a module of the user's own, which only its own code can build again."""
    class_name: str = ""
    params: int = 0
    method: str = ""
    role: Literal["teacher", "student"] = "student"
    seed: int | None = None
    checkpoint: Literal["best", "last"] | None = None
    data: str = ""
    split_seed: int = 0
    """Which split of the data it was trained on; the test images of another split may be among them."""
    class_names: tuple[str, ...] = ()
    threat: ThreatModel | None = None
    teacher_sha256: str | None = None
    command: str = ""
    versions: dict[str, str] = {}
    commit: str | None = None


def weights_bytes(model: nn.Module) -> bytes:
    """The model's state as a safetensors file; the same weights always give the same bytes."""
    # Clones: safetensors refuses tensors that share memory, as tied weights do.
    return safetensors.torch.save(
        {key: value.detach().cpu().contiguous().clone() for key, value in state(model).items()}
    )


def weights_sha256(model: nn.Module) -> str:
    """The identity of a model's weights: the SHA-256 of its weights file.

    A model that was read from a foreign file, such as ONNX, may keep no state; it is known by the bytes of that file.
    """
    of_file: str | None = getattr(model, "file_sha256", None)
    return of_file or sha256(weights_bytes(model))


def state(model: nn.Module) -> dict[str, Tensor]:
    """The tensors of a model's state, without what else a module may keep there."""
    return {key: value for key, value in model.state_dict().items() if isinstance(value, Tensor)}


def save_model(folder: Path, model: nn.Module, card: ModelCard) -> ModelCard:
    """Write a model folder; the card, written last, names the sha256 of the weights, so a torn pair is noticed."""
    make_folder(folder)
    data = weights_bytes(model)
    card = card.model_copy(
        update={
            "sha256": sha256(data),
            "architecture": model.architecture if isinstance(model, Normalized) else None,
            "class_name": f"{type(model).__module__}.{type(model).__qualname__}",
            "params": sum(parameter.numel() for parameter in model.parameters()),
        }
    )
    atomic_write_bytes(folder / WEIGHTS, data)
    atomic_write_text(folder / CARD, card.model_dump_json(by_alias=True, indent=1) + "\n")
    return card


def read_card(path: Path) -> ModelCard:
    """The card of a model folder or of a weights file."""
    file = path / CARD if path.is_dir() else path.with_suffix(".json")
    if not path.is_dir() and path.suffix != ".safetensors":
        raise InputError(f"{path}: is no model; give a model folder, or a .safetensors, .pt2 or .onnx file.")
    if not file.exists():
        raise InputError(f"{path}: is not a model folder, {file.name} is missing; give a finished run, or copy it too.")
    return parse_card(read_bytes(file), str(file))


def parse_card(content: bytes, where: str) -> ModelCard:
    """The card in a file's content; `where` is what messages call the file."""
    document = json_object(content, where)
    if document.get("schema") != "crdnd.model/1":
        raise InputError(f"{where}: has the format {document.get('schema')!r}; this version reads crdnd.model/1.")
    return build(ModelCard, document, where=where)


def is_model_folder(folder: Path) -> bool:
    """Whether a folder holds a model whose weights are whole."""
    try:
        read_verified(folder / WEIGHTS, read_card(folder).sha256, WAY_OUT)
    except InputError:
        return False
    return True


def load_model(path: str | Path, model: nn.Module | None = None) -> nn.Module:
    """Load a model, in eval mode.

    Args:
        path: a model folder, or its `.safetensors` file with the card beside it.
        model: for weights of the user's own module, a module of the same architecture to load them into.

    Raises:
        InputError: a file is missing, truncated or damaged, or belongs to another architecture.
    """
    path = Path(path)
    if not path.exists():
        raise InputError(f"{path}: there is no such model.")
    card = read_card(path)
    file = path / WEIGHTS if path.is_dir() else path
    tensors = parse_tensors(read_verified(file, card.sha256, WAY_OUT), file)
    if model is None:
        if card.architecture is None:
            place = shlex.quote(str(path))
            raise InputError(
                f"{path}: holds weights of {card.class_name}, which only its own code can build; "
                "call load_model(path, model=your_module), or on the command line give package.module:factory "
                f"--weights {place}, a teacher as --teacher package.module:factory --teacher-weights {place}."
            )
        model = build_architecture(card.architecture)
    load_tensors(model, tensors, str(file), "load it into the architecture it was made with")
    return model.eval()


def build_architecture(architecture: Architecture) -> Normalized:
    """A model of this architecture with untrained weights."""
    settings: dict[str, Any] = dict(architecture.settings)
    return create_model(
        architecture.name,
        input_shape=architecture.input_shape,
        num_classes=architecture.num_classes,
        mean=architecture.mean,
        std=architecture.std,
        **settings,
    )


def parse_tensors(data: bytes, file: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file's content, or an InputError."""
    try:
        return safetensors.torch.load(data)
    except (SafetensorError, ValueError, KeyError) as error:
        raise InputError(f"{file}: is not a readable safetensors file ({error}).") from None


def load_tensors(model: nn.Module, tensors: dict[str, Tensor], source: str, way_out: str) -> None:
    """Put tensors into a model; names and shapes must agree exactly, or an InputError names the source and way out."""
    own = state(model)
    missing = [key for key in own if key not in tensors]
    unexpected = [key for key in tensors if key not in own]
    other = [key for key in own if key in tensors and own[key].shape != tensors[key].shape]
    found: list[str] = []
    if missing:
        found.append(f"{len(missing)} missing, such as {missing[0]}")
    if unexpected:
        found.append(
            f"unexpected {unexpected[0]}" + (f" and {len(unexpected) - 1} more" if len(unexpected) > 1 else "")
        )
    if other:
        shapes = [tuple(tensors[other[0]].shape), tuple(own[other[0]].shape)]
        found.append(f"{other[0]} has shape {shapes[0]}, the model needs {shapes[1]}")
    if found:
        raise InputError(f"{source}: belongs to another architecture ({'; '.join(found)}); {way_out}.")
    with torch.no_grad():
        for key, value in own.items():
            value.copy_(tensors[key])
