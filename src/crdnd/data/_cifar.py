"""CIFAR's layouts, which CIFAR-10 and CIFAR-100 share: binary records, and Python's pickled batches.

Both hold the same images in the same order (Krizhevsky, www.cs.toronto.edu/~kriz/cifar.html).
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from crdnd.data._base import ImageData
from crdnd.data._named import Layout, Part
from crdnd.data._pickled import read_pickled
from crdnd.download import looks_like_a_page
from crdnd.errors import InputError, first_line
from crdnd.io import read_bytes

PLANES = 3 * 32 * 32  # 32x32 planes of red, green and blue


@dataclass(frozen=True)
class Cifar:
    """What differs between the two sets."""

    title: str
    labels: tuple[int, ...]
    """How many values each label byte of a binary record has; the last one is the class."""
    classes: tuple[str, ...]
    binary: tuple[str, tuple[str, ...], str, str]
    """The binary version: folder, training files, test file, and the file with the classes' names."""
    python: tuple[str, tuple[str, ...], str, str]
    """The Python version, likewise."""
    label_key: str
    names_key: str

    @property
    def record(self) -> int:
        """Bytes per image in the binary version."""
        return len(self.labels) + PLANES

    def layouts(self) -> tuple[Layout, ...]:
        """Both versions."""
        return tuple(
            Layout((folder,), {"train": train, "test": (test,)}, partial(reader, self))
            for reader, (folder, train, test, _) in ((_read_binary, self.binary), (_read_python, self.python))
        )

    def files(self, part: Part, version: tuple[str, tuple[str, ...], str, str]) -> tuple[str, ...]:
        """The files of a part in a version."""
        return version[1] if part == "train" else (version[2],)


def read_binary_file(file: Path) -> ImageData:
    """One `.bin` file of either set; which of them its name tells."""
    layout = CIFAR100 if file.name in (*CIFAR100.binary[1], CIFAR100.binary[2]) else CIFAR10
    return _data(layout, *_binary(layout, file), _names_of_binary(layout, file.parent), file.stem)


def read_python_file(file: Path) -> ImageData:
    """One pickled batch of either set; which of them its name tells."""
    layout = CIFAR100 if file.name in (*CIFAR100.python[1], CIFAR100.python[2]) else CIFAR10
    return _data(layout, *_pickled_batch(layout, file), _names_of_python(layout, file.parent), file.name)


def is_python_file(file: Path) -> bool:
    """Whether a file is called as a batch of the Python version."""
    return any(file.name in (*layout.python[1], layout.python[2]) for layout in (CIFAR10, CIFAR100))


def _read_binary(layout: Cifar, folder: Path, part: Part) -> ImageData:
    parts = [_binary(layout, folder / name) for name in layout.files(part, layout.binary)]
    return _joined(layout, parts, _names_of_binary(layout, folder))


def _read_python(layout: Cifar, folder: Path, part: Part) -> ImageData:
    parts = [_pickled_batch(layout, folder / name) for name in layout.files(part, layout.python)]
    return _joined(layout, parts, _names_of_python(layout, folder))


def _joined(layout: Cifar, parts: list[tuple[NDArray[Any], NDArray[Any]]], names: tuple[str, ...]) -> ImageData:
    x, y = np.concatenate([x for x, _ in parts]), np.concatenate([y for _, y in parts])
    return _data(layout, x, y, names, layout.title)


def _data(layout: Cifar, x: NDArray[Any], y: NDArray[Any], names: tuple[str, ...], name: str) -> ImageData:
    images = torch.from_numpy(np.ascontiguousarray(x).reshape(-1, 3, 32, 32))
    return ImageData(images, torch.from_numpy(y.astype(np.int64)), layout.labels[-1], names, name)


def _binary(layout: Cifar, file: Path) -> tuple[NDArray[Any], NDArray[Any]]:
    data = read_bytes(file)
    if not data or len(data) % layout.record:
        page = looks_like_a_page(data)
        raise InputError(
            f"{file}: has {len(data)} bytes, which is no multiple of {layout.title}'s {layout.record} bytes per image; "
            f"it is {page or 'truncated or damaged'}."
        )
    records = np.frombuffer(data, dtype=np.uint8).reshape(-1, layout.record)
    for column, count in enumerate(layout.labels):
        _check_labels(layout, file, records[:, column], count)
    skip = len(layout.labels)
    return records[:, skip:].copy(), records[:, skip - 1]


def _check_labels(layout: Cifar, file: Path, labels: NDArray[Any], count: int) -> None:
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= count:
        worst = low if low < 0 else high
        raise InputError(
            f"{file}: has the label {worst}, but {layout.title} has labels 0 .. {count - 1}; it is damaged."
        )


