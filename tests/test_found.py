"""Adversarial images in a file: what was found, and nothing else, comes out of it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from crdnd import ImageData, InputError, ThreatModel, evaluate
from crdnd.evaluation import Row, load_adversarial
from support import CLASSES, TinyNet, images

torch.set_num_threads(1)  # networks this small wait for their threads more than they compute

WEAK = ThreatModel(norm="linf", eps=0.05)
ATTACKS = {"pgd_sat": {"steps": 3, "restarts": 2}, "square": {"queries": 60}, "apgd_t": {"iterations": 4, "targets": 2}}


def model() -> TinyNet:
    return TinyNet(seed=2)


def sample(count: int = 23) -> ImageData:
    x = images(count)
    with torch.no_grad():
        y = model()(x).argmax(1)
    y[::6] = (y[::6] + 1) % CLASSES
    return ImageData(x, y, CLASSES, name="dots")


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Path, Row]:
    file = tmp_path / "deep" / "found.safetensors"
    results = evaluate(
        model(), sample(), threat=WEAK, attacks=ATTACKS, eps_sweep=(0.08,), batch_size=8, save_adversarial=file
    )
    return file, results.rows[0]


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_images_are_those_of_the_verdicts(norm, tmp_path):
    file, threat = tmp_path / "found.safetensors", ThreatModel(norm=norm, eps=0.05 if norm == "linf" else 0.6)
    (row,) = evaluate(model(), sample(), threat=threat, attacks=ATTACKS, batch_size=8, save_adversarial=file).rows
    found, data = load_adversarial(file, model(), sample(), batch_size=5), sample()
    assert set(found) == set(ATTACKS)
    for name, entry in found.items():
        assert entry.ids.tolist() == [index for index, verdict in enumerate(row.verdicts[name]) if verdict == "0"]
        assert 0 < len(entry.ids) < 23
        assert entry.images.shape == (len(entry.ids), *data.shape)
        x, y = data.batch(entry.ids)
        assert bool(threat.allows(entry.images, x).all())
        assert bool((model()(entry.images).argmax(1) != y).all())


def test_saving_changes_no_verdict(saved):
    _, row = saved
    assert evaluate(model(), sample(), threat=WEAK, attacks=ATTACKS, eps_sweep=(0.08,)).rows[0] == row


def test_an_attack_that_broke_nothing_has_no_images(tmp_path):
    file = tmp_path / "found.safetensors"
    evaluate(model(), sample(), threat=ThreatModel(eps=0.0), attacks=["square"], save_adversarial=file)
    assert len(load_adversarial(file, model(), sample())["square"].ids) == 0


def rewrite(file: Path, change: Callable[[dict[str, Tensor], dict[str, str]], Any]) -> None:
    with safe_open(file, "pt") as opened:
        tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
        metadata = dict(opened.metadata())
    change(tensors, metadata)
    save_file({key: value.contiguous() for key, value in tensors.items()}, file, metadata)


def too_far(tensors: dict[str, Tensor], _: Any) -> None:
    tensors["square.images"][1] = 1 - tensors["square.images"][1]


def outside_the_box(tensors: dict[str, Tensor], _: Any) -> None:
    tensors["square.images"][1, 0, 0, 0] = -0.001


def not_a_number(tensors: dict[str, Tensor], _: Any) -> None:
    tensors["square.images"][1, 2, 3, 4] = torch.nan


def natural(tensors: dict[str, Tensor], _: Any) -> None:
    tensors["square.images"][1] = sample().x[tensors["square.ids"][1]]


def other_ids(tensors: dict[str, Tensor], _: Any) -> None:
    tensors["square.ids"] = tensors["square.ids"].roll(1)


def id_beyond_the_data(tensors: dict[str, Tensor], _: Any) -> None:
    tensors["square.ids"][-1] = 23


def one_image_missing(tensors: dict[str, Tensor], _: Any) -> None:
    tensors["square.images"] = tensors["square.images"][:-1]


def all_images_missing(tensors: dict[str, Tensor], _: Any) -> None:
    del tensors["square.images"]


TAMPERED: dict[str, tuple[Callable[[dict[str, Tensor], dict[str, str]], Any], str]] = {
    "too far": (too_far, r"the image of square for sample \d+ does not lie in linf eps=0\.05 around its sample"),
    "outside the box": (outside_the_box, r"the image of square for sample \d+ does not lie in"),
    "NaN": (not_a_number, r"the image of square for sample \d+ does not lie in"),
    "natural": (natural, r"the image of square for sample \d+ does not fool the model"),
    "other ids": (other_ids, r"the image of square for sample \d+ does not lie in"),
    "id beyond the data": (id_beyond_the_data, r"square"),
    "one image missing": (one_image_missing, r"square"),
    "all images missing": (all_images_missing, r"square"),
    "other schema": (
        lambda _, metadata: metadata.update(schema="crdnd.adversarial/2"),
        r"has the format 'crdnd\.adversarial/2'; this version reads crdnd\.adversarial/1",
    ),
    "no schema": (lambda _, metadata: metadata.clear(), r"has the format None"),
    "damaged protocol": (lambda _, metadata: metadata.update(protocol="{"), r"protocol cannot be read"),
    "no protocol": (lambda _, metadata: metadata.pop("protocol"), r"protocol"),
}


@pytest.mark.parametrize("how", TAMPERED)
def test_a_file_that_was_tampered_with_is_refused_in_one_line(how, saved):
    (file, _), (change, message) = saved, TAMPERED[how]
    rewrite(file, change)
    with pytest.raises(InputError, match=message) as caught:
        load_adversarial(file, model(), sample())
    assert str(caught.value).startswith(f"{file}: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("length", [0, 5, 100, -1])
def test_a_truncated_file_is_refused_in_one_line(length, saved):
    file, _ = saved
    file.write_bytes(file.read_bytes()[:length])
    with pytest.raises(InputError, match="is not a readable file of adversarial images") as caught:
        load_adversarial(file, model(), sample())
    assert "\n" not in str(caught.value)


def test_a_file_belongs_to_its_model_and_its_data(saved, tmp_path):
    file, _ = saved
    with pytest.raises(InputError, match=r"was made for another model \(sha256 [0-9a-f]{12}\)"):
        load_adversarial(file, TinyNet(seed=3), sample())
    relabelled = ImageData(sample().x, sample().y.roll(1), CLASSES, name="dots")
    for data in (sample(22), relabelled):
        with pytest.raises(InputError, match=r"was made for other data \(dots, sha256 [0-9a-f]{12}\)"):
            load_adversarial(file, model(), data)
    with pytest.raises(InputError, match="is not a readable file of adversarial images"):
        load_adversarial(tmp_path / "nowhere.safetensors", model(), sample())


def test_verifying_leaves_the_model_alone(saved):
    file, _ = saved
    network = model().train()
    load_adversarial(file, network, sample())
    assert network.training
    assert all(parameter.requires_grad and parameter.grad is None for parameter in network.parameters())
