"""Images in files, decoded when they are asked for: data that would not fit into memory.

Threads decode. Pillow lets go of the interpreter's lock while it decodes: two threads read 256x256 JPEGs 1.8 times as
fast as one. Of tiny images the most part is Pillow's Python, and threads add nothing to some 5,000 images a second; an
adversarial training step takes far longer than that, so there are no processes here.
"""

import hashlib
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from crdnd.data._base import ImageData
from crdnd.data._images import Bytes
from crdnd.errors import InputError, RunError
from crdnd.io import read_bytes
from crdnd.machine import cores
from crdnd.random import permutation

Decoder = Callable[[Path], Bytes]
"""A file to its image, uint8 (H, W, 1 or 3), or an InputError that names it."""

IMAGES_A_TASK = 16
MOST_WORKERS = 16
FINGERPRINTED = 1000
MEASURED = 2000


@dataclass(frozen=True, eq=False, kw_only=True)
class StreamedData(ImageData):
    """Images of one size in files; like `ImageData`, except that `x` has no pixels, only their shape and type.

    A batch is decoded by threads when it is asked for, or ahead of that where `expect` announced it. At most two
    batches are in memory. What a batch holds depends on its ids alone.

    Args:
        x: a uint8 tensor (N, C, H, W) on torch's meta device; grey files fill all C channels.
        root: the folder that the files lie in, or below.
        files: where each image lies below `root`.
        decode: reads a file.
    """

    root: Path
    files: list[str] = field(repr=False)
    decode: Decoder = field(repr=False)
    _ahead: "dict[tuple[int, ...], _Decoding]" = field(init=False, repr=False, default_factory=dict)

    def pixels(self, ids: Tensor) -> Tensor:
        """Images (B, C, H, W) of these samples, uint8.

        Raises:
            RunError: a file cannot be read any more, or has become another image.
        """
        rows = tuple(ids.tolist())
        decoding = self._ahead.pop(rows, None) or self._decoding(rows)
        try:
            return decoding.images().to(self.device)
        except InputError as error:
            raise RunError(f"{str(error).rstrip('.')}; put the file back, then the same command goes on.") from None

    def expect(self, ids: Tensor) -> None:
        """Begin to decode these samples, which are the next batch."""
        rows = tuple(ids.tolist())
        self._ahead.clear()
        self._ahead[rows] = self._decoding(rows)

    def in_memory(self) -> ImageData:
        """The same data with all images decoded, or an InputError that names the first file that cannot be."""
        images = self._decoding(range(len(self))).images().to(self.device)
        return ImageData(images, self.y, self.num_classes, self.class_names, self.name)

    def what_decodes(self) -> tuple[ImageData, dict[int, InputError]]:
        """In memory, without the images that cannot be decoded, and what is wrong with each of these, by its row."""
        decoding = self._decoding(range(len(self)))
        failed = decoding.errors()
        rows = torch.tensor([row for row in range(len(self)) if row not in failed], dtype=torch.int64)
        if not len(rows):
            raise next(iter(failed.values()))
        images, y = decoding.decoded(), self.y
        if failed:
            images, y = images[rows], y[rows]
        return ImageData(images.to(self.device), y, self.num_classes, self.class_names, self.name), failed

    def _decoding(self, rows: Sequence[int]) -> "_Decoding":
        return _Decoding([self.root / self.files[row] for row in rows], self.shape, self.decode)

    def subset(self, ids: Tensor) -> "StreamedData":
        """The samples of `ids`, in their order."""
        x, files = self.x.new_empty((len(ids), *self.shape)), [self.files[row] for row in ids.tolist()]
        return replace(self, x=x, y=self.y[ids], files=files)

    def to(self, device: torch.device) -> "StreamedData":
        """The same data with batches on a device."""
        return self if self.device == device else replace(self, y=self.y.to(device))

    def mean_and_std(self) -> tuple[list[float], list[float]]:
        """As for `ImageData`, of 2,000 of the images if there are more; which ones depends on their number alone."""
        return self.subset(permutation(len(self), "statistics")[:MEASURED]).in_memory().mean_and_std()

    @cached_property
    def sha256(self) -> str:
        """Fingerprint of the files' names and lengths, the labels, their order, and what is in 1,000 of the files.

        It does not see that another file has changed, if that kept its name and length.
        """
        digest = hashlib.sha256(f"{tuple(self.x.shape)} {self.num_classes}".encode())
        for file in self.files:
            digest.update(f"{file} {_length(self.root / file)}\n".encode("utf-8", "surrogateescape"))
        digest.update(self.y.cpu().numpy().tobytes())
        for row in permutation(len(self), "fingerprint")[:FINGERPRINTED].tolist():
            digest.update(hashlib.sha256(read_bytes(self.root / self.files[row])).digest())
        return digest.hexdigest()


class _Decoding:
    """A batch on its way: threads fill their parts of it."""

    def __init__(self, files: list[Path], shape: tuple[int, ...], decode: Decoder) -> None:
        self._images = np.empty((len(files), *shape), dtype=np.uint8)
        self._parts: list[Future[dict[int, InputError]]] = []
        for first in range(0, len(files), IMAGES_A_TASK):
            part = slice(first, first + IMAGES_A_TASK)
            self._parts.append(_workers().submit(_decode_into, self._images[part], files[part], decode, first))

    def errors(self) -> dict[int, InputError]:
        """What is wrong with the files that cannot be decoded, by their place, once the others are there."""
        return {row: error for part in self._parts for row, error in part.result().items()}

    def decoded(self) -> Tensor:
        """uint8 (B, C, H, W); what could not be decoded is arbitrary."""
        return torch.from_numpy(self._images)

    def images(self) -> Tensor:
        """uint8 (B, C, H, W), once all of it is there; the first error is raised."""
        for error in self.errors().values():
            raise error
        return self.decoded()


def _decode_into(images: Bytes, files: list[Path], decode: Decoder, first: int) -> dict[int, InputError]:
    failed: dict[int, InputError] = {}
    for row, (place, file) in enumerate(zip(images, files, strict=True), first):
        try:
            image = decode(file)
            if image.shape[:2] != place.shape[1:] or image.shape[2] > len(place):
                raise InputError(f"{file}: has another size or colours than it had at first.")
        except InputError as error:
            failed[row] = error
        else:
            place[:] = image.transpose(2, 0, 1)  # one grey plane fills all three
    return failed


@cache
def _workers() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(min(MOST_WORKERS, cores()), thread_name_prefix="decode")


def _length(file: Path) -> int:
    try:
        return file.stat().st_size
    except OSError as error:
        raise InputError(f"{file}: cannot be read ({error.strerror}).") from None
