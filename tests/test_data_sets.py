import contextlib
import gzip
import json
import pickle
import shutil
import struct
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from scipy.io import savemat

from crdnd.data import data_names, load_data, load_info, load_test, read_images, read_splits
from crdnd.data._named import data_folder
from crdnd.data._pickled import read_pickled
from crdnd.errors import InputError

# 20 training images (18 and 2 after the split) and 6 test images of each made-up set.
TRAIN, TEST = 20, 6
SHAPES = {
    "cifar10": (3, 32, 32), "cifar100": (3, 32, 32), "svhn": (3, 32, 32), "mnist": (1, 28, 28),
    "fashion_mnist": (1, 28, 28), "tiny_imagenet": (3, 64, 64),
}  # fmt: skip
IN_FILES = sorted(SHAPES)


def pixels(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def images(name, part):
    """What is in a made-up set, whichever layout it is written in: uint8 (N, C, H, W) and labels."""
    count = TRAIN if part == "train" else TEST
    return pixels(count, *SHAPES[name], seed=count), np.arange(count) % 10


def cifar_binary(folder, name):
    hundred = name == "cifar100"
    folder = folder / ("cifar-100-binary" if hundred else "cifar-10-batches-bin")
    folder.mkdir(parents=True)

    def records(x, y):
        return b"".join(bytes([7, label] if hundred else [label]) + x[i].tobytes() for i, label in enumerate(y))

    (x, y), test = images(name, "train"), images(name, "test")
    if hundred:
        (folder / "train.bin").write_bytes(records(x, y))
        (folder / "test.bin").write_bytes(records(*test))
    else:
        for number in range(5):
            part = slice(4 * number, 4 * number + 4)
            (folder / f"data_batch_{number + 1}.bin").write_bytes(records(x[part], y[part]))
        (folder / "test_batch.bin").write_bytes(records(*test))
    return folder


def cifar_python(folder, name, write=lambda batch: pickle.dumps(batch, protocol=2)):
    hundred = name == "cifar100"
    folder = folder / ("cifar-100-python" if hundred else "cifar-10-batches-py")
    folder.mkdir(parents=True)

    def batch(x, y):
        content = {b"data": x.reshape(len(x), -1), b"fine_labels" if hundred else b"labels": y.tolist()}
        return write(content | {b"filenames": [b"a.png"] * len(x)})

    (x, y), test = images(name, "train"), images(name, "test")
    if hundred:
        (folder / "train").write_bytes(batch(x, y))
        (folder / "test").write_bytes(batch(*test))
    else:
        for number in range(5):
            part = slice(4 * number, 4 * number + 4)
            (folder / f"data_batch_{number + 1}").write_bytes(batch(x[part], y[part]))
        (folder / "test_batch").write_bytes(batch(*test))
    return folder


def idx(array):
    return struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.astype(np.uint8).tobytes()


def idx_files(folder, name, packed=False):
    folder.mkdir(parents=True, exist_ok=True)
    for part, called in (("train", "train"), ("test", "t10k")):
        x, y = images(name, part)
        for file, array in ((f"{called}-images-idx3-ubyte", x[:, 0]), (f"{called}-labels-idx1-ubyte", y)):
            data = idx(array)
            (folder / (file + ".gz" if packed else file)).write_bytes(gzip.compress(data) if packed else data)
    return folder


def svhn_files(folder):
    folder.mkdir(parents=True, exist_ok=True)
    for part in ("train", "test"):
        x, y = images("svhn", part)
        savemat(folder / f"{part}_32x32.mat", {"X": x.transpose(2, 3, 1, 0), "y": np.where(y == 0, 10, y)[:, None]})
    return folder


def tiny_files(folder, sorted_val=False):
    folder = folder / "tiny-imagenet-200"
    ids = [f"n{index:08d}" for index in range(10)]
    folder.mkdir(parents=True)
    (folder / "wnids.txt").write_text("\n".join(reversed(ids)))
    words = [f"{wnid}\tthing {index % 9}, other word" for index, wnid in enumerate(ids)]
    (folder / "words.txt").write_text("\n".join(["n99999999\tunused", *words]))

    def save(path, array):
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(array.transpose(1, 2, 0)).save(path, format="PNG")  # exact, whatever its name

    x, y = images("tiny_imagenet", "train")
    for number, (image, label) in enumerate(zip(x, y, strict=True)):
        save(folder / "train" / ids[label] / "images" / f"{number:03d}.JPEG", image)
    x, y = images("tiny_imagenet", "test")
    for number, (image, label) in enumerate(zip(x, y, strict=True)):
        save(folder / "val" / (ids[label] if sorted_val else "images") / f"val_{number}.JPEG", image)
    for wnid in ids[TEST:] if sorted_val else ():  # every class has an image
        save(folder / "val" / wnid / "more.JPEG", x[0])
    if not sorted_val:
        rows = [f"val_{number}.JPEG\t{ids[label]}\t0\t0\t9\t9" for number, label in enumerate(y)]
        (folder / "val" / "val_annotations.txt").write_text("\n".join(rows))
    return folder


def write_set(root, name):
    return {
        "cifar10": lambda: cifar_binary(root, name),
        "cifar100": lambda: cifar_binary(root, name),
        "mnist": lambda: idx_files(root / "mnist", name),
        "fashion_mnist": lambda: idx_files(root / "fashion_mnist", name, packed=True),
        "svhn": lambda: svhn_files(root / "svhn"),
        "tiny_imagenet": lambda: tiny_files(root),
    }[name]()


@pytest.fixture(autouse=True)
def few_images(monkeypatch, tmp_path):
    """The made-up sets are smaller than the published ones, and nothing is found where nobody looked before."""
    for name in IN_FILES:
        files = load_info(name).files
        monkeypatch.setitem(files.counts, "train", TRAIN)
        monkeypatch.setitem(files.counts, "test", TEST)
    monkeypatch.setitem(load_info("tiny_imagenet").files.__dict__, "classes", 10)
    monkeypatch.delenv("CRDND_DATA", raising=False)
    monkeypatch.chdir(tmp_path)


def check(splits, name):
    """The splits hold the made-up images, each once, training and validation in the file's order."""
    order = {"tiny_imagenet": np.argsort(np.arange(TRAIN) % 10, kind="stable")}.get(name, np.arange(TRAIN))
    x, y = images(name, "train")
    keys = {x[i].tobytes(): (place, y[i]) for place, i in enumerate(order)}
    seen = []
    for part in (splits.train, splits.validation):
        assert part.x.dtype == torch.uint8
        found = [keys[image.numpy().tobytes()] for image in part.x]
        assert [label for _, label in found] == part.y.tolist()
        places = [place for place, _ in found]
        assert places == sorted(places)
        seen += places
        assert (part.name, len(part.class_names)) == (name, part.num_classes)
        batch, _ = part.batch(torch.arange(2))
        assert 0 <= batch.min() < 0.1
        assert 0.9 < batch.max() <= 1
    assert sorted(seen) == list(range(TRAIN))
    assert len(splits.validation) == TRAIN // 10
    assert np.array_equal(splits.test.x.numpy(), images(name, "test")[0])
    assert splits.test.y.tolist() == images(name, "test")[1].tolist()


def refusal(name, root, message):
    with pytest.raises(InputError, match=message) as error:
        load_data(name, data_dir=root)
    text = str(error.value)
    assert "\n" not in text
    assert text.startswith(f"data {name}: ")
    assert text.endswith(f"To get it: crdnd data get {name} --data-dir {root}")
    assert load_info(name).files.expected in text
    return text


# --- every set --------------------------------------------------------------------------------------------------------


def test_the_sets_of_the_field_are_there():
    assert set(data_names()) == {*IN_FILES, "digits"}


@pytest.mark.parametrize("name", IN_FILES)
def test_a_set_is_found_in_its_own_folder_and_the_one_above(name, tmp_path, monkeypatch):
    folder = write_set(tmp_path / "sets", name)
    check(load_data(name, data_dir=folder), name)
    check(load_data(name, data_dir=str(tmp_path / "sets")), name)
    monkeypatch.setenv("CRDND_DATA", str(tmp_path / "sets"))
    check(load_data(name), name)
    monkeypatch.delenv("CRDND_DATA")
    (tmp_path / "sets").rename(tmp_path / "data")
    check(load_data(name), name)


@pytest.mark.parametrize("name", IN_FILES)
def test_where_a_set_lies_changes_nothing_of_it(name, tmp_path):
    write_set(tmp_path / "a", name)
    write_set(tmp_path / "b" / name, name)
    first, second = (load_data(name, data_dir=tmp_path / place) for place in "ab")
    assert first.sha256 == second.sha256
    assert first.train.name == second.train.name == name
    assert first.train.class_names == second.train.class_names


@pytest.mark.parametrize("name", IN_FILES)
def test_the_seed_moves_validation_and_never_the_test(name, tmp_path):
    write_set(tmp_path, name)
    splits = [load_data(name, seed, tmp_path) for seed in (0, 0, 1)]
    assert splits[0].sha256 == splits[1].sha256 != splits[2].sha256
    assert splits[0].test.sha256 == splits[2].test.sha256 == load_test(name, 5, tmp_path).sha256
    assert [split.split_seed for split in splits] == [0, 0, 1]


@pytest.mark.parametrize("name", IN_FILES)
def test_a_missing_set_says_what_is_expected_and_how_to_get_it(name, tmp_path):
    (tmp_path / "empty").mkdir()
    refusal(name, tmp_path / "empty", "there is no .* in .*empty")
    refusal(name, tmp_path / "nowhere", "there is no .* in .*nowhere")
    with pytest.raises(InputError, match=f"To get it: crdnd data get {name}$"):
        load_data(name)


@pytest.mark.parametrize("name", IN_FILES)
def test_every_set_has_a_licence_a_citation_and_class_names(name, tmp_path):
    info = load_info(name)
    assert all((info.summary, info.licence, info.citation, info.files.expected))
    write_set(tmp_path, name)
    names = load_data(name, data_dir=tmp_path).train.class_names
    assert len(set(names)) == len(names)
    if name not in ("mnist", "svhn"):
        assert not names[0].isdecimal()


@pytest.mark.parametrize("name", IN_FILES)
def test_a_set_of_another_size_is_not_the_published_one(name, tmp_path, monkeypatch):
    write_set(tmp_path, name)
    monkeypatch.setitem(load_info(name).files.counts, "train", TRAIN + 1)
    refusal(name, tmp_path, f"has {TRAIN} train images, and .* has {TRAIN + 1}; it is incomplete or another set")


def test_a_set_with_fewer_classes_is_not_the_published_one(tmp_path, monkeypatch):
    tiny_files(tmp_path)
    monkeypatch.setitem(load_info("tiny_imagenet").files.__dict__, "classes", 200)
    refusal("tiny_imagenet", tmp_path, "has 10 classes, and Tiny-ImageNet has 200")


@pytest.mark.parametrize("name", IN_FILES)
def test_the_layout_of_a_set_is_read_by_its_path_whatever_its_size(name, tmp_path, monkeypatch):
    folder = write_set(tmp_path / "mine", name)
    monkeypatch.setitem(load_info(name).files.counts, "train", 10**6)
    for path in (folder, tmp_path / "mine"):
        splits = load_data(str(path))
        assert (splits.train.name, len(splits.train), len(splits.test)) == (path.name, 18, TEST)
        assert np.array_equal(load_test(str(path)).x.numpy(), images(name, "test")[0])


# --- CIFAR ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
@pytest.mark.parametrize("protocol", range(6))
def test_both_versions_of_cifar_are_the_same_data(name, protocol, tmp_path):
    cifar_binary(tmp_path / "bin", name)
    cifar_python(tmp_path / "py", name, lambda batch: pickle.dumps(batch, protocol))
    binary, python = (load_data(name, data_dir=tmp_path / kind) for kind in ("bin", "py"))
    check(python, name)
    assert binary.sha256 == python.sha256


def python_2_batch(x, labels):
    """A batch as Python 2 wrote it, instruction by instruction: the published files are of this kind."""
    return b"".join(
        (
            b"\x80\x02}q\x01(U\x0bbatch_labelq\x02U\x15training batch 1 of 5q\x03U\x06labelsq\x04]q\x05(",
            b"".join(b"K" + bytes([label]) for label in labels),
            b"eU\x04dataq\x06cnumpy.core.multiarray\n_reconstruct\nq\x07cnumpy\nndarray\nq\x08K\x00\x85U\x01b\x87Rq\t(",
            b"K\x01M" + struct.pack("<H", len(x)) + b"M\x00\x0c\x86cnumpy\ndtype\nq\nU\x02u1K\x00K\x01\x87Rq\x0b(",
            b"K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89T" + struct.pack("<I", x.size),
            x.tobytes(),
            b"tbu.",
        )
    )


def test_a_batch_of_python_2_is_read(tmp_path):
    x, y = images("cifar10", "test")
    (tmp_path / "test_batch").write_bytes(python_2_batch(x.reshape(TEST, -1), y.tolist()))
    for path in (tmp_path, tmp_path / "test_batch"):
        data = read_images(path)
        assert np.array_equal(data.x.numpy(), x)
        assert data.y.tolist() == y.tolist()
        assert data.class_names[:2] == ("airplane", "automobile")


def test_names_of_the_python_version_are_those_of_its_meta_file(tmp_path):
    folder = cifar_python(tmp_path, "cifar10")
    names = [f"class {index}" for index in range(10)]
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": names}))
    assert load_data("cifar10", data_dir=tmp_path).train.class_names == tuple(names)
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": names[:3]}))
    refusal("cifar10", tmp_path, r"batches\.meta: has 3 names for the 10 classes of CIFAR-10")


class Payload:
    """Creates a file when it is unpickled."""

    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return Path.touch, (self.target,)


@pytest.mark.parametrize("protocol", range(6))
def test_a_pickle_with_a_call_is_refused_by_its_name_and_never_run(protocol, tmp_path):
    proof = tmp_path / "was-run"
    folder = cifar_python(tmp_path, "cifar10")
    (folder / "data_batch_3").write_bytes(pickle.dumps({"data": Payload(proof), "labels": [1]}, protocol))
    refusal("cifar10", tmp_path, r"data_batch_3: is a pickle that asks for (pathlib\.|builtins\.|__builtin__\.)\w+")
    assert not proof.exists()


@pytest.mark.parametrize(
    ("program", "asked"),
    [
        (b"cos\nsystem\n(S'true'\ntR.", r"os\.system"),
        (b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x04true\x85R.", r"os\.system"),
        (b"(S'true'\nios\nsystem\n.", "the instruction INST"),
        (b"(cos\nsystem\nS'true'\no.", r"os\.system"),
        (b"\x80\x02cnumpy\nndarray\n)\x81.", "the instruction NEWOBJ"),
        (b"\x80\x02cnumpy\nndarray\n)R.", r"numpy\.ndarray"),
        (b"cnumpy.core.multiarray\nscalar\n.", r"numpy\.core\.multiarray\.scalar"),
        (b"Pid\n.", "the instruction PERSID"),
        (b"\x82\x01.", "the instruction EXT1"),
        (b"cbuiltins\neval\n.", r"builtins\.eval"),
    ],
)
def test_whatever_else_a_pickle_asks_for_is_named(program, asked):
    with pytest.raises(InputError, match=f"batch: is a pickle that asks for {asked}; only plain numbers"):
        read_pickled(program, Path("batch"))


@pytest.mark.parametrize(
    "program",
    [
        b"", b"K", b".", b"K\x01K\x02.", b"e.", b"t.", b"R.", b"K\x01K\x02K\x03s.", b"](K\x01", b"h\x05.",
        b"K\x01e.", b"(K\x01d.", b"cnumpy\ndtype\n.", b"cnumpy\ndtype\n)R.", b"\x80\x02K\x01K\x02R.",
        b"<!DOCTYPE html>",
        b"cnumpy\ndtype\n(S'O8'\nI0\nI1\ntR.", b"\x8e\xff\xff\xff\xff\xff\xff\xff\x7fK\x01.",
    ],
)  # fmt: skip
def test_a_damaged_pickle_is_an_error_in_one_line(program):
    with pytest.raises(InputError, match="batch: is ") as error:
        read_pickled(program, Path("batch"))
    assert "\n" not in str(error.value)


def test_an_array_whose_bytes_do_not_fit_is_refused():
    whole = pickle.dumps(pixels(3, 5), 2)
    with pytest.raises(InputError, match=r"an array of shape \(3, 6\) with 15 bytes"):
        read_pickled(whole.replace(b"K\x03K\x05\x86", b"K\x03K\x06\x86"), Path("batch"))


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary(max_size=30),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=9), inner, max_size=4),
    max_leaves=12,
)


