"""Images for evaluation from files: an .npz, a folder with a subfolder per class, or the files of a published set."""

import logging
import zipfile
import zlib
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from crdnd import registry
from crdnd.data._base import ImageData
from crdnd.data._cifar import is_python_file, read_binary_file, read_python_file
from crdnd.data._images import SUFFIXES, Size, image_files, image_shape, is_hidden, read_image
from crdnd.data._named import DataInfo, Layout
from crdnd.data._stream import StreamedData
from crdnd.errors import InputError, first_line

log = logging.getLogger("crdnd")

Shape = tuple[int, int, int]
LAYOUTS = (
    "an .npz file with x and y, a folder with a subfolder of images per class, or the files of CIFAR, SVHN, "
    "Tiny-ImageNet or in MNIST's idx format"
)
# What the folders of splits are called, and which split each one is.
SPLITS = {
    "train": "train", "training": "train", "val": "validation", "valid": "validation", "validation": "validation",
    "test": "test", "testing": "test",
}  # fmt: skip
NPZ_OR_REFUSED = (b"PK\x03\x04", b"PK\x05\x06", b"\x93NUMPY", b"\x80")
"""How an .npz begins, an empty one, a single array and a pickle; numpy takes all other files for pickles."""
IN_MEMORY = 2**28
"""Bytes of decoded images up to which a folder is read into memory; a larger one is decoded as it is used."""


def read_images(path: str | Path, image_size: int | None = None, model_shape: Shape | None = None) -> ImageData:
    """Read evaluation data from a path; what it is follows from what lies there.

    - `.npz`: images under `x` or `images`, (N, C, H, W), (N, H, W, C) or (N, H, W), uint8 or floating point in [0, 1];
      labels (N,) under `y` or `labels`; optionally `class_names`, and `layout` ("NCHW" or "NHWC") where the shape does
      not tell which one it is.
    - A folder with a subfolder per class, in the order of their sorted names; of the splits train, val and test, the
      test folder is read. Images of one size, unless `image_size` brings them to one; grey if all of them are,
      otherwise RGB; 16 bits become 8, photographs are turned upright, what is transparent becomes white. Files that
      cannot be read are skipped with a warning; more than half of a class is refused. The classes take turns, so that
      the first n images are a fair sample. Beyond 256 MiB of decoded images the files stay where they are, and each
      batch is decoded when it is asked for (`StreamedData`).
    - The layout of a named set (CIFAR in its binary or its Python version, idx, SVHN, Tiny-ImageNet) with any number of
      images: the folder, or the one above it; its test part is read. Of CIFAR also a single file.

    Nothing in a file is executed; of a pickle only plain data is read.

    Args:
        path: the file or folder.
        image_size: of a folder's images: the shorter side is resized to so many pixels, the longer one cropped.
        model_shape: (C, H, W) that a model takes, which a folder's images are brought to in the same way.

    Raises:
        InputError: there is nothing of this kind, or something in it is damaged or does not fit.
    """
    if image_size is not None and image_size < 1:
        raise InputError(f"image_size: must be above 0, got {image_size}.")
    path = Path(path)
    if not path.exists():
        raise InputError(f"{path}: there is no such file or folder.")
    if path.is_dir():
        return _read_folder(path, image_size, model_shape)
    refuse_image_size(image_size, path)
    suffix = path.suffix.lower()
    if suffix == ".npz":
        return _read_npz(path)
    if suffix == ".bin":
        return read_binary_file(path)
    if is_python_file(path):
        return read_python_file(path)
    raise InputError(f"{path}: is no data that can be read; give {LAYOUTS}.")


def published_layout(folder: Path) -> tuple[Layout, Path] | None:
    """The layout of a named set that a folder, or one in it, is of, and the folder of the files."""
    for name in registry.names("data"):
        info: DataInfo = registry.load("data", name, "INFO")
        for layout in info.files.layouts if info.files else ():
            for place in layout.places(folder):
                if layout.is_in(place):
                    return layout, place
    return None


def _read_folder(folder: Path, image_size: int | None, model_shape: Shape | None) -> ImageData:
    if found := published_layout(folder):
        refuse_image_size(image_size, folder)
        layout, place = found
        return replace(layout.read(place, "test"), name=name_of(folder))
    return _read_image_folder(folder, image_size, model_shape)


