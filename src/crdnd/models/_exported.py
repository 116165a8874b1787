"""Exported programs (`.pt2`, written by `torch.export.save`): a graph of aten calls with its weights, read as data.

`torch.export.load` is not used, because it runs what is in the file: it unpickles custom objects, falls back from
`weights_only=True` to a full unpickling, evaluates the expressions of symbolic sizes, compiles the guards as Python,
and calls whatever a node names, `torch.os.system` included. Here the JSON of the graph is walked step by step; every
step calls one operator of aten (or arithmetic on sizes), whose arguments are tensors, numbers and a few known words.
"""

import json
import operator
import re
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from crdnd.errors import InputError, first_line
from crdnd.io import read_bytes, sha256
from crdnd.models._about import read_about

ABOUT = "extra/crdnd.json"
"""What the exporter adds to the archive; nobody else needs it."""
SCHEMA_MAJOR = 8

# The numbers are those of torch/_export/serde/schema.py; they are part of the file format.
DTYPES = {
    1: torch.uint8, 2: torch.int8, 3: torch.int16, 4: torch.int32, 5: torch.int64,
    6: torch.float16, 7: torch.float32, 8: torch.float64, 12: torch.bool, 13: torch.bfloat16,
}  # fmt: skip
STRIDED = 7
MEMORY_FORMATS = {
    1: torch.contiguous_format,
    2: torch.channels_last,
    3: torch.channels_last_3d,
    4: torch.preserve_format,
}
# Arithmetic on sizes, where the batch size is left open.
SIZE_OPERATORS: dict[str, Callable[..., Any]] = {
    f"_operator.{name}": getattr(operator, name)
    for name in ("add", "sub", "mul", "floordiv", "mod", "neg", "eq", "ne", "lt", "le", "gt", "ge")
}
# The only strings that an operator may get, besides the equation of einsum; a file name is not among them.
EINSUM = "torch.ops.aten.einsum.default"
WORDS = {
    "none", "tanh", "floor", "trunc", "constant", "reflect", "replicate", "circular", "same", "valid",
    "mean", "sum", "linear", "bilinear", "bicubic", "nearest", "ij", "xy",
}  # fmt: skip
# Remarks of the tracer about sizes and types of its example; they compute nothing.
ASSERTIONS = re.compile(r"torch\.ops\.aten\.(_assert\w*|sym_constrain_range\w*)\.\w+")
ATEN = re.compile(r"torch\.ops\.aten\.(_?[a-z]\w*)\.([A-Za-z]\w*)")
_OVERLOAD = type(torch.ops.aten.add.Tensor)
# What a file of any content can raise on its way to a program: broken archives, missing keys, values of other types.
_DAMAGES = (
    zipfile.BadZipFile, zlib.error, LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RuntimeError,
    EOFError, OSError,
)  # fmt: skip


@dataclass(frozen=True)
class _Name:
    """A value that an earlier step computed, or a weight."""

    name: str


class _Device:
    """Stands for the device of the images, whatever device the program was exported on."""


@dataclass(frozen=True)
class _Step:
    """One call: where its arguments come from, where its results go, and what nobody reads afterwards."""

    function: Callable[..., Any]
    positional: tuple[Any, ...]
    keywords: dict[str, Any]
    outputs: tuple[Any, ...]
    """Per result a name, a list of names, or None for one that is not used."""
    written: frozenset[str] = frozenset()
    """What it changes in place."""
    last_used: tuple[str, ...] = ()


class ExportedModel(nn.Module):
    """An exported program as a module: images (B, C, H, W) -> logits (B, K), with gradients to images and weights.

    Its mode is the one it was exported in, which has to be evaluation; `eval()` and `train()` change nothing. Made by
    `read_exported`.
    """

    def __init__(self, program: "_Program", file_sha256: str) -> None:
        super().__init__()
        self.file_sha256 = file_sha256
        self._weights = tuple(program.weights)
        self._steps, self._input, self._output = program.steps, program.input, program.output
        self._sizes, self._dtype = program.sizes, program.dtype
        self.about = program.about
        self._in_place = any(step.written for step in program.steps)
        for name, value in program.weights.items():
            if isinstance(value, nn.Parameter):
                self.register_parameter(name, value)
            else:
                self.register_buffer(name, value)

    @property
    def input_shape(self) -> tuple[int, int, int] | None:
        """(C, H, W) of its images, where they are fixed, else of the images that its network is for, if it says so."""
        channels, height, width = self._sizes[1:]
        if channels is None or height is None or width is None:
            return self.about.input_shape
        return channels, height, width

    def forward(self, x: Tensor) -> Tensor:
        """Logits of images in [0, 1]; a fixed batch size is served in padded parts."""
        check_image_shape(x, self._sizes)
        return in_parts(self._run, x.to(self._dtype), self._sizes[0])

    def _run(self, x: Tensor) -> Tensor:
        values: dict[str, Any] = {name: getattr(self, name) for name in self._weights}
        # What the program changes in place may be a view of the caller's images.
        values[self._input] = x.clone() if self._in_place else x
        for step in self._steps:
            results = step.function(
                *(_fill(argument, values, x.device) for argument in step.positional),
                **{key: _fill(argument, values, x.device) for key, argument in step.keywords.items()},
            )
            _store(values, step.outputs, results)
            for name in step.last_used:  # without gradients this frees the memory
                values.pop(name, None)
        return values[self._output]


