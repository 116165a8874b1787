"""Augmentation: laws that hold for every kind, closed forms of each, and the phases of a run."""

import math
from typing import Any, get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageEnhance, ImageOps
from torch import Tensor

from crdnd import ImageData, Splits, ThreatModel, train
from crdnd.config import build
from crdnd.data import Augmentation, _augment, augment
from crdnd.engine import TrainSettings
from crdnd.errors import InputError
from crdnd.random import Stream, permutation
from support import BATCH, CLASSES, Recorder, TinyNet, images

torch.set_num_threads(1)  # networks this small wait for their threads more than they compute

KINDS = get_args(Augmentation)
MIXED = ("mixup", "cutmix")
ALONE = tuple(kind for kind in KINDS if kind not in MIXED)
DIGIT, COLOUR, WIDE, FLAT = (1, 8, 8), (3, 32, 32), (2, 5, 11), (1, 2, 7)


def stream(count: int, seed: int = 0) -> Stream:
    return Stream.of("augment", seed, ids=torch.arange(count))


def labels(count: int) -> Tensor:
    return torch.arange(count) % CLASSES


def augmented(x: Tensor, kind: Augmentation, draws: Stream) -> Tensor:
    return augment(x, labels(len(x)), CLASSES, kind, draws)[0]


def moved(image: Tensor, down: int, right: int) -> Tensor:
    """The image moved by hand, pixel by pixel; zeros come in."""
    channels, height, width = image.shape
    result = torch.zeros_like(image)
    for c in range(channels):
        for r in range(height):
            for q in range(width):
                if 0 <= r - down < height and 0 <= q - right < width:
                    result[c, r, q] = image[c, r - down, q - right]
    return result


def marked(*shape: int) -> Tensor:
    """An image in which every pixel has its own value, and none is 0."""
    count = math.prod(shape)
    return (torch.arange(1, count + 1, dtype=torch.float64) / count).reshape(shape)


def box(mask: Tensor) -> tuple[int, int, int, int]:
    """(top, bottom, left, right) of the True pixels of (H, W); they must be a full rectangle."""
    rows, columns = mask.any(1).nonzero()[:, 0].tolist(), mask.any(0).nonzero()[:, 0].tolist()
    top, bottom, left, right = rows[0], rows[-1] + 1, columns[0], columns[-1] + 1
    assert mask[top:bottom, left:right].all()
    return top, bottom, left, right


# --- laws for every kind ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [DIGIT, COLOUR, WIDE, FLAT])
@pytest.mark.parametrize("kind", KINDS)
def test_an_augmented_batch_has_the_shape_type_and_range_of_images(kind, shape, dtype):
    x = images(13, shape, dtype=dtype).round(decimals=1)  # ties, and pixels on both faces of the box
    before, state = x.clone(), torch.get_rng_state()
    changed, target = augment(x, labels(13), CLASSES, kind, stream(13))
    assert changed.shape == x.shape
    assert changed.dtype == dtype
    assert ((changed >= 0) & (changed <= 1)).all()
    assert torch.equal(x, before)
    assert torch.equal(torch.get_rng_state(), state)
    assert target.dtype == (dtype if kind in MIXED else torch.int64)
    again, _ = augment(x, labels(13), CLASSES, kind, stream(13))
    assert torch.equal(again, changed)
    if kind != "none":
        assert not torch.equal(changed, x)
        assert not torch.equal(augmented(x, kind, stream(13, seed=1)), changed), "another epoch, another draw"


@pytest.mark.parametrize("kind", [kind for kind in ALONE if kind != "none"])
def test_an_image_is_augmented_the_same_in_any_batch_and_any_order(kind):
    x, y, ids = images(13, (3, 9, 8)), labels(13), torch.arange(100, 113)
    whole, target = augment(x, y, CLASSES, kind, Stream.of("augment", 0, ids=ids))
    assert target is y
    parts = [augmented(x[s], kind, Stream.of("augment", 0, ids=ids[s])) for s in (slice(0, 2), slice(2, 13))]
    assert torch.equal(torch.cat(parts), whole)
    order = torch.arange(12, -1, -1)
    assert torch.equal(augmented(x[order], kind, Stream.of("augment", 0, ids=ids[order])), whole[order])


