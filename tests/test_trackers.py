"""What a run tells its trackers, and that one that goes on continues the series."""

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, TensorBoardTracker
from accelerate.utils import LoggerType

from crdnd import distill, train
from crdnd.cli import main
from crdnd.cli import train as train_commands
from crdnd.engine import Progress
from crdnd.errors import RunError
from test_run import cnn, settings, splits

torch.set_num_threads(1)

tensorboard = pytest.mark.skipif(importlib.util.find_spec("tensorboard") is None, reason="tensorboard is an extra")


class StopError(Exception):
    """What a listener may raise."""


class Recording(TensorBoardTracker):
    """In the place of TensorBoard's, which is not installed everywhere."""

    made: list["Recording"] = []

    def __init__(self, run_name: str, logging_dir: str, **kwargs: Any) -> None:
        super().__init__(run_name, logging_dir, **kwargs)
        self.lines: dict[int, dict[str, float]] = {}
        self.finished = False
        Recording.made.append(self)

    def start(self) -> None:
        self.existed = (Path(self.logging_dir_param) / "run.json").exists()

    def log(self, values: dict[str, float], step: int | None = None, **_: Any) -> None:
        self.lines[step] = values

    def finish(self) -> None:
        self.finished = True


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> list[Recording]:
    Recording.made = []
    monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, "tensorboard", Recording)
    monkeypatch.setattr("accelerate.tracking._available_trackers", [LoggerType.TENSORBOARD])
    return Recording.made


def test_a_tracker_that_does_not_start_ends_the_run_in_one_line_before_its_first_step(recorded, monkeypatch, tmp_path):
    def start(self: Recording) -> None:
        raise ConnectionError("no route to the server\nand more")

    monkeypatch.setattr(Recording, "start", start)
    with pytest.raises(
        RunError, match=r"^trackers: tensorboard could not be started \(no route to the server\); [^\n]+$"
    ):
        train(cnn(), splits(), out=tmp_path / "run", **settings(trackers=("tensorboard",)))
    assert not train(cnn(), splits(), out=tmp_path / "run", **settings()).reused


def test_a_run_logs_what_an_epoch_was(recorded, tmp_path):
    common = settings(objective="rslad", attack={"steps": 1}, validate_every=2, trackers=("tensorboard",))
    found = distill(cnn(), splits(), teacher=cnn(seed=4), out=tmp_path / "run", **common)
    (tracker,) = recorded
    assert tracker.existed, "nothing is written before the folder is the run's"
    assert tracker.finished
    assert Path(tracker.logging_dir_param) == tmp_path / "run"
    assert list(tracker.lines) == [3, 6]
    names = {"loss", "terms/kl_nat", "terms/kl_adv", "learning_rate", "images_per_second"}
    names |= {"passes/student", "passes/teacher"}
    assert set(tracker.lines[3]) == names
    assert set(tracker.lines[6]) == names | {"validation/clean", "validation/robust"}
    second = found.history[1]
    assert tracker.lines[6]["images_per_second"] == pytest.approx(12 / second.seconds)
    assert tracker.lines[6]["passes/student"] == second.student_passes == 3
    assert tracker.lines[6]["validation/robust"] == second.validation.robust.percent


def test_a_run_that_goes_on_drops_what_it_logs_again(recorded, tmp_path):
    def listen(progress: Progress) -> None:
        if progress.step == 4:
            raise StopError

    common = settings(trackers=("tensorboard",), save_every_steps=2)
    with pytest.raises(StopError):
        train(cnn(), splits(), out=tmp_path / "run", listener=listen, **common)
    for _ in range(2):
        train(cnn(), splits(), out=tmp_path / "run", **common)
    first, second = recorded  # the third call reused the run and told nobody
    assert first.finished
    assert first.init_kwargs == {"purge_step": 1}
    assert second.init_kwargs == {"purge_step": 5}
    assert (list(first.lines), list(second.lines)) == ([3], [6])


def test_wandb_knows_a_run_again(tmp_path, monkeypatch):
    given = []
    monkeypatch.setattr("accelerate.tracking._available_trackers", [LoggerType.WANDB])
    monkeypatch.setattr(Accelerator, "init_trackers", lambda self, name, **values: given.append(values["init_kwargs"]))

    def listen(_: Progress) -> None:
        raise StopError

    for name in ("one", "one", "two"):
        with pytest.raises(StopError):
            train(cnn(), splits(), out=tmp_path / name, listener=listen, **settings(trackers=("wandb",)))
    one, again, two = (values["wandb"] for values in given)
    assert one == again
    assert one["id"] != two["id"]
    assert (one["resume"], two["name"]) == ("allow", "two")


@pytest.mark.parametrize(("installed", "extra", "expected"), [
    (True, [], ["tensorboard"]),
    (True, ["--set", "trackers=[]"], []),
    (False, [], None),
])  # fmt: skip
def test_the_commands_take_tensorboard_where_it_is_installed(installed, extra, expected, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(train_commands, "find_spec", lambda name: object() if installed else None)
    monkeypatch.setattr("crdnd.recipe.make_recipe", lambda values: seen.append(values.get("trackers")) or sys.exit(0))
    with pytest.raises(SystemExit):
        main(
            ["train", "--objective", "natural", "--model", "cnn", "--eps", "0.1", "--out", str(tmp_path / "r"), *extra]
        )
    assert seen == [expected]


@tensorboard
@pytest.mark.filterwarnings("ignore")
def test_the_series_of_tensorboard_goes_on(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    def listen(progress: Progress) -> None:
        if progress.step == 4:
            raise StopError

    common = settings(trackers=("tensorboard",), save_every_steps=7, epochs=3)
    with pytest.raises(StopError):
        train(cnn(), splits(), out=tmp_path / "run", listener=listen, **common)
    train(cnn(), splits(), out=tmp_path / "run", **common)  # from the start: nothing was saved
    events = EventAccumulator(str(tmp_path / "run" / "crdnd")).Reload()
    assert [event.step for event in events.Scalars("loss")] == [3, 6, 9]
