import json
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from crdnd import (
    ImageData,
    InputError,
    RunError,
    Splits,
    ThreatModel,
    create_model,
    distill,
    evaluate,
    load_data,
    load_model,
    train,
)
from crdnd.cli import main
from crdnd.engine import TrainSettings, load_history
from crdnd.engine.checkpoint import load_checkpoint
from support import CLASSES, SHAPE, TinyNet, images

torch.set_num_threads(1)  # networks this small wait for their threads more than they compute

THREAT = ThreatModel(norm="linf", eps=0.1)
COUNT, BATCH, STEPS = 13, 4, 6


def part(count: int, seed: int = 1) -> ImageData:
    return ImageData(images(count, seed=seed, dtype=torch.float32), torch.arange(count) % CLASSES, CLASSES, name="dots")


def splits() -> Splits:
    return Splits(part(COUNT), part(7, seed=2))


def cnn(seed: int = 0, classes: int = CLASSES, width: int = 2) -> nn.Module:
    return create_model("cnn", input_shape=SHAPE, num_classes=classes, width=width, seed=seed)


def settings(**changes: Any) -> dict[str, Any]:
    return {"objective": "natural", "threat": THREAT, "epochs": 2, "batch_size": BATCH} | changes


def content(folder: Path) -> dict[str, bytes]:
    """Every file below a folder but the lock and the log, by its path."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name not in (".lock", "run.log")]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def equal(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(value, b.state_dict()[key]) for key, value in a.state_dict().items())


# What a run leaves


@pytest.mark.parametrize("select", ["best", "last"])
def test_a_run_folder_is_a_model_folder_with_the_other_weights_inside(select, tmp_path):
    out, other = tmp_path / "deep" / "run", "last" if select == "best" else "best"
    run = train(cnn(), splits(), out=out, role="teacher", **settings(select=select, seed=3))
    assert equal(load_model(out), run.model)
    assert equal(load_model(out / other), run.other)
    assert not (out / select).exists()
    for folder, label in ((out, select), (out / other, other)):
        card = json.loads((folder / "model.json").read_text())
        assert card["schema"] == "crdnd.model/1"
        assert (card["method"], card["role"], card["seed"], card["checkpoint"]) == ("natural", "teacher", 3, label)
        assert (card["data"], card["threat"]) == ("dots", {"norm": "linf", "eps": 0.1})
        assert card["architecture"]["name"] == "cnn"
        assert card["architecture"]["settings"] == {"width": 2}
        assert card["params"] == sum(parameter.numel() for parameter in cnn().parameters())
        assert card["teacher_sha256"] is None
        assert card["versions"]["torch"] == str(torch.__version__)
        assert card["command"]
        assert "commit" in card


def test_a_run_tells_what_it_was(tmp_path):
    seen = []
    run = train(cnn(), splits(), out=str(tmp_path / "run"), listener=seen.append, **settings())
    assert run.folder == tmp_path / "run"
    assert run.settings == TrainSettings(**settings())
    assert [epoch.epoch for epoch in run.history] == [1, 2]
    assert run.history == load_history(run.folder)
    assert run.history[0].validation.clean.n == 7
    assert not run.reused
    assert [(progress.step, progress.steps) for progress in seen] == [(step, STEPS) for step in range(1, STEPS + 1)]
    assert [len(progress.history) for progress in seen] == [0, 0, 1, 1, 1, 2]
    assert "epoch 2/2" in (run.folder / "run.log").read_text()
    assert not list(run.folder.glob(".*.tmp"))


def test_the_card_of_a_student_names_its_teachers_weights(tmp_path):
    teacher = train(cnn(seed=4, width=3), splits(), out=tmp_path / "teacher", **settings())
    common = settings(objective="rslad", attack={"steps": 1})
    students = {
        "module": teacher.model,
        "folder": tmp_path / "teacher",
        "text": str(tmp_path / "teacher"),
        "file": tmp_path / "teacher" / "model.safetensors",
    }
    runs = [distill(cnn(), splits(), teacher=given, out=tmp_path / name, **common) for name, given in students.items()]
    assert all(equal(run.model, runs[0].model) for run in runs)
    for name in students:
        card = json.loads((tmp_path / name / "model.json").read_text())
        assert card["teacher_sha256"] == json.loads((tmp_path / "teacher" / "model.json").read_text())["sha256"]
        assert card["role"] == "student"


def test_a_module_of_the_users_own_is_saved_and_loaded_into_its_like(tmp_path):
    run = train(TinyNet(dtype=torch.float32), splits(), out=tmp_path / "run", **settings())
    with pytest.raises(InputError, match=r"TinyNet, which only its own code can build"):
        load_model(tmp_path / "run")
    assert equal(load_model(tmp_path / "run", TinyNet(seed=9, dtype=torch.float32)), run.model)


# Data of any kind


class Items:
    """A map-style data set."""

    def __init__(self, data: ImageData) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.data.x[index], int(self.data.y[index])


def test_any_kind_of_data_gives_the_same_run(tmp_path):
    data = part(40)
    kinds = {"data": data, "pair": (data.x, data.y), "items": Items(data)}
    runs = {name: train(cnn(), given, out=tmp_path / name, **settings()) for name, given in kinds.items()}
    assert all(equal(run.model, runs["data"].model) for run in runs.values())
    # 15% of data given without a validation split are held out.
    assert {run.history[-1].validation.clean.n for run in runs.values()} == {6}


def test_images_in_bytes_are_the_same_as_their_255ths(tmp_path):
    data = part(COUNT)
    whole = (data.x * 255).round().to(torch.uint8)
    runs = [
        train(cnn(), Splits(ImageData(x, data.y, CLASSES), part(7)), out=tmp_path / str(index), **settings())
        for index, x in enumerate((whole, whole.float() / 255))
    ]
    assert equal(runs[0].model, runs[1].model)


def test_a_named_data_set_brings_its_own_validation_split(tmp_path):
    student = create_model("cnn", input_shape=(1, 8, 8), num_classes=10, width=2)
    run = train(student, "digits", out=tmp_path / "run", **settings(epochs=1, batch_size=300))
    assert run.history[0].validation.clean.n == len(load_data("digits").validation) == 200
    assert json.loads((tmp_path / "run" / "model.json").read_text())["data"] == "digits"


def test_a_run_works_outside_the_main_thread(tmp_path):
    runs = []
    thread = threading.Thread(target=lambda: runs.append(train(cnn(), splits(), out=tmp_path / "run", **settings())))
    thread.start()
    thread.join()
    assert equal(runs[0].model, train(cnn(), splits(), out=tmp_path / "other", **settings()).model)


# The same folder again


@pytest.mark.parametrize("network", [cnn, lambda seed=0: TinyNet(seed=seed, dtype=torch.float32)], ids=["cnn", "own"])
def test_a_finished_run_is_reused_and_not_touched(network, tmp_path, monkeypatch):
    first = train(network(), splits(), out=tmp_path / "run", **settings())
    before, steps = content(tmp_path / "run"), []
    monkeypatch.setattr(sys, "argv", ["another command"])
    second = train(network(seed=8), splits(), out=tmp_path / "run", listener=steps.append, **settings())
    assert (first.reused, second.reused) == (False, True)
    assert equal(second.model, first.model)
    assert equal(second.other, first.other)
    assert second.history == first.history
    assert content(tmp_path / "run") == before
    assert not steps


def test_a_finished_run_whose_models_were_lost_makes_them_again(tmp_path):
    train(cnn(), splits(), out=tmp_path / "run", **settings())
    before = content(tmp_path / "run")
    (tmp_path / "run" / "model.safetensors").write_bytes(b"torn")
    (tmp_path / "run" / "last" / "model.json").unlink()
    assert train(cnn(), splits(), out=tmp_path / "run", **settings()).reused
    assert content(tmp_path / "run") == before


def test_how_often_a_run_saves_may_change_on_its_way(tmp_path):
    first = train(cnn(), splits(), out=tmp_path / "run", **settings(save_every_steps=4))
    assert train(cnn(), splits(), out=tmp_path / "run", **settings(save_every_steps=1)).reused
    assert equal(first.model, train(cnn(), splits(), out=tmp_path / "other", **settings()).model)


@pytest.mark.parametrize(
    ("changes", "shown"),
    [
        ({"optimizer": {"learning_rate": 0.2}}, "optimizer.learning_rate: 0.1 -> 0.2"),
        ({"epochs": 3}, "epochs: 2 -> 3"),
        ({"seed": 1}, "seed: 0 -> 1"),
        ({"seeds": {"order": 1}}, "seeds.order: None -> 1"),
        ({"threat": {"norm": "l2", "eps": 0.1}}, "threat.norm: linf -> l2"),
        ({"ema": 0.9, "select": "last"}, "ema: None -> 0.9; select: best -> last"),
        ({"objective": "trades"}, "objective.name: natural -> trades"),
        ({"model": cnn(width=3)}, re.escape("model: cnn(width=2) ") + "[0-9a-f]{16}" + re.escape(" -> cnn(width=3) ")),
        ({"data": Splits(part(COUNT, seed=5), part(7, seed=2))}, "data: dots [0-9a-f]{16} -> dots [0-9a-f]{16}"),
    ],
)
def test_a_changed_setting_is_refused_and_shown(changes, shown, tmp_path):
    train(cnn(), splits(), out=tmp_path / "run", **settings())
    before = content(tmp_path / "run")
    model, data = changes.pop("model", cnn()), changes.pop("data", splits())
    with pytest.raises(InputError, match=shown) as caught:
        train(model, data, out=tmp_path / "run", **settings() | changes)
    assert "--fresh" in str(caught.value)
    assert str(tmp_path / "run") in str(caught.value)
    assert "\n" not in str(caught.value)
    assert content(tmp_path / "run") == before


def test_a_setting_that_was_given_as_what_it_is_by_default_is_no_change(tmp_path):
    train(cnn(), splits(), out=tmp_path / "run", **settings(objective="trades", attack={"steps": 1}))
    spelled = {"name": "trades", "beta": 6.0, "loss_scale": 1.0}
    again = settings(objective=spelled, attack={"steps": 1, "loss": "trades"}, optimizer={"learning_rate": 0.1})
    assert train(cnn(), splits(), out=tmp_path / "run", **again).reused


def test_another_normalisation_is_refused_where_the_run_says_what_it_had(tmp_path):
    out, other = tmp_path / "run", {"mean": [0.3] * SHAPE[0], "std": [0.2] * SHAPE[0]}
    train(cnn(), splits(), out=out, **settings())
    another = create_model("cnn", input_shape=SHAPE, num_classes=CLASSES, width=2, **other)
    with pytest.raises(InputError, match=r"normalization: mean \[0\.0.* -> mean \[0\.3"):
        train(another, splits(), out=out, **settings())
    document = json.loads((out / "run.json").read_text())
    del document["identity"]["normalization"]  # as in runs of earlier versions
    (out / "run.json").write_text(json.dumps(document))
    assert train(cnn(), splits(), out=out, **settings()).reused


def test_another_teacher_is_refused(tmp_path):
    common = settings(objective="rslad", attack={"steps": 1})
    distill(cnn(), splits(), teacher=cnn(seed=1), out=tmp_path / "run", **common)
    with pytest.raises(InputError, match=r"teacher: [0-9a-f]{16} -> [0-9a-f]{16}"):
        distill(cnn(), splits(), teacher=cnn(seed=2), out=tmp_path / "run", **common)


def test_fresh_moves_the_old_run_aside_whole(tmp_path):
    out = tmp_path / "run"
    first = train(cnn(), splits(), out=out, fresh=True, **settings())
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    (out / "notes.txt").write_text("mine")
    kept = [content(out)]
    second = train(cnn(), splits(), out=out, fresh=True, **settings(seed=1))
    kept.append(content(out))
    train(cnn(), splits(), out=out, fresh=True, **settings(seed=2))
    assert not second.reused
    assert not equal(second.model, first.model)
    assert [content(tmp_path / name) for name in ("run.old-1", "run.old-2")] == kept
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run", "run.old-1", "run.old-2"]


def test_fresh_with_a_mistake_moves_nothing(tmp_path):
    train(cnn(), splits(), out=tmp_path / "run", **settings())
    before = content(tmp_path)
    for mistake in ({"objective": "natrual"}, {"epochs": 0}, {"objective": "rslad"}, {"trackers": ("nope",)}):
        with pytest.raises(InputError):
            train(cnn(), splits(), out=tmp_path / "run", fresh=True, **settings() | mistake)
    assert content(tmp_path) == before


@pytest.mark.parametrize("fresh", [False, True])
def test_a_run_does_not_take_the_place_of_its_teacher(fresh, tmp_path, monkeypatch):
    train(cnn(), splits(), out=tmp_path / "teacher", **settings())
    (tmp_path / "link").symlink_to(tmp_path / "teacher")
    monkeypatch.chdir(tmp_path)
    before = content(tmp_path)
    ways: list[dict[str, Any]] = [
        {"teacher": "teacher", "out": "teacher"},
        {"teacher": tmp_path / "teacher", "out": "./teacher/"},
        {"teacher": "link", "out": Path("teacher")},
        {"teacher": "teacher/model.safetensors", "out": tmp_path / "teacher"},
        {"teacher": cnn(seed=1), "second_teacher": "teacher", "out": "link"},
        {"teacher": "nets:small", "teacher_weights": "teacher", "out": "teacher"},
    ]
    for way in ways:
        with pytest.raises(InputError, match=r"^out: is the teacher's folder; choose another\.$"):
            distill(cnn(), splits(), fresh=fresh, **way, **settings(objective="rslad"))
    assert content(tmp_path) == before


def test_fresh_does_not_move_a_teacher_aside_that_lies_in_the_folder(tmp_path):
    train(cnn(), splits(), out=tmp_path, **settings())
    train(cnn(), splits(), out=tmp_path / "teacher", **settings())
    before = content(tmp_path)
    for teacher in (tmp_path / "teacher", tmp_path / "last"):
        with pytest.raises(InputError, match=r"^out: holds the teacher, which --fresh would move aside; choose"):
            distill(cnn(), splits(), teacher=teacher, out=tmp_path, fresh=True, **settings(objective="rslad"))
    assert content(tmp_path) == before


def test_fresh_moves_only_what_a_run_has_made(tmp_path):
    (tmp_path / "run.yaml").write_text("mine")
    (tmp_path / "other").mkdir()
    before = content(tmp_path)
    with pytest.raises(InputError, match=r"this folder holds something else \(none of .*run\.json\).*another --out"):
        train(cnn(), splits(), out=tmp_path, fresh=True, **settings())
    assert {name: value for name, value in content(tmp_path).items() if not name.endswith(".lock")} == before


def test_fresh_in_the_folder_where_one_stands(tmp_path, monkeypatch):
    (tmp_path / "run").mkdir()
    monkeypatch.chdir(tmp_path / "run")
    for _ in range(2):
        train(cnn(), splits(), out=".", fresh=True, **settings())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run", "run.old-1"]


def test_a_model_that_no_run_here_has_made_is_not_written_over(tmp_path):
    train(cnn(), splits(), out=tmp_path / "run", **settings())
    for name in ("run.json", "checkpoint.json"):
        (tmp_path / "run" / name).unlink()
    before = content(tmp_path)
    with pytest.raises(InputError, match=r"holds a model and not the run that made it.*--fresh.*--out"):
        train(cnn(), splits(), out=tmp_path / "run", **settings(seed=1))
    assert content(tmp_path) == before


def test_a_checkpoint_without_its_settings_is_not_gone_on_with(tmp_path):
    train(cnn(), splits(), out=tmp_path / "run", **settings())
    (tmp_path / "run" / "run.json").unlink()
    with pytest.raises(InputError, match=r"run\.json.*--fresh"):
        train(cnn(), splits(), out=tmp_path / "run", **settings(optimizer={"learning_rate": 0.3}))


@pytest.mark.parametrize("document", ["", '{"schema": "crdnd.run/1", "settings": {', "[]", '{"settings": []}'])
def test_damaged_settings_of_a_run_are_an_error_of_one_line(document, tmp_path):
    train(cnn(), splits(), out=tmp_path / "run", **settings())
    (tmp_path / "run" / "run.json").write_text(document)
    with pytest.raises(InputError, match=r"run\.json.*--fresh") as caught:
        train(cnn(), splits(), out=tmp_path / "run", **settings())
    assert "\n" not in str(caught.value)


# One process at a time

HOLD = """
import sys
from pathlib import Path
from crdnd.io import exclusive

