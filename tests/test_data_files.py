import pickle
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import crdnd.data
from crdnd.data import image_files, image_shape, load_data, load_test, read_image, read_images, read_splits
from crdnd.errors import InputError

# No two of these are equal, and none is 1 or 3, the numbers of channels.
N, H, W, K = 7, 5, 9, 4
LABELS = np.array([2, 0, 3, 1, 1, 0, 2])


def draws(seed=0):
    return np.random.default_rng(seed)


def pixels(*shape, seed=0):
    """uint8 of any shape, with 0 and 255 among them."""
    x = draws(seed).integers(0, 256, shape, dtype=np.uint8)
    x.flat[0], x.flat[-1] = 0, 255
    return x


def refusal(path, message):
    with pytest.raises(InputError, match=message) as error:
        read_images(path)
    assert "\n" not in str(error.value)
    return str(error.value)


# --- .npz -------------------------------------------------------------------------------------------------------------


def npz(folder, **arrays):
    file = folder / "some_set.npz"
    np.savez(file, **arrays)
    return file


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("kind", [np.uint8, np.float16, np.float32, np.float64])
def test_an_npz_is_read_whatever_its_layout_and_type(tmp_path, channels, last, kind):
    bytes_ = pixels(N, channels, H, W)
    x = bytes_ if kind is np.uint8 else (bytes_ / 255).astype(kind)
    data = read_images(npz(tmp_path, x=x.transpose(0, 2, 3, 1) if last else x, y=LABELS))
    assert data.x.shape == (N, channels, H, W)
    assert data.x.dtype == (torch.uint8 if kind is np.uint8 else torch.float32)
    assert (data.name, data.num_classes, data.class_names) == ("some_set", K, ("0", "1", "2", "3"))
    batch, labels = data.batch(torch.arange(N))
    expected = torch.from_numpy(bytes_.astype(np.float32) / 255)
    torch.testing.assert_close(batch, expected, atol=1e-3 if kind is np.float16 else 1e-7, rtol=0)
    assert labels.tolist() == LABELS.tolist()


def test_grey_images_without_a_channel_get_one(tmp_path):
    x = pixels(N, H, W)
    data = read_images(npz(tmp_path, images=x, labels=LABELS))
    assert data.x.shape == (N, 1, H, W)
    assert np.array_equal(data.x[:, 0].numpy(), x)


@pytest.mark.parametrize("kind", [np.uint8, np.int8, np.int32, np.uint64, ">i4"])
def test_labels_may_be_integers_of_any_kind_and_a_column(tmp_path, kind):
    x = pixels(N, 3, H, W)
    for y in (LABELS.astype(kind), LABELS.astype(kind)[:, None]):
        assert read_images(npz(tmp_path, x=x, y=y)).y.tolist() == LABELS.tolist()


def test_big_endian_pixels_are_read_as_they_were_meant(tmp_path):
    x = (pixels(N, 3, H, W) / 255).astype(">f4")
    assert np.array_equal(read_images(npz(tmp_path, x=x, y=LABELS)).x.numpy(), x.astype("<f4"))


def test_class_names_say_how_many_classes_there_are(tmp_path):
    names = np.array(["ant", "bee", "cow", "dog", "eel"])
    data = read_images(npz(tmp_path, x=pixels(N, 3, H, W), y=LABELS, class_names=names))
    assert data.class_names == ("ant", "bee", "cow", "dog", "eel")
    assert data.num_classes == 5, "one of them has no images"


@pytest.mark.parametrize("shape", [(N, 3, H, 3), (N, 1, H, 3), (N, 3, H, 1), (N, 2, H, W), (N, 4, H, 4)])
def test_a_layout_that_the_shape_does_not_tell_must_be_given(tmp_path, shape):
    x = pixels(*shape)
    refusal(npz(tmp_path, x=x, y=LABELS), r"some_set\.npz: .*may be \(N, C, H, W\) or.*add layout='NCHW' or layout=")
    first = read_images(npz(tmp_path, x=x, y=LABELS, layout="NCHW")).x
    assert np.array_equal(first.numpy(), x)
    last = read_images(npz(tmp_path, x=x, y=LABELS, layout="NHWC")).x
    assert np.array_equal(last.numpy(), x.transpose(0, 3, 1, 2))
    refusal(npz(tmp_path, x=x, y=LABELS, layout="CHWN"), r"layout must be 'NCHW' or 'NHWC', got 'CHWN'")


