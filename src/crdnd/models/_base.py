"""Models that take pixels in [0, 1]: normalisation is their first layer, so eps means the same for all of them."""

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from crdnd import registry
from crdnd.config import Frozen, build
from crdnd.errors import InputError
from crdnd.models._extras import TIMM, timm_network


class Architecture(Frozen):
    """Everything needed to build a model again: what `model.json` stores."""

    name: str
    settings: dict[str, int | float | str | bool] = {}
    num_classes: int = Field(ge=2)
    input_shape: tuple[int, int, int]
    """(C, H, W)."""
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @model_validator(mode="after")
    def _plausible(self) -> "Architecture":
        for name, values in (("mean", self.mean), ("std", self.std)):
            if len(values) != self.input_shape[0]:
                raise ValueError(f"{name} has {len(values)} values for {self.input_shape[0]} channels.")
        if min(self.std) <= 0:
            raise ValueError(f"std must be above 0 in every channel, got {self.std}.")
        return self

    def __str__(self) -> str:
        """Such as 'cnn(width=8)'."""
        return f"{self.name}({', '.join(f'{key}={value}' for key, value in self.settings.items())})"


class Normalized(nn.Module):
    """A network behind its normalisation. (B, C, H, W) in [0, 1] -> logits (B, K)."""

    mean: Tensor
    std: Tensor
    takes_any_size = False
    """Whether H and W of its `input_shape` are a guess: weights of others do not say for which images they are."""

    def __init__(self, network: nn.Module, architecture: Architecture) -> None:
        super().__init__()
        self.architecture = architecture
        channels = architecture.input_shape[0]
        self.network = network
        self.register_buffer("mean", torch.tensor(architecture.mean).reshape(1, channels, 1, 1))
        self.register_buffer("std", torch.tensor(architecture.std).reshape(1, channels, 1, 1))

    @property
    def channels(self) -> int:
        """Of its images."""
        return self.architecture.input_shape[0]

    def forward(self, x: Tensor) -> Tensor:
        """Logits of images in [0, 1]."""
        return self.network((x - self.mean) / self.std)


def normalizes(model: nn.Module) -> bool:
    """Whether a model is known to normalise its images itself."""
    return isinstance(model, Normalized) and bool((model.mean != 0).any() or (model.std != 1).any())


def create_model(
    name: str,
    *,
    input_shape: tuple[int, int, int],
    num_classes: int,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    seed: int = 0,
    **settings: Any,
) -> Normalized:
    """Build a model of a known architecture; the same seed gives the same weights.

    Args:
        name: a key of `model_names()`, or `timm:` and a model of timm.
        input_shape: (C, H, W) of the images.
        num_classes: K.
        mean: normalisation per channel; by default 0, or what timm has for the model.
        std: normalisation per channel; by default 1, or what timm has for the model.
        seed: of the initial weights. The global random state is left as it was.
        settings: the architecture's own, such as `width=8`.
    """
    channels = input_shape[0]
    values: dict[str, Any] = {"name": name, "num_classes": num_classes, "input_shape": input_shape}
    values |= {"mean": tuple(mean or (0.0,) * channels), "std": tuple(std or (1.0,) * channels)}
    where = f"model {name}"
    if name.startswith(TIMM):
        build(Architecture, values, where)  # says what is wrong before timm builds or downloads anything
        with seeded(seed):
            network, cfg = timm_network(name, input_shape, num_classes, settings)
        # Weights that timm downloads are there once; a saved model has its own.
        values |= {"settings": {key: value for key, value in settings.items() if key != "pretrained"}}
        values |= {"mean": tuple(mean or cfg[0]), "std": tuple(std or cfg[1])}
        return Normalized(network, build(Architecture, values, where))
    network_class = registry.load("models", name, "MODEL")
    chosen = build(network_class.Settings, settings, where)
    architecture = build(Architecture, values | {"settings": chosen.model_dump()}, where)
    smallest: int = getattr(network_class, "smallest", 1)
    if min(architecture.input_shape[1:]) < smallest:
        height, width = architecture.input_shape[1:]
        raise InputError(f"model {name}: takes images of {smallest}x{smallest} or more, got {height}x{width}.")
    with seeded(seed):
        network = network_class(channels, num_classes, chosen)
    return Normalized(network, architecture)


@contextmanager
def seeded(seed: int) -> Generator[None]:
    """Run the body with torch's generator at this seed, and leave the global one as it was."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield


@contextmanager
def evaluating(model: nn.Module) -> Generator[None]:
    """Run the body with the model in eval mode, then give every submodule its own mode back.

    `model.train()` afterwards would be wrong: it would also wake up layers that were frozen on purpose.
    """
    before = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, was_training in before:
            module.training = was_training


def device_of(model: nn.Module) -> torch.device:
    """Where a model's parameters lie; the CPU for a model without any."""
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))


def parameter_count(model: nn.Module) -> int:
    """How many parameters the model has."""
    return sum(parameter.numel() for parameter in model.parameters())
