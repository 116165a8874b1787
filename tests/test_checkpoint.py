import errno
import json
import multiprocessing
import os
import pickle
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from crdnd import ImageData, InputError, Run, RunError, Splits, ThreatModel, create_model, distill, train
from crdnd import io as crdnd_io
from crdnd.cli import main
from crdnd.engine import Progress
from crdnd.engine.checkpoint import load_checkpoint, read_checkpoint
from crdnd.io import sha256
from support import CLASSES, SHAPE, TinyNet, images

torch.set_num_threads(1)  # networks this small wait for their threads more than they compute

COUNT, BATCH, STEPS = 13, 4, 6


class StopError(Exception):
    """What a listener may raise."""


def splits() -> Splits:
    def part(count: int, seed: int) -> ImageData:
        x = images(count, seed=seed, dtype=torch.float32)
        return ImageData(x, torch.arange(count) % CLASSES, CLASSES)

    return Splits(part(COUNT, 1), part(7, 2))


def go(out: Path, *, until: int | None = None, width: int = 2, **changes: Any) -> Run:
    """A run that saves after every step, as far as `until`."""

    def listen(progress: Progress) -> None:
        if progress.step == until:
            raise StopError

    model = create_model("cnn", input_shape=SHAPE, num_classes=CLASSES, width=width)
    common = {"objective": "natural", "threat": ThreatModel(eps=0.1), "epochs": 2, "batch_size": BATCH}
    return train(model, splits(), out=out, listener=listen, **common | {"save_every_steps": 1} | changes)


@pytest.fixture
def broken_off(tmp_path: Path) -> Path:
    """The folder of a run that stopped after step 4."""
    with pytest.raises(StopError):
        go(tmp_path / "run", until=4)
    return tmp_path / "run"


def tensors_file(folder: Path) -> Path:
    (file,) = folder.glob("checkpoint-*.safetensors")
    return file


def content(folder: Path) -> dict[str, bytes]:
    files = [path for path in folder.rglob("*") if path.is_file() and path.name not in (".lock", "run.log")]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


# What it holds


def test_a_checkpoint_is_two_files_that_any_program_can_read(broken_off):
    pointer = json.loads((broken_off / "checkpoint.json").read_text())
    assert pointer["schema"] == "crdnd.checkpoint/1"
    assert (pointer["step"], pointer["finished"], pointer["best_epoch"]) == (4, False, 1)
    assert pointer["file"] == tensors_file(broken_off).name
    assert pointer["sha256"] == sha256(tensors_file(broken_off).read_bytes())
    assert [epoch["epoch"] for epoch in pointer["history"]] == [1]
    assert {name.split("/")[0].split(".")[0] for name in load_file(tensors_file(broken_off))} == {
        "student", "best", "sums", "random", "optimizer",
    }  # fmt: skip


def test_what_a_method_remembers_is_in_the_checkpoint(tmp_path):
    teacher = TinyNet(seed=2, dtype=torch.float32)
    data = splits()
    distill(
        TinyNet(seed=1, dtype=torch.float32),
        data,
        teacher=teacher,
        out=tmp_path / "run",
        objective="crdnd",
        threat=ThreatModel(eps=0.1),
        attack={"steps": 1},
        epochs=1,
        batch_size=COUNT,
    )
    previous = load_file(tensors_file(tmp_path / "run"))["objective/previous"]
    right = teacher(data.train.x).argmax(1) == data.train.y
    for label in range(CLASSES):
        of_class = data.train.y == label
        assert previous[0, 0, label] == of_class.sum()
        assert previous[0, 1, label] == (right & of_class).sum()


def test_a_finished_run_keeps_one_checkpoint(tmp_path):
    go(tmp_path / "run")
    assert read_checkpoint(tmp_path / "run").finished
    assert tensors_file(tmp_path / "run").name == f"checkpoint-{STEPS:08d}.safetensors"