def refuse_image_size(image_size: int | None, path: Path) -> None:
    """Refuse a size for anything but a folder of images."""
    if image_size is not None:
        raise InputError(f"image_size: is for folders of images, and {path} is none; leave it away.")


def name_of(path: Path) -> str:
    """What results call the data of a folder, also of '.' and '..', or of a file."""
    return path.stem if path.is_file() else path.resolve().name or "data"


# --- .npz -------------------------------------------------------------------------------------------------------------


def _read_npz(file: Path) -> ImageData:
    arrays = npz_arrays(file)
    return from_npz(file, arrays, "test" if "x_test" in arrays else "")


def from_npz(file: Path, arrays: dict[str, NDArray[Any]], part: str = "") -> ImageData:
    """The images under `x` and `y`, or under `x_test` and `y_test` for the part "test", and so on."""
    if part:
        x, y = _one_of(file, arrays, f"x_{part}"), _one_of(file, arrays, f"y_{part}")
    else:
        x, y = _one_of(file, arrays, "x", "images"), _one_of(file, arrays, "y", "labels")
    if y.dtype.kind not in "iu":
        raise InputError(f"{file}: labels must be integers 0 .. K-1, got {y.dtype}.")
    if y.ndim == 2 and y.shape[1] == 1:
        y = y[:, 0]
    if x.dtype == np.uint8:
        pixels = torch.from_numpy(np.ascontiguousarray(x))
    elif x.dtype.kind == "f":
        pixels = torch.from_numpy(np.ascontiguousarray(x, dtype=np.float32))
    else:
        raise InputError(f"{file}: images must be uint8 in 0 .. 255 or floating point in [0, 1], got {x.dtype}.")
    pixels = _channels_first(file, pixels, arrays.get("layout"))
    labels = torch.from_numpy(np.ascontiguousarray(y, dtype=np.int64))
    names = _class_names(file, arrays.get("class_names"))
    return ImageData(pixels.contiguous(), labels, len(names), names, file.stem)


def npz_arrays(file: Path) -> dict[str, NDArray[Any]]:
    """All arrays of the file; pickled objects are refused, not loaded."""
    try:
        # Opened here, because numpy leaves the file open where it turns out to be damaged.
        with file.open("rb") as handle:
            if not handle.read(6).startswith(NPZ_OR_REFUSED):
                raise InputError(
                    f"{file}: is not a readable .npz file; write one with numpy.savez(file, x=images, y=labels)."
                )
            handle.seek(0)
            content = np.load(handle, allow_pickle=False)
            if not isinstance(content, np.lib.npyio.NpzFile):
                raise InputError(f"{file}: holds a single array; write it with numpy.savez(file, x=images, y=labels).")
            with content:
                return {key: content[key] for key in content.files}
    except InputError:
        raise
    except (ValueError, OSError, EOFError, LookupError, zipfile.BadZipFile, zlib.error, RuntimeError) as error:
        if "pickle" in str(error):
            raise InputError(
                f"{file}: holds pickled objects, which may contain code and are never loaded; "
                "save plain arrays of numbers."
            ) from None
        raise InputError(f"{file}: is not a readable .npz file ({first_line(error)}); copy it again.") from None


def _one_of(file: Path, arrays: dict[str, NDArray[Any]], *names: str) -> NDArray[Any]:
    found = [arrays[key] for key in names if key in arrays]
    if len(found) > 1:
        raise InputError(f"{file}: has both {' and '.join(names)}; keep one of them.")
    if not found:
        raise InputError(f"{file}: has no array {' or '.join(names)}, only {', '.join(sorted(arrays)) or 'nothing'}.")
    return found[0]