@given(
    shape=st.tuples(st.integers(2, 6), st.sampled_from([1, 3]), st.integers(4, 9), st.integers(4, 9)),
    last=st.booleans(),
    seed=st.integers(0, 99),
)
def test_channels_first_and_last_are_the_same_images(tmp_path_factory, shape, last, seed):
    x, y = pixels(*shape, seed=seed), np.arange(shape[0])
    stored = x.transpose(0, 2, 3, 1) if last else x
    data = read_images(npz(tmp_path_factory.mktemp("npz"), x=stored, y=y))
    assert np.array_equal(data.x.numpy(), x)


X = pixels(N, 3, H, W)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"x": X}, r"some_set\.npz: has no array y or labels, only x"),
        ({"y": LABELS}, r"some_set\.npz: has no array x or images, only y"),
        ({}, r"has no array x or images, only nothing"),
        ({"x": X, "images": X, "y": LABELS}, r"has both x and images; keep one"),
        ({"x": X, "y": LABELS, "labels": LABELS}, r"has both y and labels; keep one"),
        ({"x": X, "y": LABELS + 0.5}, r"some_set\.npz: labels must be integers 0 \.\. K-1, got float64"),
        ({"x": X, "y": LABELS > 1}, r"labels must be integers 0 \.\. K-1, got bool"),
        ({"x": X, "y": np.array(["cat"] * N)}, r"labels must be integers 0 \.\. K-1, got <U3"),
        ({"x": X, "y": LABELS[:-1]}, r"some_set: 7 images need labels of shape \(7,\), got \(6,\)"),
        ({"x": X, "y": np.eye(K, dtype=int)[LABELS]}, r"need labels of shape \(7,\), got \(7, 4\)"),
        ({"x": X, "y": LABELS - 1}, r"some_set: label -1 is out of range"),
        ({"x": X.astype(np.int64), "y": LABELS}, r"images must be uint8 in 0 \.\. 255 or floating point .*got int64"),
        ({"x": X.astype(complex), "y": LABELS}, r"images must be uint8.*got complex128"),
        ({"x": X.astype(np.float32), "y": LABELS}, r"some_set: pixels range from 0 to 255 .*divide by 255"),
        ({"x": X / 127.5 - 1, "y": LABELS}, r"pixels range from -1 to 1 .*leave normalisation to the model"),
        ({"x": np.full(X.shape, np.nan), "y": LABELS}, r"some_set: images contain NaN"),
        ({"x": X[0, 0], "y": LABELS[:5]}, r"images must have shape .*\(N, H, W\), got \(5, 9\)"),
        ({"x": X[None], "y": LABELS}, r"images must have shape .*got \(1, 7, 3, 5, 9\)"),
        ({"x": X[:0], "y": LABELS[:0]}, r"some_set: there are no images"),
        (
            {"x": X, "y": LABELS, "class_names": np.array(["a", "b"])},
            r"label 3 is out of range; labels must be 0 \.\. 1",
        ),
        (
            {"x": X, "y": LABELS, "class_names": np.arange(4)},
            r"class_names must be a plain array of strings, got int64",
        ),
        ({"x": X, "y": LABELS, "class_names": np.array([["a", "b"]])}, r"class_names must be a plain array of strings"),
    ],
)
def test_an_npz_that_does_not_fit_is_refused(tmp_path, arrays, message):
    refusal(npz(tmp_path, **arrays), message)


class Payload:
    """Creates a file when it is unpickled."""

    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return Path.touch, (self.target,)


