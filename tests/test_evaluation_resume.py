"""An evaluation that is interrupted, killed or shared by processes ends in the document of one left alone."""

import dataclasses
import functools
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from crdnd import ImageData, InputError, Interrupted, Results, ThreatModel, evaluate
from crdnd.attacks import UNTOLD, Attack, Round, TableAttack, load_attack
from crdnd.attacks.square import Square
from crdnd.evaluation import Step, choose_attacks, load_adversarial
from crdnd.evaluation import run as evaluation
from crdnd.losses import cross_entropy, margin
from crdnd.models import weights_sha256
from support import CLASSES, TinyNet, images

torch.set_num_threads(1)  # networks this small wait for their threads more than they compute

WEAK = ThreatModel(norm="linf", eps=0.02)
COUNT, BATCH = 23, 8


def network() -> TinyNet:
    return TinyNet(seed=2)


def sample(count: int = COUNT) -> ImageData:
    x = images(count)
    with torch.no_grad():
        y = network()(x).argmax(1)
    y[::6] = (y[::6] + 1) % CLASSES
    return ImageData(x, y, CLASSES, name="dots")


def autoattack() -> Attack:
    settings = {
        "apgd_ce": {"iterations": 4},
        "apgd_t": {"iterations": 3, "targets": 2},
        "fab_t": {"iterations": 3, "targets": 1},
        "square": {"queries": 6},
    }
    parts = tuple(choose_attacks({name: values})[name] for name, values in settings.items())
    return dataclasses.replace(load_attack("autoattack"), parts=parts)


def go(model: nn.Module | None = None, **changes: Any) -> Results:
    """The evaluation that all tests here break off: attacks on all and on survivors, parts, restarts, a sweep."""
    values: dict[str, Any] = {
        "threat": WEAK,
        "attacks": {"pgd_sat": {"steps": 3, "restarts": 2}, "autoattack": autoattack(), "cw_inf": {"steps": 2}},
        "eps_sweep": (0.01, 0.03),
        "batch_size": BATCH,
        "per_class": True,
    }
    return evaluate(network() if model is None else model, sample(), **values | changes)


class StopError(Exception):
    """What breaks an evaluation off."""


def stopping(after: int, steps: list[Step] | None = None) -> Callable[[Step], None]:
    """A listener that lets so many batches pass, the last of which is kept."""
    left = iter(range(after, 0, -1))

    def listen(step: Step) -> None:
        if steps is not None:
            steps.append(step)
        if next(left) == 1:
            raise StopError

    return listen


@pytest.fixture(scope="module")
def alone() -> Results:
    return go()


@pytest.fixture(scope="module")
def batches() -> int:
    steps: list[Step] = []
    go(listener=steps.append)
    return len(steps)


@pytest.mark.parametrize("size", [5, 64])
@pytest.mark.parametrize("kept", [True, False], ids=["work folder", "memory"])
def test_the_document_is_the_same_whatever_the_batch_and_the_folder(kept, size, alone, tmp_path):
    for _ in range(2):  # the second time all of it is there already
        assert go(batch_size=size, work=tmp_path / "work" if kept else None) == alone


def test_the_document_shows_something(alone, batches):
    (row,) = alone.rows
    assert 0 < row.worst_case.correct < row.clean.correct
    assert 0 < row.sweep[-1].worst_case.correct < row.sweep[0].worst_case.correct
    assert all("0" in row.verdicts[name] for name in row.attacks)
    assert batches > 30


class OwnConv(nn.Conv2d):
    """Any convolution but torch's own."""


class Counting(nn.Module):
    """Counts the images it sees."""

    def __init__(self) -> None:
        super().__init__()
        self.network, self.seen = network(), 0
        self.network.conv.__class__ = OwnConv  # looked at by no probe, so that every pass belongs to a batch

    def forward(self, x: Tensor) -> Tensor:
        self.seen += len(x)
        return self.network(x)


