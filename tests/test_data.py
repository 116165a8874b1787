import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from crdnd.data import ImageData, Splits, as_data, data_names, hold_out, load_data, load_info, stratified
from crdnd.errors import InputError
from support import BATCH, SHAPE, images

LABELS = torch.tensor([0, 1, 2, 3, 4, 0])


# --- digits -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def digits():
    return load_data("digits")


def rows(data):
    """Every sample as one hashable value."""
    return [(tuple(image), label) for image, label in zip(data.x.flatten(1).tolist(), data.y.tolist(), strict=True)]


def test_digits_have_the_sizes_of_the_conventions(digits):
    parts = (digits.train, digits.validation, digits.test)
    assert [len(part) for part in parts] == [1147, 200, 450]
    for part in parts:
        assert part.shape == (1, 8, 8)
        assert part.num_classes == 10
        assert part.x.dtype == torch.float32
        assert part.y.dtype == torch.int64


def test_digits_are_the_17_levels_of_grey_between_0_and_1(digits):
    for part in (digits.train, digits.validation, digits.test):
        assert torch.equal(part.x.unique(), torch.arange(17) / 16)


def test_digits_splits_share_no_sample_and_lose_none(digits):
    from sklearn.datasets import load_digits

    bunch = load_digits()
    whole = [
        (tuple((image / 16).flatten().tolist()), int(label))
        for image, label in zip(bunch.images, bunch.target, strict=True)
    ]
    assert len(set(whole)) == 1797, "no two scans are equal, so that samples can be told apart by their pixels"
    assert sorted(rows(digits.train) + rows(digits.validation) + rows(digits.test)) == sorted(whole)


@pytest.mark.parametrize("seed", [0, 1, 2, 17])
def test_digits_splits_have_the_class_proportions_of_the_whole(seed):
    splits = load_data("digits", split_seed=seed)
    parts = [torch.bincount(part.y, minlength=10) for part in (splits.train, splits.validation, splits.test)]
    whole = sum(parts)
    for counts, size in zip(parts, (1147, 200, 450), strict=True):
        assert ((counts - whole * size / 1797).abs() <= 1).all()


def test_the_same_seed_gives_the_same_split_and_another_seed_another(digits):
    again, other = load_data("digits", split_seed=0), load_data("digits", split_seed=1)
    for part in ("train", "validation", "test"):
        first = getattr(digits, part)
        assert torch.equal(getattr(again, part).x, first.x)
        assert torch.equal(getattr(again, part).y, first.y)
        assert set(rows(getattr(other, part))) != set(rows(first))
    assert (digits.split_seed, other.split_seed) == (0, 1)
    assert again.sha256 == digits.sha256
    assert other.sha256 != digits.sha256
    assert other.test.sha256 != digits.test.sha256


def test_a_split_depends_on_its_seed_and_not_on_the_global_random_state(digits):
    before = torch.get_rng_state()
    torch.rand(5)
    shifted = torch.get_rng_state()
    assert load_data("digits").sha256 == digits.sha256
    assert torch.equal(torch.get_rng_state(), shifted)
    torch.set_rng_state(before)


@pytest.mark.parametrize("name", data_names())
def test_a_named_data_set_shows_its_licence_and_its_source(name):
    info = load_info(name)
    assert info.summary
    assert info.licence
    assert info.citation


def test_an_unknown_data_set_is_refused_with_a_suggestion():
    with pytest.raises(InputError, match=r"data: 'digit' is neither .*; did you mean 'digits'\? Available: "):
        load_data("digit")


# --- stratified -------------------------------------------------------------------------------------------------------


@settings(max_examples=50, deadline=None)
@given(
    y=st.lists(st.integers(0, 4), min_size=3, max_size=60),
    cuts=st.tuples(st.floats(0, 1), st.floats(0, 1)),
    seed=st.integers(0, 10**6),
)
def test_a_split_holds_every_sample_once_in_the_given_sizes(y, cuts, seed):
    first, second = sorted(round(cut * len(y)) for cut in cuts)
    sizes = (first, second - first, len(y) - second)
    parts = stratified(torch.tensor(y), sizes, "test", seed)
    assert tuple(len(part) for part in parts) == sizes
    assert torch.equal(torch.cat(parts).sort().values, torch.arange(len(y)))
    assert all(torch.equal(part, part.sort().values) for part in parts)