@given(value=PLAIN, protocol=st.integers(0, 5))
def test_plain_data_come_back_from_a_pickle(value, protocol):
    assert read_pickled(pickle.dumps(value, protocol), Path("batch")) == value


@given(
    shape=st.lists(st.integers(0, 4), max_size=3),
    kind=st.sampled_from(["u1", "<i8", ">i4", "<f4", "f8", "bool"]),
    fortran=st.booleans(),
    protocol=st.integers(0, 5),
)
def test_arrays_come_back_from_a_pickle(shape, kind, fortran, protocol):
    array = pixels(*shape).astype(kind)
    array = np.asfortranarray(array) if fortran else array
    found = read_pickled(pickle.dumps({"data": array}, protocol), Path("batch"))["data"]
    assert found.dtype == array.dtype
    assert np.array_equal(found, array)


@given(data=st.binary(max_size=80))
def test_no_bytes_do_anything_but_be_read_or_refused(data):
    with contextlib.suppress(InputError):
        read_pickled(data, Path("batch"))


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({"labels": [1, 2]}, r"data must be uint8 of shape \(N, 3072\) as in CIFAR-10, got NoneType"),
        ({"data": pixels(2, 3071), "labels": [1, 2]}, r"got uint8 \(2, 3071\)"),
        ({"data": pixels(2, 3072).astype(float), "labels": [1, 2]}, r"got float64 \(2, 3072\)"),
        ({"data": pixels(2, 3072)}, "has 2 images but no labels of 2 integers"),
        ({"data": pixels(2, 3072), "labels": [1]}, "has 2 images but no labels of 2 integers"),
        ({"data": pixels(2, 3072), "labels": [1, 2.5]}, "has 2 images but no labels of 2 integers"),
        ({"data": pixels(2, 3072), "labels": [1, 10]}, r"has the label 10, but CIFAR-10 has labels 0 \.\. 9"),
        ({"data": pixels(2, 3072), "labels": [-1, 1]}, r"has the label -1, but CIFAR-10 has labels 0 \.\. 9"),
        ([1, 2], "must hold a dictionary as CIFAR's batches do, got list"),
    ],
)
def test_a_batch_that_does_not_fit_is_refused(batch, message, tmp_path):
    folder = cifar_python(tmp_path, "cifar10")
    (folder / "data_batch_2").write_bytes(pickle.dumps(batch, 2))
    refusal("cifar10", tmp_path, f"data_batch_2: .*{message}")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda file: file.write_bytes(file.read_bytes()[:-1]),
            "no multiple of CIFAR-10's 3073 .*truncated or damaged",
        ),
        (lambda file: file.write_bytes(file.read_bytes()[:-3073]), r"has 19 train images, and CIFAR-10 has 20"),
        (lambda file: file.write_bytes(b"\x0b" + file.read_bytes()[1:]), r"has the label 11, but CIFAR-10 has"),
        (
            lambda file: file.write_bytes(b"<!DOCTYPE html><html>quota exceeded</html>"),
            "a web page instead of the file",
        ),
        (lambda file: file.unlink(), r"lacks data_batch_4\.bin"),
        (lambda file: [entry.unlink() for entry in file.parent.iterdir()], r"cifar-10-batches-bin is empty"),
        (lambda file: file.write_bytes(b""), "has 0 bytes"),
    ],
)
def test_cifar_folders_that_are_wrong(damage, message, tmp_path):
    damage(cifar_binary(tmp_path, "cifar10") / "data_batch_4.bin")
    refusal("cifar10", tmp_path, message)