@pytest.mark.parametrize("kind", MIXED)
def test_a_mixture_depends_on_its_sample_and_the_next_alone(kind):
    x, y, ids = images(13), labels(13), torch.arange(100, 113)
    whole, target = augment(x, y, CLASSES, kind, Stream.of("augment", 0, ids=ids))
    part, of_part = augment(x[2:9], y[2:9], CLASSES, kind, Stream.of("augment", 0, ids=ids[2:9]))
    assert torch.equal(part[:-1], whole[2:8])
    assert torch.equal(of_part[:-1], target[2:8])
    assert not torch.equal(part[-1], whole[8]), "the last one's partner is the first of its batch"
    turned = torch.arange(13).roll(4)  # every sample keeps its partner
    again, of_turned = augment(x[turned], y[turned], CLASSES, kind, Stream.of("augment", 0, ids=ids[turned]))
    assert torch.equal(again, whole[turned])
    assert torch.equal(of_turned, target[turned])


@pytest.mark.parametrize("kind", MIXED)
def test_a_soft_label_is_a_distribution_with_the_own_class_on_top(kind):
    count = 200
    y = torch.randint(0, CLASSES, (count,), generator=torch.Generator().manual_seed(0))
    _, target = augment(images(count, dtype=torch.float32), y, CLASSES, kind, stream(count))
    assert target.shape == (count, CLASSES)
    torch.testing.assert_close(target.sum(1), torch.ones(count))
    own = target.gather(1, y[:, None])[:, 0]
    assert (own >= 0.5).all()
    assert (own >= target.amax(1)).all()
    same = y == y.roll(-1)
    assert (own[same] == 1).all()
    assert ((target > 0).sum(1) <= 2).all()
    assert (target.gather(1, y.roll(-1)[:, None])[~same, 0] > 0).float().mean() > 0.9


# --- one after the other ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("last", ["cutmix", "mixup", "random_erasing"])
def test_a_plus_does_one_after_the_other_with_draws_of_their_own(last):
    x, y, draws = images(13, (3, 9, 8)), labels(13), stream(13)
    both, target = augment(x, y, CLASSES, f"crop_flip + {last}", draws)
    first = augmented(x, "crop_flip", draws.child("before", 0))
    assert not torch.equal(first, augmented(x, "crop_flip", draws)), "twice the same draws would move by even steps"
    expected, of_expected = augment(first, y, CLASSES, last, draws)
    assert torch.equal(both, expected)
    assert torch.equal(target, of_expected)


def test_bytes_may_go_through_several():
    x = (images(7, (3, 9, 8)) * 255).round().to(torch.uint8)
    for kind in ("crop_flip+mixup", "idbh_weak+cutmix", "shift+none"):
        got = augmented(x, kind, stream(7))
        torch.testing.assert_close(got, augmented(x.float() / 255, kind, stream(7)), rtol=0, atol=1e-6)


# --- none, shift, crop_flip -------------------------------------------------------------------------------------------


def test_no_augmentation_is_the_identity():
    x = images()
    assert augmented(x, "none", stream(BATCH)) is x


def test_a_shift_moves_the_whole_image_by_up_to_one_pixel_each_way():
    count, image = 900, marked(2, 3, 4)
    shifted = augmented(image.expand(count, 2, 3, 4), "shift", stream(count))
    found = torch.zeros(3, 3)
    for down in (-1, 0, 1):
        for right in (-1, 0, 1):
            found[down + 1, right + 1] = (shifted == moved(image, down, right)).all(dim=(1, 2, 3)).sum()
    assert found.sum() == count, "every image is one of the nine, zeros where nothing comes in"
    # Each of the nine has probability 1/9.
    assert (found - 100).abs().max() < 4 * math.sqrt(count * 8 / 81)


def test_crop_flip_moves_by_up_to_four_pixels_and_mirrors_every_other_image():
    count = 1620
    image = 0.1 + 0.9 * images(1, (3, 5, 11))[0]
    changed = augmented(image.expand(count, 3, 5, 11), "crop_flip", stream(count))
    found = torch.zeros(2, 9, 9)
    for down in range(-4, 5):
        for right in range(-4, 5):
            straight = moved(image, down, right)
            for mirror, candidate in enumerate((straight, straight.flip(2))):
                found[mirror, down + 4, right + 4] = (changed == candidate).all(dim=(1, 2, 3)).sum()
    assert found.sum() == count
    assert abs(found[0].sum() - count / 2) < 4 * math.sqrt(count / 4)
    for axis in (1, 2):  # whether an image is mirrored has nothing to do with where it moves: 18 cells of 1/18 each
        assert (found.sum(axis) - count / 18).abs().max() < 4 * math.sqrt(count * 17 / 18**2)
    # Rows and columns of the 81 offsets: 9 cells of probability 1/9 each.
    for marginal in (found.sum((0, 2)), found.sum((0, 1))):
        assert (marginal - count / 9).abs().max() < 4 * math.sqrt(count * 8 / 81)
    assert (found.sum(0) > 0).sum() > 75, "nearly all offsets occur, so that both directions are drawn on their own"


