"""Augmentation in batches on the data's own device, drawn per sample, so that it needs no workers and no state.

CropShift and IDBH: Li and Spratling 2023 (arXiv 2301.09879); random erasing: Zhong et al. (arXiv 1708.04896); mixup:
Zhang et al. (arXiv 1710.09412); CutMix: Yun et al. (arXiv 1905.04899).
"""

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Literal, cast, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from crdnd.data._base import in_unit_range
from crdnd.errors import did_you_mean
from crdnd.random import Stream

Augmentation = Literal["none", "shift", "crop_flip", "cropshift", "random_erasing", "idbh_weak", "mixup", "cutmix"]


def augmentation_names(kind: str) -> tuple[Augmentation, ...]:
    """The names in `crop_flip+cutmix`, or a ValueError: one is unknown, or something follows a mixture."""
    names = tuple(name.strip() for name in kind.split("+"))
    for name in names:
        if name not in _ALONE and name not in _MIXED:
            raise ValueError(f"unknown augmentation {name!r}{did_you_mean(name, get_args(Augmentation))}")
    for before, after in pairwise(names):
        if before in _MIXED:
            raise ValueError(f"{before} mixes samples and comes last, so nothing follows it; write {after}+{before}.")
    return cast("tuple[Augmentation, ...]", names)


def augment(x: Tensor, y: Tensor, num_classes: int, kind: str, stream: Stream) -> tuple[Tensor, Tensor]:
    """Augment a batch. One after the other with a plus between, such as `crop_flip+cutmix`; mixtures come last.

    - none: as it is.
    - shift: moved by up to 1 pixel each way, zeros come in.
    - crop_flip: moved by up to 4 pixels, and mirrored left to right with probability 1/2.
    - cropshift: lines are cut off, and what is left is put at a random place on zeros. The number of lines over both
      axes together is uniform on 0 .. 10 of 32, as in the authors' code for CIFAR-10, and scales with the shorter side.
      Nothing is mirrored.
    - random_erasing: crop_flip, then with probability 1/2 a rectangle of zeros over 2% to 33% of the image, whose sides
      have a ratio of 0.3 to 3.3. These are IDBH's numbers; Zhong et al. go up to 40% and fill in noise.
    - idbh_weak: mirrored with probability 1/2, cropshift, one of eight changes of colour or shape, random erasing. The
      order, the strengths and the probabilities are those of the authors' code for CIFAR-10. Differs from it: pixels
      are not rounded to 256 levels in between, so small images can be equalised too.
    - mixup: w x_i + (1 - w) x_j, w uniform on [1/2, 1]. Nothing is moved or mirrored.
    - cutmix: a rectangle of x_j in x_i, or of x_i in x_j, such that x_i has the larger part; its share of the area is
      uniform on [0, 1] before it is cut off at the edges. Nothing is moved or mirrored.

    The papers' Beta(1, 1) is behind both w. They are folded to at least 1/2, so that y_i stays the dominant class; that
    changes no pair of images, only which of the two is called i. j is the next sample of the batch, and the first for
    the last one. So in these two a sample depends on its neighbour (with several processes, on the one in the same
    share of the batch); in all others on its id and the stream alone.

    Args:
        x: images (B, C, H, W), floating point in [0, 1] or uint8 in 0 .. 255: the latter cost less to move.
        y: labels, int64 (B,).
        num_classes: K.
        kind: which of the above, with a plus between where there are several.
        stream: draws for these samples.

    Returns:
        Images of the same shape in [0, 1], of the same type or float32 for uint8, and targets: y itself, or for mixup
        and cutmix soft labels (B, K) in the type of the images.
    """
    *before, last = augmentation_names(kind)
    for number, name in enumerate(before):
        x = _alone(x, name, stream.child("before", number))
    if last not in _MIXED:
        return in_unit_range(_alone(x, last, stream)), y
    x = in_unit_range(x)
    mixed, share = _MIXED[last](x, stream)
    # Not `one_hot`, which looks at its labels.
    own = (y[:, None] == torch.arange(num_classes, device=y.device)).to(x.dtype)
    other = own.roll(-1, 0)
    return mixed, share[:, None] * own + (1 - share[:, None]) * other