def test_interrupted_after_any_batch_it_goes_on_with_the_next_to_the_same_document(alone, batches, tmp_path):
    everything: list[Step] = []
    go(listener=everything.append)
    for kill in range(1, batches + 1):
        before, after, work = list[Step](), list[Step](), tmp_path / str(kill)
        with pytest.raises(StopError):
            go(listener=stopping(kill, before), work=work)
        assert go(listener=after.append, work=work) == alone, f"interrupted after batch {kill}"
        assert before + after == everything, f"interrupted after batch {kill}"


def test_interrupted_again_and_again_it_still_ends_in_the_same_document(alone, batches, tmp_path):
    steps: list[Step] = []
    for number in range(batches):
        with pytest.raises(StopError):
            go(listener=stopping(1, steps), work=tmp_path)
        assert len(steps) == number + 1
    assert go(listener=steps.append, work=tmp_path) == alone
    assert len(steps) == batches
    assert len(list(tmp_path.rglob("*.chunk.safetensors"))) == batches


def test_what_is_done_is_not_computed_again(tmp_path):
    def cost(**changes: Any) -> int:
        model = Counting()
        go(model, work=tmp_path / "work", **changes)
        return model.seen

    whole, model = Counting(), Counting()
    after: list[int] = []
    go(whole, listener=lambda step: after.append(whole.seen))
    with pytest.raises(StopError):
        go(model, listener=stopping(12), work=tmp_path / "work")
    rest, idle = cost(), cost()  # the second time, only the looks at the model and the checks are left
    assert rest - idle == after[-1] - after[11]


def test_another_batch_size_may_finish_it(alone, tmp_path):
    with pytest.raises(StopError):
        go(listener=stopping(9), work=tmp_path)
    assert go(batch_size=5, work=tmp_path) == alone


def test_another_row_of_the_same_model_shares_the_verdicts_and_another_protocol_does_not(tmp_path):
    steps: list[Step] = []
    go(work=tmp_path)
    go(work=tmp_path, per_class=False, listener=steps.append)
    assert not steps
    for changes in ({"seed": 1}, {"eps_sweep": ()}, {"threat": ThreatModel(eps=0.01)}, {"attacks": ["fgsm"]}):
        go(work=tmp_path, listener=steps.append, **changes)
        assert steps[0].column == "clean", changes
        steps.clear()
    go(TinyNet(seed=3), work=tmp_path, listener=steps.append)
    assert steps[0].column == "clean"


def test_a_request_to_stop_ends_it_after_the_batch_and_says_where_to_go_on(alone, tmp_path):
    for number, code in ((signal.SIGINT, 130), (signal.SIGTERM, 143)):
        steps: list[Step] = []

        def listen(step: Step, steps: list[Step] = steps, number: int = number) -> None:
            steps.append(step)
            if len(steps) == 5:
                os.kill(os.getpid(), number)

        work = tmp_path / str(code)
        with pytest.raises(Interrupted, match=rf"everything found is saved in {re.escape(str(work))}") as caught:
            go(work=work, listener=listen)
        assert caught.value.exit_code == code
        assert len(steps) == 5
        assert len(list(work.rglob("*.chunk.safetensors"))) == 5
        assert go(work=work) == alone


DAMAGE: dict[str, Callable[[Path], Any]] = {
    "cut short": lambda file: file.write_bytes(file.read_bytes()[:-3]),
    "cut in the head": lambda file: file.write_bytes(file.read_bytes()[:20]),
    "empty": lambda file: file.write_bytes(b""),
    "nonsense": lambda file: file.write_bytes(b"nonsense" * 40),
}


class Impatient(nn.Module):
    """Ends its own process's patience in the middle of a search."""

    def __init__(self, number: int, passes: int) -> None:
        super().__init__()
        self.network, self.number, self.passes = network(), number, passes

    def forward(self, x: Tensor) -> Tensor:
        self.passes -= 1
        if self.passes == 0:
            os.kill(os.getpid(), self.number)
        return self.network(x)