def test_shift_and_crop_flip_draw_what_they_always_drew():
    # Runs that go on, and published numbers, depend on these places: a pixel is worth its number, 1 .. 99.
    x = torch.arange(1, 100, dtype=torch.float64).reshape(1, 1, 9, 11).expand(6, 1, 9, 11) / 100
    draws = Stream.of("augment", 3, 5, ids=torch.tensor([40, 7, 0, 1146, 5, 9]))
    drawn = {kind: (100 * augmented(x, kind, draws)[:, 0, 4, 2]).round().int().tolist() for kind in FORMER}
    assert drawn == FORMER


FORMER = {"shift": [46, 37, 59, 36, 59, 47], "crop_flip": [0, 37, 32, 36, 56, 83]}


@given(
    st.integers(2, 5), st.integers(1, 3), st.integers(1, 7), st.integers(1, 7), st.sampled_from(["shift", "crop_flip"])
)
def test_images_of_any_size_are_moved_and_then_mirrored_as_drawn(count, channels, height, width, kind):
    most = 4 if kind == "crop_flip" else 1
    x, draws = images(count, (channels, height, width)), stream(count)
    offsets = draws.child("move").integers(-most, most + 1, (2,))
    flips = draws.child("flip").integers(0, 2, (1,)) * (kind == "crop_flip")
    expected = torch.zeros_like(x)
    for sample in range(count):
        for row in range(height):
            for column in range(width):
                seen = width - 1 - column if flips[sample] else column
                source = row + int(offsets[sample, 0]), seen + int(offsets[sample, 1])
                if 0 <= source[0] < height and 0 <= source[1] < width:
                    expected[sample, :, row, column] = x[sample, :, *source]
    assert torch.equal(augmented(x, kind, draws), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_bytes_are_augmented_as_the_numbers_that_they_stand_for(kind):
    x = (256 * images(BATCH, (3, 9, 11))).to(torch.uint8)
    y = torch.arange(BATCH) % CLASSES
    from_bytes = augment(x, y, CLASSES, kind, stream(BATCH))
    from_numbers = augment(x.float() / 255, y, CLASSES, kind, stream(BATCH))
    assert from_bytes[0].dtype == torch.float32
    assert all(torch.equal(a, b) for a, b in zip(from_bytes, from_numbers, strict=True))


# --- cropshift --------------------------------------------------------------------------------------------------------


def crops(shape: tuple[int, int, int], count: int) -> list[tuple[int, int, int, int, int, int]]:
    """(height, width, top, left in the result, top, left in the image) of each crop, found by its pixels."""
    image, found = marked(*shape), []
    for result in augmented(image.expand(count, *shape), "cropshift", stream(count)):
        top, bottom, left, right = box(result[0] > 0)
        first = int((image[0] == result[0, top, left]).nonzero()[0, 0])
        second = int((image[0] == result[0, top, left]).nonzero()[0, 1])
        height, width = bottom - top, right - left
        expected = image[:, first : first + height, second : second + width]
        assert torch.equal(result[:, top:bottom, left:right], expected), "a crop of the original, not mirrored"
        found.append((height, width, top, left, first, second))
    return found


def test_cropshift_pastes_a_crop_of_the_original_on_zeros():
    count = 1500
    found = crops((2, 32, 33), count)
    lines = torch.tensor([(32 - height) + (33 - width) for height, width, *_ in found])
    counts = torch.bincount(lines, minlength=11).float()
    assert len(counts) == 11, "0 to 10 lines are cut off"
    assert (counts - count / 11).abs().max() < 4 * math.sqrt(count * 10 / 121)
    # Cut rows are uniform on 0 .. lines, so half of the lines on average; places are uniform on what is free.
    rows = torch.tensor([32 - height for height, *_ in found])
    assert abs((rows / lines.clamp(min=1))[lines > 0].mean() - 0.5) < 0.05
    for size, axis in ((32, 0), (33, 1)):
        free = torch.tensor([size - crop[axis] for crop in found])
        for place in (2 + axis, 4 + axis):
            at = torch.tensor([crop[place] for crop in found])
            assert (at <= free).all()
            assert abs((at[free == 1] == 1).float().mean() - 0.5) < 0.2
            assert abs((at / free.clamp(min=1))[free > 0].mean() - 0.5) < 0.05
    to, source = (torch.tensor([crop[place] for crop in found]) for place in (2, 4))
    assert abs((to > source).double().mean() - (to < source).double().mean()) < 0.1
    assert (to != source).double().mean() > 0.4, "where it is put has nothing to do with where it was"


def test_the_lines_that_cropshift_cuts_scale_with_the_shorter_side():
    for shape, most in ((DIGIT, 2), ((1, 16, 40), 5), ((1, 40, 16), 5), ((1, 64, 64), 20)):
        lines = [shape[1] - height + shape[2] - width for height, width, *_ in crops(shape, 300)]
        assert (min(lines), max(lines)) == (0, most)


# --- random erasing ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [DIGIT, COLOUR, (2, 12, 40)])
def test_random_erasing_puts_a_rectangle_of_zeros_on_every_other_image(shape):
    count, (_, height, width) = 1200, shape
    x = 0.1 + 0.9 * images(count, shape)
    before, after = augmented(x, "crop_flip", stream(count)), augmented(x, "random_erasing", stream(count))
    kept, erased_images, on_edge = (after == before).all(1), 0, 0
    assert (after.movedim(1, -1)[~kept] == 0).all(), "a pixel is as crop_flip left it, or black in all channels"
    for mask in _augment._erased(x, stream(count)).eq(0).all(1):  # on pixels none of which was black
        if not mask.any():
            continue
        erased_images += 1
        top, bottom, left, right = box(mask)
        rows, columns = bottom - top, right - left
        # The sides are rounded to whole pixels, so both laws hold for a rectangle at most half a pixel off.
        smallest, largest = (max(rows - 0.5, 0) * max(columns - 0.5, 0), (rows + 0.5) * (columns + 0.5))
        assert largest > 0.02 * height * width
        assert smallest < 0.33 * height * width
        assert (rows + 0.5) / max(columns - 0.5, 1e-9) > 0.3
        assert max(rows - 0.5, 0) / (columns + 0.5) < 3.3
        on_edge += bottom == height > rows
    assert abs(erased_images - count / 2) < 4 * math.sqrt(count / 4)
    assert on_edge > 0


def test_the_erased_share_is_uniform_between_two_and_thirty_three_percent():
    count = 2000
    mask = _augment._erased(torch.ones(count, 1, 96, 96), stream(count)) == 0
    share = mask.flatten(1).float().mean(1)
    share = share[share > 0]
    assert 0.018 < share.min() < 0.03
    assert 0.32 < share.max() < 0.335
    quarters = torch.histc(share, 4, 0.02, 0.33)
    assert (quarters - len(share) / 4).abs().max() < 4 * math.sqrt(len(share) * 3 / 16) + 3


# --- idbh_weak --------------------------------------------------------------------------------------------------------


def test_idbh_is_mirror_then_cropshift_then_colour_or_shape_then_erasing():
    x, draws = images(40, COLOUR), stream(40)
    expected = _augment._erased(
        _augment._colour_or_shape(_augment._crop_shift(_augment._mirrored(x, draws), draws), draws), draws
    )
    assert torch.equal(augmented(x, "idbh_weak", draws), expected)


def test_each_of_the_eight_changes_is_made_of_every_eighth_image():
    # So large that the least turn moves a pixel, and so far from 0 and 1 that no value is cut off.
    count, shape = 800, (3, 24, 64)
    image = 0.25 + 0.25 * images(1, shape)
    changed = _augment._colour_or_shape(image.expand(count, *shape), stream(count))
    grey = _augment._grey(image)
    bases = {
        "colour": (grey.expand_as(image), 0.1),
        "brightness": (torch.zeros_like(image), 0.5),
        "contrast": (torch.full_like(image, grey.mean()), 0.5),
        "sharpness": (_augment._smoothed(image), 0.1),
    }
    found = {}
    for name, (base, least) in bases.items():
        away, line = (changed - base).flatten(1), (image - base).flatten(1)
        strength = (away * line).sum(1) / line.square().sum()
        found[name] = (away - strength[:, None] * line).abs().amax(1) < 1e-9
        strength = strength[found[name]]
        assert least < strength.min() < least + 0.1, name
        assert 1.8 < strength.max() < 1.9, name
    found["autocontrast"] = (changed == _augment._stretched(image)).flatten(1).all(1)
    found["equalise"] = (changed == _augment._equalised(image)).flatten(1).all(1)
    turns = [degrees for degrees in range(-10, 11) if degrees]
    candidates = _augment._rotated(image.expand(20, *shape), torch.tensor(turns)[:, None, None])
    same = (changed[:, None] == candidates).flatten(2).all(2)
    found["rotate"] = same.any(1)
    found["shear"] = ~torch.stack(list(found.values())).any(0)
    assert (torch.stack(list(found.values())).sum(0) == 1).all()
    for name, mask in found.items():
        assert abs(mask.sum() - count / 8) < 4 * math.sqrt(count * 7 / 64), name
    sheared = changed[found["shear"]]
    assert (sheared[:, :, 11:13, 31:33] == image[:, :, 11:13, 31:33]).all(), "the centre stays"
    assert 0.3 < (sheared[:, :, 0, 0] == 0).all(1).double().mean() < 0.7, "a corner leaves or stays, by the sign"
    # Across, the rows about the middle stay whole; down, the columns about it.
    across = (sheared[:, :, 11:13] == image[:, :, 11:13]).flatten(1).all(1)
    assert 0.3 < across.double().mean() < 0.7
    assert (sheared[~across][:, :, :, 31:33] == image[:, :, :, 31:33]).all()
    # By 0.05 to 0.15 pixels for each from the centre, which the outer lines are 11.5 and 31.5 pixels from.
    assert (sheared[across][:, 0, 0] == 0).sum(1).unique().tolist() == [1, 2]
    assert (sheared[~across][:, 0, :, 0] == 0).sum(1).unique().tolist() == [2, 3, 4, 5]
    assert same.any(0).float().mean() > 0.9, "every whole number of degrees, both ways"


FACTORS = st.floats(0.1, 1.9)


def pictured(image: Tensor) -> Image.Image:
    levels = (image * 255).round().to(torch.uint8)
    return Image.fromarray(levels[0].numpy() if len(levels) == 1 else levels.movedim(0, -1).numpy())


def pixels(picture: Image.Image) -> Tensor:
    levels = torch.from_numpy(np.array(picture)).double() / 255
    return levels[None] if levels.ndim == 2 else levels.movedim(-1, 0)


def level(shape: tuple[int, int, int], seed: int) -> Tensor:
    """An image that 256 levels can hold."""
    return (images(1, shape, seed=seed)[0] * 255).round() / 255


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), factor=FACTORS, shape=st.sampled_from([DIGIT, COLOUR, (3, 6, 13)]))
def test_changes_of_colour_are_those_of_pillow_but_for_its_rounding(seed, factor, shape):
    image = level(shape, seed)
    x, strength = image[None], torch.full((1, 1, 1, 1), factor, dtype=torch.float64)
    grey, picture = _augment._grey(x), pictured(image)
    pairs = {
        "Color": grey,
        "Brightness": torch.zeros_like(x),
        "Contrast": grey.flatten(1).mean(1)[:, None, None, None],
        "Sharpness": _augment._smoothed(x),
    }
    for name, base in pairs.items():
        theirs = pixels(getattr(ImageEnhance, name)(picture).enhance(factor))
        ours = _augment._blended(base, x, strength)[0]
        assert (ours - theirs).abs().max() < 2.1 / 255, name
    assert (_augment._stretched(x)[0] - pixels(ImageOps.autocontrast(picture))).abs().max() < 1.1 / 255


