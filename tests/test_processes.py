"""Several processes do what one does, go on where another number of them stopped, and end together."""

import contextlib
import hashlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from crdnd import ImageData, InputError, Interrupted, RunError, Splits, ThreatModel, create_model, distill, train
from crdnd.cli import main
from crdnd.engine import Progress
from crdnd.engine import processes as engine_processes
from crdnd.engine.checkpoint import read_checkpoint
from crdnd.engine.levers import checkpointed
from crdnd.engine.processes import SharedRun, processes
from crdnd.models import parameter_count, state
from crdnd.objectives import load_objective, needs_second_teacher, needs_teacher, objective_names
from support import CLASSES, SHAPE, SIZES, TinyNet, images
from test_resume import PROCESSES

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="gloo's processes are forked here")

COUNT, BATCH, STEPS, STOP = 45, 6, 21, 10  # three epochs of seven steps, three images left over; 10 is in the second


class WithNorm(nn.Module):
    """A network with batch norm, which may be frozen."""

    def __init__(self, *, freeze: bool) -> None:
        super().__init__()
        self.freeze, self.first = freeze, TinyNet(seed=4)
        self.norm, self.last = nn.BatchNorm1d(CLASSES), nn.Linear(CLASSES, CLASSES, bias=False)
        with torch.no_grad():
            self.last.weight.copy_(2 * torch.eye(CLASSES) + 0.1)
        self.train()

    def train(self, mode: bool = True) -> "WithNorm":
        super().train(mode)
        self.norm.train(mode and not self.freeze)
        return self

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.norm(self.first(x)))


# Every method as it is, and what combines with any.
CASES: dict[str, dict[str, Any]] = {name: {"objective": name} for name in objective_names()} | {
    "running": {"objective": {"name": "crdnd", "accuracy": "running"}},
    "parts": {
        "objective": "crdnd",
        "optimizer": {"name": "adamw", "learning_rate": 0.01},
        "augmentation": "shift",
        "ema": 0.9,
        "clip_grad_norm": 0.5,
        "awp": {"gamma": 0.01, "warmup": 0.2},
        "igdm": 2.0,
        "attack": {"steps": 2, "restarts": 2},
    },
    "frozen_norm": {"objective": "rslad", "swa": 0.3},
    "norm": {"objective": "rslad"},
    "micro": {"objective": "rslad", "micro_batch": 2, "awp": {"gamma": 0.01, "warmup": 0.2}},
    "micro_relating": {"objective": "crd", "micro_batch": 2, "awp": {"gamma": 0.01, "warmup": 0.2}},
    "sharded": {"objective": "adaad", "shard_teacher": True},
    "sharded_again": {
        "objective": "adaad",
        "shard_teacher": True,
        "levers": {"checkpoint_teacher": True, "keep_teacher": 1},
    },
    "sharded_slope": {"objective": "saad", "shard_teacher": True},
}
FAST = [
    "crdnd",
    "running",
    "crd",
    "mtard",
    "parts",
    "frozen_norm",
    "norm",
    "micro",
    "micro_relating",
    "sharded",
    "sharded_again",
]
RESUMED = ["crdnd", "running", "crd", "parts", "norm"]


def go(name: str, out: Path, listener: Callable[[Progress], None] | None = None, **changes: Any) -> nn.Module:
    """Twenty-one steps in float64; the trained student."""
    torch.set_default_dtype(torch.float64)
    case = CASES[name]
    chosen = case["objective"] if isinstance(case["objective"], str) else case["objective"]["name"]
    objective = load_objective(chosen)(CLASSES, sizes=SIZES)

    def part(count: int, seed: int) -> ImageData:
        x, number = images(count, seed=seed), torch.arange(count)
        # The teacher is right about more than half, so that its accuracies count.
        return ImageData(x, torch.where(number % 3 > 0, TinyNet(seed=2)(x).argmax(1), number % CLASSES), CLASSES)

    student = WithNorm(freeze="frozen" in name) if "norm" in name else TinyNet(seed=1)
    values: dict[str, Any] = {"attack": {"steps": 3}} if objective.attack else {}
    values |= {"threat": ThreatModel(norm="linf", eps=0.1), "epochs": 3, "validate_every": 3, "batch_size": BATCH}
    values |= {"optimizer": {"learning_rate": 0.02}, "check_teacher": False, "out": out, "listener": listener}
    values |= case | changes
    data = Splits(part(COUNT, 1), part(7, 2))
    if needs_teacher(objective, objective.attack):
        second = {"second_teacher": TinyNet(seed=3)} if needs_second_teacher(objective) else {}
        distill(student, data, teacher=TinyNet(seed=2), **second, **values)
    else:
        train(student, data, **values)
    return student