def test_a_split_is_exact_where_the_classes_divide_evenly():
    y = torch.arange(200) % 10
    for part, each in zip(stratified(y, (100, 40, 60), "test", 3), (10, 4, 6), strict=True):
        assert torch.bincount(y[part]).tolist() == [each] * 10


def test_rare_classes_are_spread_over_the_parts():
    y = torch.cat([torch.zeros(90, dtype=torch.int64), torch.ones(9, dtype=torch.int64)])
    parts = stratified(y, (33, 33, 33), "test", 0)
    assert [int(y[part].sum()) for part in parts] == [3, 3, 3]


def test_a_rare_class_is_rounded_to_the_nearest_count():
    # 74 of 310 samples: of 10 rare ones 2.39 belong there, which is 2 and not 3.
    y = torch.cat([torch.zeros(300, dtype=torch.int64), torch.ones(10, dtype=torch.int64)])
    assert [int(y[part].sum()) for part in stratified(y, (74, 236), "test", 0)] == [2, 8]


def test_a_split_depends_on_all_of_its_names():
    y = torch.arange(60) % 3
    first = stratified(y, (30, 30), "digits", 0)[0]
    assert torch.equal(stratified(y, (30, 30), "digits", 0)[0], first)
    for names in (("digits", 1), ("other", 0)):
        assert not torch.equal(stratified(y, (30, 30), *names)[0], first)


def test_a_sample_is_equally_likely_in_every_part():
    y = torch.arange(12) % 3
    inside = torch.stack([torch.isin(torch.arange(12), stratified(y, (6, 6), s)[0]) for s in range(400)]).double()
    # Binomial with n = 400, p = 1/2.
    assert (inside.sum(0) - 200).abs().max() < 4 * math.sqrt(400 / 4)


# --- ImageData --------------------------------------------------------------------------------------------------------


def with_pixel(value):
    x = images(dtype=torch.float32)
    x[2, 1, 0, 3] = value
    return x


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        (with_pixel(1.5), LABELS, r"pixels range from .* to 1\.5 and must lie in \[0, 1\]; leave normalisation"),
        (with_pixel(-0.25), LABELS, r"pixels range from -0\.25 to .* must lie in \[0, 1\]; leave normalisation"),
        (with_pixel(254.0), LABELS, r"pixels range from .* to 254 and must lie in \[0, 1\]; divide by 255"),
        (with_pixel(math.nan), LABELS, r"NaN or infinite pixels"),
        (with_pixel(math.inf), LABELS, r"NaN or infinite pixels"),
        (torch.zeros(6, 3, 4, 7, dtype=torch.int64), LABELS, r"floating point in \[0, 1\] or uint8, got torch\.int64"),
        (images(dtype=torch.float32), LABELS.float(), r"labels must be integers, got torch\.float32"),
        (images(dtype=torch.float32), LABELS > 1, r"labels must be integers, got torch\.bool"),
        (images(dtype=torch.float32), LABELS - 1, r"label -1 is out of range; labels must be 0 or more"),
        (images(dtype=torch.float32), LABELS[:5], r"6 images need labels of shape \(6,\), got \(5,\)"),
        (images(dtype=torch.float32), LABELS[:, None], r"6 images need labels of shape \(6,\), got \(6, 1\)"),
        (images(dtype=torch.float32)[0], LABELS[:3], r"must have shape \(N, C, H, W\), got \(3, 4, 7\)"),
        (images(dtype=torch.float32)[:0], LABELS[:0], r"there are no images"),
    ],
)
def test_unusable_data_is_refused_in_one_line_that_names_it(x, y, message):
    with pytest.raises(InputError, match=message) as error:
        ImageData(x, y, name="faces")
    assert str(error.value).startswith("faces: ")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("y", "num_classes", "message"),
    [
        (LABELS, 4, r"label 4 is out of range; labels must be 0 \.\. 3"),
        (LABELS - 2, 4, r"label -2 is out of range; labels must be 0 \.\. 3"),
    ],
)
def test_labels_must_fit_the_given_number_of_classes(y, num_classes, message):
    with pytest.raises(InputError, match=message):
        ImageData(images(dtype=torch.float32), y, num_classes)


def test_one_class_can_be_measured_and_not_learned():
    one = ImageData(images(dtype=torch.float32), LABELS * 0)
    assert one.num_classes == 1
    with pytest.raises(InputError, match=r"data: there is only one class; a classifier needs at least 2"):
        Splits(one, one)