def read_exported(file: Path) -> ExportedModel:
    """Read a `.pt2` file without running anything in it.

    Raises:
        InputError: the file is damaged, is compiled or pickled, was exported in training mode, or calls something
            other than operators of aten.
    """
    data = read_bytes(file)
    try:
        with zipfile.ZipFile(BytesIO(data)) as archive:
            return ExportedModel(_Program(file, archive), sha256(data))
    except InputError:
        raise
    except _DAMAGES as error:
        raise InputError(f"{file}: is not a readable exported program ({first_line(error)}).") from None


def in_parts(run: Callable[[Tensor], Tensor], x: Tensor, size: int | None) -> Tensor:
    """Call `run` on parts of exactly `size` images, the last one filled up with zeros; None leaves x whole.

    Args:
        run: (size, C, H, W) -> (size, ...).
        x: (B, C, H, W), B from 0.
        size: the fixed batch size.

    Returns:
        (B, ...); gradients with respect to x pass through.
    """
    if size is None:
        return run(x)
    results: list[Tensor] = []
    for part in x.split(size):
        filler = part.new_zeros(size - len(part), *part.shape[1:])
        result = run(torch.cat([part, filler]) if len(filler) else part)
        if result.ndim == 0 or len(result) != size:
            raise InputError(f"the model returns shape {tuple(result.shape)} for a batch of {size} images.")
        results.append(result[: len(part)])
    return torch.cat(results)


def check_image_shape(x: Tensor, sizes: tuple[int | None, ...]) -> None:
    """Raise an InputError unless x (B, C, H, W) fits the sizes (B, C, H, W) of a model; None leaves a size open."""
    fits = x.ndim == len(sizes) and all(b is None or a == b for a, b in zip(x.shape[1:], sizes[1:], strict=True))
    if not fits:
        wanted = ", ".join("any" if size is None else str(size) for size in sizes[1:])
        raise InputError(f"the model takes images of shape ({wanted}), got {tuple(x.shape[1:])}.")