def digest(student: nn.Module) -> str:
    values = [value.numpy().tobytes() for value in state(student).values()]
    return hashlib.sha256(b"".join(values)).hexdigest()


# Processes


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def _begin(work: Callable[..., None], rank: int, count: int, port: int, folder: Path, arguments: Any) -> None:
    os.environ |= {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    if count > 1:
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_PORT": port}
        os.environ |= {key: str(value) for key, value in place.items()} | {"MASTER_ADDR": "127.0.0.1"}
    torch.set_num_threads(1)
    try:
        work(folder, rank, *arguments)
    except (InputError, RunError, Interrupted) as error:
        (folder / f"said-{rank}").write_text(str(error))
        sys.exit({InputError: 2, RunError: 1}.get(type(error), getattr(error, "exit_code", 1)))
    finally:
        if torch.distributed.is_initialized() and sys.exc_info()[0] is None:
            torch.distributed.destroy_process_group()


def launch(
    count: int, work: Callable[..., None], folder: Path, *arguments: Any, silent: int | None = None
) -> list[int | None]:
    """The exit codes of so many processes that share a run; None for a silent one, which is killed in the end."""
    folder.mkdir(parents=True, exist_ok=True)
    port = free_port()
    started = [
        PROCESSES.Process(target=_begin, args=(work, rank, count, port, folder, arguments)) for rank in range(count)
    ]
    for process in started:
        process.start()
    for rank, process in enumerate(started):
        if rank != silent:
            process.join(120)
    late = [process for process in started if process.is_alive()]
    for process in late:
        process.kill()
        process.join()
    return [None if process in late else process.exitcode for process in started]


def train_all(folder: Path, rank: int, names: list[str]) -> None:
    for name in names:
        student = go(name, folder / name)
        (folder / f"{name}-{rank}.sha256").write_text(digest(student))


class StopError(Exception):
    """What ends a run in all processes at once."""


def stop_all(folder: Path, rank: int, names: list[str]) -> None:
    def listen(progress: Progress) -> None:
        if progress.step == STOP:
            raise StopError

    for name in names:
        with contextlib.suppress(StopError):
            go(name, folder / name, listen, save_every_steps=STOP)


Trained = dict[int, Path]


def _trained(root: Path, names: list[str]) -> Trained:
    for count in (1, 2):
        assert launch(count, train_all, root / str(count), names) == [0] * count
    return {count: root / str(count) for count in (1, 2)}


@pytest.fixture(scope="module")
def some(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return _trained(tmp_path_factory.mktemp("some"), FAST)


@pytest.fixture(scope="module")
def others(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return _trained(tmp_path_factory.mktemp("others"), [name for name in CASES if name not in FAST])


def history(out: Path) -> list[dict[str, Any]]:
    return json.loads((out / "checkpoint.json").read_text())["history"]


def same(one: Path, two: Path) -> None:
    """The same weights and losses within 1e-8 of their size, and the same validations."""
    expected, found = (load_file(out / "last" / "model.safetensors") for out in (one, two))
    for key, value in expected.items():
        assert (found[key] - value).abs().max() <= 1e-8 * value.abs().max(), key
    for before, after in zip(history(one), history(two), strict=True):
        assert after["loss"] == pytest.approx(before["loss"], rel=1e-8)
        assert after["terms"] == pytest.approx(before["terms"], rel=1e-8)
        assert after["validation"] == before["validation"]
        assert after["student_passes"] == before["student_passes"]


def equal(trained: Trained, name: str) -> None:
    same(trained[1] / name, trained[2] / name)
    assert read_checkpoint(trained[2] / name).step == STEPS


@pytest.mark.parametrize("name", [name for name in FAST if name != "norm"])
def test_two_processes_equal_one_process_on_the_joined_batch(name, some):
    equal(some, name)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in CASES if name not in FAST])
def test_two_processes_of_any_method_equal_one_process_on_the_joined_batch(name, others):
    equal(others, name)


@pytest.mark.parametrize("name", FAST)
def test_between_steps_every_process_has_the_same_student(name, some):
    first, second = ((some[2] / f"{name}-{rank}.sha256").read_text() for rank in (0, 1))
    assert first == second


def test_batch_norm_normalises_by_the_share_of_its_process(some):
    one, two = (load_file(some[count] / "norm" / "last" / "model.safetensors") for count in (1, 2))
    change = (one["norm.running_mean"] - two["norm.running_mean"]).abs().max()
    assert 1e-6 < change < 1


# Another number of processes


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2), (2, 2)])
def test_a_run_goes_on_with_another_number_of_processes_in_the_middle_of_an_epoch(before, after, some, tmp_path):
    names = [name for name in RESUMED if name != "norm" or before == after]
    assert launch(before, stop_all, tmp_path, names) == [0] * before
    assert {read_checkpoint(tmp_path / name).step for name in names} == {STOP}
    assert launch(after, train_all, tmp_path, names) == [0] * after
    for name in names:
        same(some[after] / name, tmp_path / name)
        if before == after:
            assert (tmp_path / f"{name}-0.sha256").read_text() == (some[2] / f"{name}-0.sha256").read_text()


