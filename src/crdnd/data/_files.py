"""Images for evaluation from files: an .npz, a folder with a subfolder per class, or the files of a published set."""

import zipfile
import zlib
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from crdnd import registry
from crdnd.data._base import ImageData
from crdnd.data._cifar import is_python_file, read_binary_file, read_python_file
from crdnd.data._named import DataInfo, Layout
from crdnd.data._stream import Bytes, StreamedData
from crdnd.errors import InputError, first_line

if TYPE_CHECKING:
    import PIL.Image

LAYOUTS = (
    "an .npz file with x and y, a folder with a subfolder of images per class, or the files of CIFAR, SVHN, "
    "Tiny-ImageNet or in MNIST's idx format"
)
SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".ppm", ".pgm", ".tif", ".tiff", ".gif")
# Named, because Pillow also knows formats that other programs are started for.
FORMATS = ("PNG", "JPEG", "BMP", "WEBP", "PPM", "TIFF", "GIF")
# What the folders of splits are called, and which split each one is.
SPLITS = {
    "train": "train", "training": "train", "val": "validation", "valid": "validation", "validation": "validation",
    "test": "test",
}  # fmt: skip
GREY, GREY_16 = ("1", "L", "LA", "La"), ("I", "I;16", "I;16B", "I;16L", "I;16N")
IN_MEMORY = 2**28
"""Bytes of decoded images up to which a folder is read into memory; a larger one is decoded as it is used."""
COLOUR = ("RGB", "RGBA", "RGBa", "RGBX", "P", "PA", "CMYK", "YCbCr", "HSV")


def read_images(path: str | Path, image_size: int | None = None) -> ImageData:
    """Read evaluation data from a path; what it is follows from what lies there.

    - `.npz`: images under `x` or `images`, (N, C, H, W), (N, H, W, C) or (N, H, W), uint8 or floating point in [0, 1];
      labels (N,) under `y` or `labels`; optionally `class_names`, and `layout` ("NCHW" or "NHWC") where the shape does
      not tell which one it is.
    - A folder with a subfolder per class, in the order of their sorted names; of the splits train, val and test, the
      test folder is read. Images of one size, unless `image_size` brings them to one; grey if all of them are,
      otherwise RGB; 16 bits become 8 and transparency is dropped. The classes take turns, so that the first n images
      are a fair sample. Beyond 256 MiB of decoded images the files stay where they are, and each batch is decoded
      when it is asked for (`StreamedData`).
    - The layout of a named set (CIFAR in its binary or its Python version, idx, SVHN, Tiny-ImageNet) with any number of
      images: the folder, or the one above it; its test part is read. Of CIFAR also a single file.

    Nothing in a file is executed; of a pickle only plain data is read.

    Args:
        path: the file or folder.
        image_size: of a folder's images: the shorter side is resized to so many pixels, the longer one cropped.

    Raises:
        InputError: there is nothing of this kind, or something in it is damaged or does not fit.
    """
    if image_size is not None and image_size < 1:
        raise InputError(f"image_size: must be above 0, got {image_size}.")
    path = Path(path)
    if not path.exists():
        raise InputError(f"{path}: there is no such file or folder.")
    if path.is_dir():
        return _read_folder(path, image_size)
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


def _read_folder(folder: Path, image_size: int | None) -> ImageData:
    if found := published_layout(folder):
        refuse_image_size(image_size, folder)
        layout, place = found
        return replace(layout.read(place, "test"), name=name_of(folder))
    return _read_image_folder(folder, image_size)


def refuse_image_size(image_size: int | None, path: Path) -> None:
    """Refuse a size for anything but a folder of images."""
    if image_size is not None:
        raise InputError(f"image_size: is for folders of images, and {path} is none; leave it away.")


def name_of(path: Path) -> str:
    """What results call the data of a folder, also of '.' and '..'."""
    return path.resolve().name or "data"


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


def _read_image_folder(folder: Path, image_size: int | None) -> ImageData:
    parts = split_folders(folder)
    if parts and "test" not in parts:
        found = ", ".join(entry.name for entry in parts.values())
        raise InputError(f"{folder}: has {found} but no test; give the folder to be evaluated.")
    return read_classes(parts.get("test", folder), name_of(folder), image_size)


def split_folders(folder: Path) -> dict[str, Path]:
    """The folders train, validation and test by these names, where a folder holds nothing else; else none."""
    entries = {entry.name.lower(): entry for entry in subfolders(folder)}
    return {SPLITS[name]: entry for name, entry in entries.items()} if set(entries) <= set(SPLITS) else {}


def read_classes(folder: Path, name: str, image_size: int | None) -> ImageData:
    """Images in a subfolder for each class; the classes take turns. As for `read_images`."""
    classes = subfolders(folder)
    if not classes:
        raise InputError(f"{folder}: has no subfolders; give {LAYOUTS}.")
    members = [list(image_files(entry)) for entry in classes]
    # First the first of every class, then the second: an evaluation may take only the first n.
    turns = sorted((turn, label) for label, files in enumerate(members) for turn in range(len(files)))
    if not turns:
        raise InputError(f"{folder}: has no images ({', '.join(SUFFIXES)}) in its {len(classes)} subfolders.")
    files = [members[label][turn] for turn, label in turns]
    y = torch.tensor([label for _, label in turns])
    return from_files(folder, files, y, tuple(entry.name for entry in classes), name, image_size)


