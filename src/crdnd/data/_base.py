"""Images and labels in memory, their checks, and their splits. Everything downstream asks for batches by sample id."""

import hashlib
import logging
from collections.abc import Sequence, Sized
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from crdnd.errors import InputError, first_line
from crdnd.random import Stream, permutation

log = logging.getLogger("crdnd")


class MapDataset(Protocol):
    """A map-style data set, such as a `torch.utils.data.Dataset`, of pairs (image (C, H, W) in [0, 1], label)."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


@dataclass(frozen=True, eq=False)
class ImageData:
    """Images with labels, checked once when made.

    Args:
        x: images (N, C, H, W): floating point in [0, 1], half precision becoming float32, or uint8 in 0 .. 255, which
            each batch divides by 255.
        y: labels (N,), integers in 0 .. num_classes - 1.
        num_classes: K; by default one more than the largest label.
        class_names: names for messages and reports; by default the numbers.
        name: what results call this data.

    Raises:
        InputError: a shape is wrong, a pixel lies outside [0, 1] or is NaN, a label is out of range.
    """

    x: Tensor
    y: Tensor
    num_classes: int = 0
    class_names: tuple[str, ...] = ()
    name: str = "data"

    def __post_init__(self) -> None:
        if self.x.ndim != 4:
            raise InputError(f"{self.name}: images must have shape (N, C, H, W), got {tuple(self.x.shape)}.")
        if self.y.shape != (len(self.x),):
            raise InputError(
                f"{self.name}: {len(self.x)} images need labels of shape ({len(self.x)},), got {tuple(self.y.shape)}."
            )
        if len(self.x) == 0:
            raise InputError(f"{self.name}: there are no images.")
        if self.y.is_floating_point() or self.y.is_complex() or self.y.dtype == torch.bool:
            raise InputError(f"{self.name}: labels must be integers, got {self.y.dtype}.")
        self._check_pixels()
        low, high = int(self.y.min()), int(self.y.max())
        if low < 0 or (self.num_classes and high >= self.num_classes):
            bad = low if low < 0 else high
            limit = f"0 .. {self.num_classes - 1}" if self.num_classes else "0 or more"
            raise InputError(f"{self.name}: label {bad} is out of range; labels must be {limit}.")
        classes = self.num_classes or high + 1
        if self.class_names and len(self.class_names) != classes:
            raise InputError(f"{self.name}: class_names has {len(self.class_names)} names for {classes} classes.")
        object.__setattr__(self, "num_classes", classes)
        object.__setattr__(self, "class_names", self.class_names or tuple(str(i) for i in range(classes)))
        object.__setattr__(self, "y", self.y.to(torch.int64))

    def _check_pixels(self) -> None:
        if self.x.dtype == torch.uint8:
            return
        if not self.x.is_floating_point():
            raise InputError(f"{self.name}: images must be floating point in [0, 1] or uint8, got {self.x.dtype}.")
        if self.x.dtype != torch.float64:  # attacks in half precision would have another eps, and few draws
            object.__setattr__(self, "x", self.x.float())
        if not bool(self.x.isfinite().all()):
            raise InputError(f"{self.name}: images contain NaN or infinite pixels; clean them first.")
        low, high = float(self.x.min()), float(self.x.max())
        if low < 0 or high > 1:
            hint = "divide by 255" if high > 2 else "leave normalisation to the model"
            raise InputError(f"{self.name}: pixels range from {low:g} to {high:g} and must lie in [0, 1]; {hint}.")

    def __len__(self) -> int:
        return len(self.x)

    @property
    def shape(self) -> tuple[int, ...]:
        """(C, H, W)."""
        return tuple(self.x.shape[1:])

    @property
    def device(self) -> torch.device:
        """Where batches lie."""
        return self.y.device

    def batch(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Images (B, C, H, W) in [0, 1] and labels (B,) of these samples, ids int64 (B,)."""
        return in_unit_range(self.pixels(ids)), self.y[ids]

    def pixels(self, ids: Tensor) -> Tensor:
        """Images (B, C, H, W) of these samples as they are stored: floating point in [0, 1], or uint8."""
        return self.x.index_select(0, ids.to(self.device))

    def expect(self, ids: Tensor) -> None:
        """These samples are the next batch; nothing has to be done about it where the images are in memory."""

    def mean_and_std(self) -> tuple[list[float], list[float]]:
        """Mean and standard deviation of each channel's pixels in [0, 1]."""
        if self.x.dtype != torch.uint8:
            return self.x.mean((0, 2, 3)).tolist(), self.x.std((0, 2, 3)).tolist()
        # From the number of pixels at each level, because the images as floating point may not fit into memory.
        counts = torch.stack([channel.flatten().bincount(minlength=256) for channel in self.x.unbind(1)]).double()
        levels, total = torch.arange(256, dtype=torch.float64, device=self.x.device) / 255, counts.sum(1)
        mean = counts @ levels / total
        variance = (counts * (levels - mean[:, None]) ** 2).sum(1) / (total - 1)
        return mean.tolist(), variance.sqrt().tolist()

    def subset(self, ids: Tensor) -> "ImageData":
        """The samples of `ids`, in their order."""
        return ImageData(self.x[ids], self.y[ids], self.num_classes, self.class_names, self.name)

    def to(self, device: torch.device) -> "ImageData":
        """The same data on a device."""
        if self.device == device:
            return self
        return ImageData(self.x.to(device), self.y.to(device), self.num_classes, self.class_names, self.name)

    @cached_property
    def sha256(self) -> str:
        """Fingerprint of pixels, labels and their order."""
        digest = hashlib.sha256(f"{tuple(self.x.shape)} {self.x.dtype} {self.num_classes}".encode())
        digest.update(self.x.contiguous().cpu().numpy().reshape(-1).data)
        digest.update(self.y.cpu().numpy().tobytes())
        return digest.hexdigest()


