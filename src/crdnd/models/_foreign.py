"""Models from elsewhere: what MODEL means, weights files of others, and ONNX files. No file's code is ever run."""

import importlib
import re
import sys
import warnings
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from crdnd import registry
from crdnd.errors import InputError, did_you_mean, first_line
from crdnd.io import read_bytes, sha256
from crdnd.models._about import read_about
from crdnd.models._base import Normalized, evaluating
from crdnd.models._exported import check_image_shape, in_parts, read_exported
from crdnd.models._extras import ROBUSTBENCH, robustbench_model
from crdnd.models._folder import load_model, load_tensors, parse_tensors, state
from crdnd.models._named import fit, is_architecture, named_model
from crdnd.models._published import unwrapped
from crdnd.models._remote import is_remote, local_model, local_weights, remote_name
from crdnd.models._spec import parse_spec

PICKLED = (".pt", ".pth", ".bin", ".ckpt")
NESTED = ("state_dict", "model", "model_state_dict", "net", "student", "last")
"""Where checkpoints keep the state dict; `student` is RSLAD's, `last` that of two entries of RobustBench."""
WAY_OUT = "use the weights of this very architecture"
CONVERT = "where you trust its source, convert it: safetensors.torch.save_file(model.state_dict(), 'x.safetensors')"


class OnnxModel(nn.Module):
    """An ONNX file as a module: images (B, C, H, W) -> logits (B, K), float32, on the CPU, without gradients.

    It has no parameters. Its first output is taken for the logits; a fixed batch size is served in padded parts.
    """

    provides_gradients = False

    def __init__(self, file: Path) -> None:
        """Open the file; an InputError says why it cannot be used."""
        super().__init__()
        runtime = _onnxruntime()
        self.file_sha256 = _onnx_sha256(file)
        options = runtime.SessionOptions()
        options.log_severity_level = 4  # the error that is raised says it all
        options.intra_op_num_threads = torch.get_num_threads()
        try:
            self._session = runtime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # the runtime's errors have no base class of their own
            raise InputError(f"{file}: is not a readable ONNX model ({first_line(error)}).") from None
        inputs = self._session.get_inputs()
        if len(inputs) != 1:
            names = ", ".join(entry.name for entry in inputs)
            raise InputError(f"{file}: needs {len(inputs)} inputs ({names}); export a model of images alone.")
        self._input = inputs[0]
        self._sizes = tuple(size if isinstance(size, int) else None for size in self._input.shape)
        self.about = read_about(self._session.get_modelmeta().custom_metadata_map)
        if self._input.type != "tensor(float)" or len(self._sizes) != 4:
            raise InputError(
                f"{file}: takes a {self._input.type} of {len(self._sizes)} dimensions; "
                "export a model of images (B, C, H, W) in float32."
            )

    @property
    def input_shape(self) -> tuple[int, int, int] | None:
        """(C, H, W) of its images, where they are fixed, else of the images that its network is for, if it says so."""
        channels, height, width = self._sizes[1:]
        if channels is None or height is None or width is None:
            return self.about.input_shape
        return channels, height, width

    @property
    def channels(self) -> int | None:
        """Of its images, where they are fixed."""
        return self._sizes[1]

    def forward(self, x: Tensor) -> Tensor:
        """Logits of images in [0, 1], detached, on the device of the images."""
        check_image_shape(x, self._sizes)
        return in_parts(self._run, x.detach().to("cpu", torch.float32), self._sizes[0]).to(x.device)

    def _run(self, x: Tensor) -> Tensor:
        first = self._session.get_outputs()[0].name
        try:
            (logits,) = self._session.run([first], {self._input.name: x.contiguous().numpy()})
        except Exception as error:  # as above
            raise RuntimeError(f"onnxruntime: {first_line(error)}") from error
        return torch.as_tensor(logits)


def has_gradients(model: nn.Module) -> bool:
    """Whether a model can be differentiated; False where it, or a part of it, is an `OnnxModel`."""
    return all(getattr(module, "provides_gradients", True) for module in model.modules())