with exclusive(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


@contextmanager
def held(folder: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds a run's folder."""
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], stdin=pipe, stdout=pipe, text=True) as process:
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


@pytest.mark.parametrize("fresh", [False, True])
def test_a_folder_in_use_is_refused_at_once_and_nothing_in_it_changes(fresh, tmp_path, capsys):
    out = tmp_path / "run"
    train(cnn(), splits(), out=out, **settings())
    before = content(tmp_path)
    command = ["train", "--objective", "natural", "--model", "cnn", "--eps", "0.1", "--out", str(out), "--json"]
    with held(out):
        with pytest.raises(InputError, match="another run is writing here"):
            train(cnn(), splits(), out=out, fresh=fresh, **settings())
        with pytest.raises(SystemExit) as exit_:
            main(command + ["--fresh"] * fresh)
    shown = capsys.readouterr()
    assert exit_.value.code == 2
    assert re.fullmatch(r"error: .*run: another run is writing here; .*--out\.\n", shown.err)
    assert not shown.out
    assert content(tmp_path) == before


def test_a_killed_process_leaves_no_lock_behind(tmp_path):
    out = tmp_path / "run"
    out.mkdir()
    with held(out) as process:
        process.kill()
        process.wait()
        assert train(cnn(), splits(), out=out, **settings()).folder == out