class _Program:
    """The content of an archive, checked: weights by the graph's names for them, steps, the input and the output."""

    def __init__(self, file: Path, archive: zipfile.ZipFile) -> None:
        self.file = file
        self._entries = self._read_entries(archive)
        document: Any = json.loads(self._entry("models/model.json"))
        self.about = read_about(json.loads(self._entries.get(ABOUT, b"{}")))
        if document["schema_version"]["major"] != SCHEMA_MAJOR:
            raise self._too_old()
        graph, signature = document["graph_module"]["graph"], document["graph_module"]["signature"]
        self._payload = self._payload_of("weights") | self._payload_of("constants")
        self._cache: dict[str, Tensor] = {}
        self.weights: dict[str, Tensor] = {}
        self.input, self.output = self._read_inputs(signature["input_specs"]), self._read_output(signature)
        meta = graph["tensor_values"][self.input]
        self.dtype = DTYPES[meta["dtype"]]
        self.sizes: tuple[int | None, ...] = tuple(size.get("as_int") for size in meta["sizes"])
        if len(self.sizes) != 4 or not self.dtype.is_floating_point:
            raise InputError(f"{file}: takes an input of {len(self.sizes)} dimensions and {self.dtype}, no images.")
        steps = [step for node in graph["nodes"] if (step := self._step(node)) is not None]
        self.steps = _with_last_uses(steps, keep={self.output, *self.weights})

    def _read_entries(self, archive: zipfile.ZipFile) -> dict[str, bytes]:
        """The archive's entries without the folder that they all lie in."""
        names = [name for name in archive.namelist() if not name.endswith("/")]
        if any("/data/aotinductor/" in name for name in names):
            raise InputError(f"{self.file}: holds compiled code, which is never run; save it with torch.export.save.")
        if "serialized_exported_program.json" in names:
            raise self._too_old()
        return {name.partition("/")[2]: archive.read(name) for name in names if "/data/sample_inputs/" not in name}

    def _entry(self, name: str) -> bytes:
        if name not in self._entries:
            raise InputError(f"{self.file}: is not a readable exported program ({name} is missing).")
        return self._entries[name]

    def _too_old(self) -> InputError:
        return InputError(
            f"{self.file}: has an unknown or older format; save it again with torch.export.save of torch 2.9 or newer."
        )

    def _pickled(self, what: str) -> InputError:
        return InputError(
            f"{self.file}: keeps {what} as a pickle, which may contain code and is never loaded; export a module whose "
            "state is plain tensors, with torch 2.9 or newer."
        )

    def _payload_of(self, kind: str) -> dict[str, Any]:
        """Where each weight or constant lies: its name -> (path in the archive, its description)."""
        if f"data/{kind}/model.pt" in self._entries:
            raise self._pickled(f"its {kind}")
        config: Any = json.loads(self._entry(f"data/{kind}/model_{kind}_config.json"))["config"]
        for name, entry in config.items():
            plain = "tensor_" if kind == "constants" else "weight_"
            if entry["use_pickle"] or not entry["path_name"].startswith(plain):
                raise self._pickled(name)
        return {name: (f"data/{kind}/{entry['path_name']}", entry["tensor_meta"]) for name, entry in config.items()}

    def _tensor(self, name: str) -> Tensor:
        """The weight of this name; tied weights, which lie at one place, are one tensor."""
        path, meta = self._payload[name]
        key = json.dumps([path, meta], sort_keys=True)
        if key not in self._cache:
            data, dtype = self._entry(path), DTYPES[meta["dtype"]]
            flat = torch.frombuffer(bytearray(data), dtype=dtype) if data else torch.empty(0, dtype=dtype)
            sizes, strides = ([int(value["as_int"]) for value in meta[kind]] for kind in ("sizes", "strides"))
            view = flat.as_strided(sizes, strides, int(meta["storage_offset"]["as_int"]))
            self._cache[key] = view.clone(memory_format=torch.contiguous_format)
        return self._cache[key]

    def _read_inputs(self, specs: list[Any]) -> str:
        """Fill `weights` and return the name of the images."""
        images: list[str] = []
        parameters: dict[int, nn.Parameter] = {}
        for spec in specs:
            ((kind, content),) = spec.items()
            if kind == "user_input" and "as_tensor" in content["arg"]:
                images.append(content["arg"]["as_tensor"]["name"])
            elif kind == "parameter":
                tensor = self._tensor(content["parameter_name"])
                parameter = parameters.setdefault(
                    id(tensor), nn.Parameter(tensor, requires_grad=tensor.is_floating_point())
                )
                self.weights[content["arg"]["name"]] = parameter
            elif kind in ("buffer", "tensor_constant"):
                self.weights[content["arg"]["name"]] = self._tensor(content[f"{kind}_name"])
            else:
                raise InputError(f"{self.file}: takes an input that is no tensor ({kind}); export forward(images).")
        if len(images) != 1:
            raise InputError(f"{self.file}: takes {len(images)} inputs; export a module with forward(images).")
        return images[0]

    def _read_output(self, signature: Any) -> str:
        """The name of the logits; whatever else the program returns or changes is refused."""
        kinds = [next(iter(spec)) for spec in signature["output_specs"]]
        if any(kind.endswith("_mutation") for kind in kinds):
            raise self._training("it changes its own state")
        if kinds != ["user_output"] or "as_tensor" not in signature["output_specs"][0]["user_output"]["arg"]:
            raise InputError(f"{self.file}: must return one tensor, the logits; its outputs are {', '.join(kinds)}.")
        return signature["output_specs"][0]["user_output"]["arg"]["as_tensor"]["name"]

    def _training(self, why: str) -> InputError:
        return InputError(
            f"{self.file}: was exported in training mode ({why}); call model.eval() before torch.export.export."
        )

    def _step(self, node: Any) -> _Step | None:
        """One node of the graph, or None where it computes nothing."""
        target = node["target"]
        if ASSERTIONS.fullmatch(target):
            return None
        positional: list[Any] = []
        keywords: dict[str, Any] = {}
        for argument in node["inputs"]:
            if argument["name"] in ("train", "training") and argument["arg"].get("as_bool"):
                raise self._training(f"{target} is in training mode")
            value = self._argument(target, argument["arg"])
            if argument.get("kind") == 2:
                keywords[str(argument["name"])] = value
            else:
                positional.append(value)
        outputs = tuple(self._result(target, output) for output in node["outputs"])
        function = self._function(target)
        written = frozenset(_written(function, positional, keywords))
        if written & self.weights.keys():
            raise self._training("it changes its own state")
        return _Step(function, tuple(positional), keywords, outputs, written)

    def _function(self, target: str) -> Callable[..., Any]:
        if target in SIZE_OPERATORS:
            return SIZE_OPERATORS[target]
        if match := ATEN.fullmatch(target):
            found: Any = getattr(getattr(torch.ops.aten, match[1], None), match[2], None)
            if isinstance(found, _OVERLOAD):
                return found
        raise self._unsupported(target)

    def _unsupported(self, what: str) -> InputError:
        return InputError(
            f"{self.file}: calls {what!r:.80}, which is no plain operator of torch and is not run; "
            "hand the model over as package.module:factory."
        )

    def _argument(self, target: str, argument: Any) -> Any:
        """The value of an argument, with a `_Name` for what is known only when the program runs."""
        ((kind, value),) = argument.items()
        match kind:
            case "as_none":
                return None
            case "as_int" | "as_bool" | "as_ints" | "as_bools":
                return _plain(value)
            case "as_float":
                return float(value)
            case "as_floats":
                return [float(entry) for entry in value]
            case "as_string" if value in WORDS or target == EINSUM:
                return value
            case "as_scalar_type":
                return DTYPES[value]
            case "as_memory_format":
                return MEMORY_FORMATS[value]
            case "as_layout" if value == STRIDED:
                return torch.strided
            case "as_device":
                return _Device()
            case "as_tensor":
                return _Name(value["name"])
            case "as_name":
                return _Name(value)
            case "as_tensors":
                return [_Name(entry["name"]) for entry in value]
            case "as_sym_int" | "as_sym_float" | "as_sym_bool" | "as_optional_tensor":
                return self._argument(target, value)
            case "as_sym_ints" | "as_sym_floats" | "as_sym_bools" | "as_optional_tensors":
                return [self._argument(target, entry) for entry in value]
            case _:
                raise self._unsupported(f"{target} with a {kind.removeprefix('as_')}")

    def _result(self, target: str, output: Any) -> Any:
        """The name or names that a result is kept under."""
        named = self._argument(target, output)
        if isinstance(named, list):
            return [entry.name for entry in cast("list[_Name]", named)]
        return named.name if isinstance(named, _Name) else None