def test_a_request_to_stop_does_not_wait_for_a_search_to_end(tmp_path):
    for number, code in ((signal.SIGINT, 130), (signal.SIGTERM, 143)):
        model, work = Impatient(number, 150), tmp_path / str(code)
        handler = signal.getsignal(number)
        with pytest.raises(Interrupted) as caught:
            go(model, work=work, attacks={"square": {"queries": 400}}, eps_sweep=())
        assert caught.value.exit_code == code
        assert model.passes == 0
        assert signal.getsignal(number) is handler
        assert all(parameter.requires_grad for parameter in model.parameters())
        assert "forward" not in vars(model.network.conv)


# A search in blocks


def in_blocks(**changes: Any) -> Results:
    return go(attacks={"square": {"queries": 150}}, eps_sweep=(0.03,), **changes)


@pytest.fixture
def short_blocks(monkeypatch):
    monkeypatch.setattr(sys.modules["crdnd.attacks.square"], "BLOCK", 64)


def lefts(folder: Path) -> list[Path]:
    return list(folder.rglob("*.left.safetensors"))


@pytest.mark.usefixtures("short_blocks")
@pytest.mark.parametrize("size", [5, BATCH, 64])
def test_a_search_in_blocks_is_interrupted_after_any_of_them_and_loses_no_query(size, monkeypatch, tmp_path):
    everything: list[Step] = []
    whole = in_blocks(listener=everything.append)
    assert max(step.rounds for step in everything) == 3
    with monkeypatch.context() as patch:
        patch.setattr(sys.modules["crdnd.attacks.square"], "BLOCK", 512)
        assert in_blocks() == whole
    begins = Square._search

    def from_the_natural_images(self: Square, stop: int, *task: Any) -> Tensor:
        assert stop == 64, "a later block began anew"
        return begins(self, stop, *task)

    monkeypatch.setattr(Square, "_search", from_the_natural_images)
    kept = 0
    for kill in range(1, len(everything) + 1):
        work = tmp_path / str(kill)
        with pytest.raises(StopError):
            in_blocks(listener=stopping(kill), work=work)
        kept = max(kept, len(lefts(work)))
        assert in_blocks(work=work, batch_size=size) == whole, f"interrupted after batch {kill}"
        assert not lefts(work), "where a search was is forgotten once it has ended"
    assert kept >= 3


@pytest.mark.usefixtures("short_blocks")
@pytest.mark.parametrize("how", [*DAMAGE, "gone"])
def test_where_a_block_ended_may_be_lost_and_costs_only_its_queries(how, tmp_path):
    whole = in_blocks()
    with pytest.raises(StopError):
        in_blocks(listener=stopping(6), work=tmp_path)  # three batches of natural images, and the first block
    assert len(lefts(tmp_path)) == 3
    for file in lefts(tmp_path)[1:]:
        DAMAGE[how](file) if how in DAMAGE else file.unlink()
    assert in_blocks(work=tmp_path) == whole


@pytest.mark.parametrize("how", DAMAGE)
def test_a_damaged_chunk_is_named_in_one_line_and_can_be_deleted(how, alone, tmp_path):
    go(work=tmp_path)
    chunk = sorted(tmp_path.rglob("*.chunk.safetensors"))[7]
    DAMAGE[how](chunk)
    with pytest.raises(InputError) as caught:
        go(work=tmp_path)
    assert str(caught.value).startswith(f"{chunk}: is damaged (")
    assert "\n" not in str(caught.value)
    chunk.unlink()
    steps: list[Step] = []
    assert go(work=tmp_path, listener=steps.append) == alone
    assert len(steps) == 1


def test_a_half_written_chunk_is_no_chunk(alone, tmp_path):
    with pytest.raises(StopError):
        go(listener=stopping(9), work=tmp_path)
    (folder,) = tmp_path.iterdir()
    (folder / ".0-1-1.chunk.safetensors.1.tmp").write_bytes(b"half")
    assert go(work=tmp_path) == alone


# Models that share their weights