def lets_gradients_through(model: nn.Module, x: Tensor) -> bool:
    """Whether autograd knows of any way from images x to the model's logits, be it a wrong one."""
    if not has_gradients(model):
        return False
    x = x.detach().requires_grad_(True)
    with evaluating(model), torch.enable_grad():
        total = model(x).sum()
    if not total.requires_grad:
        return False
    (gradient,) = cast("tuple[Tensor | None]", torch.autograd.grad(total, x, allow_unused=True))
    return gradient is not None


def resolve_model(spec: str, weights: str | Path | None = None) -> nn.Module:
    """What MODEL means on the command line; paths never run code.

    Args:
        spec: one of these, the first that fits:
            a model folder or its `.safetensors` file, an exported program (`.pt2`) or an ONNX file (`.onnx`);
            `https://...#sha256=...` for such a file in the web, or `hf:owner/name[@revision]` for a model folder at the
            Hugging Face hub, downloaded once;
            `robustbench:NAME`, a model of RobustBench, which downloads it;
            an architecture with its settings, such as `wrn,depth=34,width=10` or `timm:NAME`, for weights of others;
            `package.module:factory`, which is the user's own code and is called without arguments.
        weights: for an architecture or a factory, the file with the weights, here or in the web: `.safetensors`, or a
            `.pt`, `.pth`, `.bin` or `.ckpt` with a state dict; for a factory also a folder that this package wrote.
            `wrn,weights=FILE` says the same.

    Raises:
        InputError: there is no such model, a file is damaged, contains code or belongs to another architecture.
        RunError: it lies in the web, and cannot be reached.
    """
    remote = is_remote(spec)
    path = Path(remote_name(spec) if remote else spec)
    if not remote and not path.exists():
        return _resolve_name(spec, weights)
    if weights is not None:
        raise InputError(
            "weights: belong to a model given as package.module:factory or by its architecture; "
            f"{spec} is a file with weights of its own."
        )
    suffix = path.suffix.lower() if remote or path.is_file() else ""
    if suffix in PICKLED:
        raise InputError(
            f"{spec}: is a file of weights without an architecture; give the model by its architecture, such as "
            f"wrn,depth=34,width=10, or as package.module:factory, and this file as its weights."
        )
    if remote:
        return resolve_model(local_model(spec))
    if suffix == ".pt2":
        return read_exported(path)
    if suffix == ".onnx":
        return OnnxModel(path)
    return load_model(spec)


def _resolve_name(spec: str, weights: str | Path | None) -> nn.Module:
    """A model that is no file: `robustbench:NAME`, an architecture, or a factory."""
    name, settings = parse_spec(spec)
    if "weights" in settings:
        if weights is not None:
            raise InputError(f"weights: {spec} names them already; leave --weights away.")
        weights = str(settings.pop("weights"))
    weights = None if weights is None else local_weights(str(weights))
    if name.startswith(ROBUSTBENCH):
        if weights is not None:
            raise InputError(f"weights: {name} has weights of its own.")
        return robustbench_model(name, settings)
    if is_architecture(name):
        return named_model(name, settings, None if weights is None else (_read(Path(weights)), str(weights)))
    if ":" in name:
        if settings:
            raise InputError(f"{spec}: a factory is called without settings; only weights can be given.")
        model = _call_factory(name)
        return model if weights is None else load_weights(model, weights)
    if settings or weights is not None:
        raise InputError(f"{name}: is no architecture{did_you_mean(name, registry.names('models'))}")
    raise InputError(f"{spec}: there is no such model.")


def load_weights(model: nn.Module, weights: str | Path) -> nn.Module:
    """Put the weights of a file into a model, and return it in eval mode.

    Names and shapes must agree exactly; for an architecture of this package so must those that its weights have where
    others publish them. A normalisation in the file becomes the model's.

    Args:
        model: of the architecture that the weights belong to.
        weights: as for `resolve_model`.
    """
    file = Path(weights)
    if file.is_dir():
        return load_model(file, model=model)
    tensors = _read(file)
    if isinstance(model, Normalized):
        fit(model, tensors, str(file), WAY_OUT)
    else:
        load_tensors(model, unwrapped(tensors, state(model)), str(file), WAY_OUT)
    return model.eval()