def _channels_first(file: Path, x: torch.Tensor, layout: NDArray[Any] | None) -> torch.Tensor:
    """Images as (N, C, H, W), or an InputError where the shape does not say which dimension the channels are."""
    shape = tuple(x.shape)
    if x.ndim == 3:
        return x[:, None]
    if x.ndim != 4:
        raise InputError(f"{file}: images must have shape (N, C, H, W), (N, H, W, C) or (N, H, W), got {shape}.")
    if layout is not None:
        if str(layout) not in ("NCHW", "NHWC"):
            raise InputError(f"{file}: layout must be 'NCHW' or 'NHWC', got {str(layout)!r:.40}.")
        last = str(layout) == "NHWC"
    elif (shape[1] in (1, 3)) == (shape[3] in (1, 3)):
        raise InputError(
            f"{file}: images of shape {shape} may be (N, C, H, W) or (N, H, W, C); "
            "add layout='NCHW' or layout='NHWC' to numpy.savez."
        )
    else:
        last = shape[3] in (1, 3)
    return x.movedim(3, 1) if last else x


def _class_names(file: Path, names: NDArray[Any] | None) -> tuple[str, ...]:
    if names is None:
        return ()
    if names.ndim != 1 or names.dtype.kind != "U":
        raise InputError(f"{file}: class_names must be a plain array of strings, got {names.dtype} {names.shape}.")
    return tuple(str(name) for name in names)


# --- A folder of images -----------------------------------------------------------------------------------------------


def _read_image_folder(folder: Path, image_size: int | None, model_shape: Shape | None) -> ImageData:
    parts = split_folders(folder)
    if parts and "test" not in parts:
        found = ", ".join(entry.name for entry in parts.values())
        raise InputError(f"{folder}: has {found} but no test; give the folder to be evaluated.")
    size, channels = brought_to(image_size, model_shape)
    return read_classes(parts.get("test", folder), name_of(folder), size, channels)[0]


def brought_to(image_size: int | None, model_shape: Shape | None) -> tuple[Size | None, int | None]:
    """The size (H, W) and the channels that images are brought to; None leaves them as they are."""
    size = None if image_size is None else (image_size, image_size)
    return (size, None) if model_shape is None else (size or model_shape[1:], model_shape[0])


def split_folders(folder: Path) -> dict[str, Path]:
    """The folders train, validation and test by these names; none where a folder holds classes.

    Raises:
        InputError: it holds both, so that parts of the data would be taken for classes, or two folders of one split.
    """
    entries = {entry.name.lower(): entry for entry in subfolders(folder)}
    parts = {SPLITS[name]: entry for name, entry in entries.items() if name in SPLITS}
    if len(entries.keys() & SPLITS.keys()) == len(entries):
        if twins := [entry for name, entry in entries.items() if parts[SPLITS[name]] != entry]:
            other = parts[SPLITS[twins[0].name.lower()]]
            raise InputError(f"{folder}: has {twins[0].name} and {other.name}; move the images of one into the other.")
        return parts
    # A class may be called train, but it holds images and not classes.
    if split := next((entry for entry in parts.values() if subfolders(entry)), None):
        other = next(entry for name, entry in entries.items() if name not in SPLITS)
        raise InputError(f"{folder}: has {other.name} beside {split.name}; leave only train, val and test in it.")
    return {}


def training_folder(folder: Path) -> Path:
    """Where the classes of the training data lie: the folder train in it, or the folder itself."""
    return split_folders(folder).get("train", folder)


def has_test(path: Path) -> bool:
    """Whether a folder or a file of training data holds test data too."""
    if path.is_dir():
        return published_layout(path) is not None or "test" in split_folders(path)
    return path.suffix.lower() == ".npz" and "x_test" in npz_arrays(path)