class Through(nn.Module):
    """The same weights behind another forward."""

    def __init__(self, change: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.network, self.change = network(), change

    def forward(self, x: Tensor) -> Tensor:
        return self.change(self.network, x)


def rounded(x: Tensor) -> Tensor:
    return (x * 8).round() / 8


def straight_through(network: nn.Module, x: Tensor) -> Tensor:
    return network(x + (rounded(x) - x).detach())


SAME_WEIGHTS: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    "plain": lambda f, x: f(x),
    "softmax": lambda f, x: f(x).softmax(1),
    "rounding": lambda f, x: f(rounded(x)),
    "straight through": straight_through,  # the same logits as rounding, other gradients
    "ten times": lambda f, x: 10 * f(x),
    "NaN gradients": lambda f, x: f(x) + (0 * x.flatten(1).sum(1, keepdim=True)).sqrt(),
    "no gradients": lambda f, x: f(x).detach(),
}


def test_models_of_the_same_weights_and_other_code_share_no_verdict(tmp_path):
    models = {name: Through(change) for name, change in SAME_WEIGHTS.items()}
    assert len({weights_sha256(model) for model in models.values()}) == 1
    common: dict[str, Any] = {"attacks": {"fgsm": {}, "square": {"queries": 5}}}
    for name, model in models.items():
        steps: list[Step] = []
        found = go(model, work=tmp_path, listener=steps.append, **common)
        assert steps, name
        assert steps[0].column == "clean", name
        assert found == go(model, **common), name
    for name, model in models.items():  # and each one finds its own again
        steps = []
        assert go(model, work=tmp_path, listener=steps.append, **common) == go(model, **common), name
        assert not steps, name


def noisy(network: nn.Module, x: Tensor) -> Tensor:
    return network(x + 0.05 * torch.randn_like(x))


def test_a_random_model_takes_no_verdict_from_before(tmp_path):
    torch.manual_seed(1)
    for number in (1, 2, 3):
        steps: list[Step] = []
        go(Through(noisy), work=tmp_path, listener=steps.append)
        assert steps[0].column == "clean"
        assert len(list(tmp_path.iterdir())) == number


@pytest.mark.parametrize("first", ["plain", "random"])
def test_a_random_model_and_a_plain_one_of_the_same_weights_share_no_verdict(first, tmp_path):
    torch.manual_seed(1)
    models = {"plain": Through(SAME_WEIGHTS["plain"]), "random": Through(noisy)}
    go(models.pop(first), work=tmp_path)
    ((_, other),) = models.items()
    steps: list[Step] = []
    go(other, work=tmp_path, listener=steps.append)
    assert steps
    assert steps[0].column == "clean"


def test_a_lost_probe_hands_no_verdict_to_another_model(tmp_path):
    go(Through(SAME_WEIGHTS["plain"]), work=tmp_path)
    (probe,) = tmp_path.rglob("probe.safetensors")
    probe.unlink()
    steps: list[Step] = []
    other = Through(SAME_WEIGHTS["softmax"])
    assert go(other, work=tmp_path, listener=steps.append) == go(other)
    assert steps


def test_another_surrogate_of_the_checks_shares_no_verdict(tmp_path, monkeypatch):
    monkeypatch.setattr(evaluation, "check_columns", transfer_column_only)
    attacks = {"fgsm": {}, "pgd_sat": {"steps": 2}, "cw_inf": {"steps": 2}, "autoattack": autoattack()}
    for surrogate in (TinyNet(seed=5), Blind()):
        steps: list[Step] = []
        go(attacks=attacks, checks=True, surrogate=surrogate, work=tmp_path, listener=steps.append)
        assert "check:transfer" in {step.column for step in steps}


class Blind(nn.Module):
    """Its gradients lead nowhere; its images are the starts."""

    def forward(self, x: Tensor) -> Tensor:
        return 0 * x.flatten(1)[:, :CLASSES]


_all_columns = evaluation.check_columns


def transfer_column_only(*arguments: Any) -> list[Any]:
    return [column for column in _all_columns(*arguments) if column.name == "check:transfer"]