# One process that ends, or falls silent, or is told to stop


def one_dies(folder: Path, rank: int, number: signal.Signals, victim: int) -> None:
    """Process `victim` gets a signal after the fifth step."""
    if number == signal.SIGSTOP:
        engine_processes.PATIENCE = timedelta(seconds=8)

    def listen(progress: Progress) -> None:
        if rank == victim and progress.step == 5:
            os.kill(os.getpid(), number)

    go("crdnd", folder / "crdnd", listen, save_every_steps=3)


def said(folder: Path, rank: int) -> str:
    return (folder / f"said-{rank}").read_text()


@pytest.mark.parametrize("victim", [0, 1])
def test_when_one_process_dies_the_other_ends_and_the_run_goes_on(victim, some, tmp_path):
    begin = time.monotonic()
    codes = launch(2, one_dies, tmp_path, signal.SIGKILL, victim)
    assert codes[victim] == -signal.SIGKILL
    assert codes[1 - victim] == 1
    assert time.monotonic() - begin < 60
    assert said(tmp_path, 1 - victim).startswith("another process of this run has ended or does not answer (")
    assert "the same command goes on from there" in said(tmp_path, 1 - victim)
    assert read_checkpoint(tmp_path / "crdnd").step == 3
    assert launch(2, train_all, tmp_path, ["crdnd"]) == [0, 0]
    assert (tmp_path / "crdnd-0.sha256").read_text() == (some[2] / "crdnd-0.sha256").read_text()


@pytest.mark.slow
def test_a_process_that_falls_silent_is_given_up_after_a_while(tmp_path):
    codes = launch(2, one_dies, tmp_path, signal.SIGSTOP, 1, silent=1)
    assert codes == [1, None]
    assert "does not answer" in said(tmp_path, 0)


@pytest.mark.parametrize(("number", "code", "victim"), [(signal.SIGTERM, 143, 1), (signal.SIGINT, 130, 0)])
def test_a_signal_to_one_process_saves_and_ends_all(number, code, victim, tmp_path):
    assert launch(2, one_dies, tmp_path, number, victim) == [code, code]
    assert read_checkpoint(tmp_path / "crdnd").step == 6
    for rank in (0, 1):
        assert said(tmp_path, rank).startswith(f"stopped at step 6 of {STEPS}; everything is saved in ")


# Teachers in parts


def compare_teachers(folder: Path, rank: int) -> None:
    """Outputs, input gradients and the share of the weights that is here, for layers on their own and together."""
    processes()
    teacher, x = create_model("cnn", input_shape=SHAPE, num_classes=CLASSES, width=4, seed=1).eval(), images().float()
    for size in (1, 100, 10**9):
        engine_processes.LARGE_LAYER = size
        network = engine_processes.sharded(teacher, torch.device("cpu"))
        here = sum(parameter.to_local().numel() for parameter in network.parameters())
        assert 0.4 < here / parameter_count(teacher) < 0.6
        answers = []
        for one, again in ((teacher, False), (network, False), (network, False), (network, True), (network, True)):
            z = x.clone().requires_grad_(True)
            with checkpointed(one) if again else contextlib.nullcontext():
                logits = one(z)
                answers.append((logits, torch.autograd.grad(logits.square().sum(), z)[0]))
        for logits, gradient in answers[1:]:
            torch.testing.assert_close(logits, answers[0][0])
            torch.testing.assert_close(gradient, answers[0][1])
        with torch.no_grad():
            torch.testing.assert_close(network(x), answers[0][0])
        assert all(parameter.requires_grad for parameter in teacher.parameters()), "it is left alone"


def test_a_teacher_in_parts_says_what_it_says_as_a_whole(tmp_path):
    assert launch(2, compare_teachers, tmp_path) == [0, 0]


