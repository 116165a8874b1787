"""A run that is killed, stopped or broken off ends in the same weights as one that was left alone."""

import hashlib
import json
import multiprocessing
import os
import signal
import stat
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from crdnd import ImageData, Interrupted, Run, Splits, ThreatModel, create_model, distill
from crdnd.cli import main
from crdnd.engine import Progress, loop
from crdnd.engine.checkpoint import Checkpoint, read_checkpoint, save_checkpoint
from crdnd.random import Stream
from support import CLASSES, SHAPE, TinyNet, images

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="this system cannot kill a process as SIGKILL does")

# A fork server has torch loaded already, so that dozens of killed processes cost little.
PROCESSES = multiprocessing.get_context("forkserver" if sys.platform == "linux" else "spawn")
if sys.platform == "linux":
    PROCESSES.set_forkserver_preload(["crdnd.recipe", "crdnd.evaluation", "torch._dynamo"])

torch.set_num_threads(1)  # networks this small wait for their threads more than they compute

COUNT, BATCH, STEPS = 13, 4, 9  # three steps an epoch


def student(method: str) -> nn.Module:
    if method == "ard":
        return create_model("cnn", input_shape=SHAPE, num_classes=CLASSES, width=2, seed=1)
    return nn.Sequential(TinyNet(dtype=torch.float32, seed=1), nn.Dropout(0.3), nn.Linear(CLASSES, CLASSES, bias=False))


# Batch norm, momentum, augmentation and the parts that combine with any method in one; dropout, averaged weights, two
# moments, a second validation rhythm and the state and sums of a method in the other.
OWN: dict[str, dict[str, Any]] = {
    "ard": {
        "objective": {"name": "ard", "tau": 1},
        "augmentation": "shift",
        "save_every_steps": 2,
        "optimizer": {"learning_rate": 0.2},
        "attack": {"steps": 2, "restarts": 2, "eps_warmup": 0.4},
        "swa": 0.3,
        "awp": {"gamma": 0.01, "warmup": 0.2},
        "repair": True,
    },
    "crdnd": {
        "objective": "crdnd",
        "optimizer": {"name": "adamw", "learning_rate": 0.01},
        "schedule": {"warmup": 0.3},
        "ema": 0.8,
        "igdm": 2.0,
        "clip_grad_norm": 0.5,
        "validate_every": 2,
        "save_every_steps": 2,
    },
}


def go(method: str, out: Path, listener: Any = None, **changes: Any) -> Run:
    """The run that all tests here break off: mid-epoch saves, three epochs."""

    def part(count: int, seed: int) -> ImageData:
        x = images(count, seed=seed, dtype=torch.float32)
        return ImageData(x, torch.arange(count) % CLASSES, CLASSES)

    torch.manual_seed(0)
    network = student(method)
    teacher = create_model("cnn", input_shape=SHAPE, num_classes=CLASSES, width=3, seed=2)
    common = {"threat": ThreatModel(norm="linf", eps=0.1), "attack": {"steps": 2}, "epochs": 3, "batch_size": BATCH}
    splits = Splits(part(COUNT, 1), part(7, 2))
    return distill(network, splits, teacher=teacher, out=out, listener=listener, **common | OWN[method] | changes)


def outcome(out: Path) -> dict[str, Any]:
    """What must be the same: both models, bit for bit, and the history but for its seconds."""
    history = json.loads((out / "checkpoint.json").read_text())["history"]
    return {
        "model": hashlib.sha256((out / "model.safetensors").read_bytes()).hexdigest(),
        "last": hashlib.sha256((out / "last" / "model.safetensors").read_bytes()).hexdigest(),
        "history": [{key: value for key, value in epoch.items() if "seconds" not in key} for epoch in history],
    }


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def die_at_step(method: str, out: Path, step: int) -> None:
    """Run until a step is done and, where due, saved; the listener is called after that."""

    def listen(progress: Progress) -> None:
        if progress.step == step:
            die()

    go(method, out, listen)