def test_other_attacks_of_the_same_name_share_no_verdict(tmp_path):
    chosen = [{"mine": load_attack("fgsm")}, {"mine": load_attack("uniform_noise")}]
    steps: list[Step] = []
    for attacks in chosen:
        found = go(attacks=attacks, eps_sweep=(), work=tmp_path, listener=steps.append)
        assert steps, attacks
        steps.clear()
        assert found == go(attacks=attacks, eps_sweep=())


class Lighter(Attack):
    """Every image becomes lighter."""

    def rounds(self, num_classes: int) -> list[Round]:
        return [Round(self.name, 0, lambda model, x, y, threat, stream: (x + threat.eps).clamp(0, 1))]


class Darker(Attack):
    """Every image becomes darker."""

    def rounds(self, num_classes: int) -> list[Round]:
        return [Round(self.name, 0, lambda model, x, y, threat, stream: (x - threat.eps).clamp(0, 1))]


def table(loss: Callable[[Tensor, Tensor], Tensor]) -> Attack:
    return TableAttack(summary="", paper="", loss=loss, steps=3, step=0.5, start="none")


def nearer(logits: Tensor, y: Tensor) -> Tensor:
    return margin(logits, y)


def further(logits: Tensor, y: Tensor) -> Tensor:
    return -margin(logits, y)


USERS: dict[str, list[Attack]] = {
    "classes": [Lighter(summary="", paper=""), Darker(summary="", paper="")],
    "losses": [table(nearer), table(further)],
}


@pytest.mark.parametrize("name", USERS)
def test_attacks_of_users_share_no_verdict_though_name_and_settings_are_the_same(name, tmp_path):
    steps: list[Step] = []
    common: dict[str, Any] = {"eps_sweep": (), "threat": ThreatModel(eps=0.1)}
    found = []
    for attack in USERS[name]:
        found.append(go(attacks={"mine": attack}, work=tmp_path, listener=steps.append, **common))
        assert steps
        steps.clear()
        assert found[-1] == go(attacks={"mine": attack}, **common)
        assert found[-1] == go(attacks={"mine": attack}, work=tmp_path, listener=steps.append, **common)
        assert not steps, "it finds its own again"
    assert found[0].rows[0].verdicts["mine"] != found[1].rows[0].verdicts["mine"]
    assert found[0].protocol.fingerprint != found[1].protocol.fingerprint


def test_verdicts_of_an_attack_that_could_be_another_one_are_not_kept(tmp_path):
    attacks = {"mine": table(functools.partial(cross_entropy))}
    steps: list[Step] = []
    with pytest.raises(InputError, match=rf"^work: attacks\.mine\.loss: functools\.partial, {UNTOLD}") as caught:
        go(attacks=attacks, eps_sweep=(), work=tmp_path / "work", listener=steps.append)
    assert "\n" not in str(caught.value)
    assert not steps
    assert not list(tmp_path.iterdir())
    plain = go(attacks={"mine": table(cross_entropy)}, eps_sweep=())
    assert go(attacks=attacks, eps_sweep=()).rows == plain.rows


# Images that were found before a kill


def test_images_found_before_an_interruption_are_saved_after_it(batches, tmp_path):
    file, alone = tmp_path / "found.safetensors", tmp_path / "alone.safetensors"
    go(save_adversarial=alone)
    expected = load_adversarial(alone, network(), sample())
    for kill in range(1, batches, 5):
        work = tmp_path / str(kill)
        with pytest.raises(StopError):
            go(save_adversarial=file, work=work, listener=stopping(kill))
        assert not file.exists()
        go(save_adversarial=file, work=work)
        found = load_adversarial(file, network(), sample())
        assert set(found) == set(expected)
        for name, entry in expected.items():
            assert torch.equal(found[name].ids, entry.ids), f"{name}, interrupted after batch {kill}"
            torch.testing.assert_close(found[name].images, entry.images, rtol=0, atol=1e-12)
        file.unlink()