# A loss that is not finite


class Broken(nn.Module):
    """Goes wrong at one of its forward passes in train mode: its logits are NaN, or their gradient is."""

    def __init__(self, at: int, what: str) -> None:
        super().__init__()
        self.network = TinyNet(dtype=torch.float32)
        self.at, self.what, self.passes = at, what, 0

    def forward(self, x: Tensor) -> Tensor:
        logits = self.network(x)
        self.passes += self.training
        if self.passes != self.at or not self.training:
            return logits
        if self.what == "loss":
            return logits * torch.nan
        logits.register_hook(lambda gradient: gradient * torch.nan)
        return logits


@pytest.mark.parametrize(("what", "at", "noticed"), [("loss", 5, 5), ("loss", 1, 1), ("gradient", 4, 4)])
def test_a_run_that_turns_nan_stops_and_keeps_the_last_good_checkpoint(what, at, noticed, tmp_path):
    out, common = tmp_path / "run", settings(save_every_steps=1)
    message = rf"not finite (at|after) step {noticed}\b.*{re.escape(str(out))}.*learning_rate.*clip_grad_norm.*--fresh"
    with pytest.raises(RunError, match=message) as caught:
        train(Broken(at, what), splits(), out=out, **common)
    assert "\n" not in str(caught.value)
    assert not (out / "model.json").exists()
    found = load_checkpoint(out)
    if at == 1:
        assert found is None
    else:
        checkpoint, tensors = found
        assert checkpoint.step == at - 1
        assert all(value.isfinite().all() for value in tensors.values() if value.is_floating_point())

    # What was kept is good: the same run without the fault goes on from there and ends where it would have.
    steps = []
    healthy = train(Broken(0, what), splits(), out=out, listener=lambda p: steps.append(p.step), **common)
    assert steps == list(range(at, STEPS + 1))
    assert equal(healthy.model, train(Broken(0, what), splits(), out=tmp_path / "other", **common).model)