def test_equalising_is_that_of_pillow_where_pillow_can():
    # Pillow counts pixels in steps of a 255th of them, rounded down, so it needs many to be near to the definition.
    image = level((3, 256, 300), 0) ** 2
    image = (image * 255).round() / 255
    theirs = pixels(ImageOps.equalize(pictured(image)))
    assert (_augment._equalised(image[None])[0] - theirs).abs().max() < 2.1 / 255


def test_equalised_pixels_are_the_share_that_is_darker():
    x = torch.tensor([0.5, 0.1, 0.1, 0.7, 0.5, 0.2, 0.9, 0.9], dtype=torch.float64).reshape(1, 1, 2, 4)
    expected = torch.tensor([3, 0, 0, 5, 3, 2, 6, 6], dtype=torch.float64).reshape(1, 1, 2, 4) / 6
    torch.testing.assert_close(_augment._equalised(x), expected)


@pytest.mark.parametrize("change", [_augment._stretched, _augment._equalised])
def test_a_channel_without_contrast_is_neither_stretched_nor_equalised(change):
    x = images(5, (3, 4, 7))
    x[:, 1] = 0.4
    assert (change(x)[:, 1] == 0.4).all()
    assert (change(x)[:, 0].amax((1, 2)) == 1).all()


@pytest.mark.parametrize("shape", [(3, 8, 9), COLOUR])
@pytest.mark.parametrize("degrees", [-10, -3, 1, 7, 80])
def test_rotation_is_that_of_pillow(shape, degrees):
    image = level(shape, 1)
    ours = _augment._rotated(image[None], torch.full((1, 1, 1), degrees))[0]
    theirs = pixels(pictured(image).rotate(degrees, resample=Image.Resampling.NEAREST))
    assert (ours == theirs).double().mean() > 0.99


