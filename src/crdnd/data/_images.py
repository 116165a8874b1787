"""One image: from a file of any kind and size to pixels. Training and `crdnd predict` read images by this code alone.

- Formats are told by content, whatever the file is called; of several pages or frames the first is taken.
- A photograph is turned as its EXIF data say.
- What is transparent is laid on white. 16 bits become 8; CMYK, palettes and the like become RGB.
- Where a size is asked for, the image is scaled until it just covers it, and what stands over is cut off at both ends.
"""

import functools
import warnings
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from crdnd.errors import InputError, first_line

if TYPE_CHECKING:
    import PIL.Image

Bytes = NDArray[np.uint8]
Size = tuple[int, int]
"""(H, W)."""

SUFFIXES = (
    ".png", ".jpg", ".jpeg", ".jfif", ".bmp", ".webp", ".avif", ".heic", ".heif", ".ppm", ".pgm", ".tif", ".tiff",
    ".gif",
)  # fmt: skip
# Named, because Pillow also knows formats that other programs are started for.
FORMATS = ("PNG", "JPEG", "BMP", "WEBP", "AVIF", "PPM", "TIFF", "GIF")
GREY, GREY_16 = ("1", "L", "LA", "La"), ("I", "I;16", "I;16B", "I;16L", "I;16N")
COLOUR = ("RGB", "RGBA", "RGBa", "RGBX", "P", "PA", "CMYK", "YCbCr", "HSV")
MOST_PIXELS = 89_478_485
"""Of a file that is opened: a quarter of a GiB of RGB, which is where Pillow begins to speak of decompression bombs."""
TOO_LARGE = f"has more than {MOST_PIXELS // 10**6} million pixels; make it smaller."
ENDS = {"PNG": b"IEND", "JPEG": b"\xff\xd9"}
"""What the last bytes of a whole file contain."""
HEIC = {b"ftyp" + brand for brand in (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")}
"""How a photograph of a phone begins, behind four bytes, that Pillow does not read."""


def image_files(folder: str | Path) -> Iterator[Path]:
    """The images in a folder and below it, sorted; other kinds of files and hidden ones are passed over."""
    folder = Path(folder)
    for file in sorted(folder.rglob("*")):
        inside = file.relative_to(folder).parts
        # A link that leads nowhere is an image that is missing, and not a file of another kind.
        is_one = file.suffix.lower() in SUFFIXES and (file.is_file() or file.is_symlink())
        if is_one and not any(is_hidden(part) for part in inside):
            yield file


def is_hidden(name: str) -> bool:
    """Whether a file or folder is none of the user's."""
    return name.startswith(".") or name == "__MACOSX"


def image_shape(file: str | Path, size: Size | None = None, channels: int | None = None) -> tuple[int, int, int]:
    """(H, W, 1 or 3), as `read_image` will give it; only the head of the file and its last bytes are read.

    A file that does not end as its format does may be cut off, so it is decoded to know.

    Raises:
        InputError: as for `read_image`; damage in the middle of a file is not seen.
    """
    file = Path(file)
    with _opened(file) as image:
        height, width = size or _size_of(image)
        found = channels or (1 if _is_grey(image, file) else 3)
        end = ENDS.get(image.format or "")
        if end is None or end not in _last_bytes(file):
            image.load()
    return height, width, found


def read_image(file: str | Path, size: Size | None = None, channels: int | None = None) -> Bytes:
    """One image as uint8 (H, W, 1) if its file is grey, otherwise (H, W, 3).

    Args:
        file: of any of `FORMATS`.
        size: what it is brought to; None leaves it as it is.
        channels: 1 makes colour grey, 3 repeats grey; None leaves them as they are.

    Raises:
        InputError: the file cannot be read, is damaged or has more than `MOST_PIXELS`; the message names it.
    """
    file = Path(file)
    with _opened(file) as image:
        array = pixels_of(image, file)
    if channels == 1 and array.shape[2] == 3:
        array = _grey(array)
    elif channels == 3:
        array = np.broadcast_to(array, (*array.shape[:2], 3))
    return array if size is None else _resized(array, size)


def pixels_of(image: "PIL.Image.Image", name: object) -> Bytes:
    """A Pillow image as uint8 (H, W, 1) if it is grey, otherwise (H, W, 3); `name` is for messages."""
    from PIL import Image

    grey, orientation = _is_grey(image, name), _orientation(image)
    if image.mode in GREY_16:
        array = _from_16_bits(np.array(image), name)
    else:
        if image.has_transparency_data:
            white = Image.new("RGBA", image.size, "white")
            white.alpha_composite(image.convert("RGBA"))
            image = white
        array = np.array(image.convert("L" if grey else "RGB"))
        array = array[:, :, None] if grey else array
    return _turned(array, orientation)


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


@contextmanager
def _opened(file: Path) -> Generator["PIL.Image.Image"]:
    """The image in a file; what goes wrong with it is an InputError."""
    from PIL import Image

    # `MOST_PIXELS` says it in our own words.
    warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
    try:
        with Image.open(file, formats=_formats()) as image:
            if image.width * image.height > MOST_PIXELS:
                raise InputError(f"{file}: {TOO_LARGE}")
            yield image
    except InputError:
        raise
    except Image.DecompressionBombError:
        raise InputError(f"{file}: {TOO_LARGE}") from None
    except Exception as error:  # a decoder raises whatever it stumbles over in a damaged file
        if _is_heic(file):
            raise InputError(f"{file}: is a HEIC image, which is not read; save it as JPEG.") from None
        reason = getattr(error, "strerror", None) or first_line(error).replace(f" {str(file)!r}", "")
        raise InputError(f"{file}: is not a readable image ({reason}).") from None


def _is_heic(file: Path) -> bool:
    """By its content: on their way from a phone such files are often renamed."""
    try:
        with file.open("rb") as handle:
            return handle.read(12)[4:] in HEIC
    except OSError:
        return False


@functools.cache
def _formats() -> tuple[str, ...]:
    """Those that this Pillow can read; older ones know no AVIF."""
    from PIL import Image

    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def _last_bytes(file: Path) -> bytes:
    with file.open("rb") as handle:
        handle.seek(-min(16, file.stat().st_size), 2)
        return handle.read()


TURNS = {
    2: (False, 1, -1), 3: (False, -1, -1), 4: (False, -1, 1), 5: (True, 1, 1), 6: (True, 1, -1), 7: (True, -1, -1),
    8: (True, -1, 1),
}  # fmt: skip
"""What EXIF's orientations ask for: whether rows and columns change places, then the steps through either."""
ORIENTATION = 0x0112


def _orientation(image: "PIL.Image.Image") -> int:
    """EXIF's, or 1. Pillow itself turns a TIFF; other files have the data in their head, or are taken as they are."""
    if image.format == "TIFF" or "exif" not in image.info:
        return 1
    try:
        return int(image.getexif().get(ORIENTATION, 1))
    except Exception:  # damaged EXIF data do not make an image unreadable
        return 1


def _turned(array: Bytes, orientation: int) -> Bytes:
    exchanged, down, across = TURNS.get(orientation, (False, 1, 1))
    return np.ascontiguousarray((array.transpose(1, 0, 2) if exchanged else array)[::down, ::across])


def _size_of(image: "PIL.Image.Image") -> Size:
    exchanged, *_ = TURNS.get(_orientation(image), (False,))
    return image.size if exchanged else (image.height, image.width)


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


def _grey(array: Bytes) -> Bytes:
    from PIL import Image

    return np.array(Image.fromarray(array).convert("L"))[:, :, None]


def _resized(array: Bytes, size: Size) -> Bytes:
    """Scaled until it just covers (H, W), and cropped in the middle: `crdnd.models.fitted` up to the rounding."""
    from PIL import Image

    height, width, channels = array.shape
    scale = min(height / size[0], width / size[1])
    top, left = max(0.0, (height - size[0] * scale) / 2), max(0.0, (width - size[1] * scale) / 2)
    seen = (left, top, width - left, height - top)
    image = Image.fromarray(array[:, :, 0] if channels == 1 else np.ascontiguousarray(array))
    resized = np.array(image.resize((size[1], size[0]), Image.Resampling.BILINEAR, box=seen))
    return resized.reshape(*size, channels)
