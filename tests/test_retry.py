"""`on_nan: retry`: back to the end of the epoch before with half the learning rate, and as exact as any run."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from crdnd import RunError, train
from crdnd.cli import main
from crdnd.engine import Progress, read_status
from crdnd.engine.checkpoint import read_checkpoint
from support import TinyNet
from test_run import Broken, equal, settings, splits

torch.set_num_threads(1)


class StopError(Exception):
    """What a listener may raise."""


def stop_at(step: int) -> Any:
    def listen(progress: Progress) -> None:
        if progress.step == step:
            raise StopError

    return listen


class Fragile(nn.Module):
    """Its logits are NaN once the weights have moved too far.

    What it looks at is the weights alone, so that it breaks at the same place whenever it gets there.
    """

    def __init__(self, most: float) -> None:
        super().__init__()
        self.network = TinyNet(dtype=torch.float32)
        self.start = self.network.classifier.weight.detach().clone()
        self.most = most

    def forward(self, x: Tensor) -> Tensor:
        moved = (self.network.classifier.weight.detach() - self.start).norm()
        return self.network(x) * torch.where(moved > self.most, torch.nan, 1.0)


def fragile(**changes: Any) -> dict[str, Any]:
    common = {"epochs": 4, "on_nan": "retry", "ema": 0.8, "optimizer": {"learning_rate": 0.15}, "augmentation": "shift"}
    return settings(**common | {"save_every_steps": 100} | changes)


LIMIT = 1.3


def epochs_of(folder: Path) -> list[dict[str, Any]]:
    history = json.loads((folder / "checkpoint.json").read_text())["history"]
    return [{key: value for key, value in epoch.items() if "seconds" not in key} for epoch in history]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return train(Fragile(LIMIT), splits(), out=tmp_path_factory.mktemp("whole") / "run", **fragile())


def test_a_run_that_turns_nan_goes_back_and_halves_its_learning_rate(whole, capsys):
    changes = read_checkpoint(whole.folder).changes
    assert [change.what for change in changes] == ["learning_rate", "learning_rate"]
    assert [(change.step, change.value) for change in changes] == [(3, 0.075), (6, 0.0375)]
    assert "not finite at step" in changes[0].why
    document = json.loads((whole.folder / "run.json").read_text())
    assert document["changes"] == [change.model_dump() for change in changes]
    # The history has every epoch once, and the rates that they were really made with (a cosine's, at their last step).
    assert [epoch.epoch for epoch in whole.history] == [1, 2, 3, 4]
    assert whole.history[-1].learning_rate < 0.0375
    assert read_status(whole.folder).changes == changes
    with pytest.raises(SystemExit):
        main(["status", str(whole.folder)])
    assert f"changed  learning_rate 0.075 from step {changes[0].step} on: the loss is not" in capsys.readouterr().out
    assert "going on from step" in (whole.folder / "run.log").read_text()


@pytest.mark.parametrize("every", [1, 2, 100])
def test_wherever_such_a_run_is_broken_off_it_ends_in_the_same_bits(every, whole, tmp_path):
    common = fragile(save_every_steps=every)
    for step in range(1, 12):
        out = tmp_path / str(step)
        with pytest.raises(StopError):
            train(Fragile(LIMIT), splits(), out=out, listener=stop_at(step), **common)
        again = train(Fragile(LIMIT), splits(), out=out, **common)
        assert equal(again.model, whole.model), step
        assert equal(again.other, whole.other), step
        assert epochs_of(out) == epochs_of(whole.folder)
        assert read_checkpoint(out).changes == read_checkpoint(whole.folder).changes


def test_after_two_halvings_a_run_stops_and_says_so(tmp_path):
    with pytest.raises(
        RunError, match=r"not finite at step 2 of 12.*now 0\.0375\).*went back 2 times already"
    ) as caught:
        train(Fragile(1e-9), splits(), out=tmp_path / "run", **fragile())
    assert "\n" not in str(caught.value)
    assert [(change.step, change.value) for change in read_checkpoint(tmp_path / "run").changes] == [
        (0, 0.075),
        (0, 0.0375),
    ]
    assert read_status(tmp_path / "run").state == "diverged"
    with pytest.raises(RunError, match="went back 2 times already"):
        train(Fragile(1e-9), splits(), out=tmp_path / "run", **fragile())


def test_a_run_that_stopped_may_be_gone_on_with_as_one_that_retries(tmp_path):
    out, common = tmp_path / "run", settings(save_every_steps=2)
    with pytest.raises(RunError):
        train(Broken(6, "loss"), splits(), out=out, **common)
    assert not read_checkpoint(out).changes
    run = train(Broken(2, "loss"), splits(), out=out, **common | {"on_nan": "retry"})
    # It did not keep the end of the epoch before, step 3, so it goes back to what it has.
    assert [(change.step, change.value) for change in read_checkpoint(out).changes] == [(4, 0.05)]
    assert [epoch.epoch for epoch in run.history] == [1, 2]


@pytest.mark.parametrize("at", [3, 6])
def test_weights_that_are_not_finite_after_an_epoch_are_not_what_is_gone_back_to(at, tmp_path):
    class Once(Broken):
        """Breaks once, and not again after it went back."""

    run = train(Once(at, "gradient"), splits(), out=tmp_path / "run", **settings(on_nan="retry"))
    (change,) = read_checkpoint(tmp_path / "run").changes
    assert change.step == at - 3
    assert f"weights are not finite after step {at}" in change.why
    assert all(value.isfinite().all() for value in run.model.state_dict().values())
    assert [epoch.epoch for epoch in run.history] == [1, 2]


def test_a_kill_between_the_checkpoint_and_the_document_is_made_up_for(tmp_path):
    out = tmp_path / "run"
    with pytest.raises(StopError):
        train(Broken(2, "loss"), splits(), out=out, listener=stop_at(1), **settings(on_nan="retry", save_every_steps=1))
    document = json.loads((out / "run.json").read_text())
    assert "changes" not in document
    pointer = json.loads((out / "checkpoint.json").read_text())
    pointer["changes"] = [{"what": "learning_rate", "value": 0.05, "step": 0, "why": "a test"}]
    (out / "checkpoint.json").write_text(json.dumps(pointer))
    run = train(Broken(0, "loss"), splits(), out=out, **settings(on_nan="retry"))
    assert json.loads((out / "run.json").read_text())["changes"] == pointer["changes"]
    assert run.history[0].learning_rate < 0.05


class BrokenAt(Broken):
    """Its logits are NaN at each of several passes in train mode."""

    def __init__(self, *at: int) -> None:
        super().__init__(0, "loss")
        self.all = at

    def forward(self, x: Tensor) -> Tensor:
        self.at = self.passes + 1 if self.passes + 1 in self.all else 0
        return super().forward(x)


def test_the_same_state_is_gone_back_to_twice(tmp_path):
    common = settings(on_nan="retry", save_every_steps=1)
    whole = train(BrokenAt(5, 7), splits(), out=tmp_path / "whole", **common)
    steps: list[int] = []

    def stop(progress: Progress) -> None:
        steps.append(progress.step)
        if steps.count(4) == 2:
            raise StopError

    with pytest.raises(StopError):  # the state to go back to is now read from the file
        train(BrokenAt(5), splits(), out=tmp_path / "run", listener=stop, **common)
    again = train(BrokenAt(1), splits(), out=tmp_path / "run", **common)
    assert [change.step for change in read_checkpoint(tmp_path / "whole").changes] == [3, 3]
    assert equal(again.other, whole.other)