def test_a_gradient_that_turns_nan_in_the_last_step_is_not_a_result(tmp_path):
    with pytest.raises(RunError, match="not finite after step 6"):
        train(Broken(STEPS, "gradient"), splits(), out=tmp_path / "run", **settings())
    assert not (tmp_path / "run" / "model.json").exists()


def test_a_learning_rate_far_too_high_is_named(tmp_path):
    with pytest.raises(RunError, match=r"not finite at step \d+ of 12.*optimizer\.learning_rate \(now 1e\+30\)"):
        train(cnn(), splits(), out=tmp_path / "run", **settings(epochs=4, optimizer={"learning_rate": 1e30}))


# Bad input


class Probabilities(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.network = cnn()

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x).softmax(1)


class Reshaped(nn.Module):
    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.network, self.shape = cnn(), shape

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x).reshape(*self.shape)


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.network = cnn()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.network(x), x


class Nowhere(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.full((len(x), CLASSES), torch.nan)


def spoiled(index: int, value: float) -> tuple[Tensor, Tensor]:
    data = part(COUNT)
    x = data.x.clone()
    x.view(-1)[index] = value
    return x, data.y


def relabelled(*labels: float) -> tuple[Tensor, Tensor]:
    data = part(COUNT)
    return data.x, torch.cat([torch.tensor(labels), data.y[len(labels) :]])


DATA: dict[str, tuple[Callable[[], Any], str]] = {
    "unknown name": (lambda: "digit", "data: 'digit' is neither a data set nor a path; did you mean 'digits'"),
    "above 1": (lambda: spoiled(7, 1.5), "pixels range from .* to 1.5 and must lie in \\[0, 1\\]"),
    "bytes as floats": (lambda: (part(COUNT).x * 255, part(COUNT).y), "must lie in \\[0, 1\\]; divide by 255"),
    "below 0": (lambda: spoiled(7, -0.1), "pixels range from -0.1 .*leave normalisation to the model"),
    "NaN": (lambda: spoiled(7, torch.nan), "NaN or infinite pixels"),
    "infinite": (lambda: spoiled(7, torch.inf), "NaN or infinite pixels"),
    "negative label": (lambda: relabelled(-1, 0), "label -1 is out of range"),
    "label too large": (lambda: ImageData(*relabelled(9, 0), num_classes=5), "label 9 is out of range.*0 .. 4"),
    "more classes than the model": (lambda: relabelled(9, 0), "has 5 classes, but the data has 10"),
    "labels that are no integers": (lambda: relabelled(0.5, 1.0), "labels must be integers, got torch.float32"),
    "one class": (lambda: (part(COUNT).x, torch.zeros(COUNT, dtype=torch.long)), "only one class"),
    "labels of other length": (lambda: (part(COUNT).x, part(7).y), "13 images need labels of shape \\(13,\\)"),
    "no channels": (lambda: (part(COUNT).x[:, 0], part(COUNT).y), "shape \\(N, C, H, W\\), got \\(13, 4, 7\\)"),
    "integers": (lambda: ((part(COUNT).x * 2).int(), part(COUNT).y), "floating point in \\[0, 1\\] or uint8"),
    "no images": (lambda: (part(COUNT).x[:0], part(COUNT).y[:0]), "there are no images"),
    "no tensors": (lambda: (part(COUNT).x.tolist(), part(COUNT).y), "pair must be two tensors .*got list, Tensor"),
    "no data": (lambda: 3, "expected the name of a data set, .*got int"),
}


@pytest.mark.parametrize("name", DATA)
def test_data_that_cannot_be_used_is_named_in_one_line(name, tmp_path):
    make, message = DATA[name]
    with pytest.raises(InputError, match=message) as caught:
        train(cnn(), make(), out=tmp_path / "run", **settings())
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()
    if name not in ("unknown name", "one class"):  # images of one class can be measured
        with pytest.raises(InputError, match=message):
            evaluate(cnn(), make(), threat=THREAT)


@pytest.mark.parametrize(
    "validation",
    [
        ImageData(images(7, (3, 5, 5), dtype=torch.float32), torch.arange(7) % CLASSES, CLASSES),
        ImageData(images(7, (1, 4, 7), dtype=torch.float32), torch.arange(7) % CLASSES, CLASSES),
        ImageData(images(7, dtype=torch.float32), torch.arange(7), 7),
    ],
    ids=["other size", "other channels", "more classes"],
)
def test_validation_data_that_does_not_go_with_the_training_data_is_refused_at_the_start(validation, tmp_path):
    with pytest.raises(InputError, match="validation"):
        train(TinyFlat(), Splits(part(COUNT), validation), out=tmp_path / "run", **settings())
    assert not (tmp_path / "run").exists()


class TinyFlat(nn.Module):
    """Takes images of one shape only."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3 * 4 * 7, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x.flatten(1))


MODELS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "probabilities": (Probabilities, "returns probabilities, but logits are needed; remove its softmax"),
    "other input": (
        lambda: create_model("cnn", input_shape=(1, 8, 8), num_classes=CLASSES),
        "cannot process images of shape \\(3, 4, 7\\)",
    ),
    "other type": (lambda: TinyNet(dtype=torch.float64), "cannot process images of shape"),
    "one number too many": (lambda: Reshaped(-1, CLASSES, 1), "must return logits \\(B, K\\), got \\(3, 5, 1\\)"),
    "flat": (lambda: Reshaped(-1), "must return logits \\(B, K\\), got \\(15,\\)"),
    "a pair": (Pair, "must return logits \\(B, K\\), got tuple"),
    "NaN": (Nowhere, "returns NaN or infinite logits"),
    "too few classes": (lambda: cnn(classes=4), "has 4 classes, but the data has 5"),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_model_that_cannot_be_used_is_named_in_one_line(name, tmp_path):
    make, message = MODELS[name]
    for role in ("student", "teacher"):
        networks = {"student": cnn(), "teacher": cnn()} | {role: make()}
        with pytest.raises(InputError, match=f"^{role}: {message}") as caught:
            distill(
                networks["student"],
                splits(),
                teacher=networks["teacher"],
                out=tmp_path / "run",
                **settings(objective="rslad"),
            )
        assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match=f"^model: {message}"):
        train(make(), splits(), out=tmp_path / "run", **settings())
    if name == "probabilities":  # it can be attacked; a check then says what is wrong with it
        (row,) = evaluate(make(), part(COUNT), threat=THREAT).rows
        assert any(check.name == "probabilities" and check.suspicious for check in row.checks)
        assert row.verdict.startswith("suspicious because probabilities: ")
    else:
        with pytest.raises(InputError, match=f"^model: {message}"):
            evaluate(make(), part(COUNT), threat=THREAT)
    assert not (tmp_path / "run").exists()


SETTINGS: dict[str, tuple[dict[str, Any], str]] = {
    "objective": ({"objective": "rslda"}, "unknown objective 'rslda'; did you mean 'rslad'"),
    "no such setting": ({"epoch": 3}, "epoch: no such setting; did you mean 'epochs'"),
    "nested": ({"optimizer": {"lr": 0.1}}, "optimizer.lr: no such setting.*learning_rate"),
    "of the objective": ({"objective": {"name": "trades", "bet": 1}}, "bet: no such setting; did you mean 'beta'"),
    "of the attack": ({"attack": {"stepz": 3}}, "attack.stepz: no such setting; did you mean 'steps?'"),
    "wrong type": ({"epochs": "many"}, "epochs: .*integer, .*got 'many'"),
    "wrong range": ({"epochs": 0}, "epochs: .*greater than or equal to 1, got 0"),
    "batch of one": ({"batch_size": 1}, "batch_size: .*greater than or equal to 2, got 1"),
    "objective's range": ({"objective": {"name": "trades", "beta": -1}}, "beta: .*greater than or equal to 0, got -1"),
    "choice": ({"precision": "fp16"}, "precision: .*'fp32' or 'bf16', got 'fp16'"),
    "training attack": ({"objective": "trades", "attack": {"loss": "cee"}}, "attack.loss: .*'ce'.*got 'cee'"),
    "attack on natural": ({"attack": {"steps": 3}}, "attack.steps: objective natural trains without an attack"),
    "eps in 255ths": ({"threat": {"norm": "linf", "eps": 8}}, "threat: eps=8 .*write 8/255 and not 8"),
    "negative eps": ({"threat": {"eps": -0.1}}, "threat: eps=-0.1 must be a number of at least 0"),
    "eps in words": ({"threat": {"eps": "eight"}}, "threat.eps: 'eight' is not a number; write 0.1 or 8/255"),
    "no eps": ({"threat": {"norm": "linf"}}, "threat.eps: this setting is required"),
    "no adversary": ({"threat": None}, "threat: .*ThreatModel"),
    "norm": ({"threat": {"norm": "l1", "eps": 0.1}}, "threat.norm: .*'linf' or 'l2', got 'l1'"),
    "choice on test data": ({"select_on": "test"}, "select_on: choosing a checkpoint on test data is refused"),
    "tracker": ({"trackers": ("wandbb",)}, "trackers: wandbb is not installed or not known"),
    "teacher needed": ({"objective": "ard"}, "objective ard needs a teacher: use .*distill"),
    "teacher's attack": (
        {"objective": "pgd_at", "attack": {"loss": "kl_teacher"}},
        "objective pgd_at needs a teacher: use .*distill",
    ),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_a_setting_that_cannot_be_used_is_named_in_one_line(name, tmp_path):
    changes, message = SETTINGS[name]
    with pytest.raises(InputError, match=message) as caught:
        train(cnn(), splits(), out=tmp_path / "run", **settings() | changes)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("key", ["objective", "threat"])
def test_what_has_no_default_must_be_given(key, tmp_path):
    given = settings()
    del given[key]
    with pytest.raises(InputError, match=f"{key}: this setting is required"):
        train(cnn(), splits(), out=tmp_path / "run", **given)


def test_a_teacher_must_fit_and_must_be_wanted(tmp_path):
    common = {"data": splits(), "out": tmp_path / "run"}
    with pytest.raises(InputError, match="the teacher has 6 classes and the student 5; they must agree"):
        distill(cnn(), teacher=cnn(classes=6), **common, **settings(objective="rslad"))
    with pytest.raises(InputError, match=r"objective natural uses no teacher: use .*train"):
        distill(cnn(), teacher=cnn(seed=1), **common, **settings())
    for missing, message in {"nowhere": "there is no such model", "no.such:thing": "cannot be imported"}.items():
        with pytest.raises(InputError, match=message):
            distill(cnn(), teacher=missing, **common, **settings(objective="rslad"))
    assert not (tmp_path / "run").exists()


def test_an_unknown_architecture_is_named():
    with pytest.raises(InputError, match="unknown model 'cnnn'; did you mean 'cnn'"):
        create_model("cnnn", input_shape=SHAPE, num_classes=CLASSES)
    with pytest.raises(InputError, match="wdth: no such setting; did you mean 'width'"):
        create_model("cnn", input_shape=SHAPE, num_classes=CLASSES, wdth=3)


def test_a_file_where_the_folder_should_be_is_left_alone(tmp_path):
    (tmp_path / "run").write_text("mine")
    for out in (tmp_path / "run", tmp_path / "run" / "deeper"):
        with pytest.raises((InputError, RunError), match="cannot be written") as caught:
            train(cnn(), splits(), out=out, **settings())
        assert "\n" not in str(caught.value)
    assert (tmp_path / "run").read_text() == "mine"


def test_a_refused_call_leaves_the_model_alone(tmp_path):
    student = cnn().train()
    student.network.features[1].eval()
    modes, state = [module.training for module in student.modules()], deepcopy(student.state_dict())
    with pytest.raises(InputError):
        train(student, splits(), out=tmp_path / "run", **settings(objective="ard"))
    assert [module.training for module in student.modules()] == modes
    assert all(torch.equal(value, state[key]) for key, value in student.state_dict().items())