def test_an_archive_that_is_not_unpacked_and_an_unfinished_download_are_mentioned(tmp_path):
    (tmp_path / "cifar-10-python.tar.gz").write_bytes(b"packed")
    refusal("cifar10", tmp_path, r"there is no CIFAR-10 in .*; .*cifar-10-python\.tar\.gz is not unpacked")
    (tmp_path / "cifar-10-binary.tar.gz.part").write_bytes(b"half")
    refusal("cifar10", tmp_path, r"cifar-10-binary\.tar\.gz\.part is an unfinished download")


# --- idx --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("folder", ["", "mnist", "MNIST/raw"])
def test_idx_is_read_packed_or_plain_and_where_other_tools_put_it(packed, folder, tmp_path):
    idx_files(tmp_path / folder, "mnist", packed)
    check(load_data("mnist", data_dir=tmp_path), "mnist")


def test_names_with_a_dot_are_read_too(tmp_path):
    for file in idx_files(tmp_path, "mnist").iterdir():
        file.rename(file.with_name(file.name.replace("-idx", ".idx")))
    check(load_data("mnist", data_dir=tmp_path), "mnist")


def test_two_sets_that_share_their_file_names_are_not_mixed_up(tmp_path):
    fashion = [9, 0, 0, 3, 0, 2, 7, 2, 5, 5, 0, 9, 5, 5, 7, 9, 1, 2, 3, 4]
    (idx_files(tmp_path, "mnist") / "train-labels-idx1-ubyte").write_bytes(idx(np.array(fashion)))
    refusal("mnist", tmp_path, "holds Fashion-MNIST, not MNIST; the two have the same file names")
    assert load_data("fashion_mnist", data_dir=tmp_path).train.class_names[9] == "Ankle boot"


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("train-images-idx3-ubyte", b"", "has 0 bytes, less than a header"),
        ("train-images-idx3-ubyte", idx(pixels(TRAIN, 28, 28))[:-1], "= 15680 bytes and has 15679; it is truncated"),
        ("train-images-idx3-ubyte", idx(pixels(TRAIN, 28, 28)) + b"x", "= 15680 bytes and has more"),
        ("train-images-idx3-ubyte", idx(pixels(TRAIN)), "begins with 00000801 instead of 00000803"),
        ("train-labels-idx1-ubyte", idx(pixels(TRAIN, 28, 28)), "begins with 00000803 instead of 00000801"),
        ("train-labels-idx1-ubyte", idx(np.arange(TRAIN - 1) % 10), "has 20 images, but .* has 19 labels"),
        ("t10k-labels-idx1-ubyte", idx(np.array([0, 1, 2, 3, 4, 10])), r"has the label 10; labels are 0 \.\. 9"),
        ("t10k-images-idx3-ubyte", struct.pack(">4B3I", 0, 0, 8, 3, 2**31, 2**31, 9), "its header is damaged"),
        ("t10k-images-idx3-ubyte", b"<html><body>404</body></html>", "is a web page instead of the file"),
        ("t10k-images-idx3-ubyte.gz", gzip.compress(idx(pixels(TEST, 28, 28)))[:-30], "cannot be unpacked"),
        ("t10k-images-idx3-ubyte.gz", b"\x1f\x8b not packed", "cannot be unpacked"),
    ],
)
def test_idx_files_that_are_wrong(file, content, message, tmp_path):
    (idx_files(tmp_path / "mnist", "mnist") / file).write_bytes(content)
    refusal("mnist", tmp_path, message)