def _with_last_uses(steps: list[_Step], keep: set[str]) -> tuple[_Step, ...]:
    """The steps, each with the names that no later step reads."""
    later = set(keep)
    result: list[_Step] = []
    for step in reversed(steps):
        touched = set(_names((step.positional, list(step.keywords.values())))) | set(_flat(step.outputs))
        last = tuple(sorted(touched - later))
        later |= touched
        result.append(replace(step, last_used=last))
    return tuple(reversed(result))


def _written(function: Any, positional: list[Any], keywords: dict[str, Any]) -> Iterator[str]:
    """The names of the values that an operator of aten changes in place; arithmetic on sizes changes none."""
    if isinstance(function, _OVERLOAD):
        schema: Any = function._schema  # pyright: ignore[reportPrivateUsage]
        for index, argument in enumerate(schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                given = positional[index] if index < len(positional) else keywords.get(argument.name)
                yield from _names(given)


def _names(argument: Any) -> Iterator[str]:
    if isinstance(argument, _Name):
        yield argument.name
    elif isinstance(argument, list | tuple):
        for entry in cast("list[Any]", argument):
            yield from _names(entry)


def _flat(outputs: Any) -> Iterator[str]:
    for output in outputs:
        if isinstance(output, str):
            yield output
        elif output is not None:
            yield from output


def _fill(argument: Any, values: dict[str, Any], device: torch.device) -> Any:
    """An argument with the values of this run in place of their names."""
    if isinstance(argument, _Name):
        return values[argument.name]
    if isinstance(argument, _Device):
        return device
    if isinstance(argument, list):
        return [_fill(entry, values, device) for entry in cast("list[Any]", argument)]
    return argument


def _store(values: dict[str, Any], outputs: tuple[Any, ...], results: Any) -> None:
    """Put a call's results under their names."""
    for output, result in zip(outputs, (results,) if len(outputs) == 1 else results or (), strict=False):
        if isinstance(output, str):
            values[output] = result
        elif output is not None:
            values.update(zip(output, result, strict=True))


def _plain(value: Any) -> Any:
    """A number, a truth value or a list of them; ValueError for anything else."""
    entries = cast("list[Any]", value) if isinstance(value, list) else [value]
    if not all(isinstance(entry, int) for entry in entries):
        raise ValueError(f"{value!r:.60} is no number")
    return value