@pytest.mark.parametrize(
    ("sizes", "count", "held"), [((6, 6), 1, [1, 1]), ((100, 6, 4), 6, [6, 1, 0]), ((50, 50), 10, [5, 5])]
)
def test_no_class_that_can_spare_an_image_is_left_out_of_validation(sizes, count, held):
    y = torch.cat([torch.full((size,), label) for label, size in enumerate(sizes)])
    kept, validation = hold_out(y, count, "test", 3)
    assert y[validation].bincount(minlength=len(sizes)).tolist() == held
    assert torch.cat([kept, validation]).sort().values.tolist() == list(range(len(y)))
    assert torch.equal(validation, validation.sort().values)


def test_half_precision_becomes_single():
    half = ImageData(images(dtype=torch.float16), LABELS)
    assert half.x.dtype == torch.float32
    assert ImageData(images(), LABELS).x.dtype == torch.float64


@pytest.mark.parametrize(
    ("given_", "message"),
    [
        ((images().numpy(), LABELS.numpy()), r"got ndarray, ndarray; torch\.from_numpy makes them of arrays"),
        (Splits(ImageData(images(), LABELS), ImageData(images(), LABELS)), r"got Splits; give a part of it, such as"),
    ],
)
def test_what_is_nearly_data_is_refused_with_what_makes_it_some(given_, message):
    with pytest.raises(InputError, match=message):
        as_data(given_)


def test_the_number_of_classes_is_counted_or_given():
    counted, given_ = ImageData(images(), LABELS), ImageData(images(), LABELS, num_classes=7)
    assert (counted.num_classes, given_.num_classes) == (5, 7)
    assert counted.class_names == ("0", "1", "2", "3", "4")
    assert len(given_.class_names) == 7
    named = ImageData(images(), LABELS % 2, class_names=("cat", "dog"))
    assert named.class_names == ("cat", "dog")


def test_class_names_of_the_wrong_number_are_refused():
    with pytest.raises(InputError, match=r"data: class_names has 2 names for 5 classes"):
        ImageData(images(), LABELS, class_names=("cat", "dog"))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64])
def test_labels_of_any_integer_type_become_int64(dtype):
    data = ImageData(images(), LABELS.to(dtype))
    assert data.y.dtype == torch.int64
    assert torch.equal(data.y, LABELS)


def test_bytes_are_divided_by_255_batch_by_batch():
    x = torch.arange(6 * 2 * 3, dtype=torch.uint8).reshape(6, 1, 2, 3) * 7 + 3
    data = ImageData(x, LABELS)
    assert data.x.dtype == torch.uint8, "kept small in memory"
    ids = torch.tensor([5, 0, 3, 3])
    batch, y = data.batch(ids)
    assert batch.dtype == torch.float32
    assert batch.flatten().tolist() == pytest.approx([value / 255 for value in x[ids].flatten().tolist()], rel=1e-7)
    assert y.tolist() == LABELS[ids].tolist()
    extremes, _ = ImageData(torch.tensor([[[[0, 255]]]], dtype=torch.uint8).expand(6, 1, 1, 2), LABELS).batch(ids)
    assert extremes.unique().tolist() == [0.0, 1.0]


def test_a_batch_holds_the_samples_that_were_asked_for():
    data = ImageData(images(), LABELS)
    ids = torch.tensor([4, 4, 1])
    x, y = data.batch(ids)
    assert torch.equal(x, images()[ids])
    assert x.dtype == torch.float64
    assert y.tolist() == [4, 4, 1]
    assert len(data) == BATCH
    assert data.shape == SHAPE


def test_a_subset_keeps_the_classes_and_the_names():
    data = ImageData(images(), LABELS, class_names=tuple("abcde"), name="letters")
    part = data.subset(torch.tensor([5, 0]))  # one class alone is no reason to refuse
    assert part.num_classes == 5
    assert part.class_names == tuple("abcde")
    assert part.name == "letters"
    assert torch.equal(part.x, images()[[5, 0]])
    assert data.to(torch.device("cpu")) is data


def test_data_never_changes():
    data = ImageData(images(), LABELS)
    with pytest.raises(dataclasses.FrozenInstanceError):
        data.name = "other"


def test_the_fingerprint_sees_pixels_labels_order_type_and_classes():
    x, y = images(dtype=torch.float32), LABELS
    changed = x.clone()
    changed[5, 2, 3, 6] = 1 - changed[5, 2, 3, 6]
    variants = [
        ImageData(x, y),
        ImageData(changed, y),
        ImageData(x, (y + 1) % 5),
        ImageData(x.flip(0), y.flip(0)),
        ImageData(x.double(), y),
        ImageData(x.reshape(6, 3, 7, 4), y),
        ImageData(x, y, num_classes=7),
    ]
    assert len({data.sha256 for data in variants}) == len(variants)
    strided = x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    assert not strided.is_contiguous()
    assert ImageData(strided, y, name="other").sha256 == variants[0].sha256