def test_a_missing_idx_file_is_named(tmp_path):
    (idx_files(tmp_path / "mnist", "mnist") / "t10k-labels-idx1-ubyte").unlink()
    refusal("mnist", tmp_path, "mnist lacks t10k-labels-idx1-ubyte")


# --- SVHN -------------------------------------------------------------------------------------------------------------


X, Y = images("svhn", "train")
MAT = X.transpose(2, 3, 1, 0)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"y": Y[:, None]}, r"X must be uint8 of shape \(32, 32, 3, N\), got nothing"),
        ({"X": MAT.astype(float), "y": Y[:, None] + 1}, r"X must be uint8 .* got float64"),
        ({"X": MAT[..., 0], "y": Y[:, None] + 1}, r"X must be uint8 .* got uint8 \(32, 32, 3\)"),
        ({"X": MAT, "y": Y[:5, None] + 1}, r"y must be 20 integers, got .*\(5, 1\)"),
        ({"X": MAT, "y": Y[:, None]}, r"has the label 0; SVHN has 1 \.\. 10"),
        ({"X": MAT, "y": Y[:, None] + 2}, r"has the label 11; SVHN has 1 \.\. 10"),
    ],
)
def test_mat_files_that_do_not_fit(content, message, tmp_path):
    savemat(svhn_files(tmp_path / "svhn") / "train_32x32.mat", content)
    refusal("svhn", tmp_path, message)