def _alone(x: Tensor, kind: Augmentation, stream: Stream) -> Tensor:
    return _ALONE[kind](x if kind in _MOVING else in_unit_range(x), stream)


# Places


def _moved(x: Tensor, most: int, stream: Stream, *, mirror: bool = False) -> Tensor:
    """Moved by up to `most` pixels each way, and then perhaps mirrored left to right with probability 1/2.

    Lines are copied whole, which is much faster than to look up every pixel: what an image becomes is a window of the
    image on zeros, or of its mirror image, where the window lies as far to the other side.
    """
    count, channels, height, width = x.shape
    down, right = stream.child("move").integers(-most, most + 1, (2,)).unbind(1)
    padded = x.new_zeros(1 + mirror, count, channels, height + 2 * most, width + 2 * most)
    inner = padded[..., most:-most, most:-most]
    inner[0] = x
    image = torch.arange(count, device=x.device)
    if mirror:
        inner[1] = x.flip(3)
        flip = _flips(stream)
        image, right = image + count * flip, torch.where(flip.bool(), -right, right)
    image_size, channel_size, line_size = padded.stride()[1:4]
    places = torch.arange(channels, device=x.device)[:, None] * channel_size
    places = places + torch.arange(height, device=x.device) * line_size
    first = image * image_size + (most + down) * line_size + most + right
    windows = padded.as_strided((padded.numel() - width + 1, width), (1, 1))
    return windows.index_select(0, (first[:, None] + places.flatten()).flatten()).reshape(x.shape)


def _flips(stream: Stream) -> Tensor:
    """1 for each sample that is mirrored, else 0; int64 (B,)."""
    return stream.child("flip").integers(0, 2, (1,))[:, 0]


def _mirrored(x: Tensor, stream: Stream) -> Tensor:
    return torch.where(_flips(stream).bool()[:, None, None, None], x.flip(3), x)


def _crop_flip(x: Tensor, stream: Stream) -> Tensor:
    return _moved(x, 4, stream, mirror=True)


def _crop_shift(x: Tensor, stream: Stream) -> Tensor:
    height, width = x.shape[2:]
    most = round(10 / 32 * min(height, width))
    draws = stream.child("cropshift")
    lines = draws.child("lines").integers(0, most + 1, (1,))[:, 0]
    split, *places = draws.child("places").uniform((5,)).unbind(1)
    cut_rows = _below(lines + 1, split)
    rows = _crop_of_lines(height, cut_rows, places[0], places[1])
    columns = _crop_of_lines(width, lines - cut_rows, places[2], places[3])
    return _taken(x, rows[:, :, None], columns[:, None, :])


def _crop_of_lines(size: int, cut: Tensor, source: Tensor, target: Tensor) -> Tensor:
    """Which line of the image stands at each line of the result, -1 for none. (B,), (B,), (B,) -> (B, size)."""
    first, place = _below(cut + 1, source), _below(cut + 1, target)
    line = torch.arange(size, device=cut.device) - place[:, None]
    return torch.where((line >= 0) & (line < size - cut[:, None]), line + first[:, None], -1)


def _erased(x: Tensor, stream: Stream) -> Tensor:
    height, width = x.shape[2:]
    chance, share, form, down, right = stream.child("erase").uniform((5,)).unbind(1)
    area = (0.02 + 0.31 * share) * height * width
    # Of the ratios in the range those with which the rectangle fits; the common code draws again and gives up at last.
    low = (area / width**2).log().clamp(min=math.log(0.3))
    high = (height**2 / area).log().clamp(max=math.log(3.3))
    ratio = (low + form * (high - low)).exp()
    rows = (area * ratio).sqrt().round().clamp(1, height).long()
    columns = (area / ratio).sqrt().round().clamp(1, width).long()
    down_from = torch.arange(height, device=x.device) - _below(height - rows + 1, down)[:, None]
    right_from = torch.arange(width, device=x.device) - _below(width - columns + 1, right)[:, None]
    inside_rows = (down_from >= 0) & (down_from < rows[:, None]) & (chance < 0.5)[:, None]
    inside_columns = (right_from >= 0) & (right_from < columns[:, None])
    return x.masked_fill((inside_rows[:, :, None] & inside_columns[:, None, :])[:, None], 0)