def in_unit_range(x: Tensor) -> Tensor:
    """Images in [0, 1]: float32 for uint8, all others as they are."""
    return x.float() / 255 if x.dtype == torch.uint8 else x


@dataclass(frozen=True)
class Splits:
    """Training, validation and (where there is one) test data. Choices are made on validation data alone."""

    train: ImageData
    validation: ImageData
    test: ImageData | None = None
    split_seed: int = 0
    """Which of a named set's splits this is."""
    skipped: tuple[str, ...] = ()
    """Files that could not be read, each with the reason."""

    def __post_init__(self) -> None:
        if self.train.num_classes < 2:  # images that are only tested may be of one class
            raise InputError(f"{self.train.name}: there is only one class; a classifier needs at least 2.")

    @cached_property
    def sha256(self) -> str:
        """Fingerprint of what training sees."""
        return hashlib.sha256((self.train.sha256 + self.validation.sha256).encode()).hexdigest()


def in_colour(data: ImageData) -> ImageData:
    """The same data with grey images (1, H, W) repeated to (3, H, W); colour images as they are."""
    return replace(data, x=data.x.expand(-1, 3, -1, -1)) if data.shape[0] == 1 else data


def with_classes(data: ImageData, class_names: Sequence[str]) -> ImageData:
    """The same data with labels that count in these classes: names decide, not the order in which the data has them.

    Where either side has numbers for names, and these are not among the other's, labels stay as they are. Classes
    without images may be missing.

    Raises:
        InputError: the data has images of a class that is not among these, or names for another number of classes.
    """
    names, wanted = data.class_names, tuple(class_names)
    place = {name: label for label, name in enumerate(wanted)}
    odd = [names[label] for label in data.y.unique().tolist() if names[label] not in place]
    if names == wanted or len(place) < len(wanted) or (odd and _are_numbers(names)):
        return data
    if odd and _are_numbers(wanted):
        if len(names) != len(wanted):
            raise InputError(
                f"{data.name}: has {len(names)} classes, {names[0]} and others; the model has {len(wanted)}, unnamed."
            )
        log.warning(
            "%s: the model's classes have no names and are taken in the order of these: 0 is %s, 1 is %s and so on",
            data.name, names[0], names[1],
        )  # fmt: skip
        return data
    if odd:
        some = ", ".join(wanted[:5]) + (", ..." if len(wanted) > 5 else "")
        raise InputError(f"{data.name}: has images of the class {odd[0]!r}, which is none of {some}.")
    labels = torch.tensor([place.get(name, -1) for name in names], device=data.y.device)[data.y]
    return replace(data, y=labels, num_classes=len(wanted), class_names=wanted)