@pytest.mark.parametrize("damage", [lambda d: b"", lambda d: d[:90], lambda d: d[:-400], lambda d: b"MATLAB 7.3" + d])
def test_damaged_mat_files(damage, tmp_path):
    file = svhn_files(tmp_path / "svhn") / "train_32x32.mat"
    file.write_bytes(damage(file.read_bytes()))
    refusal("svhn", tmp_path, r"train_32x32\.mat: is no readable \.mat file|got nothing")
    file.write_bytes(b"<!DOCTYPE HTML PUBLIC>")
    refusal("svhn", tmp_path, "is a web page instead of the file")


# --- Tiny-ImageNet ----------------------------------------------------------------------------------------------------


def test_val_may_be_sorted_into_class_folders(tmp_path, monkeypatch):
    monkeypatch.setitem(load_info("tiny_imagenet").files.counts, "test", 12)
    tiny_files(tmp_path, sorted_val=True)
    for wnid in ("n00000002", "n00000005"):
        image = next(next(tmp_path.rglob(f"val/{wnid}")).rglob("*.JPEG"))
        shutil.copy(image, image.with_name("z.JPEG"))
    splits = load_data("tiny_imagenet", data_dir=tmp_path)
    assert splits.test.y.tolist() == [*range(10), 2, 5], "the classes take turns"
    assert np.array_equal(splits.test.x[:TEST].numpy(), images("tiny_imagenet", "test")[0])


def test_classes_have_the_first_of_their_words_and_no_two_the_same(tmp_path):
    tiny_files(tmp_path)
    names = load_data("tiny_imagenet", data_dir=tmp_path).train.class_names
    assert names[1] == "thing 1"
    assert (names[0], names[9]) == ("thing 0 (n00000000)", "thing 0 (n00000009)")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "val" / "val_annotations.txt").unlink(), r"has images/ but no val_annotations\.txt"),
        (lambda f: (f / "val" / "val_annotations.txt").write_text("val_0.JPEG\tn77"), "names no image with its class"),
        (lambda f: (f / "val" / "val_annotations.txt").write_text("../a\tn00000001"), "names no image with its class"),
        (lambda f: (f / "val" / "images" / "val_3.JPEG").unlink(), r"val_3\.JPEG: is missing, and val_annotations"),
        (lambda f: (f / "train" / "n00000004").rename(f / "n00000004"), "1 of 10 classes have no images, n00000004"),
        (lambda f: (f / "train" / "n00000099").mkdir(), "n00000099, which is none of the 10 classes"),
        (lambda f: (f / "val").rename(f / "value"), "lacks val"),
        (lambda f: (f / "train" / "n00000001" / "images" / "001.JPEG").write_bytes(b"\xff"), "no.* readable image"),
    ],
)
def test_tiny_imagenet_folders_that_are_wrong(damage, message, tmp_path):
    damage(tiny_files(tmp_path))
    refusal("tiny_imagenet", tmp_path, message)