@pytest.mark.parametrize("slope", [-0.15, 0.07])
def test_shearing_moves_each_line_by_its_distance_from_the_centre(slope):
    image = level((2, 9, 31), 2)
    tall = image.transpose(1, 2)
    slopes = torch.full((1, 1, 1), slope, dtype=torch.float64)
    across = torch.ones(1, 1, 1, dtype=torch.bool)
    expected = torch.zeros_like(image)
    for r in range(9):
        expected[:, r] = moved(image, 0, -round(slope * (r - 4)))[:, r]
    assert torch.equal(_augment._sheared(image[None], slopes, across)[0], expected)
    assert torch.equal(_augment._sheared(tall[None], slopes, ~across)[0], expected.transpose(1, 2))


# --- mixup, cutmix ----------------------------------------------------------------------------------------------------


def test_mixup_takes_the_same_convex_combination_of_images_and_of_labels():
    count = 400
    x, y = images(count), labels(count)  # no sample has its neighbour's label
    mixed, target = augment(x, y, CLASSES, "mixup", stream(count))
    w = target.gather(1, y[:, None])[:, 0]
    torch.testing.assert_close(target.gather(1, y.roll(-1)[:, None])[:, 0], 1 - w)
    weight = w[:, None, None, None]
    torch.testing.assert_close(mixed, weight * x + (1 - weight) * x.roll(-1, 0))
    quarters = torch.histc(w, 4, 0.5, 1)
    assert quarters.sum() == count
    assert (quarters - count / 4).abs().max() < 4 * math.sqrt(count * 3 / 16), "w is uniform on [1/2, 1]"