def from_files(
    root: Path, files: list[Path], y: torch.Tensor, class_names: tuple[str, ...], name: str, image_size: int | None
) -> ImageData:
    """Images of one size, in memory up to 256 MiB of decoded images, otherwise streamed.

    Args:
        root: a folder that all files lie below.
        files: the images.
        y: their labels.
        class_names: what the labels mean.
        name: what results call the data.
        image_size: what their shorter side is resized to, and the longer one cropped; None leaves them as they are.
    """
    shape = _shape_of_all(files, image_size)
    data = StreamedData(
        torch.empty((len(files), *shape), dtype=torch.uint8, device="meta"),
        y,
        len(class_names),
        class_names,
        name,
        root=root,
        files=[str(file.relative_to(root)) for file in files],
        decode=partial(_read_image, image_size=image_size),
    )
    return data if data.x.numel() > IN_MEMORY else data.in_memory()


def subfolders(folder: Path) -> list[Path]:
    try:
        return sorted(entry for entry in folder.iterdir() if entry.is_dir() and not _hidden(entry.name))
    except OSError as error:
        raise InputError(f"{folder}: cannot be read ({error.strerror}).") from None


def image_files(folder: Path) -> Iterator[Path]:
    """The images in a folder and below it, sorted; other kinds of files and hidden ones are passed over."""
    for file in sorted(folder.rglob("*")):
        inside = file.relative_to(folder).parts
        if file.suffix.lower() in SUFFIXES and file.is_file() and not any(_hidden(part) for part in inside):
            yield file


def _hidden(name: str) -> bool:
    return name.startswith(".") or name == "__MACOSX"


def _shape_of_all(files: list[Path], image_size: int | None) -> tuple[int, ...]:
    """(C, H, W) of images of one size; only their heads are read."""
    first = _image_shape(files[0], image_size)
    channels = first[2]
    for file in files:
        shape = _image_shape(file, image_size)
        if shape[:2] != first[:2]:
            raise InputError(
                f"{file}: is {shape[1]}x{shape[0]}, but {files[0]} is {first[1]}x{first[0]}; "
                "bring all images to one size, or give image_size."
            )
        channels = max(channels, shape[2])
    return channels, *first[:2]


def _image_shape(file: Path, image_size: int | None) -> tuple[int, ...]:
    """(H, W, 1 or 3), as `_read_image` will give it."""
    with _opened(file) as image:
        width, height = (image_size, image_size) if image_size else image.size
        return height, width, 1 if _is_grey(image, file) else 3


def _read_image(file: Path, image_size: int | None = None) -> Bytes:
    """One image as uint8 (H, W, 1) if its file is grey, otherwise (H, W, 3).

    With an image size its shorter side is brought to that, and what the longer one has beyond is cut off at both ends.
    """
    with _opened(file) as image:
        array = pixels_of(image, file)
    return array if image_size is None else _resized(array, image_size)


@contextmanager
def _opened(file: Path) -> Generator["PIL.Image.Image"]:
    """The image in a file; what goes wrong with it is an InputError."""
    from PIL import Image

    try:
        with Image.open(file, formats=FORMATS) as image:
            yield image
    except InputError:
        raise
    except (OSError, ValueError, SyntaxError, EOFError, LookupError, Image.DecompressionBombError) as error:
        raise InputError(f"{file}: is not a readable image ({first_line(error)}).") from None


def _resized(array: Bytes, size: int) -> Bytes:
    from PIL import Image

    height, width, _ = array.shape
    scale = size / min(height, width)
    rows, columns = max(size, round(height * scale)), max(size, round(width * scale))
    image = Image.fromarray(array[:, :, 0] if array.shape[2] == 1 else array)
    resized = np.array(image.resize((columns, rows), Image.Resampling.BILINEAR)).reshape(rows, columns, -1)
    top, left = (rows - size) // 2, (columns - size) // 2
    return resized[top : top + size, left : left + size]


def stacked(images: Iterable[Bytes], names: Sequence[object]) -> torch.Tensor:
    """Images (H, W, 1 or 3) of one size as uint8 (N, 1 or 3, H, W); `names` are for messages."""
    arrays: list[Bytes] = []
    for array, name in zip(images, names, strict=True):
        if arrays and array.shape[:2] != arrays[0].shape[:2]:
            (height, width), (first_height, first_width) = array.shape[:2], arrays[0].shape[:2]
            raise InputError(
                f"{name}: is {width}x{height}, but {names[0]} is {first_width}x{first_height}; "
                "bring all images to one size."
            )
        arrays.append(array)
    channels = max(array.shape[2] for array in arrays)
    x = np.empty((len(arrays), channels, *arrays[0].shape[:2]), dtype=np.uint8)
    for place, array in zip(x, arrays, strict=True):
        place[:] = array.transpose(2, 0, 1)  # one grey plane fills all three
    return torch.from_numpy(x)


def pixels_of(image: "PIL.Image.Image", name: object) -> Bytes:
    """A Pillow image as uint8 (H, W, 1) if it is grey, otherwise (H, W, 3); `name` is for messages."""
    if not _is_grey(image, name):
        # Through RGBA, because Pillow warns of palettes with transparency otherwise.
        return np.array((image.convert("RGBA") if image.mode in ("P", "PA") else image).convert("RGB"))
    if image.mode in GREY_16:
        return _from_16_bits(np.array(image), name)
    return np.array(image.convert("L"))[:, :, None]


def _is_grey(image: "PIL.Image.Image", name: object) -> bool:
    if image.mode in (*GREY, *GREY_16):
        return True
    if image.mode not in COLOUR:
        raise InputError(f"{name}: has pixels of the kind {image.mode}; save it as 8-bit grey or RGB.")
    return False


def _from_16_bits(values: NDArray[Any], name: object) -> Bytes:
    wide = values.astype(np.int64)
    if wide.min() < 0 or wide.max() > 65535:
        raise InputError(f"{name}: has pixels beyond 16 bits; save it as 8-bit grey or RGB.")
    return ((wide + 128) // 257).astype(np.uint8)[:, :, None]