def _pickled_batch(layout: Cifar, file: Path) -> tuple[NDArray[Any], NDArray[Any]]:
    batch = _dictionary(file)
    x, y = batch.get("data"), batch.get(layout.label_key)
    if not isinstance(x, np.ndarray) or x.dtype != np.uint8 or x.ndim != 2 or x.shape[1] != PLANES or not len(x):
        found = f"{x.dtype} {x.shape}" if isinstance(x, np.ndarray) else type(x).__name__
        raise InputError(f"{file}: data must be uint8 of shape (N, {PLANES}) as in {layout.title}, got {found}.")
    labels = np.asarray(y) if isinstance(y, list | np.ndarray) else np.empty(0)
    if labels.shape != (len(x),) or labels.dtype.kind not in "iu":
        raise InputError(
            f"{file}: has {len(x)} images but no {layout.label_key} of {len(x)} integers; "
            f"it is damaged or not {layout.title}."
        )
    _check_labels(layout, file, labels, layout.labels[-1])
    return x.copy(), labels


def _dictionary(file: Path) -> dict[str, Any]:
    data = read_bytes(file)
    if page := looks_like_a_page(data):
        raise InputError(f"{file}: is {page}.")
    content: Any = read_pickled(data, file)
    if not isinstance(content, dict):
        raise InputError(f"{file}: must hold a dictionary as CIFAR's batches do, got {type(content).__name__}.")
    return {key.decode("latin-1") if isinstance(key, bytes) else str(key): value for key, value in content.items()}


def _names_of_binary(layout: Cifar, folder: Path) -> tuple[str, ...]:
    file = folder / layout.binary[3]
    if not file.is_file():
        return layout.classes
    try:
        names = [line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{file}: cannot be read ({first_line(error)}).") from None
    return _checked_names(layout, file, names)


def _names_of_python(layout: Cifar, folder: Path) -> tuple[str, ...]:
    file = folder / layout.python[3]
    if not file.is_file():
        return layout.classes
    names = _dictionary(file).get(layout.names_key)
    if not isinstance(names, list):
        raise InputError(f"{file}: has no {layout.names_key}; it is damaged.")
    return _checked_names(
        layout, file, [name.decode("latin-1") if isinstance(name, bytes) else str(name) for name in names]
    )


def _checked_names(layout: Cifar, file: Path, names: list[str]) -> tuple[str, ...]:
    if len(names) != layout.labels[-1]:
        raise InputError(f"{file}: has {len(names)} names for the {layout.labels[-1]} classes of {layout.title}.")
    return tuple(names)


CIFAR10 = Cifar(
    title="CIFAR-10",
    labels=(10,),
    classes=("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"),
    binary=(
        "cifar-10-batches-bin",
        tuple(f"data_batch_{number}.bin" for number in range(1, 6)),
        "test_batch.bin",
        "batches.meta.txt",
    ),
    python=(
        "cifar-10-batches-py",
        tuple(f"data_batch_{number}" for number in range(1, 6)),
        "test_batch",
        "batches.meta",
    ),
    label_key="labels",
    names_key="label_names",
)
# The classes of CIFAR-100 in the order of their labels.
_HUNDRED = (
    "apple", "aquarium_fish", "baby", "bear", "beaver", "bed", "bee", "beetle", "bicycle", "bottle", "bowl", "boy",
    "bridge", "bus", "butterfly", "camel", "can", "castle", "caterpillar", "cattle", "chair", "chimpanzee", "clock",
    "cloud", "cockroach", "couch", "crab", "crocodile", "cup", "dinosaur", "dolphin", "elephant", "flatfish",
    "forest", "fox", "girl", "hamster", "house", "kangaroo", "keyboard", "lamp", "lawn_mower", "leopard", "lion",
    "lizard", "lobster", "man", "maple_tree", "motorcycle", "mountain", "mouse", "mushroom", "oak_tree", "orange",
    "orchid", "otter", "palm_tree", "pear", "pickup_truck", "pine_tree", "plain", "plate", "poppy", "porcupine",
    "possum", "rabbit", "raccoon", "ray", "road", "rocket", "rose", "sea", "seal", "shark", "shrew", "skunk",
    "skyscraper", "snail", "snake", "spider", "squirrel", "streetcar", "sunflower", "sweet_pepper", "table", "tank",
    "telephone", "television", "tiger", "tractor", "train", "trout", "tulip", "turtle", "wardrobe", "whale",
    "willow_tree", "wolf", "woman", "worm",
)  # fmt: skip
CIFAR100 = Cifar(
    title="CIFAR-100",
    labels=(20, 100),
    classes=_HUNDRED,
    binary=("cifar-100-binary", ("train.bin",), "test.bin", "fine_label_names.txt"),
    python=("cifar-100-python", ("train",), "test", "meta"),
    label_key="fine_labels",
    names_key="fine_label_names",
)