@pytest.mark.parametrize("shape", [DIGIT, COLOUR, WIDE])
def test_the_labels_of_cutmix_have_the_shares_of_the_pixels(shape):
    count = 600
    x, y = images(count, shape), labels(count)
    mixed, target = augment(x, y, CLASSES, "cutmix", stream(count))
    own, other = (mixed == x).all(1), (mixed == x.roll(-1, 0)).all(1)
    assert (own ^ other).all(), "every pixel is one image's or the other's, in all channels"
    torch.testing.assert_close(target.gather(1, y[:, None])[:, 0], own.double().mean((1, 2)))
    assert all(is_rectangle(mask) or is_rectangle(~mask) for mask in own)
    framed = sum(not is_rectangle(~mask) and is_rectangle(mask) and not mask.all() for mask in own)
    assert framed > count / 20, "the own image is the rectangle when that has the larger part"


def is_rectangle(mask: Tensor) -> bool:
    """Whether the True pixels of (H, W) are a rectangle, or none."""
    rows, columns = mask.any(1), mask.any(0)
    filled = torch.equal(mask, rows[:, None] & columns)
    return filled and all(int(line.int().diff().abs().sum() + line[0] + line[-1]) in (0, 2) for line in (rows, columns))


def test_the_share_of_cutmix_follows_the_law_of_its_paper():
    # Share s uniform, the middle uniform over the image, sides sqrt(s), cut off at the edges, by numpy's draws.
    draws = np.random.default_rng(0)
    half, middle = np.sqrt(draws.random(100_000)) / 2, draws.random((2, 100_000))
    covered = (np.minimum(middle + half, 1) - np.maximum(middle - half, 0)).prod(0)
    assert covered.mean() == pytest.approx(0.3208, abs=0.003)  # 2 (1/4 - 1/10 + 1/96)
    expected = np.sort(np.maximum(covered, 1 - covered))

    count = 3000
    x, y = torch.zeros(count, 1, 40, 40), labels(count)
    own = augment(x, y, CLASSES, "cutmix", stream(count))[1].gather(1, y[:, None])[:, 0].sort().values
    # The largest distance of the two distribution functions (Kolmogorov): 1.95 / sqrt(n) in one of a thousand.
    found = np.searchsorted(expected, own.numpy()) / len(expected)
    assert np.abs(found - (np.arange(count) + 0.5) / count).max() < 1.95 / math.sqrt(count)


