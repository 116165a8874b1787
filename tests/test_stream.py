"""Folders that are decoded as they are used are the same data as folders in memory."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from crdnd import Splits, ThreatModel, create_model, evaluate, train
from crdnd.data import ImageData, StreamedData, _files, _stream, read_images
from crdnd.engine.checkpoint import read_checkpoint
from crdnd.errors import InputError, RunError
from crdnd.recipe import make_recipe

# No two of these are equal, and none is 1 or 3, the numbers of channels.
COUNTS, H, W = (14, 11, 12), 5, 9
N, BATCH = sum(COUNTS), 8


def pixels(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def save(file, array):
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(file)
    return file


def make_folder(root, shape=(H, W, 3)):
    for label, count in enumerate(COUNTS):
        for index in range(count):
            save(root / f"class_{label}" / f"{index}.png", pixels(*shape, seed=100 * label + index))
    return root


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("stream") / "pets")


@pytest.fixture(scope="module")
def in_memory(folder):
    return read_images(folder)


def stream(folder, **options):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_files, "IN_MEMORY", 0)
        return read_images(folder, **options)


@pytest.fixture
def streamed(folder):
    return stream(folder)


def same(first, second, ids=None):
    ids = torch.arange(len(second)) if ids is None else ids
    return all(torch.equal(a, b) for a, b in zip(first.batch(ids), second.batch(ids), strict=True))


# --- what it holds ----------------------------------------------------------------------------------------------------


def test_the_size_of_the_decoded_images_decides_where_they_are(folder, monkeypatch):
    monkeypatch.setattr(_files, "IN_MEMORY", N * 3 * H * W)
    assert type(read_images(folder)) is ImageData
    monkeypatch.setattr(_files, "IN_MEMORY", N * 3 * H * W - 1)
    assert type(read_images(folder)) is StreamedData


def test_a_streamed_folder_is_the_same_data_as_one_in_memory(in_memory, streamed):
    assert (type(in_memory), type(streamed)) == (ImageData, StreamedData)
    for field in ("num_classes", "class_names", "name", "shape", "device"):
        assert getattr(streamed, field) == getattr(in_memory, field), field
    assert len(streamed) == len(in_memory) == N
    assert torch.equal(streamed.y, in_memory.y)
    assert same(streamed, in_memory)


@given(st.lists(st.integers(0, N - 1), min_size=2, max_size=40), st.lists(st.integers(0, N - 1), min_size=2))
def test_a_batch_depends_on_its_ids_and_not_on_what_was_expected(folder, in_memory, ids, others):
    streamed, ids, others = stream(folder), torch.tensor(ids), torch.tensor(others)
    for expected in (ids, others):
        streamed.expect(expected)
        assert same(streamed, in_memory, ids)
        assert same(streamed, in_memory, ids), "also once the expected batch has been handed out"


@pytest.mark.parametrize("workers", [1, 5])
def test_the_number_of_workers_changes_nothing(streamed, in_memory, monkeypatch, workers):
    with _stream.ThreadPoolExecutor(workers) as pool:
        monkeypatch.setattr(_stream, "_workers", lambda: pool)
        assert same(streamed, in_memory)


def test_a_part_of_a_part_has_its_own_samples(streamed, in_memory):
    first, second = torch.tensor([30, 2, 7, 19, 11]), torch.tensor([3, 1, 4])
    part = streamed.subset(first).subset(second)
    assert same(part, in_memory.subset(first[second]))
    assert (part.num_classes, part.class_names, part.name) == (3, streamed.class_names, streamed.name)


def test_a_grey_file_among_colours_fills_all_channels(tmp_path):
    root = make_folder(tmp_path / "pets")
    save(root / "class_0" / "0.png", pixels(H, W))  # the first of all
    assert same(stream(root), read_images(root))
    assert stream(root).shape == (3, H, W)
    assert stream(make_folder(tmp_path / "grey", (H, W))).shape == (1, H, W)


def test_streamed_data_can_be_renamed_and_grey_data_made_colour_as_those_in_memory_can(tmp_path):
    root = make_folder(tmp_path / "grey", (H, W))
    for data in (stream(root), read_images(root)):
        colour = replace(data, x=data.x.expand(-1, 3, -1, -1).contiguous(), name="other")
        assert (colour.name, colour.shape) == ("other", (3, H, W))
        assert torch.equal(colour.batch(torch.arange(N))[0], data.batch(torch.arange(N))[0].expand(-1, 3, -1, -1))


def test_every_image_of_an_epoch_is_decoded_once_and_no_more_than_the_next_batch_ahead(streamed):
    decoded, decode = Counter(), streamed.decode
    streamed = replace(streamed, decode=lambda file: decoded.update([file]) or decode(file))
    parts = torch.arange(N).split(BATCH)
    for index, (ids, following) in enumerate(zip(parts, [*parts[1:], None], strict=True)):
        streamed.batch(ids)
        if following is not None:
            streamed.expect(following)
        assert decoded.total() <= (index + 2) * BATCH
    assert len(decoded) == N
    assert set(decoded.values()) == {1}


def test_mean_and_deviation_are_those_of_all_images_or_of_a_sample(in_memory, streamed, monkeypatch):
    whole = in_memory.x.double() / 255
    mean, std = (torch.tensor(values).double() for values in in_memory.mean_and_std())
    torch.testing.assert_close(mean, whole.mean((0, 2, 3)), atol=1e-6, rtol=0)
    torch.testing.assert_close(std, whole.std((0, 2, 3)), atol=1e-6, rtol=0)
    assert streamed.mean_and_std() == in_memory.mean_and_std()
    monkeypatch.setattr(_stream, "MEASURED", N // 2)
    sampled = streamed.mean_and_std()
    assert sampled == streamed.mean_and_std()
    assert sampled != in_memory.mean_and_std()
    assert sampled[0] == pytest.approx(in_memory.mean_and_std()[0], abs=0.1)


# --- sizes ------------------------------------------------------------------------------------------------------------


def test_sizes_that_differ_are_named_before_anything_is_decoded(tmp_path):
    root = make_folder(tmp_path / "pets")
    save(root / "class_2" / "odd.png", pixels(W, H, 3))
    for read in (read_images, stream):
        with pytest.raises(InputError, match=r"odd\.png: is 5x9, but .*0\.png is 9x5; .* or give image_size\.$"):
            read(root)


def test_an_image_size_brings_images_to_one_size(tmp_path):
    root = make_folder(tmp_path / "pets")
    wide, high = pixels(H, 13, 3, seed=1), pixels(12, H, seed=2)
    save(root / "class_2" / "wide.png", wide)
    save(root / "class_2" / "high.png", high)
    data = read_images(root, image_size=H)
    assert same(stream(root, image_size=H), data)
    assert data.shape == (3, H, H)
    members = data.x[data.y == 2]
    assert np.array_equal(members[-1].permute(1, 2, 0).numpy(), wide[:, 4:9]), "8 columns too many: 4 before, 4 behind"
    between = (high[3:8].astype(int) + high[4:9]) / 2  # 7 rows too many: three and a half before
    assert np.abs(members[-2][0].numpy() - between).max() <= 0.5


@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 30), st.integers(0, 255), st.sampled_from([(), (3,)]))
def test_an_image_of_one_colour_keeps_it_at_any_size(tmp_path_factory, height, width, size, level, channels):
    root = tmp_path_factory.mktemp("flat")
    for label in "ab":
        save(root / label / "1.png", np.full((height, width, *channels), level, np.uint8))
    data = read_images(root, image_size=size)
    assert data.x.shape == (2, 3 if channels else 1, size, size)
    assert (data.x == level).all()


def test_half_the_size_is_the_mean_of_neighbours_where_the_image_is_linear(tmp_path):
    ramp = np.tile(np.arange(0, 128, 4, dtype=np.uint8), (32, 1))
    for label in "ab":
        save(tmp_path / label / "1.png", ramp)
    inner = read_images(tmp_path, image_size=16).x[0, 0, :, 1:-1].float()
    expected = (ramp[0, 2:-2:2].astype(float) + ramp[0, 3:-2:2]) / 2
    assert (inner - torch.from_numpy(expected)).abs().max() <= 0.5


@pytest.mark.parametrize("size", [0, -3])
def test_an_image_size_is_above_0(folder, size):
    with pytest.raises(InputError, match=f"image_size: must be above 0, got {size}"):
        read_images(folder, size)


def test_an_image_size_is_refused_where_there_is_no_folder_of_images(tmp_path):
    np.savez(tmp_path / "a.npz", x=pixels(6, 3, H, W), y=np.arange(6))
    (tmp_path / "cifar").mkdir()
    (tmp_path / "cifar" / "test_batch.bin").write_bytes(bytes(3073))
    for path in (tmp_path / "a.npz", tmp_path / "cifar"):
        with pytest.raises(InputError, match=rf"image_size: is for folders of images, and .*{path.name} is none"):
            read_images(path, H)


# --- fingerprint ------------------------------------------------------------------------------------------------------


def test_the_fingerprint_is_of_the_content_and_not_of_the_place(tmp_path, streamed):
    assert stream(make_folder(tmp_path / "pets")).sha256 == streamed.sha256
    assert streamed.subset(torch.arange(N)).sha256 == streamed.sha256


def change_pixel(root):
    file = root / "class_1" / "4.png"
    content = bytearray(file.read_bytes())
    content[-20] ^= 1
    file.write_bytes(content)


def change_name(root):
    (root / "class_1" / "10.png").rename(root / "class_1" / "11.png")


def change_label(root):
    (root / "class_2" / "11.png").rename(root / "class_1" / "11.png")


def change_length(root):
    with (root / "class_0" / "13.png").open("ab") as file:
        file.write(b"\0")


@pytest.mark.parametrize("change", [change_pixel, change_name, change_label, change_length])
def test_the_fingerprint_sees(tmp_path, streamed, change):
    root = make_folder(tmp_path / "pets")
    change(root)
    assert stream(root).sha256 != streamed.sha256


def test_the_fingerprint_sees_names_and_lengths_beyond_its_sample(tmp_path, streamed, monkeypatch):
    monkeypatch.setattr(_stream, "FINGERPRINTED", 0)
    for number, change in enumerate((change_name, change_label, change_length)):
        root = make_folder(tmp_path / str(number))
        change(root)
        assert stream(root).sha256 != streamed.sha256, change
    assert streamed.subset(torch.arange(N).flip(0)).sha256 != streamed.sha256
    assert replace(streamed, y=streamed.y.roll(1)).sha256 != streamed.sha256


# --- runs -------------------------------------------------------------------------------------------------------------


def go(data, out, listener=None):
    """Three epochs of three steps, saved after every second step."""
    network = create_model("cnn", input_shape=(3, H, W), num_classes=3, width=2, seed=1)
    splits = Splits(data.subset(torch.arange(26)), data.subset(torch.arange(26, N)))
    return train(
        network, splits, out=out, listener=listener, objective="pgd_at", threat=ThreatModel(norm="linf", eps=0.1),
        attack={"steps": 2}, epochs=3, batch_size=BATCH, augmentation="crop_flip", save_every_steps=2, swa=0.3,
        optimizer={"learning_rate": 0.1},
    )  # fmt: skip


@pytest.fixture(scope="module")
def weights(in_memory, tmp_path_factory):
    """What a run in memory ends in."""
    return go(in_memory, tmp_path_factory.mktemp("memory")).model.state_dict()


def equal(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def test_a_run_ends_in_the_same_bits_in_memory_and_streamed(streamed, weights, tmp_path):
    assert equal(go(streamed, tmp_path).model.state_dict(), weights)


def test_a_run_announces_the_next_batch_of_an_epoch_and_nothing_else(in_memory, tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(ImageData, "expect", lambda self, ids: calls.append(("expect", ids.tolist())))
    pixels = ImageData.pixels
    monkeypatch.setattr(
        ImageData, "pixels", lambda self, ids: calls.append(("take", ids.tolist())) or pixels(self, ids)
    )
    go(in_memory, tmp_path)
    announced = [index for index, (what, _) in enumerate(calls) if what == "expect"]
    assert len(announced) == 3 * 2, "three epochs of three steps"
    for index in announced:
        assert calls[index + 1] == ("take", calls[index][1])


def test_a_run_on_streamed_data_that_was_broken_off_goes_on_to_the_same_bits(folder, weights, tmp_path):
    def stop(progress):
        if progress.step == 5:
            raise KeyError

    with pytest.raises(KeyError):
        go(stream(folder), tmp_path, stop)
    assert equal(go(stream(folder), tmp_path).model.state_dict(), weights)


@pytest.mark.parametrize("content", [None, b"", b"no image"])
def test_a_file_that_cannot_be_read_any_more_ends_a_run_that_goes_on_once_it_is_back(
    folder, weights, tmp_path, content
):
    root = make_folder(tmp_path / "pets")
    file, whole = root / "class_0" / "3.png", (root / "class_0" / "3.png").read_bytes()

    def spoil(progress):
        if progress.step == 3:  # the end of an epoch: nothing is decoded ahead
            file.unlink() if content is None else file.write_bytes(content)

    with pytest.raises(RunError, match=r"class_0.3\.png: is not a readable image .*; put the file back, then") as error:
        go(stream(root), tmp_path / "run", spoil)
    assert "\n" not in str(error.value)
    found = read_checkpoint(tmp_path / "run")
    assert found is not None
    assert 3 <= found.step < 6, "what was computed before is kept"
    file.write_bytes(whole)
    seen = []
    run = go(stream(root), tmp_path / "run", lambda progress: seen.append(progress.step))
    assert seen[0] == found.step + 1
    assert equal(run.model.state_dict(), weights)


@pytest.mark.parametrize(("before", "after"), [((H, W, 3), (W, H, 3)), ((H, W), (H, W, 3))])
def test_a_file_that_became_another_image_is_named(tmp_path, before, after):
    root = make_folder(tmp_path / "pets", before)
    data = stream(root)
    save(root / "class_0" / "3.png", pixels(*after))
    with pytest.raises(RunError, match=r"class_0.3\.png: has another size or colours than it had at first; put"):
        data.batch(torch.arange(N))


def test_an_evaluation_of_streamed_data_has_the_same_verdicts(streamed, in_memory):
    model = create_model("cnn", input_shape=(3, H, W), num_classes=3, width=2, seed=1)
    rows = [
        evaluate(model, data, threat=ThreatModel(norm="linf", eps=0.02), attacks=["fgsm"], batch_size=BATCH).rows[0]
        for data in (streamed, in_memory)
    ]
    assert rows[0].verdicts == rows[1].verdicts
    assert 0 < rows[0].worst_case.correct < N


def test_a_model_is_made_for_streamed_images(streamed, in_memory, tmp_path):
    values = {"objective": "natural", "threat": {"eps": 0.1}, "model": {"name": "cnn"}, "out": str(tmp_path)}
    first, second = (make_recipe(values).build_model(Splits(data, data)) for data in (streamed, in_memory))
    assert equal(first.state_dict(), second.state_dict())
    assert (first.architecture, len(first.architecture.mean)) == (second.architecture, 3)