# --- data of one's own ------------------------------------------------------------------------------------------------


def save_classes(folder, count, names=("cat", "dog"), size=(5, 9, 3), seed=0):
    for label, name in enumerate(names):
        (folder / name).mkdir(parents=True)
        for number in range(count):
            array = pixels(*size, seed=seed + 100 * label + number)
            Image.fromarray(array[..., 0] if size[2] == 1 else array).save(folder / name / f"{number:02d}.png")


def test_a_folder_with_splits_is_read_as_they_are(tmp_path):
    for seed, (part, count) in enumerate({"train": 7, "val": 2, "test": 3}.items()):
        save_classes(tmp_path / "pets" / part, count, seed=1000 * seed)
    splits = load_data(str(tmp_path / "pets"), 3)
    assert [len(part) for part in (splits.train, splits.validation, splits.test)] == [14, 4, 6]
    assert {part.name for part in (splits.train, splits.validation, splits.test)} == {"pets"}
    assert splits.test.sha256 == load_test(str(tmp_path / "pets")).sha256
    assert splits.train.class_names == ("cat", "dog")


def test_without_a_validation_split_a_tenth_is_held_out(tmp_path):
    save_classes(tmp_path / "a" / "train", 20)
    save_classes(tmp_path / "a" / "test", 3, size=(5, 9, 1))
    splits = read_splits(tmp_path / "a")
    assert (len(splits.train), sorted(splits.validation.y.tolist())) == (36, [0, 0, 1, 1])
    assert splits.test.shape == (3, 5, 9), "grey images take the training images' three channels"
    save_classes(tmp_path / "b", 20)
    alone = read_splits(tmp_path / "b")
    assert (len(alone.train), len(alone.validation), alone.test) == (36, 4, None)


def test_parts_that_do_not_fit_together_are_refused(tmp_path):
    save_classes(tmp_path / "a" / "train", 4)
    save_classes(tmp_path / "a" / "test", 2, names=("cat", "cow"))
    with pytest.raises(InputError, match=r"its classes are not those of .*train; cow is in one only"):
        read_splits(tmp_path / "a")
    save_classes(tmp_path / "b" / "train", 4)
    save_classes(tmp_path / "b" / "val", 2, size=(9, 5, 3))
    with pytest.raises(InputError, match="images of 5x9 beside training images of 9x5"):
        read_splits(tmp_path / "b")
    save_classes(tmp_path / "c" / "train", 4, size=(5, 9, 1))
    save_classes(tmp_path / "c" / "test", 4)
    assert read_splits(tmp_path / "c").test.shape == (1, 5, 9), "beside grey training images colours become grey"
    save_classes(tmp_path / "d" / "val", 4)
    with pytest.raises(InputError, match="has val but no train"):
        read_splits(tmp_path / "d")


@pytest.mark.parametrize("train", ["x y", "x_train y_train", "images labels"])
def test_an_npz_holds_training_data_and_perhaps_test_data(train, tmp_path):
    x, y = train.split()
    arrays = {x: pixels(20, 5, 9, 3), y: np.arange(20) % 4}
    np.savez(tmp_path / "alone.npz", **arrays)
    np.savez(tmp_path / "both.npz", **arrays, x_test=pixels(6, 5, 9, 3), y_test=np.arange(6) % 4)
    alone, both = (load_data(str(tmp_path / f"{name}.npz")) for name in ("alone", "both"))
    assert (len(alone.train), len(alone.validation), alone.test) == (16, 4, None)
    assert alone.sha256 == both.sha256
    assert np.array_equal(both.test.x.permute(0, 2, 3, 1).numpy(), pixels(6, 5, 9, 3))
    assert both.test.sha256 == load_test(str(tmp_path / "both.npz")).sha256


def test_test_labels_that_training_lacks_are_refused(tmp_path):
    np.savez(tmp_path / "a.npz", x=pixels(20, 5, 9, 3), y=np.arange(20) % 4, x_test=pixels(6, 5, 9, 3), y_test=range(6))
    with pytest.raises(InputError, match="test data have labels up to 5, the training data do not"):
        read_splits(tmp_path / "a.npz")


def test_the_mean_of_bytes_is_that_of_their_values():
    data = read_splits_of(pixels(20, 5, 9, 3))
    x = data.x.double() / 255
    mean, std = data.mean_and_std()
    torch.testing.assert_close(torch.tensor(mean).double(), x.mean((0, 2, 3)))
    torch.testing.assert_close(torch.tensor(std).double(), x.std((0, 2, 3)))


def read_splits_of(x):
    from crdnd.data import ImageData

    return ImageData(torch.from_numpy(x).permute(0, 3, 1, 2), torch.arange(len(x)) % 4)


# --- the Hugging Face hub ---------------------------------------------------------------------------------------------


class Column(list):
    """A split as the package `datasets` shows it: columns by name, and their features."""

    def __init__(self, count, labels=("label",)):
        super().__init__(range(count))
        hub = sys.modules["datasets"]
        self.features = {"img": hub.Image(), **{key: hub.ClassLabel() for key in labels}, "text": object()}
        self.columns = {key: [i % 2 for i in range(count)] for key in labels}
        self.columns["img"] = [Image.fromarray(pixels(5, 9, 3, seed=i)) for i in range(count)]

    def __getitem__(self, key):
        return self.columns[key]