# --- phases -----------------------------------------------------------------------------------------------------------

PHASES = [{"name": "cropshift", "until": 0.3}, {"name": "shift", "until": 0.75}, {"name": "idbh_weak"}]
THREAT = ThreatModel(norm="linf", eps=0.1)


def train_settings(augmentation: Any, **changes: Any) -> TrainSettings:
    return build(TrainSettings, {"objective": "natural", "threat": THREAT, "augmentation": augmentation} | changes)


def test_a_name_is_the_augmentation_of_the_whole_run():
    for kind in KINDS:
        chosen = train_settings(kind)
        assert chosen.augmentation == kind
        assert {chosen.augmentation_at(epoch / 9) for epoch in range(9)} == {kind}
    assert train_settings("none") == build(TrainSettings, {"objective": "natural", "threat": THREAT})


def test_a_phase_lasts_until_the_first_epoch_that_begins_at_its_end_or_later():
    chosen = train_settings(PHASES)
    kinds = [chosen.augmentation_at(epoch / 10) for epoch in range(10)]
    assert kinds == ["cropshift"] * 3 + ["shift"] * 5 + ["idbh_weak"] * 2


@pytest.mark.parametrize("augmentation", ["shift", PHASES, [{"name": "mixup"}]])
def test_augmentations_survive_being_written_and_read(augmentation):
    chosen = train_settings(augmentation)
    assert train_settings(chosen.model_dump(mode="json")["augmentation"]) == chosen
    assert train_settings(chosen.augmentation) == chosen
    if isinstance(augmentation, str):
        assert chosen.model_dump(mode="json")["augmentation"] == augmentation


REFUSED = [
    ("shfit", r"augmentation: unknown augmentation 'shfit'; did you mean 'shift'\? Available: crop_flip, cropshift, "),
    ("crop_flip+shfit", "augmentation: unknown augmentation 'shfit'; did you mean 'shift'"),
    ("mixup+crop_flip", r"augmentation: mixup mixes samples and comes last, .*; write crop_flip\+mixup"),
    ("crop_flip+", "augmentation: unknown augmentation ''"),
    (3, "augmentation: write a name, or phases as .*, got 3"),
    ([], r"augmentation: write a name, or phases as .*, got \[\]"),
    ({"name": "shift"}, "augmentation: write a name, or phases as "),
    ([{"name": "idbh"}], "augmentation: phase 1: name: unknown augmentation 'idbh'; did you mean 'idbh_weak'"),
    ([{"name": "shift", "until": 0.5}], r"augmentation: phase 1 \(shift\) is the last and takes no until"),
    ([{"name": "mixup"}, {"name": "shift"}], r"augmentation: phase 1 \(mixup\) needs an until"),
    ([*PHASES[:2][::-1], PHASES[2]], r"augmentation: until must rise from phase to phase, got 0\.3 after 0\.75"),
    ([PHASES[0], PHASES[0], PHASES[2]], r"augmentation: until must rise from phase to phase, got 0\.3 after 0\.3"),
    ([{"name": "shift", "until": 1.0}, PHASES[2]], "augmentation: phase 1: until: input should be less than 1"),
    ([{"name": "shift", "til": 0.5}, PHASES[2]], "augmentation: phase 1: til: no such setting; did you mean 'until'"),
    ([{"until": 0.5}, PHASES[2]], "augmentation: phase 1: name: this setting is required"),
]