def test_images_are_not_missing_where_verdicts_were_found_without_them(tmp_path):
    file = tmp_path / "found.safetensors"
    go(work=tmp_path / "work")
    go(work=tmp_path / "work", save_adversarial=file)
    (row,) = go(work=tmp_path / "work").rows
    found = load_adversarial(file, network(), sample())
    for name in row.attacks:
        assert found[name].ids.tolist() == [i for i, verdict in enumerate(row.verdicts[name]) if verdict == "0"]


# Processes

SLOW_MODEL = """
import time
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, 6, 3), nn.Tanh(), nn.Flatten(), nn.Linear(6 * 2 * 5, 5))
    def forward(self, x):
        time.sleep({pause})
        return self.layers(x)

def make():
    torch.manual_seed(0)
    return Net()
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="this system cannot kill a process as SIGKILL does")
def test_a_killed_command_goes_on_to_the_same_document(tmp_path):
    (tmp_path / "slow_model.py").write_text(SLOW_MODEL.format(pause=0.02))
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "dots.npz", x=rng.random((31, 3, 4, 7), dtype=np.float32), y=np.arange(31) % 5)
    command = [
        sys.executable, "-m", "crdnd", "evaluate", "slow_model:make", "--data", "dots.npz", "--eps", "0.02",
        "--attacks", "pgd_sat,apgd_t", "--set", "attacks.apgd_t.iterations=9", "--batch-size", "4",
    ]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": "1"}

    def start(work: str) -> subprocess.Popen[str]:
        own = [*command, "--work", work, "--out", f"{work}.json", "--save-adv", f"{work}.safetensors"]
        return subprocess.Popen(
            own, cwd=tmp_path, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )

    undisturbed = start("alone")
    kept, kills = 0, 0
    for more in (1, 5, 2):
        process = start("killed")
        while process.poll() is None and len(list(tmp_path.glob("killed/*/*.chunk.safetensors"))) < kept + more:
            time.sleep(0.005)
        assert process.poll() is None, process.communicate()
        process.kill()
        process.communicate()
        kills += 1
        kept = len(list(tmp_path.glob("killed/*/*.chunk.safetensors")))
    last = start("killed")
    for process in (undisturbed, last):
        _, said = process.communicate(timeout=120)
        assert process.returncode == 0, said
    alone, killed = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("alone", "killed"))
    assert alone == killed
    assert 0 < alone["rows"][0]["worst_case"]["correct"] < alone["rows"][0]["clean"]["correct"]
    counts = [len(list(tmp_path.glob(f"{name}/*/*.chunk.safetensors"))) for name in ("alone", "killed")]
    assert kills == 3
    assert counts[0] <= counts[1] <= counts[0] + kills  # a torn batch is attacked again, and cut differently


SHARED = """
import json
import sys
from dataclasses import replace
from pathlib import Path

import torch
from accelerate import PartialState

sys.path.insert(0, sys.argv[1])
import test_evaluation_resume as tests

state = PartialState()
tests.go(work="work", save_adversarial="kept.safetensors")
results = tests.go(save_adversarial="found.safetensors")
if state.is_main_process:
    Path("document.json").write_text(results.to_json())
"""


@pytest.mark.slow
def test_two_processes_give_the_document_and_the_images_of_one(alone, tmp_path):
    (tmp_path / "share.py").write_text(SHARED)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*launcher, "share.py", str(Path(__file__).parent)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "document.json").read_text()) == json.loads(alone.to_json())
    assert len({file.name.split("-")[0] for file in tmp_path.glob("work/*/*.chunk.safetensors")}) == 2
    # One process alone finds nothing left to do in the folder of two.
    steps: list[Step] = []
    assert go(work=tmp_path / "work", save_adversarial=tmp_path / "one.safetensors", listener=steps.append) == alone
    assert not steps
    expected = load_adversarial(tmp_path / "one.safetensors", network(), sample())
    for file in ("kept", "found"):
        found = load_adversarial(tmp_path / f"{file}.safetensors", network(), sample())
        assert {name: entry.ids.tolist() for name, entry in found.items()} == {
            name: entry.ids.tolist() for name, entry in expected.items()
        }, file