def test_tensors_that_the_pointer_names_are_never_written_over(tmp_path, monkeypatch):
    """A kill between the two files must leave a whole pair, whatever the caller's own code does in between."""
    replace, written = os.replace, {}

    def noting(source: Path, target: Path) -> None:
        written.setdefault(target.name, set()).add(sha256(source.read_bytes()))
        replace(source, target)

    monkeypatch.setattr(crdnd_io.os, "replace", noting)
    model = create_model("cnn", input_shape=SHAPE, num_classes=CLASSES, width=2)
    common = {"objective": "natural", "threat": ThreatModel(eps=0.1), "epochs": 2, "batch_size": BATCH}
    train(model, splits(), out=tmp_path, listener=lambda _: torch.rand(1), save_every_steps=1, **common)
    tensors = {name: contents for name, contents in written.items() if name.startswith("checkpoint-")}
    assert len(tensors) == STEPS
    assert all(len(contents) == 1 for contents in tensors.values())


def test_by_default_short_epochs_do_not_each_write_a_checkpoint(tmp_path):
    with pytest.raises(StopError):
        go(tmp_path / "run", until=5, save_every_steps=None)
    assert read_checkpoint(tmp_path / "run") is None


# Damage


def truncate(folder: Path) -> Path:
    file = tensors_file(folder)
    file.write_bytes(file.read_bytes()[:-7])
    return file


def flip(folder: Path) -> Path:
    file = tensors_file(folder)
    data = bytearray(file.read_bytes())
    data[-100] ^= 1
    file.write_bytes(data)
    return file


def remove(folder: Path) -> Path:
    file = tensors_file(folder)
    file.unlink()
    return file


def rewrite(**changes: Any) -> Callable[[Path], Path]:
    def damage(folder: Path) -> Path:
        pointer = folder / "checkpoint.json"
        pointer.write_text(json.dumps(json.loads(pointer.read_text()) | changes))
        return pointer

    return damage


def replace_pointer(text: bytes) -> Callable[[Path], Path]:
    def damage(folder: Path) -> Path:
        (folder / "checkpoint.json").write_bytes(text)
        return folder / "checkpoint.json"

    return damage


def truncate_pointer(folder: Path) -> Path:
    pointer = folder / "checkpoint.json"
    pointer.write_bytes(pointer.read_bytes()[:100])
    return pointer