@pytest.mark.parametrize("array", ["x", "y", "class_names", "layout", "unused"])
def test_a_pickled_array_is_refused_and_never_run(tmp_path, array):
    proof = tmp_path / "was-run"
    arrays = {"x": X, "y": LABELS, array: np.array([Payload(proof), 1], dtype=object)}
    file = npz(tmp_path, **arrays)
    refusal(file, r"some_set\.npz: holds pickled objects, which may contain code and are never loaded")
    file.write_bytes(pickle.dumps(Payload(proof)))
    refusal(file, r"some_set\.npz: holds pickled objects")
    assert not proof.exists()
    pickle.loads(pickle.dumps(Payload(proof)))  # noqa: S301
    assert proof.exists(), "the payload is a real one"


def test_a_damaged_npz_is_refused(tmp_path):
    file = npz(tmp_path, x=X, y=LABELS)
    whole = file.read_bytes()
    for length in (3, 100, len(whole) // 2, len(whole) - 3):
        file.write_bytes(whole[:length])
        refusal(file, r"some_set\.npz: (is not a readable \.npz file|holds pickled)")
    file.write_bytes(b"")
    refusal(file, r"is not a readable \.npz file")
    changed = bytearray(whole)
    changed[200] ^= 1
    file.write_bytes(changed)
    refusal(file, r"is not a readable \.npz file \(Bad CRC-32")


@pytest.mark.parametrize("content", [b"x,y\n1,2\n", b"PNG or not", b"\x89PNG\r\n\x1a\n", b"{}"])
def test_what_is_no_npz_is_not_said_to_hold_code(tmp_path, content):
    file = tmp_path / "a.npz"
    file.write_bytes(content)
    refusal(file, r"a\.npz: is not a readable \.npz file; write one with numpy\.savez\(file, x=images, y=labels\)\.$")


def test_a_single_array_under_the_name_of_an_npz_is_refused(tmp_path):
    np.save(tmp_path / "a.npy", X)
    (tmp_path / "a.npy").rename(tmp_path / "a.npz")
    refusal(tmp_path / "a.npz", r"a\.npz: holds a single array; write it with numpy\.savez")


# --- a folder of images -----------------------------------------------------------------------------------------------


def save(path, array, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path, **options)
    return path


def test_an_image_is_read_by_a_path_in_text_too(tmp_path):
    file = save(tmp_path / "a" / "1.png", pixels(H, W, 3))
    (tmp_path / "a" / "2.png").write_bytes(file.read_bytes()[:60])
    assert np.array_equal(read_image(str(file)), read_image(file))
    assert image_shape(str(file)) == image_shape(file) == (H, W, 3)
    assert list(image_files(str(tmp_path))) == list(image_files(tmp_path)) == [file, file.with_name("2.png")]
    for read in (read_image, image_shape):
        for name, message in (("nope.png", "No such file or directory"), ("a/2.png", "truncated")):
            with pytest.raises(InputError, match=rf"{name}: is not a readable image \(.*{message}.*\)\.$") as error:
                read(str(tmp_path / name))
            assert "\n" not in str(error.value)


def test_classes_are_folders_and_take_turns(tmp_path):
    root = tmp_path / "pets"
    x = {name: pixels(H, W, 3, seed=seed) for seed, name in enumerate(("c0", "c1", "a0", "b0", "b1", "b2"))}
    for name, array in x.items():
        save(root / f"class_{name[0]}" / f"{name[1]}.png", array)
    data = read_images(root)
    assert (data.name, data.num_classes, data.class_names) == ("pets", 3, ("class_a", "class_b", "class_c"))
    assert data.x.dtype == torch.uint8
    assert data.y.tolist() == [0, 1, 2, 1, 2, 1]
    for image, name in zip(data.x, ("a0", "b0", "c0", "b1", "c1", "b2"), strict=True):
        assert np.array_equal(image.permute(1, 2, 0).numpy(), x[name]), name


@given(st.lists(st.integers(0, 4), min_size=2, max_size=5).filter(sum))
def test_the_first_of_every_class_come_first(tmp_path_factory, counts):
    root = tmp_path_factory.mktemp("turns")
    for label, count in enumerate(counts):
        (root / str(label)).mkdir()
        for index in range(count):
            save(root / str(label) / f"{index}.bmp", np.full((H, W), 10 * label + index, np.uint8))
    data = read_images(root)
    assert data.num_classes == len(counts), "also where some have no images"
    assert [int((data.y == label).sum()) for label in range(len(counts))] == counts
    marks = data.x[:, 0, 0, 0].tolist()
    assert marks == [10 * int(y) + turn for turn, y in sorted((m % 10, m // 10) for m in marks)]


def test_the_classes_are_in_the_order_of_their_names(tmp_path):
    for name in ("2", "10", "B", "a"):
        save(tmp_path / name / "1.png", pixels(H, W))
    assert read_images(tmp_path).class_names == ("10", "2", "B", "a")


@pytest.mark.parametrize("suffix", ["png", "PNG", "bmp", "webp", "tiff", "gif", "jpg", "jpeg", "pgm"])
def test_usual_formats_are_read(tmp_path, suffix):
    flat = np.full((H, W), 77, np.uint8)
    for label in "ab":
        save(tmp_path / label / f"1.{suffix}", flat)
    data = read_images(tmp_path)
    assert (data.x.float() - 77).abs().max() <= 1
    assert data.x.shape[2:] == (H, W)


def test_grey_stays_grey_only_where_all_are(tmp_path):
    grey, colour = pixels(H, W), pixels(H, W, 3, seed=1)
    save(tmp_path / "a" / "1.png", grey)
    save(tmp_path / "b" / "1.png", grey)
    assert read_images(tmp_path).x.shape == (2, 1, H, W)
    save(tmp_path / "b" / "2.png", colour)
    data = read_images(tmp_path)
    assert data.x.shape == (3, 3, H, W)
    assert all(np.array_equal(plane.numpy(), grey) for plane in data.x[0])
    assert np.array_equal(data.x[2].permute(1, 2, 0).numpy(), colour)


def test_16_bits_are_scaled_and_not_cut(tmp_path):
    levels = np.array([0, 128, 129, 257, 32768, 65535], dtype=np.uint16)
    save(tmp_path / "a" / "1.png", np.tile(levels, (H, 1)))
    save(tmp_path / "b" / "1.png", pixels(H, 6))
    data = read_images(tmp_path)
    assert data.x.shape == (2, 1, H, 6)
    assert data.x[0, 0, 0].tolist() == [0, 0, 1, 1, 128, 255], "65535 / 255 = 257 levels become one"


def on_white(colour, alpha):
    return np.rint(255 + (colour.astype(float) - 255) * alpha / 255)


def test_what_is_transparent_is_laid_on_white_and_palettes_are_resolved(tmp_path):
    colour, alpha = pixels(H, W, 3), pixels(H, W, 1, seed=1)
    save(tmp_path / "a" / "rgba.png", np.concatenate([colour, alpha], axis=2))
    few = np.zeros((H, W, 3), np.uint8)
    few[:, ::2] = (250, 20, 90)
    palette = Image.fromarray(few).quantize(4)
    clear = int(np.array(palette)[0, 1])  # the black one
    (tmp_path / "b").mkdir()
    palette.save(tmp_path / "b" / "palette.png", transparency=clear)
    data = read_images(tmp_path)
    assert np.abs(data.x[0].permute(1, 2, 0).numpy() - on_white(colour, alpha)).max() <= 1
    few[:, 1::2] = 255
    assert np.array_equal(data.x[1].permute(1, 2, 0).numpy(), few)


def test_grey_with_transparency_is_grey_on_white(tmp_path):
    both = pixels(H, W, 2)
    for label in "ab":
        save(tmp_path / label / "1.png", both)
    data = read_images(tmp_path)
    assert data.shape == (1, H, W)
    assert np.abs(data.x[0, 0].numpy() - on_white(both[..., 0], both[..., 1])).max() <= 1


def test_nested_files_are_found_and_hidden_and_other_ones_passed_over(tmp_path):
    array = pixels(H, W)
    for name in ("a/1.png", "a/deep/er/2.png", "b/1.png"):
        save(tmp_path / name, array)
    for name in (".thumbs/1.png", "a/.1.png", "a/.cache/1.png", "__MACOSX/1.png", "b/__MACOSX/2.png"):
        save(tmp_path / name, array[:2])
    (tmp_path / "b" / "notes.txt").write_text("not an image")
    (tmp_path / "readme.md").write_text("not an image")
    data = read_images(tmp_path)
    assert data.class_names == ("a", "b")
    assert data.y.tolist() == [0, 1, 0]


@pytest.mark.parametrize("others", [("train",), ("val",), ("train", "valid"), ()])
def test_of_the_splits_the_test_folder_is_read(tmp_path, others):
    for split in others:
        save(tmp_path / "pets" / split / "cat" / "1.png", pixels(2, 2))
    for seed, label in enumerate(("cat", "dog")):
        save(tmp_path / "pets" / "test" / label / "1.png", pixels(H, W, seed=seed))
    data = read_images(tmp_path / "pets")
    assert (data.name, data.class_names, data.x.shape) == ("pets", ("cat", "dog"), (2, 1, H, W))


def test_a_class_may_be_called_test(tmp_path):
    for label in ("exam", "test"):
        save(tmp_path / label / "1.png", pixels(H, W))
    assert read_images(tmp_path).class_names == ("exam", "test")


def test_splits_without_test_are_not_taken_for_classes(tmp_path):
    for split in ("train", "val"):
        save(tmp_path / split / "cat" / "1.png", pixels(H, W))
    refusal(tmp_path, r"has train, val but no test; give the folder to be evaluated")


def test_sizes_that_differ_are_named(tmp_path):
    save(tmp_path / "a" / "1.png", pixels(H, W))
    save(tmp_path / "b" / "1.png", pixels(W, H))
    message = refusal(tmp_path, r"is 5x9, but .* is 9x5; bring all images to one size")
    assert str(tmp_path / "a" / "1.png") in message
    assert str(tmp_path / "b" / "1.png") in message


@pytest.mark.parametrize(
    "damage", [lambda data: b"", lambda data: b"text", lambda data: data[:40], lambda data: data[: len(data) // 2]]
)
def test_an_unreadable_image_is_named(tmp_path, damage):
    save(tmp_path / "a" / "1.png", pixels(40, 50, 3))
    file = save(tmp_path / "b" / "2.png", pixels(40, 50, 3))
    file.write_bytes(damage(file.read_bytes()))
    assert str(file) in refusal(tmp_path, r"is not a readable image")


def test_a_format_that_starts_programs_is_not_opened(tmp_path):
    save(tmp_path / "a" / "1.png", pixels(H, W))
    file = tmp_path / "b" / "1.png"
    file.parent.mkdir()
    Image.fromarray(pixels(H, W)).save(file, format="EPS")
    refusal(tmp_path, r"1\.png: is not a readable image \(cannot identify")


def test_floating_point_pixels_are_refused(tmp_path):
    save(tmp_path / "a" / "1.tiff", np.zeros((H, W), np.float32))
    (tmp_path / "b").mkdir()
    refusal(tmp_path, r"1\.tiff: has pixels of the kind F; save it as 8-bit")


def test_pixels_beyond_16_bits_are_refused(tmp_path):
    save(tmp_path / "a" / "1.tiff", np.full((H, W), 70000, np.int32))
    (tmp_path / "b").mkdir()
    refusal(tmp_path, r"1\.tiff: has pixels beyond 16 bits")


def test_images_without_folders_of_their_classes_are_counted(tmp_path):
    for name in "abc":
        save(tmp_path / f"{name}.png", pixels(H, W))
    refusal(tmp_path, r"has 3 images, but no folder for each class with them; give an \.npz file")


def test_a_folder_without_images_says_what_is_expected(tmp_path):
    refusal(tmp_path, r"has no subfolders; give an \.npz file with x and y, a folder with a subfolder of images per cl")
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "x.txt").write_text("")
    refusal(tmp_path, r"has no images \(\.png, .*\) in its 2 subfolders")
    save(tmp_path / "c.png", pixels(H, W))
    refusal(tmp_path, r"has no images")


def test_one_class_is_no_classification_but_can_be_measured(tmp_path):
    for index in range(12):
        save(tmp_path / "a" / f"{index}.png", pixels(H, W))
    assert read_images(tmp_path).class_names == ("a",)
    with pytest.raises(InputError, match=r"there is only one class; a classifier needs at least 2"):
        read_splits(tmp_path)


# --- CIFAR's binary version -------------------------------------------------------------------------------------------


def cifar_bytes(images, *labels):
    """Records written by hand: the labels, then the planes of red, green and blue, row by row."""
    records = []
    for index, image in enumerate(images):
        record = [column[index] for column in labels]
        for channel in range(3):
            for row in range(32):
                record += image[row, :, channel].tolist()
        records.append(bytes(record))
    return b"".join(records)


IMAGES = pixels(N, 32, 32, 3)
FINE = [2, 0, 9, 1, 1, 0, 8]
TEN = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


@pytest.fixture
def cifar10(tmp_path):
    folder = tmp_path / "cifar-10-batches-bin"
    folder.mkdir()
    (folder / "test_batch.bin").write_bytes(cifar_bytes(IMAGES, FINE))
    (folder / "data_batch_1.bin").write_bytes(cifar_bytes(IMAGES[::-1], FINE[::-1]))
    (folder / "batches.meta.txt").write_text("\n".join(TEN) + "\n\n")
    return folder


def check_cifar(data, images=IMAGES):
    assert data.x.shape == (N, 3, 32, 32)
    assert data.x.dtype == torch.uint8
    assert np.array_equal(data.x.permute(0, 2, 3, 1).numpy(), images)


def test_cifar10_is_read_from_its_folder_or_the_one_above(cifar10):
    for path, name in ((cifar10, "cifar-10-batches-bin"), (cifar10.parent, cifar10.parent.name)):
        data = read_images(path)
        check_cifar(data)
        assert (data.name, data.num_classes, data.class_names) == (name, 10, tuple(TEN))
        assert data.y.tolist() == FINE


def test_a_single_file_of_cifar10_is_read(cifar10):
    data = read_images(cifar10 / "data_batch_1.bin")
    check_cifar(data, IMAGES[::-1])
    assert (data.name, data.num_classes, data.class_names) == ("data_batch_1", 10, tuple(TEN))
    assert data.y.tolist() == FINE[::-1]
    (cifar10 / "batches.meta.txt").unlink()
    assert read_images(cifar10 / "test_batch.bin").class_names == tuple(TEN), "they are known without the file"


@pytest.mark.parametrize("inside", ["", "cifar-100-binary"])
def test_cifar100_has_two_labels_of_which_the_fine_one_counts(tmp_path, inside):
    folder = tmp_path / inside
    folder.mkdir(exist_ok=True)
    coarse, fine = [19, 0, 3, 5, 7, 2, 11], [99, 0, 44, 1, 1, 20, 8]
    (folder / "test.bin").write_bytes(cifar_bytes(IMAGES, coarse, fine))
    names = [f"thing_{index}" for index in range(100)]
    (folder / "fine_label_names.txt").write_text("\n".join(names))
    for path in (tmp_path, folder / "test.bin"):
        data = read_images(path)
        check_cifar(data)
        assert (data.num_classes, data.class_names) == (100, tuple(names))
        assert data.y.tolist() == fine


@pytest.mark.parametrize("change", [-1, 1, -3072])
def test_a_truncated_cifar_file_is_refused(cifar10, change):
    file = cifar10 / "test_batch.bin"
    data = file.read_bytes()
    file.write_bytes(data[:change] if change < 0 else data + b"\0")
    assert str(file) in refusal(cifar10, r"is no multiple of CIFAR-10's 3073 bytes per image; it is truncated or dama")


def test_an_empty_cifar_file_is_refused(cifar10):
    (cifar10 / "test_batch.bin").write_bytes(b"")
    refusal(cifar10, r"test_batch\.bin: has 0 bytes, .*truncated or damaged")


def test_labels_out_of_range_are_damage(cifar10, tmp_path):
    (cifar10 / "test_batch.bin").write_bytes(cifar_bytes(IMAGES, [*FINE[:-1], 10]))
    refusal(cifar10, r"test_batch\.bin: has the label 10, but CIFAR-10 has labels 0 \.\. 9; it is damaged")
    file = tmp_path / "test.bin"
    file.write_bytes(cifar_bytes(IMAGES, [20] * N, FINE))
    refusal(file, r"test\.bin: has the label 20, but CIFAR-100 has labels 0 \.\. 19")
    file.write_bytes(cifar_bytes(IMAGES, [19] * N, [100] * N))
    refusal(file, r"test\.bin: has the label 100, but CIFAR-100 has labels 0 \.\. 99")


def test_a_names_file_of_something_else_is_refused(cifar10):
    names = cifar10 / "batches.meta.txt"
    names.write_text("cat\ndog\n")
    refusal(cifar10, r"batches\.meta\.txt: has 2 names for the 10 classes of CIFAR-10")
    names.write_bytes(b"\xff\xfe\n" * 10)
    refusal(cifar10, r"batches\.meta\.txt: cannot be read")


# --- names and paths --------------------------------------------------------------------------------------------------


def test_other_paths_are_refused(tmp_path):
    refusal(tmp_path / "nowhere", r"nowhere: there is no such file or folder")
    (tmp_path / "data.csv").write_text("1,2")
    refusal(tmp_path / "data.csv", r"data\.csv: is no data that can be read; give an \.npz file with x and y, a folder")


def test_a_name_is_its_test_split():
    expected = load_data("digits", 3).test
    assert load_test("digits", 3).sha256 == expected.sha256
    assert load_test("digits").sha256 != expected.sha256


def test_names_win_over_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for label in "ab":
        save(tmp_path / "digits" / label / "1.png", pixels(H, W))
    assert len(load_test("digits")) == 450
    for spec in ("./digits", "digits/", str(tmp_path / "digits")):
        data = load_test(spec)
        assert (data.name, len(data)) == ("digits", 2)


def test_the_current_folder_has_a_name(tmp_path, monkeypatch):
    for label in "ab":
        save(tmp_path / "here" / label / "1.png", pixels(H, W))
    monkeypatch.chdir(tmp_path / "here")
    assert load_test(".").name == "here"


@pytest.mark.parametrize("spec", ["digit", "nowhere/x.npz", ""])
def test_what_is_neither_is_refused_with_a_suggestion(spec):
    message = r"neither a data set nor a path.*Available: .*digits.* A path may be an \.npz"
    with pytest.raises(InputError, match=message) as error:
        load_test(spec)
    assert "\n" not in str(error.value)
    assert ("did you mean 'digits'?" in str(error.value)) == (spec == "digit")


def test_a_set_without_test_data_is_refused(monkeypatch):
    whole = load_data("digits")
    monkeypatch.setattr(crdnd.data, "load_data", lambda *_: crdnd.data.Splits(whole.train, whole.validation))
    with pytest.raises(InputError, match=r"data digits: has no test split; give a path"):
        load_test("digits")


def test_reading_warns_of_nothing(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        data = read_images(npz(tmp_path, x=X, y=LABELS))
        data.x.add_(0)  # the memory is its own