@pytest.fixture
def hub(monkeypatch):
    module = types.ModuleType("datasets")
    module.Image = type("Image", (), {})
    module.ClassLabel = type("ClassLabel", (), {"num_classes": 2, "names": ["cat", "dog"]})
    module.sets = {}
    module.load_dataset = lambda name: module.sets[name]
    monkeypatch.setitem(sys.modules, "datasets", module)
    return module


def test_a_set_of_the_hub_is_found_by_the_types_of_its_columns(hub):
    hub.sets["me/pets"] = {"train": Column(20), "test": Column(4)}
    splits = load_data("hf:me/pets")
    assert [len(part) for part in (splits.train, splits.validation, splits.test)] == [18, 2, 4]
    assert (splits.train.name, splits.train.class_names) == ("hf:me/pets", ("cat", "dog"))
    assert np.array_equal(load_test("hf:me/pets").x[3].permute(1, 2, 0).numpy(), pixels(5, 9, 3, seed=3))
    hub.sets["me/pets"]["valid"] = Column(5)
    assert [len(part) for part in (load_data("hf:me/pets").train, load_data("hf:me/pets").validation)] == [20, 5]


def test_what_the_hub_leaves_open_is_asked_for(hub):
    hub.sets["me/two"] = {"train": Column(20, ("breed", "colour"))}
    with pytest.raises(InputError, match=r"write hf:owner/name#column .*: breed, colour"):
        load_data("hf:me/two")
    assert load_data("hf:me/two#colour").train.num_classes == 2
    hub.sets["me/none"] = {"test": Column(4)}
    with pytest.raises(InputError, match="has no split train, only test"):
        load_data("hf:me/none")
    with pytest.raises(InputError, match=r"hf:me/gone: cannot be loaded"):
        load_data("hf:me/gone")


def test_without_the_package_the_command_that_installs_it_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(InputError, match=r'hf:me/pets: needs the package datasets: pip install "crdnd\[hf\]"$'):
        load_data("hf:me/pets")


# --- the commands -----------------------------------------------------------------------------------------------------


@pytest.fixture
def crdnd(capsys):
    from crdnd.cli import main

    def call(*arguments):
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        shown = capsys.readouterr()
        return stop.value.code, shown.out, shown.err

    return call


def test_data_list_says_where_each_set_is(crdnd, tmp_path):
    folder = write_set(tmp_path / "sets", "svhn")
    status, out, _ = crdnd("data", "list", "--json", "--data-dir", str(tmp_path / "sets"))
    entries = {entry["name"]: entry for entry in json.loads(out)["datasets"]}
    assert status == 0
    assert set(entries) == set(data_names())
    assert entries["svhn"]["found"] == str(folder)
    assert entries["mnist"]["found"] == "no; crdnd data get mnist"
    assert (entries["cifar10"]["megabytes"], entries["digits"]["megabytes"]) == (170, 0)
    assert all(entry["licence"] and entry["citation"] for entry in entries.values())
    _, out, _ = crdnd("data", "list")
    assert all(name in out for name in data_names())
    assert "doi:10.24432/C50P49" in out


def test_data_verify_counts_or_says_what_is_wrong(crdnd, tmp_path):
    folder = cifar_binary(tmp_path, "cifar10")
    status, out, _ = crdnd("data", "verify", "cifar10", "--data-dir", str(tmp_path), "--json")
    report = json.loads(out)
    assert (status, report["checksums"], report["classes"], report["shape"]) == (0, [], 10, [3, 32, 32])
    assert report["parts"]["test"] == {"images": 6, "fewest": 0, "most": 1}
    x = images("cifar10", "train")[0] / 255
    assert report["mean"] == pytest.approx(x.mean((0, 2, 3)).tolist())
    status, out, _ = crdnd("data", "verify", "cifar10", "--data-dir", str(tmp_path))
    assert (status, "no file with a published checksum" in out) == (0, True)
    (tmp_path / "cifar-10-binary.tar.gz").write_bytes(b"other")
    status, out, err = crdnd("data", "verify", "cifar10", "--data-dir", str(tmp_path))
    assert (status, out) == (2, "")
    assert "cifar-10-binary.tar.gz: not the published file, its checksum is another one" in err
    (tmp_path / "cifar-10-binary.tar.gz").unlink()
    (folder / "test_batch.bin").write_bytes(b"cut")
    status, _, err = crdnd("data", "verify", "cifar10", "--data-dir", str(tmp_path))
    assert (status, "truncated or damaged" in err, err.count("\n")) == (2, True, 1)


def test_data_show_draws_every_class_with_its_own_images(crdnd, tmp_path):
    x = np.zeros((12, 6, 4, 3), np.uint8)
    x[np.arange(12), ..., np.arange(12) % 3] = 200  # class 0 red, class 1 green, class 2 blue
    np.savez(tmp_path / "a.npz", x=x, y=np.arange(12) % 3, class_names=np.array(["red", "green", "blue"]))
    status, out, _ = crdnd("data", "show", str(tmp_path / "a.npz"), "--out", str(tmp_path / "new" / "s.png"))
    assert status == 0
    assert "3 classes" in out
    picture = np.array(Image.open(tmp_path / "new" / "s.png")).astype(int)
    rows = [np.nonzero((picture == colour).all(2).any(1))[0] for colour in ((200, 0, 0), (0, 200, 0), (0, 0, 200))]
    assert all(len(row) == 48 for row in rows), "6 pixels are enlarged eightfold"
    assert rows[0].max() < rows[1].min() <= rows[1].max() < rows[2].min()