DAMAGE: dict[str, Callable[[Path], Path]] = {
    "tensors cut short": truncate,
    "one bit of the tensors": flip,
    "tensors gone": remove,
    "pointer cut short": truncate_pointer,
    "pointer empty": replace_pointer(b""),
    "pointer of another program": replace_pointer(b"[1, 2]"),
    "pointer that is no text": replace_pointer(b"\xff\x00\x80"),
    "another format": rewrite(schema="crdnd.checkpoint/2"),
    "a format of nobody": rewrite(schema=None),
    "a step that is no number": rewrite(step="many"),
    "a key too many": rewrite(surprise=1),
    "a history of nothing": rewrite(history=[{}]),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_named_with_the_way_out(damage, broken_off, capsys):
    file = DAMAGE[damage](broken_off)
    before = content(broken_off)
    with pytest.raises(InputError) as caught:
        go(broken_off)
    assert str(file) in str(caught.value)
    assert "--fresh" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert content(broken_off) == before
    # The way out works.
    assert not go(broken_off, fresh=True).reused
    assert content(broken_off.with_name("run.old-1")) == before


def test_a_checkpoint_of_another_architecture_is_refused(broken_off, tmp_path):
    with pytest.raises(StopError):
        go(tmp_path / "wider", until=4, width=3)
    for file in (tmp_path / "wider").glob("checkpoint*"):
        shutil.copy(file, broken_off)
    file = re.escape(str(broken_off / "checkpoint-00000004.safetensors"))
    with pytest.raises(InputError, match=rf"^{file}: belongs to another architecture .*\(3, 3, 3, 3\).*--fresh"):
        go(broken_off)


class Trap:
    """Writes a file when it is unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.write_text, (self.target, "sprung")


def test_no_file_of_a_run_is_ever_unpickled(broken_off, tmp_path):
    sprung = tmp_path / "sprung"
    trap = pickle.dumps(Trap(sprung))
    pickle.loads(trap)  # noqa: S301
    assert sprung.read_text() == "sprung"
    sprung.unlink()

    tensors_file(broken_off).write_bytes(trap)
    with pytest.raises(InputError):
        go(broken_off)
    rewrite(sha256=sha256(trap))(broken_off)
    with pytest.raises(InputError, match="not a readable safetensors file"):
        go(broken_off)
    for target in ("checkpoint.json", "run.json"):
        (broken_off / target).write_bytes(trap)
        with pytest.raises(InputError):
            go(broken_off)
    assert not sprung.exists()


# A disk that is full


def full_from(writes: int, monkeypatch: pytest.MonkeyPatch, error: int = errno.ENOSPC) -> None:
    """Let the disk be full from the given write on."""
    replace, done = os.replace, 0

    def limited(source: Path, target: Path) -> None:
        nonlocal done
        done += 1
        if done >= writes:
            raise OSError(error, os.strerror(error))
        replace(source, target)

    monkeypatch.setattr(crdnd_io.os, "replace", limited)


@pytest.mark.parametrize(
    ("write", "error"), [*((write, errno.ENOSPC) for write in range(1, 11)), (4, errno.EDQUOT), (5, errno.EFBIG)]
)
def test_a_full_disk_ends_a_run_that_can_be_gone_on_with(write, error, tmp_path, monkeypatch):
    out = tmp_path / "run"
    with monkeypatch.context() as disk:
        full_from(write, disk, error)
        with pytest.raises(RunError, match="the disk is full; what was saved before is untouched") as caught:
            go(out)
    assert "\n" not in str(caught.value)
    assert str(out) in str(caught.value)
    assert not list(out.rglob(".*.tmp"))
    # run.json first, then two files for each step.
    found = load_checkpoint(out)
    assert (found[0].step if found else 0) == max(0, (write - 2) // 2)
    go(out)
    whole = tmp_path / "whole"
    go(whole)
    for name in ("model.safetensors", "last/model.safetensors"):
        assert (out / name).read_bytes() == (whole / name).read_bytes()


def test_a_full_disk_ends_a_command_with_one_line_and_exit_1(tmp_path, monkeypatch, capsys):
    command = ["train", "--objective", "natural", "--model", "cnn", "--set", "model.width=2", "--eps", "0.1"]
    full_from(4, monkeypatch)
    with pytest.raises(SystemExit) as ended:
        main([*command, "--epochs", "1", "--save-every-steps", "1", "--out", str(tmp_path / "run"), "--json"])
    shown, said = capsys.readouterr()
    assert ended.value.code == 1
    assert not shown
    assert re.fullmatch(r"error: .*: the disk is full; what was saved before is untouched\. .*", said.splitlines()[-1])


def limited_run(out: Path, told: Path) -> None:
    """A run whose process may write no file longer than a thousand bytes once it has saved step 3."""
    import resource

    torch.set_num_threads(1)

    def listen(progress: Progress) -> None:
        if progress.step == 3:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))

    model = create_model("cnn", input_shape=SHAPE, num_classes=CLASSES, width=2)
    common = {"objective": "natural", "threat": ThreatModel(eps=0.1), "epochs": 2, "batch_size": BATCH}
    try:
        train(model, splits(), out=out, listener=listen, save_every_steps=1, **common)
    except RunError as error:
        told.write_text(str(error))


@pytest.mark.skipif(sys.platform == "win32", reason="this system has no limits on what a process may write")
def test_a_file_that_the_system_cuts_short_is_not_taken_for_a_checkpoint(tmp_path):
    processes = multiprocessing.get_context("forkserver" if sys.platform == "linux" else "spawn")
    out, told = tmp_path / "run", tmp_path / "told"
    process = processes.Process(target=limited_run, args=(out, told))
    process.start()
    process.join()
    assert process.exitcode == 0
    assert "checkpoint-00000004.safetensors: the disk is full" in told.read_text()
    assert not list(out.rglob(".*.tmp"))
    assert load_checkpoint(out)[0].step == 3
    go(out)
    go(tmp_path / "whole")
    assert (out / "model.safetensors").read_bytes() == (tmp_path / "whole" / "model.safetensors").read_bytes()