def read_classes(
    folder: Path, name: str, size: Size | None, channels: int | None = None, known: tuple[str, ...] = ()
) -> tuple[ImageData, tuple[str, ...]]:
    """Images in a subfolder for each class; the classes take turns.

    Args:
        folder: the folder of the classes.
        name: what results call the data.
        size: what the images are brought to.
        channels: what they are brought to; by default grey if all of them are, otherwise RGB.
        known: classes that there are besides those that have a folder.

    Returns:
        The data of all images that can be read, and why each other file was skipped.

    Raises:
        InputError: there are no images, they are of several sizes, or more than half of a class cannot be read.
    """
    classes = subfolders(folder)
    if not classes:
        loose = sum(1 for _ in image_files(folder))
        found = f"has {loose} images, but no folder for each class with them" if loose else "has no subfolders"
        raise InputError(f"{folder}: {found}; give {LAYOUTS}.")
    members = [list(image_files(entry)) for entry in classes]
    # First the first of every class, then the second: an evaluation may take only the first n.
    turns = sorted((turn, label) for label, files in enumerate(members) for turn in range(len(files)))
    if not turns:
        raise InputError(f"{folder}: has no images ({', '.join(SUFFIXES)}) in its {len(classes)} subfolders.")
    files = [members[label][turn] for turn, label in turns]
    names = tuple(dict.fromkeys([*(entry.name for entry in classes), *known]))
    y = torch.tensor([label for _, label in turns])
    data, failed = from_files(folder, files, y, names, name, size, channels)
    _warn_of(failed, y, names, folder)
    return data, tuple(str(error) for error in failed.values())


def _warn_of(failed: dict[int, InputError], y: torch.Tensor, names: tuple[str, ...], folder: Path) -> None:
    """Say what was skipped; too much of a class is refused, because what is left may be another class."""
    if not failed:
        return
    lost = y[list(failed)].bincount(minlength=len(names))
    for label, (bad, count) in enumerate(zip(lost.tolist(), y.bincount(minlength=len(names)).tolist(), strict=True)):
        if 2 * bad > count:
            first = next(error for row, error in failed.items() if int(y[row]) == label)
            raise InputError(
                f"{folder / names[label]}: {bad} of its {count} images cannot be read; mend or remove them. The first "
                f"one: {first}"
            )
    log.warning("%s: skips %d of %d images, which cannot be read:", folder, len(failed), len(y))
    for error in failed.values():
        log.warning("skipped %s", error)


def from_files(
    root: Path,
    files: list[Path],
    y: torch.Tensor,
    class_names: tuple[str, ...],
    name: str,
    size: Size | None = None,
    channels: int | None = None,
) -> tuple[ImageData, dict[int, InputError]]:
    """Images of one size, in memory up to 256 MiB of decoded images, otherwise streamed.

    What goes into memory is decoded, and every file that cannot be is left out. Of what is streamed a file is left out
    if its head cannot be read or it is cut off; damage in the middle is met in the run.

    Args:
        root: a folder that all files lie below.
        files: the images.
        y: their labels.
        class_names: what the labels mean.
        name: what results call the data.
        size: what all images are brought to; None leaves them as they are.
        channels: likewise.

    Returns:
        The data without the files that cannot be read, and what is wrong with each of these, by their place in `files`.
    """
    shapes: dict[int, tuple[int, int, int]] = {}
    failed: dict[int, InputError] = {}
    for row, file in enumerate(files):
        try:
            shapes[row] = image_shape(file, size, channels)
        except InputError as error:
            failed[row] = error
    rows = list(shapes)
    if not rows:
        raise next(iter(failed.values()))
    for row in rows:
        if shapes[row][:2] != shapes[rows[0]][:2]:
            (height, width, _), (first_height, first_width, _) = shapes[row], shapes[rows[0]]
            raise InputError(
                f"{files[row]}: is {width}x{height}, but {files[rows[0]]} is {first_width}x{first_height}; "
                "bring all images to one size, or give image_size."
            )
    shape = (max(shape[2] for shape in shapes.values()), *shapes[rows[0]][:2])
    data = StreamedData(
        torch.empty((len(rows), *shape), dtype=torch.uint8, device="meta"),
        y[rows],
        len(class_names),
        class_names,
        name,
        root=root,
        files=[str(files[row].relative_to(root)) for row in rows],
        decode=partial(read_image, size=size, channels=channels),
    )
    if data.x.numel() > IN_MEMORY:
        return data, failed
    decoded, damaged = data.what_decodes()
    failed |= {rows[place]: error for place, error in damaged.items()}
    return decoded, dict(sorted(failed.items()))


def subfolders(folder: Path) -> list[Path]:
    """The folders in a folder, sorted, without hidden ones."""
    try:
        return sorted(entry for entry in folder.iterdir() if entry.is_dir() and not is_hidden(entry.name))
    except OSError as error:
        raise InputError(f"{folder}: cannot be read ({error.strerror}).") from None
