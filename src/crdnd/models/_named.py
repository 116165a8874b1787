"""Architectures given by name with weights from elsewhere: `wrn,depth=34,width=10` and a file."""

from collections.abc import Mapping
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from crdnd import registry
from crdnd.config import Frozen, build
from crdnd.errors import InputError, did_you_mean
from crdnd.models._base import Architecture, Normalized, create_model
from crdnd.models._extras import TIMM, fixes_size
from crdnd.models._folder import load_tensors, state
from crdnd.models._published import Published, renamed, split_normalization, unwrapped

NORMALIZATION = {
    "none": ((0.0,), (1.0,)),
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "mnist": ((0.1307,), (0.3081,)),
    "fashion_mnist": ((0.2860,), (0.3530,)),
}
"""Mean and std that published networks are behind; those of CIFAR as Gowal et al. and RobustBench have them."""


class StatedNormalization(Frozen):
    """What images in [0, 1] are put through first, where it is said beside a model's own settings."""

    normalization: str | None = None
    """A key of `NORMALIZATION`."""
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None

    def normalized(self, name: str, channels: int) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
        """The mean and std that were stated, (C,) each, or None."""
        if self.normalization is None:
            if (self.mean is None) != (self.std is None):
                raise InputError(f"model {name}: mean and std are given together.")
            found = None if self.mean is None or self.std is None else (self.mean, self.std)
        elif self.mean is not None or self.std is not None:
            raise InputError(f"model {name}: give normalization, or mean and std.")
        elif self.normalization not in NORMALIZATION:
            raise InputError(
                f"model {name}: normalization: no such one {self.normalization!r}"
                f"{did_you_mean(self.normalization, NORMALIZATION)} Or give mean and std."
            )
        else:
            found = NORMALIZATION[self.normalization]
        if found is None:
            return None
        mean, std = ((values * channels if len(values) == 1 else values) for values in found)
        return mean, std


class _About(StatedNormalization):
    """What a weights file may not say."""

    num_classes: int | None = Field(default=None, ge=2)
    size: int | None = Field(default=None, ge=1)
    """Of the images; unless it is given or the network fixes it, the model takes them as they come."""


def is_architecture(name: str) -> bool:
    """Whether this names an architecture of this package, or one of timm."""
    return name.startswith(TIMM) or name in registry.names("models")


def named_model(name: str, settings: Mapping[str, Any], weights: tuple[Mapping[str, Tensor], str] | None) -> Normalized:
    """A model of a known architecture with these weights, in eval mode.

    Classes and channels are read off the weights. So is the normalisation, where they hold one; where they hold none
    and none is stated, the images stay in [0, 1].

    Args:
        name: of the architecture.
        settings: the architecture's own, and num_classes, size, normalization (a key of `NORMALIZATION`), mean and std.
        weights: tensors under any name that their publishers have, and the file they are from. None only for a model
            of timm that has `pretrained=true`.
    """
    apart = {key: value for key, value in settings.items() if key in _About.model_fields}
    own = {key: value for key, value in settings.items() if key not in apart}
    about = build(_About, apart, f"model {name}")
    if weights is None and not (name.startswith(TIMM) and own.get("pretrained")):
        raise InputError(
            f"{name}: is an architecture without weights; give the file as --weights, or {name},weights=FILE."
        )
    tensors, source = weights or ({}, "")
    channels, classes = _sizes(name, own, tensors)
    if about.num_classes is None and classes is None:
        raise InputError(f"model {name}: num_classes cannot be seen; give it as {name},num_classes=10.")
    stated, size = about.normalized(name, channels), about.size or (28 if channels == 1 else 32)
    mean, std = stated or (None, None)
    model = create_model(
        name, input_shape=(channels, size, size), num_classes=about.num_classes or classes or 0,
        mean=mean, std=std, **_variant(name, tensors) | own,
    )  # fmt: skip
    model.takes_any_size = about.size is None and not fixes_size(model.network)
    if weights is None:
        return model.eval()
    held = fit(model, tensors, source, f"say what it is, as {name} with other settings")
    if stated is None and not held and _variant(name, tensors):
        raise InputError(
            f"{source}: comes from code that normalises inside the network, and the numbers are not in the file; "
            f"say {name},normalization=cifar10 (also for RSLAD's CIFAR-100 teacher), cifar100, none, or mean and std."
        )
    if stated is not None and held and not _agree(stated, (model.architecture.mean, model.architecture.std)):
        raise InputError(
            f"{source}: holds mean {_shown(model.architecture.mean)} and std {_shown(model.architecture.std)}, and "
            f"mean {_shown(stated[0])} and std {_shown(stated[1])} were stated; leave them away."
        )
    return model.eval()


def fit(model: Normalized, tensors: Mapping[str, Tensor], source: str, way_out: str) -> bool:
    """Put published tensors into a model of a known architecture.

    Returns:
        Whether a normalisation was among them; it is the model's from now on.

    Raises:
        InputError: a tensor is missing, is one too many or has another shape, under every name that is known for it.
    """
    network, published = model.network, _published(model.network)
    own = state(network)
    bare, stats = split_normalization(unwrapped(tensors, own))
    if published.sign in bare:
        other = {key: value for key, value in published.variant.items() if model.architecture.settings[key] != value}
        if other:
            wanted = ", ".join(f"{key}={value}" for key, value in other.items())
            raise InputError(f"{source}: belongs to the variant with {wanted}; build the model so.")
    load_tensors(network, renamed(bare, own, published), source, way_out)
    if stats is not None:
        channels = model.architecture.input_shape[0]
        mean, std = (tuple((value.expand(channels) if value.numel() == 1 else value).tolist()) for value in stats)
        values = model.architecture.model_dump() | {"mean": mean, "std": std}
        model.architecture = build(Architecture, values, source)
        with torch.no_grad():
            model.mean.copy_(torch.tensor(mean).reshape(model.mean.shape))
            model.std.copy_(torch.tensor(std).reshape(model.std.shape))
    return stats is not None


def _sizes(name: str, settings: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> tuple[int, int | None]:
    """Channels, and classes where they can be seen: the sides of the first and the last weight that the images meet."""
    if name.startswith(TIMM):
        return 3, None
    kind = registry.load("models", name, "MODEL")
    with torch.device("meta"):  # shapes and names without memory
        network = kind(3, 2, build(kind.Settings, dict(settings), f"model {name}"))
    own = state(network)
    bare, _ = split_normalization(unwrapped(tensors, own))
    found = renamed(bare, own, _published(network))
    first = next(key for key, value in own.items() if value.ndim == 4)
    last = [key for key, value in own.items() if value.ndim == 2][-1]
    channels = found[first].shape[1] if first in found and found[first].ndim == 4 else 3
    return channels, found[last].shape[0] if last in found and found[last].ndim == 2 else 10


def _published(network: Any) -> Published:
    return getattr(network, "published", Published())


def _variant(name: str, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Settings of the networks that such names belong to."""
    if name.startswith(TIMM):
        return {}
    published = _published(registry.load("models", name, "MODEL"))
    is_one = published.sign and any(key == published.sign or key.endswith(f".{published.sign}") for key in tensors)
    return dict(published.variant) if is_one else {}


def _agree(a: tuple[tuple[float, ...], ...], b: tuple[tuple[float, ...], ...]) -> bool:
    return len(a[0]) == len(b[0]) and torch.allclose(torch.tensor(a), torch.tensor(b), atol=1e-4)


def _shown(values: tuple[float, ...]) -> str:
    return "/".join(f"{value:.4g}" for value in values)