def _below(bound: Tensor, uniform: Tensor) -> Tensor:
    """Integers in 0 .. bound - 1, equally likely for a uniform draw on [0, 1). int64 (B,), (B,) -> int64 (B,)."""
    return (bound * uniform).long()


def _taken(x: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """The pixels at these places, 0 where a place lies outside. rows and columns: int64, (B, H, W) when broadcast."""
    height, width = x.shape[2:]
    inside = (rows >= 0) & (rows < height) & (columns >= 0) & (columns < width)
    place = rows.clamp(0, height - 1) * width + columns.clamp(0, width - 1)
    found = x.flatten(2).gather(2, place.flatten(1)[:, None].expand(-1, x.shape[1], -1))
    return torch.where(inside[:, None], found.reshape(x.shape), 0)


# Colour and shape: IDBH's layer, "colour-biased" in its paper. Each change is made of every image and one is kept.


def _idbh_weak(x: Tensor, stream: Stream) -> Tensor:
    return _erased(_colour_or_shape(_crop_shift(_mirrored(x, stream), stream), stream), stream)


def _colour_or_shape(x: Tensor, stream: Stream) -> Tensor:
    draws = stream.child("colour_or_shape")
    u = draws.child("strength").uniform((1, 1, 1)).to(x.dtype)
    degrees = draws.child("degrees").integers(1, 11, (1, 1))
    sign = 2 * draws.child("sign").integers(0, 2, (1, 1)) - 1
    across = draws.child("across").integers(0, 2, (1, 1)).bool()
    slope = sign * torch.tan(0.05 + 0.1 * u[:, 0])
    grey, wide, narrow = _grey(x), 0.1 + 1.8 * u, 0.5 + 1.4 * u
    changed = (
        _blended(grey, x, wide),  # colour
        _blended(torch.zeros_like(x), x, narrow),  # brightness
        _blended(grey.flatten(1).mean(1)[:, None, None, None], x, narrow),  # contrast
        _blended(_smoothed(x), x, wide),  # sharpness
        _stretched(x),
        _equalised(x),
        _sheared(x, slope, across),
        _rotated(x, sign * degrees),
    )
    chosen = draws.child("operation").integers(0, len(changed), (1,))[:, 0]
    return torch.stack(changed)[chosen, torch.arange(len(x), device=x.device)]


def _blended(base: Tensor, x: Tensor, strength: Tensor) -> Tensor:
    """On from `base` through x: strength 0 is the base, 1 is x. strength: (B, 1, 1, 1)."""
    return (base + strength * (x - base)).clamp(0, 1)


def _grey(x: Tensor) -> Tensor:
    """Brightness, (B, 1, H, W): Rec. 601 of three channels, else their mean."""
    if x.shape[1] != 3:
        return x.mean(1, keepdim=True)
    return 0.299 * x[:, :1] + 0.587 * x[:, 1:2] + 0.114 * x[:, 2:]


def _smoothed(x: Tensor) -> Tensor:
    """Each inner pixel averaged with its eight neighbours, at five times their weight; the border as it is."""
    smooth = (9 * F.avg_pool2d(x, 3, stride=1, padding=1) + 4 * x) / 13
    border = torch.ones_like(x, dtype=torch.bool)
    border[:, :, 1:-1, 1:-1] = False
    return torch.where(border, x, smooth)


def _stretched(x: Tensor) -> Tensor:
    """Every channel from 0 to 1; one without contrast as it is."""
    low, high = x.amin((2, 3), keepdim=True), x.amax((2, 3), keepdim=True)
    flat = high == low
    return torch.where(flat, x, (x - low) / torch.where(flat, 1, high - low))


def _equalised(x: Tensor) -> Tensor:
    """Each pixel as the share of its channel that is darker, such that the brightest is 1; a flat one as it is."""
    values = x.flatten(2)
    darker = torch.searchsorted(values.sort(2).values, values.contiguous()).to(x.dtype)
    most = darker.amax(2, keepdim=True)
    return torch.where(most == 0, values, darker / most.clamp(min=1)).reshape(x.shape)


def _sheared(x: Tensor, slope: Tensor, across: Tensor) -> Tensor:
    """Rows moved across, or columns down, by `slope` pixels for each pixel from the centre. (B, 1, 1), (B, 1, 1)."""
    down_from, right_from = _from_centre(x)
    rows = torch.where(across, down_from, down_from + slope * right_from)
    columns = torch.where(across, right_from + slope * down_from, right_from)
    return _nearest(x, rows, columns)


def _rotated(x: Tensor, degrees: Tensor) -> Tensor:
    """Turned counter-clockwise about the centre. degrees: (B, 1, 1)."""
    down_from, right_from = _from_centre(x)
    angle = degrees.to(x.dtype).deg2rad()
    rows = angle.cos() * down_from + angle.sin() * right_from
    columns = angle.cos() * right_from - angle.sin() * down_from
    return _nearest(x, rows, columns)


def _from_centre(x: Tensor) -> tuple[Tensor, Tensor]:
    """Distance of every row (H, 1) and column (1, W) from the image's centre, downwards and to the right."""
    height, width = x.shape[2:]
    rows = torch.arange(height, device=x.device, dtype=x.dtype) - (height - 1) / 2
    columns = torch.arange(width, device=x.device, dtype=x.dtype) - (width - 1) / 2
    return rows[:, None], columns[None, :]


def _nearest(x: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """The pixels nearest to places given from the centre, (B, H, W) when broadcast; 0 outside."""
    height, width = x.shape[2:]
    return _taken(x, (rows + (height - 1) / 2).round().long(), (columns + (width - 1) / 2).round().long())


# Mixtures with the next sample: the images, and each sample's own share (B,), at least 1/2.


def _mixup(x: Tensor, stream: Stream) -> tuple[Tensor, Tensor]:
    u = stream.child("mixup").uniform(()).to(x.dtype)
    share = torch.maximum(u, 1 - u)
    w = share[:, None, None, None]
    return w * x + (1 - w) * x.roll(-1, 0), share


def _cutmix(x: Tensor, stream: Stream) -> tuple[Tensor, Tensor]:
    height, width = x.shape[2:]
    area, down, right = stream.child("cutmix").uniform((3,)).unbind(1)
    side = area.sqrt()[:, None] / 2
    # A pixel is inside when its middle is.
    rows = ((torch.arange(height, device=x.device) + 0.5) / height - down[:, None]).abs() < side
    columns = ((torch.arange(width, device=x.device) + 0.5) / width - right[:, None]).abs() < side
    inside = (rows[:, :, None] & columns[:, None, :])[:, None]
    covered = inside.flatten(1).to(x.dtype).mean(1)
    own = inside == (covered > 0.5)[:, None, None, None]
    return torch.where(own, x, x.roll(-1, 0)), torch.maximum(covered, 1 - covered)


_ALONE: dict[Augmentation, Callable[[Tensor, Stream], Tensor]] = {
    "none": lambda x, _: x,
    "shift": lambda x, stream: _moved(x, 1, stream),
    "crop_flip": _crop_flip,
    "cropshift": _crop_shift,
    "random_erasing": lambda x, stream: _erased(_crop_flip(x, stream), stream),
    "idbh_weak": _idbh_weak,
}
# Those that take pixels as they are or leave them black.
_MOVING: tuple[Augmentation, ...] = ("none", "shift", "crop_flip", "cropshift", "random_erasing")
_MIXED: dict[Augmentation, Callable[[Tensor, Stream], tuple[Tensor, Tensor]]] = {"mixup": _mixup, "cutmix": _cutmix}