def test_data_show_draws_photographs_of_any_size(crdnd, tmp_path):
    for name, colour in (("blue", (0, 0, 200)), ("red", (200, 0, 0))):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for number in range(12):
            size = (30 + number, 41 - number % 3)
            Image.new("RGB", size, colour).save(tmp_path / "photos" / name / f"{number}.png")
    (tmp_path / "photos" / "red" / "0.png").write_bytes(b"damaged")
    sheet = tmp_path / "s.png"
    status, out, err = crdnd("data", "show", str(tmp_path / "photos"), "--out", str(sheet), "--per-class", "3")
    assert status == 0, err
    assert "2 classes" in out
    picture = np.array(Image.open(sheet)).astype(int)
    seen = [np.nonzero((picture == colour).all(2)) for colour in ((0, 0, 200), (200, 0, 0))]
    assert all(len(np.unique(rows)) == 96 and len(np.unique(columns)) == 3 * 96 for rows, columns in seen)
    assert seen[0][0].max() < seen[1][0].min()


def test_data_show_draws_images_of_one_size_pixel_by_pixel(crdnd, tmp_path):
    image = np.zeros((6, 6, 3), np.uint8)
    image[:, :3, 0], image[:, 3:, 2] = 200, 200
    for file in [tmp_path / "tiny" / name / f"{number}.png" for name in "ab" for number in range(4)]:
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(file)
    status, _, err = crdnd("data", "show", str(tmp_path / "tiny"), "--out", str(tmp_path / "s.png"))
    assert status == 0, err
    red, green, blue = np.moveaxis(np.array(Image.open(tmp_path / "s.png")), 2, 0)
    assert ((red == 200) & (green == 0) & (blue == 0)).any()
    assert not ((red > 0) & (green == 0) & (blue > 0)).any(), "between them would be purple"


def test_data_show_writes_a_png_and_says_so_before_it_reads(crdnd, tmp_path):
    for name in ("sheet.xyz", "sheet", "sheet.jpg"):
        status, out, err = crdnd("data", "show", "nowhere", "--out", str(tmp_path / "new" / name))
        assert (status, out) == (2, "")
        assert err == f"error: out: the picture is a PNG, so its name ends in .png, got {name}.\n"
    assert not (tmp_path / "new").exists()


def test_training_takes_data_from_a_folder_without_keeping_the_place(crdnd, tmp_path, monkeypatch):
    monkeypatch.setenv("CRDND_DATA", "unset-later")  # the option sets it for the command; this puts it back
    write_set(tmp_path / "one", "mnist")
    write_set(tmp_path / "two" / "mnist", "mnist")
    words = ["train", "--data", "mnist", "--objective", "natural", "--model", "cnn", "--set", "model.width=2"]
    words += ["--eps", "0.1", "--epochs", "1", "--set", "batch_size=6", "--out", str(tmp_path / "run"), "--json"]
    for place, reused in (("one", False), ("two", True)):
        status, out, err = crdnd(*words, "--data-dir", str(tmp_path / place))
        assert status == 0, err
        assert json.loads(out)["reused"] is reused, "where the files lie is no part of a run"
    settings = (tmp_path / "run" / "run.json").read_text()
    assert json.loads(settings)["settings"].get("data_dir") is None
    status, _, err = crdnd(*words, "--data-dir", str(tmp_path / "nowhere"))
    assert (status, err) == (2, f"error: data_dir: {tmp_path / 'nowhere'} is no folder.\n")


def test_data_of_ones_own_train_by_their_path(crdnd, tmp_path):
    np.savez(tmp_path / "mine.npz", x=pixels(40, 8, 8, 3), y=np.arange(40) % 4)
    words = ["--objective", "natural", "--model", "cnn", "--set", "model.width=2", "--eps", "0.1", "--epochs", "1"]
    status, _, err = crdnd("train", "--data", str(tmp_path / "mine.npz"), *words, "--out", str(tmp_path / "run"))
    assert status == 0, err


# --- the real one -----------------------------------------------------------------------------------------------------


def real_cifar10():
    import os

    root = Path(os.environ.get("CRDND_DATA", "nowhere"))
    return any((root / place / "data_batch_1.bin").is_file() for place in (".", "cifar-10-batches-bin"))


REAL = data_folder().absolute() if real_cifar10() else None


@pytest.mark.skipif(REAL is None, reason="CRDND_DATA names no folder with CIFAR-10's binary files")
def test_the_real_cifar10_is_read(monkeypatch):
    files = load_info("cifar10").files
    monkeypatch.setitem(files.counts, "train", 50_000)
    monkeypatch.setitem(files.counts, "test", 10_000)
    splits = load_data("cifar10", data_dir=REAL)
    assert (splits.train.y.bincount() + splits.validation.y.bincount()).tolist() == [5000] * 10
    assert splits.validation.y.bincount().tolist() == [500] * 10
    assert splits.test.y.bincount().tolist() == [1000] * 10
    means = [torch.tensor(part.mean_and_std()[0]) for part in (splits.train, splits.validation)]
    mean = 0.9 * means[0] + 0.1 * means[1]
    torch.testing.assert_close(mean, torch.tensor([0.4914, 0.4822, 0.4465]), atol=5e-5, rtol=0)
    assert splits.test.y[:5].tolist() == [3, 8, 8, 0, 6], "cat, ship, ship, airplane, frog"