def with_wrong_labels(data: ImageData, share: float, seed: int) -> ImageData:
    """The same data with this share of its labels replaced by another class, each other class as likely as the next.

    Args:
        data: the data.
        share: of the samples, in [0, 1), rounded to a whole number of them.
        seed: which ones, and what they become. A larger share spoils the same ones, and more.
    """
    ids = torch.arange(len(data))
    spoiled = permutation(len(data), "wrong labels", seed)[: round(share * len(data))]
    shift = Stream.of("wrong label", seed, ids=ids).integers(1, data.num_classes, ())
    changed = torch.zeros_like(ids).scatter(0, spoiled, shift[spoiled]).to(data.device)
    return replace(data, y=(data.y + changed) % data.num_classes)


def _are_numbers(names: Sequence[str]) -> bool:
    return list(names) == [str(label) for label in range(len(names))]


def stratified(y: Tensor, sizes: Sequence[int], *names: str | int) -> list[Tensor]:
    """Split samples into parts with the given sizes, each with the classes in the proportions of the whole.

    Args:
        y: labels (N,).
        sizes: the size of each part; their sum is N.
        names: what the split depends on, such as a seed.

    Returns:
        Sorted sample ids of each part.
    """
    order = permutation(len(y), "split", *names)
    # Rank every sample within its class as a fraction; cutting the fractions cuts every class alike.
    fraction = torch.empty(len(y), dtype=torch.float64)
    shuffled = y.cpu()[order]
    for label in shuffled.unique():
        members = order[shuffled == label]
        fraction[members] = (torch.arange(len(members), dtype=torch.float64) + 0.5) / len(members)
    place = torch.empty(len(y), dtype=torch.int64)
    place[order] = torch.arange(len(y))
    ranked = fraction[order].argsort(stable=True)
    parts = order[ranked].split(list(sizes))
    return [part.sort().values for part in parts]


SPARES_ONE = 5
"""A class of so many images has one of them in validation, however small that is."""


def hold_out(y: Tensor, count: int, *names: str | int) -> tuple[Tensor, Tensor]:
    """Ids of what is kept and of `count` samples, or a few more, held out: stratified, and no larger class left out.

    Args:
        y: labels (N,).
        count: how many to hold out, below N.
        names: what the split depends on, such as a seed.
    """
    kept, held = stratified(y, (len(y) - count, count), *names)
    labels = y.cpu()
    missing = set(labels.unique().tolist()) - set(labels[held].tolist())
    members = [kept[labels[kept] == label] for label in sorted(missing)]
    more = [ids[-1:] for ids in members if len(ids) >= SPARES_ONE]
    held = torch.cat([held, *more]).sort().values
    return kept[~torch.isin(kept, held)], held


def as_data(data: Any, name: str = "data") -> ImageData:
    """Accept `ImageData`, a pair of tensors (x, y), or a map-style data set, whose items are read into memory."""
    if isinstance(data, ImageData):
        return data
    if isinstance(data, tuple | list) and len(cast("Sized", data)) == 2:
        x, y = cast("tuple[Any, Any]", data)
        if isinstance(x, Tensor) and isinstance(y, Tensor):
            return ImageData(x, y, name=name)
        if isinstance(data, tuple):  # a list may also be a data set of two items
            kinds = f"{type(x).__name__}, {type(y).__name__}"
            made = "; torch.from_numpy makes them of arrays" if "ndarray" in kinds else ""
            raise InputError(f"{name}: a pair must be two tensors (images, labels), got {kinds}{made}.")
    if hasattr(data, "__getitem__") and hasattr(data, "__len__"):
        try:
            items = [data[index] for index in range(len(data))]
            x = torch.stack([item[0] for item in items])
            y = torch.tensor([_integer(item[1]) for item in items])
        except (TypeError, ValueError, RuntimeError, LookupError, ArithmeticError) as error:
            raise InputError(
                f"{name}: every item must be a pair (image tensor of one shape (C, H, W), integer label): "
                f"{first_line(error)}"
            ) from None
        return ImageData(x, y, name=name)
    ways = {"Splits": "; give a part of it, such as .test", "DataLoader": "; give its .dataset"}
    raise InputError(
        f"{name}: expected the name of a data set, a pair of tensors (images, labels) or a map-style data set, "
        f"got {type(data).__name__}{ways.get(type(data).__name__, '')}."
    )


def _integer(label: Any) -> int:
    number = int(label)
    if number != label:
        raise ValueError(f"label {label} is not an integer")
    return number