def _read(file: Path) -> dict[str, Tensor]:
    """The tensors of a weights file."""
    if not file.exists():
        raise InputError(f"{file}: there is no such weights file.")
    suffix = file.suffix.lower()
    if suffix == ".safetensors":
        return parse_tensors(read_bytes(file), file)
    if suffix in PICKLED:
        return _state_dict(_load_pickled(file), file)
    raise InputError(f"{file}: weights are read from .safetensors, {', '.join(PICKLED)} or a model folder.")


def _call_factory(spec: str) -> nn.Module:
    module_name, _, factory_name = spec.partition(":")
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))  # as `python -m` does: the user's module usually lies here
    try:
        factory: Any = getattr(importlib.import_module(module_name), factory_name)
    except (ImportError, AttributeError, ValueError, TypeError) as error:
        raise InputError(f"{spec}: cannot be imported ({error}).") from None
    if not callable(factory) or isinstance(factory, nn.Module):
        raise InputError(f"{spec}: must be a function that returns the model, got {type(factory).__name__}.")
    try:
        model = factory()
    except Exception as error:  # it is the user's code, and may raise anything
        raise InputError(
            f"{spec}: called without arguments, it failed ({type(error).__name__}: {first_line(error)}); "
            f"python -c 'import {module_name}; {module_name}.{factory_name}()' shows where."
        ) from error
    if not isinstance(model, nn.Module):
        raise InputError(f"{spec}: must return a torch.nn.Module, got {type(model).__name__}.")
    return model


def _load_pickled(file: Path) -> Any:
    """The content of a torch file, by the loader that refuses everything except tensors and plain containers."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what it warns of, it also refuses
            return torch.load(file, weights_only=True, map_location="cpu")
    except Exception as error:  # a damaged file can raise nearly anything
        if type(error).__name__ != "UnpicklingError" and "TorchScript" not in str(error):
            raise InputError(f"{file}: is not a readable weights file ({first_line(error)}); copy it again.") from None
        named = re.search(r"(?:GLOBAL|class) ([\w.]+)", str(error))
        what = f" ({named[1]})" if named else ""
        raise InputError(f"{file}: holds pickled content{what} that may contain code, never run; {CONVERT}.") from None


def _state_dict(content: Any, file: Path) -> dict[str, Tensor]:
    """The state dict in a checkpoint: the whole of it, or what lies under one of the usual keys."""
    if _is_state_dict(content):
        return content
    keys = list(cast("dict[Any, Any]", content)) if isinstance(content, dict) else []
    for key in NESTED:
        if key in keys and _is_state_dict(content[key]):
            return content[key]
    found = f"the keys {', '.join(map(str, keys[:5]))}" if keys else type(content).__name__
    raise InputError(
        f"{file}: holds no state dict of tensors, neither at the top nor under {', '.join(NESTED)}: {found}."
    )


def _is_state_dict(content: Any) -> bool:
    return isinstance(content, dict) and all(
        isinstance(key, str) and isinstance(value, Tensor) for key, value in cast("dict[Any, Any]", content).items()
    )


def _onnxruntime() -> Any:
    try:
        return importlib.import_module("onnxruntime")
    except ImportError:
        raise InputError('an .onnx model needs onnxruntime: pip install "crdnd[onnx]".') from None


def _onnx_sha256(file: Path) -> str:
    """The identity of an ONNX model: of its bytes, and of the files beside it that hold weights too large for it."""
    data = read_bytes(file)
    digests = [sha256(data)]
    # In the protobuf: the key "location", then the tag and the length of its value, a path relative to the model.
    for entry in re.finditer(rb"\n\x08location\x12", data):
        start = entry.end() + 1
        name = data[start : start + data[entry.end()]].decode(errors="replace") if entry.end() < len(data) else ""
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise InputError(f"{file}: names weights outside its folder ({name}), which are not read.")
        beside = file.parent / name
        if beside.is_file() and (digest := sha256(read_bytes(beside))) not in digests:
            digests.append(digest)
    return digests[0] if len(digests) == 1 else sha256("".join(digests).encode())