@pytest.mark.parametrize(("augmentation", "message"), REFUSED)
def test_an_augmentation_that_cannot_be_is_refused_in_one_line(augmentation, message):
    with pytest.raises(InputError, match=f"^{message}") as refusal:
        train_settings(augmentation)
    assert "\n" not in str(refusal.value)


# Runs

COUNT, SIZE = 13, 4  # three steps an epoch, one image left out of each


def splits() -> Splits:
    def part(count: int, seed: int) -> ImageData:
        return ImageData(images(count, seed=seed), labels(count), CLASSES)

    return Splits(part(COUNT, 1), part(7, 2))


def run(out: Any, augmentation: Any, student: Any = None, listener: Any = None, **changes: Any) -> Any:
    values: dict[str, Any] = {"objective": "natural", "threat": THREAT, "epochs": 4, "batch_size": SIZE}
    values |= {"validate_every": 4, "augmentation": augmentation} | changes
    return train(student or TinyNet(), splits(), out=out, listener=listener, **values)


def training_batches(out: Any, augmentation: Any) -> list[Tensor]:
    """What a run's network saw in training, in order."""
    student = Recorder(TinyNet())
    run(out, augmentation, student)
    return [x for x, training in zip(student.inputs, student.modes, strict=True) if training]


def test_each_epoch_is_augmented_as_its_phase_says(tmp_path):
    kinds = {kind: training_batches(tmp_path / kind, kind) for kind in ("cropshift", "shift", "idbh_weak")}
    phased = training_batches(tmp_path / "phases", PHASES)
    assert len(phased) == 12
    for step, batch in enumerate(phased):
        kind = ("cropshift", "cropshift", "shift", "idbh_weak")[step // 3]  # epochs begin at 0, 0.25, 0.5 and 0.75
        assert torch.equal(batch, kinds[kind][step]), step
    assert not torch.equal(kinds["cropshift"][0], kinds["shift"][0])


class StopError(Exception):
    """What the listener below raises."""


@pytest.mark.parametrize("step", [5, 6, 8])  # within a phase, at its end, within the next
def test_a_run_broken_off_in_its_phases_ends_in_the_same_weights(step, tmp_path):
    phases = [{"name": "crop_flip", "until": 0.5}, {"name": "cutmix"}]

    def stop(progress: Any) -> None:
        if progress.step == step:
            raise StopError

    alone = run(tmp_path / "alone", phases, save_every_steps=1)
    with pytest.raises(StopError):
        run(tmp_path / "run", phases, listener=stop, save_every_steps=1)
    steps: list[int] = []
    again = run(tmp_path / "run", phases, listener=lambda progress: steps.append(progress.step), save_every_steps=1)
    assert steps == list(range(step + 1, 13))
    for own, other in ((alone.model, again.model), (alone.other, again.other)):
        assert all(torch.equal(a, b) for a, b in zip(own.parameters(), other.parameters(), strict=True))


def test_other_phases_are_another_run(tmp_path):
    run(tmp_path / "run", PHASES)
    assert run(tmp_path / "run", PHASES).reused
    with pytest.raises(InputError, match=r"holds a run with other settings .*augmentation: .* -> shift"):
        run(tmp_path / "run", "shift")


@pytest.mark.parametrize("kind", MIXED)
def test_a_run_on_mixed_images_learns_their_soft_labels(kind, tmp_path):
    student = Recorder(TinyNet())
    found = run(tmp_path / "run", kind, student, epochs=1, optimizer={"learning_rate": 1e-30, "weight_decay": 0})
    seen = [x for x, training in zip(student.inputs, student.modes, strict=True) if training]
    data, loss = splits().train, 0.0
    order = permutation(COUNT, "order", 0, 0)
    for step, x in enumerate(seen):
        ids = order[step * SIZE : (step + 1) * SIZE]
        mixed, target = augment(*data.batch(ids), CLASSES, kind, Stream.of("augment", 0, 0, ids=ids))
        assert torch.equal(x, mixed)
        loss += -(target * TinyNet()(x).log_softmax(1)).sum(1).mean().item() / len(seen)
    assert len(seen) == 3
    assert found.history[0].loss == pytest.approx(loss, rel=1e-9)