def die_at_write(method: str, out: Path, number: int) -> None:
    """Run until the given fsync or rename is about to happen; what was to be synced is torn in half first."""
    replace, seen = os.replace, 0

    def about_to() -> bool:
        nonlocal seen
        seen += 1
        return seen == number

    def torn_fsync(handle: int) -> None:
        if about_to():
            if stat.S_ISREG(os.fstat(handle).st_mode):
                os.ftruncate(handle, os.fstat(handle).st_size // 2)
            die()  # what is not torn needs no syncing: the process dies here, not the machine

    def torn_replace(source: Path, target: Path) -> None:
        if about_to():
            die()
        replace(source, target)

    os.fsync, os.replace = torn_fsync, torn_replace
    go(method, out)
    (out / "writes").write_text(str(seen))


def _alone(work: Any, arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    work(*arguments)


def in_a_process(work: Any, *arguments: Any) -> int | None:
    process = PROCESSES.Process(target=_alone, args=(work, arguments))
    process.start()
    process.join()
    return process.exitcode


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What the runs end in when nothing happens to them, and how many writes that takes."""
    found = {}
    for method in OWN:
        out = tmp_path_factory.mktemp("alone") / method
        assert in_a_process(die_at_write, method, out, -1) == 0
        found[method] = outcome(out) | {"writes": int((out / "writes").read_text())}
    return found


def same(out: Path, expected: dict[str, Any]) -> bool:
    return outcome(out) == {key: value for key, value in expected.items() if key != "writes"}


@pytest.mark.parametrize("method", OWN)
def test_a_run_gives_the_same_bits_twice(method, alone, tmp_path):
    go(method, tmp_path / "run")
    assert same(tmp_path / "run", alone[method])
    assert len(outcome(tmp_path / "run")["history"]) == 3


@pytest.mark.slow
@pytest.mark.parametrize("method", OWN)
def test_killed_after_any_step_a_run_goes_on_to_the_same_bits(method, alone, tmp_path):
    for step in range(1, STEPS):
        out = tmp_path / str(step)
        assert in_a_process(die_at_step, method, out, step) == -signal.SIGKILL
        saved = read_checkpoint(out)
        assert (saved.step if saved else 0) == step // 2 * 2
        steps: list[int] = []
        go(method, out, lambda progress, steps=steps: steps.append(progress.step))
        assert steps == list(range(step // 2 * 2 + 1, STEPS + 1))
        assert same(out, alone[method]), f"killed after step {step}"


@pytest.mark.slow
def test_killed_inside_any_write_a_run_goes_on_to_the_same_bits(alone, tmp_path):
    writes = alone["crdnd"]["writes"]
    assert writes >= 3 + 5 * 6 + 4 * 3  # run.json, five checkpoints of two files, two models of two files
    # Those of run.json and the first two checkpoints, and those of the last one and the models; between are more such.
    for number in (*range(1, 16), *range(writes - 17, writes + 1)):
        out = tmp_path / str(number)
        assert in_a_process(die_at_write, "crdnd", out, number) == -signal.SIGKILL
        go("crdnd", out)
        assert same(out, alone["crdnd"]), f"killed at write {number}"


@pytest.mark.slow
@pytest.mark.parametrize("method", OWN)
def test_killed_again_and_again_a_run_still_ends_in_the_same_bits(method, alone, tmp_path):
    out, kills = tmp_path / "run", 0
    # Far enough for two checkpoints or for both models, and then in the middle of what comes next.
    while in_a_process(die_at_write, method, out, 14) == -signal.SIGKILL:
        kills += 1
        assert kills < 20
    assert kills >= 3
    assert same(out, alone[method])


def go_when_told(method: str, out: Path, began: Any) -> None:
    began.set()
    go(method, out, save_every_steps=1)


def test_killed_at_random_moments_a_run_goes_on_to_the_same_bits(alone, tmp_path):
    """Five of the hundred kills of `benchmarks/kills.py`."""

    def started(out: Path) -> tuple[Any, float]:
        began = PROCESSES.Event()
        process = PROCESSES.Process(target=_alone, args=(go_when_told, ("crdnd", out, began)))
        process.start()
        began.wait()
        return process, time.monotonic()

    process, begin = started(tmp_path / "whole")
    process.join()
    length, kills = time.monotonic() - begin, 0
    for number, part in enumerate(Stream.of("kills", ids=torch.arange(20)).uniform((1,)).flatten().tolist()):
        out = tmp_path / str(number)
        process, begin = started(out)
        process.join(part * length)
        process.kill()
        process.join()
        kills += process.exitcode == -signal.SIGKILL
        go("crdnd", out)
        assert same(out, alone["crdnd"]), f"killed after {part:.3f} of the run"
        if kills == 5:
            break
    assert kills == 5


def test_nothing_of_a_torn_write_is_left_when_the_run_is_done(alone, tmp_path):
    out = tmp_path / "run"
    assert in_a_process(die_at_write, "ard", out, 10) == -signal.SIGKILL
    assert list(out.glob(".*.tmp"))
    go("ard", out)
    assert not list(out.glob("**/.*.tmp"))
    assert len(list(out.glob("checkpoint-*"))) == 1


def test_a_run_removes_torn_writes_of_its_own_only(tmp_path):
    inner = tmp_path / "run" / "student"
    inner.mkdir(parents=True)
    others = inner / ".checkpoint-00000002.safetensors.123.tmp"
    others.write_text("another run is writing this")
    go("ard", tmp_path / "run")
    assert others.exists()


class StopError(Exception):
    """What a listener may raise."""


def stop_at(step: int) -> Any:
    def listen(progress: Progress) -> None:
        if progress.step == step:
            raise StopError

    return listen


def test_by_default_saving_takes_a_hundredth_of_the_time_at_most(tmp_path, monkeypatch):
    now, saved = [0.0], list[int]()

    def save(folder: Path, checkpoint: Checkpoint, tensors: Any) -> None:
        save_checkpoint(folder, checkpoint, tensors)
        saved.append(checkpoint.step)
        now[0] += 1

    def listen(_: Progress) -> None:
        now[0] += 30

    monkeypatch.setattr(loop, "time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr(loop, "save_checkpoint", save)
    go("ard", tmp_path / "run", listen, save_every_steps=None, epochs=6)
    assert saved == [3, 9, 15, 18]  # an epoch is 90 s, and 100 s are to lie between two saves


def test_an_error_of_a_listener_ends_a_run_that_can_be_gone_on_with(alone, tmp_path):
    with pytest.raises(StopError):
        go("crdnd", tmp_path / "run", stop_at(5))
    go("crdnd", tmp_path / "run")
    assert same(tmp_path / "run", alone["crdnd"])


def test_a_run_keeps_the_number_of_threads_that_it_began_with(tmp_path):
    before, seen = torch.get_num_threads(), []

    def listen(_: Progress) -> None:
        seen.append(torch.get_num_threads())

    try:
        torch.set_num_threads(3)
        with pytest.raises(StopError):
            go("ard", tmp_path / "run", stop_at(5))
        torch.set_num_threads(1)
        go("ard", tmp_path / "run", listen)
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)
    assert set(seen) == {3}


def test_how_often_a_run_saves_may_change_between_its_parts(alone, tmp_path):
    with pytest.raises(StopError):
        go("ard", tmp_path / "run", stop_at(5), save_every_steps=5)
    go("ard", tmp_path / "run", save_every_steps=1)
    assert same(tmp_path / "run", alone["ard"])


def test_a_refused_change_does_not_spoil_a_run_that_is_under_way(alone, tmp_path):
    with pytest.raises(StopError):
        go("ard", tmp_path / "run", stop_at(5))
    with pytest.raises(ValueError, match="epochs: 3 -> 4"):
        go("ard", tmp_path / "run", epochs=4)
    go("ard", tmp_path / "run")
    assert same(tmp_path / "run", alone["ard"])


# Signals


def signal_at(step: int, number: signal.Signals) -> Any:
    def listen(progress: Progress) -> None:
        if progress.step == step:
            os.kill(os.getpid(), number)

    return listen


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_a_run_after_its_step_is_saved(number, code, alone, tmp_path):
    out = tmp_path / "run"
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with pytest.raises(Interrupted, match=r"stopped at step 5 of 9; everything is saved in .*The same command") as stop:
        go("crdnd", out, signal_at(4, number))
    assert stop.value.exit_code == code
    assert str(out) in str(stop.value)
    assert read_checkpoint(out).step == 5  # which is not one of those that are saved anyway
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
    go("crdnd", out)
    assert same(out, alone["crdnd"])


def test_a_signal_during_the_last_step_lets_the_run_finish_and_nothing_begin_after_it(alone, tmp_path):
    with pytest.raises(Interrupted, match=r"^stopped; the run in .* is finished\.$") as stop:
        go("ard", tmp_path / "run", signal_at(STEPS - 1, signal.SIGINT))
    assert stop.value.exit_code == 130
    assert same(tmp_path / "run", alone["ard"])
    assert go("ard", tmp_path / "run").reused


class LateRequest:
    """A signal that comes just after somebody looked for the given number of times."""

    def __init__(self, looks: int) -> None:
        self.looks = looks

    @property
    def exit_code(self) -> int | None:
        self.looks -= 1
        return None if self.looks >= 0 else 130


def test_a_run_that_says_that_it_saved_has_saved_whenever_the_signal_came(tmp_path, monkeypatch):
    for looks in range(8):
        out = tmp_path / str(looks)
        monkeypatch.setattr(loop, "stop_requests", lambda looks=looks: nullcontext(LateRequest(looks)))
        with pytest.raises(Interrupted, match=r"stopped at step \d of 9; everything is saved") as stop:
            go("ard", out)
        saved = read_checkpoint(out)
        assert saved is not None, looks
        assert f"stopped at step {saved.step} of 9" in str(stop.value), looks


def test_a_second_signal_acts_at_once(alone, tmp_path):
    def twice(progress: Progress) -> None:
        if progress.step == 5:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)

    # A shell starts its background jobs deaf to SIGINT, and the tests may be one.
    usual = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            go("ard", tmp_path / "run", twice)
    finally:
        signal.signal(signal.SIGINT, usual)
    go("ard", tmp_path / "run")
    assert same(tmp_path / "run", alone["ard"])


def test_a_run_ends_when_it_is_stopped_whatever_catches_exceptions(tmp_path):
    assert not issubclass(Interrupted, Exception)


# The command


COMMAND = ["train", "--objective", "pgd_at", "--model", "cnn", "--eps", "0.1", "--epochs", "30", "--json"]
COMMAND += ["--set", "model.width=2", "--set", "attack.steps=1", "--set", "validate_every=6", "--save-every-steps", "3"]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stopped_command_says_how_to_go_on(number, code, tmp_path, monkeypatch, capsys):
    out, replace = tmp_path / "run", os.replace

    def stopping(source: Path, target: Path) -> None:
        replace(source, target)
        if target.name == "checkpoint.json":
            os.kill(os.getpid(), number)

    with monkeypatch.context() as during:
        during.setattr(os, "replace", stopping)
        with pytest.raises(SystemExit) as ended:
            main([*COMMAND, "--out", str(out)])
    shown, said = capsys.readouterr()
    assert ended.value.code == code
    assert not shown
    way_on = "The same command, without --fresh, goes on from there."
    assert said.splitlines()[-1] == f"stopped at step 3 of 240; everything is saved in {out}. {way_on}"


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A command that was killed, given again and stopped by Ctrl-C."""
    out, ends = tmp_path_factory.mktemp("command") / "run", {}
    for number in (signal.SIGKILL, signal.SIGINT):
        saved = read_checkpoint(out)
        process = subprocess.Popen(
            [sys.executable, "-m", "crdnd", *COMMAND, "--out", str(out)],
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        while process.poll() is None and read_checkpoint(out) == saved:
            time.sleep(0.005)
        process.send_signal(number)
        process.communicate()
        ends[number] = process.returncode
    return {"out": out, "ends": ends}


@pytest.mark.slow
def test_a_killed_and_stopped_command_given_again_ends_in_the_same_weights(stopped, tmp_path, capsys):
    assert stopped["ends"] == {signal.SIGKILL: -signal.SIGKILL, signal.SIGINT: 130}
    for out in (stopped["out"], tmp_path / "alone"):
        with pytest.raises(SystemExit) as ended:
            main([*COMMAND, "--out", str(out)])
        assert ended.value.code == 0
        shown, said = capsys.readouterr()
        assert not json.loads(shown)["reused"]
        assert ("going on from step" in said) == (out == stopped["out"])
    assert outcome(stopped["out"]) == outcome(tmp_path / "alone")