# --- as_data ----------------------------------------------------------------------------------------------------------


class Pairs:
    """A map-style data set; `items` may be anything."""

    def __init__(self, items):
        self.items = items

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        return self.items[index]


def test_data_is_taken_as_it_is():
    data = ImageData(images(), LABELS)
    assert as_data(data) is data


@pytest.mark.parametrize("kind", [tuple, list])
def test_a_pair_of_tensors_is_data(kind):
    data = as_data(kind([images(), LABELS]), name="mine")
    assert torch.equal(data.x, images())
    assert torch.equal(data.y, LABELS)
    assert data.name == "mine"


@pytest.mark.parametrize("label", [int, torch.tensor])
def test_a_map_style_data_set_is_read_into_memory_in_its_order(label):
    items = [(image, label(int(y))) for image, y in zip(images(), LABELS, strict=True)]
    for dataset in (Pairs(items), items, torch.utils.data.TensorDataset(images(), LABELS)):
        data = as_data(dataset)
        assert torch.equal(data.x, images())
        assert torch.equal(data.y, LABELS)


def test_a_map_style_data_set_of_bytes_stays_bytes():
    x = torch.arange(6 * 6, dtype=torch.uint8).reshape(6, 1, 2, 3)
    data = as_data(Pairs([(image, int(y)) for image, y in zip(x, LABELS, strict=True)]))
    assert data.x.dtype == torch.uint8


IMAGE = images(dtype=torch.float32)[0]
ITEM = r"data: every item must be a pair \(image tensor of one shape \(C, H, W\), integer label\)"


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        ((images().numpy(), LABELS.numpy()), r"data: a pair must be two tensors \(images, labels\), got ndarray, nd"),
        ((images(), [0, 1, 2, 3, 4, 0]), r"data: a pair must be two tensors \(images, labels\), got Tensor, list"),
        (Pairs([(IMAGE.numpy(), 0), (IMAGE.numpy(), 1), (IMAGE.numpy(), 1)]), ITEM),
        (Pairs([(IMAGE, 0), (IMAGE[:, :2], 1), (IMAGE, 1)]), ITEM),
        (Pairs([(IMAGE, "cat"), (IMAGE, "dog"), (IMAGE, "dog")]), ITEM),
        (Pairs([(IMAGE, None), (IMAGE, 1), (IMAGE, 1)]), ITEM),
        (Pairs([(IMAGE,), (IMAGE,), (IMAGE,)]), ITEM),
        (Pairs([1, 2, 3]), ITEM),
        (Pairs([]), ITEM),
        (3, r"data: expected the name of a data set, a pair of tensors .* or a map-style data set, got int"),
        (None, r"data: expected .* got NoneType"),
        (iter([(IMAGE, 0)]), r"data: expected .* got list_iterator"),
        (Pairs([(IMAGE * 300, 0), (IMAGE, 1), (IMAGE, 1)]), r"data: pixels range .* divide by 255"),
        (Pairs([(IMAGE[0], 0), (IMAGE[0], 1), (IMAGE[0], 1)]), r"data: images must have shape \(N, C, H, W\)"),
    ],
)
def test_what_is_no_data_is_refused(dataset, message):
    with pytest.raises(InputError, match=message):
        as_data(dataset)


@pytest.mark.parametrize(
    "dataset", [Pairs([{"image": IMAGE, "label": 0}] * 3), {"train": IMAGE, "test": IMAGE, "more": IMAGE}]
)
def test_dictionaries_are_refused_like_other_wrong_items(dataset):
    with pytest.raises(InputError, match=ITEM):
        as_data(dataset)


@pytest.mark.parametrize("label", [1.5, torch.tensor(1.5), "1", math.nan, math.inf])
def test_a_map_style_data_set_whose_labels_are_no_integers_is_refused(label):
    with pytest.raises(InputError, match=ITEM):
        as_data(Pairs([(IMAGE, 0), (IMAGE, label), (IMAGE, 1)]))


def test_a_list_of_two_samples_is_a_data_set():
    assert len(as_data([(IMAGE, 0), (IMAGE, 1)])) == 2