def test_joined_batch_norm_is_refused_where_torch_does_not_have_it(tmp_path):
    with pytest.raises(InputError, match="sync_batch_norm: torch has it for GPUs only"):
        distill(
            WithNorm(freeze=False).double(),
            Splits(*(ImageData(images(count), torch.arange(count) % CLASSES, CLASSES) for count in (12, 7))),
            teacher=TinyNet(seed=2),
            objective="rslad",
            threat=ThreatModel(norm="linf", eps=0.1),
            sync_batch_norm=True,
            batch_size=BATCH,
            out=tmp_path / "run",
        )
    assert not (tmp_path / "run").exists()


# What several processes refuse


def starved(folder: Path, rank: int) -> None:
    """Process 1 has no memory for its share of a batch while the student learns, but for the whole of its data."""

    plain = TinyNet.forward

    def forward(self: TinyNet, x: torch.Tensor) -> torch.Tensor:
        if rank == 1 and self.training and len(x) == 4:
            raise torch.OutOfMemoryError("out of memory: Tried to allocate 2 GiB")
        return plain(self, x)

    TinyNet.forward = forward
    go("crdnd", folder / "crdnd", batch_size=8)


def test_a_process_without_enough_memory_names_the_batch_that_may_fit_and_ends_all(tmp_path):
    assert launch(2, starved, tmp_path) == [1, 1]
    assert re.match(r"out of memory with 4 images .*micro_batch=2, or batch_size=4, .*--fresh", said(tmp_path, 1))
    assert said(tmp_path, 0).startswith("another process of this run has ended")


def test_several_processes_do_not_go_back(tmp_path):
    assert launch(2, told, tmp_path, {"on_nan": "retry"}) == [2, 2]
    assert said(tmp_path, 0).startswith("on_nan: several processes")
    assert not (tmp_path / "crdnd").exists()


# What only the main process does


def told(folder: Path, rank: int, changes: dict[str, Any]) -> None:
    go("crdnd", folder / "crdnd", **changes)


def test_a_mistake_is_said_by_every_process(tmp_path):
    assert launch(2, told, tmp_path, {"batch_size": 7}) == [2, 2]
    for rank in (0, 1):
        assert said(tmp_path, rank) == "batch_size: 7 cannot be shared equally by 2 processes."


def test_a_run_starts_over_in_all_processes_and_its_log_has_every_line_once(some, tmp_path):
    for _ in range(2):
        assert launch(2, told, tmp_path, {"fresh": True}) == [0, 0]
    assert len(list(tmp_path.glob("crdnd.old-*"))) == 1
    log = (tmp_path / "crdnd" / "run.log").read_text()
    assert log.count("epoch 1/3: loss") == 1
    same(some[2] / "crdnd", tmp_path / "crdnd")


def test_one_process_has_nothing_to_tell():
    alone = SharedRun(processes())
    values = [images(), torch.arange(3)]
    assert alone.agree(143, main=True) == (143, True)
    assert alone.agree() == (None, False)
    for found, value in zip(alone.sums(values), values, strict=True):
        assert torch.equal(found, value)
        assert found is not value


# The command


COMMAND = ["-m", "crdnd", "train", "--objective", "pgd_at", "--model", "cnn", "--eps", "0.1", "--epochs", "2", "--json"]
COMMAND += ["--set", "model.width=2", "--set", "attack.steps=1", "--set", "validate_every=2", "--save-every-steps", "2"]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the launcher's children are found in /proc")
def test_a_command_of_two_processes_whose_one_is_killed_says_so_and_goes_on(tmp_path):
    out = tmp_path / "run"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    options: dict[str, Any] = {"env": environment, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen([*launcher, *COMMAND, "--out", str(out)], **options) as first:
        while first.poll() is None and read_checkpoint(out) is None:
            time.sleep(0.01)
        children = Path(f"/proc/{first.pid}/task/{first.pid}/children").read_text().split()
        os.kill(int(children[-1]), signal.SIGKILL)
        _, complaint = first.communicate(timeout=120)
    assert first.returncode == 1
    assert "error: another process of this run has ended or does not answer" in complaint
    assert not read_checkpoint(out).finished
    done = subprocess.run([*launcher, *COMMAND, "--out", str(out)], **options, check=False)
    assert done.returncode == 0, done.stderr
    assert "going on from step" in done.stderr
    assert json.loads(done.stdout)["epochs"] == 2


@pytest.mark.parametrize(("arguments", "parted"), [(["--version"], [True]), (["no-command"], [])])
def test_a_command_that_is_done_leaves_the_other_processes_and_one_that_failed_does_not_wait(
    arguments, parted, monkeypatch
):
    found: list[bool] = []
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "destroy_process_group", lambda: found.append(True))
    with pytest.raises(SystemExit):
        main(arguments)
    assert found == parted
