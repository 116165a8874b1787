"""The idx format of MNIST and of the sets that took its place: big-endian headers, then bytes; often packed by gzip.

(LeCun, Cortes, Burges: the MNIST database, "file formats".)
"""

import gzip
import math
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from crdnd.data._base import ImageData
from crdnd.data._named import Layout, Part
from crdnd.download import looks_like_a_page
from crdnd.errors import InputError, first_line

TRAIN = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte")
TEST = ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")
LARGEST = 2**31
"""Bytes; a header that announces more is damaged."""

# The sets share their file names. Their first training labels tell them apart.
FIRST_LABELS = {
    "MNIST": (5, 0, 4, 1, 9, 2, 1, 3, 1, 4, 3, 5, 3, 6, 1, 7),
    "Fashion-MNIST": (9, 0, 0, 3, 0, 2, 7, 2, 5, 5, 0, 9, 5, 5, 7, 9),
}


def layout(*folders: str, title: str = "", classes: tuple[str, ...] = ()) -> Layout:
    """The four files of a set.

    Args:
        folders: what the folder of the files may be called.
        title: which of the sets that share their names this one must be, if any.
        classes: the classes' names.
    """

    def read(folder: Path, part: Part) -> ImageData:
        return read_part(folder, part, title, classes)

    return Layout(folders, {"train": TRAIN, "test": TEST}, read, find)


def find(folder: Path, name: str) -> Path | None:
    """The file of that name: packed (it is the one that has a checksum), plain, or with a dot as in `images.idx3`."""
    for spelling in (name, name.replace("-idx", ".idx")):
        for suffix in (".gz", ""):
            if (folder / (spelling + suffix)).is_file():
                return folder / (spelling + suffix)
    return None


def read_part(folder: Path, part: Part, title: str, classes: tuple[str, ...]) -> ImageData:
    """Images (N, 1, H, W), uint8, and labels of a part."""
    images, labels = TRAIN if part == "train" else TEST
    x, y = _read(_found(folder, images), 3), _read(_found(folder, labels), 1)
    if len(x) != len(y):
        raise InputError(f"{folder}: {images} has {len(x)} images, but {labels} has {len(y)} labels.")
    for other, first in FIRST_LABELS.items():
        if title and other != title and part == "train" and tuple(y[: len(first)].tolist()) == first:
            raise InputError(f"{folder}: holds {other}, not {title}; the two have the same file names.")
    if classes and len(y) and int(y.max()) >= len(classes):
        raise InputError(f"{folder / labels}: has the label {int(y.max())}; labels are 0 .. {len(classes) - 1}.")
    return ImageData(
        torch.from_numpy(x.copy())[:, None], torch.from_numpy(y.astype(np.int64)), len(classes), classes,
        folder.resolve().name or "data",
    )  # fmt: skip


def _found(folder: Path, name: str) -> Path:
    file = find(folder, name)
    if file is None:
        raise InputError(f"{folder}: lacks {name} (or {name}.gz).")
    return file


def _read(file: Path, dimensions: int) -> NDArray[Any]:
    """An array of bytes with so many dimensions."""
    start = _content(file, 4 + 4 * dimensions)
    if page := looks_like_a_page(start):
        raise InputError(f"{file}: is {page}.")
    if len(start) < 4 + 4 * dimensions:
        raise InputError(f"{file}: has {len(start)} bytes, less than a header; it is truncated.")
    # Two zeros, 8 for unsigned bytes, the number of dimensions.
    if start[:4] != bytes((0, 0, 8, dimensions)):
        raise InputError(
            f"{file}: begins with {start[:4].hex()} instead of 000008{dimensions:02x}; it is no idx file of "
            f"{'images' if dimensions == 3 else 'labels'}, or damaged."
        )
    shape = tuple(int(size) for size in np.frombuffer(start[4:], ">u4"))
    size = math.prod(shape)
    if size > LARGEST or not size:
        raise InputError(f"{file}: announces {' x '.join(map(str, shape))} bytes; its header is damaged.")
    data = _content(file, len(start) + size + 1)[len(start) :]
    if len(data) != size:
        found = f"{len(data)}" if len(data) < size else "more"
        raise InputError(
            f"{file}: announces {' x '.join(map(str, shape))} = {size} bytes and has {found}; "
            "it is truncated or damaged."
        )
    return np.frombuffer(data, np.uint8).reshape(shape)


def _content(file: Path, most: int) -> bytes:
    """The first bytes of a file's content, unpacked where it is packed."""
    try:
        with file.open("rb") as plain:
            if plain.peek(2)[:2] != b"\x1f\x8b":
                return plain.read(most)
            with gzip.GzipFile(fileobj=plain) as packed:
                return packed.read(most)
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{file}: cannot be unpacked ({first_line(error)}); it is truncated or damaged.") from None
