"""What a run's folder tells of its state, and the commands that show it."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from crdnd import Interrupted, RunError, train
from crdnd.cli import main
from crdnd.engine import Epoch, Progress, TimeLeft, Validation, find_runs, read_status
from crdnd.engine import pace as pace_module
from crdnd.engine.pace import Note, Pace, read_note, time_left, validations_left
from crdnd.io import exclusive, is_held
from test_run import Broken, cnn, content, held, settings, splits

torch.set_num_threads(1)

FIXTURES = Path(__file__).parent / "fixtures"


class StopError(Exception):
    """What a listener may raise."""


def stopped(out: Path, at: int = 4, **changes: Any) -> Path:
    """A run whose process died after so many steps of 6, three an epoch."""

    def listen(progress: Progress) -> None:
        if progress.step == at:
            raise StopError

    with pytest.raises(StopError):
        train(cnn(), splits(), out=out, listener=listen, **settings(save_every_steps=1) | changes)
    return out


def command(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as ended:
        main(list(arguments))
    shown = capsys.readouterr()
    return ended.value.code, shown.out, shown.err


# The state


def test_a_finished_run_tells_what_it_was(tmp_path):
    run = train(cnn(), splits(), out=tmp_path / "run", **settings())
    found = read_status(tmp_path / "run")
    assert (found.state, found.method, found.model, found.data) == ("finished", "natural", "cnn(width=2)", "dots")
    assert (found.epoch, found.epochs, found.step, found.steps) == (2, 2, 6, 6)
    assert found.best.epoch == run.best_epoch
    assert found.best.validation == run.history[run.best_epoch - 1].validation
    assert found.seconds == pytest.approx(sum(e.seconds + e.validation_seconds for e in run.history))
    assert found.left == TimeLeft(seconds=0.0, at_least=False)
    assert "epoch 2/2" in found.note
    assert not (tmp_path / "run" / "progress.json").exists()


def test_a_run_whose_process_is_gone_is_stopped_and_one_that_is_held_is_running(tmp_path):
    out = stopped(tmp_path / "run")
    assert not is_held(out)
    found = read_status(out)
    assert (found.state, found.epoch, found.step, found.steps) == ("stopped", 1, 4, 6)
    before = content(tmp_path)
    with held(out):
        assert is_held(out)
        assert read_status(out).state == "running"
    assert content(tmp_path) == before
    assert read_status(out).state == "stopped"


def test_a_look_at_a_run_keeps_nobody_from_its_folder(tmp_path):
    fcntl = pytest.importorskip("fcntl")
    with exclusive(tmp_path):
        pass
    with (tmp_path / ".lock").open("rb") as look:  # one that happens to hold it at this very moment
        fcntl.flock(look, fcntl.LOCK_SH)
        with pytest.raises(ValueError, match="another run"), exclusive(tmp_path):
            pass
        fcntl.flock(look, fcntl.LOCK_UN)
        with exclusive(tmp_path):
            assert is_held(tmp_path)


def test_a_diverged_run_says_so_until_it_goes_on(tmp_path):
    out, common = tmp_path / "run", settings(save_every_steps=1)
    with pytest.raises(RunError):
        train(Broken(5, "loss"), splits(), out=out, **common)
    found = read_status(out)
    assert (found.state, found.step) == ("diverged", 4)
    assert "not finite at step 5" in found.note
    train(Broken(0, "loss"), splits(), out=out, **common)
    assert read_status(out).state == "finished"


def test_a_run_that_a_signal_stopped_says_so(tmp_path):
    def interrupted(_: Progress) -> None:
        raise Interrupted("stopped at step 1", 143)

    with pytest.raises(Interrupted):
        train(cnn(), splits(), out=tmp_path / "run", listener=interrupted, **settings())
    found = read_status(tmp_path / "run")
    assert (found.state, found.step) == ("stopped", 0)
    assert found.note.endswith("ended: stopped at step 1")


DAMAGE = {
    "run.json": ["", "[]", '{"settings": []}', '{"settings": {}, "identity": {}}', '{"schema": "crdnd.run/1"}'],
    "checkpoint.json": ["", "[]", '{"schema": "crdnd.checkpoint/9"}'],
}


@pytest.mark.parametrize(("file", "text"), [(file, text) for file, texts in DAMAGE.items() for text in texts])
def test_a_damaged_run_is_listed_as_such_and_the_others_beside_it(file, text, tmp_path, capsys):
    out = stopped(tmp_path / "run")
    (out / file).write_text(text)
    shutil.copytree(FIXTURES / "run-1-finished", tmp_path / "whole")
    status, shown, _ = command(capsys, "runs", str(tmp_path), "--json")
    assert status == 0
    first, second = json.loads(shown)["runs"]
    assert (first["state"], second["state"]) == ("damaged", "finished")
    assert file in first["note"]


def test_a_run_of_an_older_version_is_read(tmp_path):
    shutil.copytree(FIXTURES, tmp_path / "old")
    finished, unfinished = (read_status(run) for run in find_runs(tmp_path / "old"))
    assert (finished.state, unfinished.state) == ("finished", "stopped")
    assert (unfinished.epoch, unfinished.epochs, unfinished.steps, unfinished.left) == (1, 2, None, None)


def test_runs_are_found_at_any_depth_and_hidden_folders_are_left_alone(tmp_path):
    for name in ("b", "a", "a/inner/deep", ".hidden"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "run.json").write_text("{}")
    (tmp_path / "empty").mkdir()
    assert [str(run.relative_to(tmp_path)) for run in find_runs(tmp_path)] == ["a", "a/inner/deep", "b"]


# Time left


def epoch(number: int, seconds: float, validation: float | None = None) -> Epoch:
    count = {"correct": 3, "n": 7}
    validated = Validation(clean=count, robust=count) if validation is not None else None
    return Epoch(
        epoch=number,
        loss=1.0,
        terms={},
        learning_rate=0.1,
        seconds=seconds,
        validation_seconds=validation or 0.0,
        validation=validated,
    )


@pytest.mark.parametrize("every", [1, 2, 3, 4, 9])
@pytest.mark.parametrize("epochs", [1, 4, 7])
def test_the_validations_that_are_left_are_those_that_come(every, epochs):
    for done in range(epochs + 1):
        coming = [e for e in range(done + 1, epochs + 1) if e % every == 0 or e == epochs]
        assert validations_left(done, epochs, every) == len(coming)


def test_the_time_left_is_that_of_the_steps_and_validations_that_come():
    # 7 epochs of 4 steps, a validation every 3 and at the end.
    assert time_left(0, 28, 7, 3, ()) is None
    assert time_left(2, 28, 7, 3, (), 0.5) == TimeLeft(seconds=13.0, at_least=True)
    history = (epoch(1, 8.0), epoch(2, 4.0), epoch(3, 6.0, 10.0))
    assert time_left(12, 28, 7, 3, history) == TimeLeft(seconds=16 * 1.5 + 2 * 10, at_least=False)
    assert time_left(25, 28, 7, 3, history, 0.25) == TimeLeft(seconds=3 * 0.25 + 10, at_least=False)
    assert time_left(28, 28, 7, 3, history) == TimeLeft(seconds=0.0, at_least=False)


def test_the_pace_is_the_mean_of_recent_steps_without_the_first_of_a_process(tmp_path):
    pace = Pace(tmp_path)
    assert pace.step_seconds is None
    pace.step(99.0)
    assert pace.step_seconds is None
    for seconds in [7.0] * 10 + [1.0] * 25 + [3.0] * 25:
        pace.step(seconds)
    assert pace.step_seconds == 2.0


def test_a_run_under_way_notes_where_it_is_between_two_checkpoints(tmp_path, monkeypatch):
    monkeypatch.setattr(pace_module, "SECONDS_BETWEEN_NOTES", 0.0)
    out, found = tmp_path / "run", []
    (tmp_path / "run").mkdir()

    def listen(progress: Progress) -> None:
        found.append(read_status(out))
        assert found[-1].left == progress.left

    train(cnn(), splits(), out=out, listener=listen, **settings(save_every_steps=3))
    assert [(one.state, one.step) for one in found] == [("running", step) for step in range(1, 7)]
    assert [one.left is not None for one in found] == [False, True, True, True, True, True]
    assert [one.left.at_least for one in found[1:]] == [True, False, False, False, False]
    assert read_note(out) is None


def test_what_a_killed_process_noted_is_not_believed(tmp_path):
    out = stopped(tmp_path / "run")
    note = Note(step=6, seconds=1.0, left=None)
    (out / "progress.json").write_text(note.model_dump_json())
    assert read_status(out).step == 4
    with held(out):
        assert read_status(out).step == 6
        (out / "progress.json").write_text("{torn")
        assert read_status(out).step == 4
    seen = []
    train(cnn(), splits(), out=out, listener=lambda _: seen.append(read_note(out)), **settings(save_every_steps=1))
    assert seen == [None, None]


# The commands


def test_runs_are_listed_for_people(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.chdir(tmp_path)
    assert command(capsys, "runs")[::2] == (2, "error: runs: is no folder; name the folder of a run or of several.\n")
    (tmp_path / "runs").mkdir()
    assert command(capsys, "runs") == (0, "There is no run in runs.\n", "")
    stopped(Path("runs/one"))
    status, shown, _ = command(capsys, "runs")
    assert status == 0
    assert all(word in shown for word in ("runs/one", "stopped", "natural", "cnn(width=2)", "dots", "1 of 2", " / "))


def test_one_run_is_shown_in_full(tmp_path, capsys):
    out = stopped(tmp_path / "run")
    status, shown, _ = command(capsys, "status", str(out), "--json")
    document = json.loads(shown)
    assert status == 0
    assert (document["state"], document["settings"]["epochs"], len(document["history"])) == ("stopped", 2, 1)
    status, shown, _ = command(capsys, "status", str(out))
    assert status == 0
    assert "state    stopped\n" in shown
    assert "epoch    1 of 2, step 4 of 6\n" in shown
    assert "lever    fused_optimizer on\n" in shown
    assert "learning rate" in shown
    status, _, said = command(capsys, "status", str(tmp_path))
    assert (status, said) == (2, f"error: {tmp_path}: holds no run; `crdnd runs` lists those that there are.\n")
    (out / "run.json").write_text("")
    assert "state    damaged\n" in command(capsys, "status", str(out))[1]


def test_watch_ends_when_the_run_does(tmp_path, capsys, monkeypatch):
    out, looks = stopped(tmp_path / "run"), []
    with held(out) as process:

        def wait(seconds: float) -> None:
            looks.append(seconds)
            if len(looks) == 3:
                process.kill()
                process.wait()

        monkeypatch.setattr("crdnd.cli.runs.time.sleep", wait)
        status, shown, _ = command(capsys, "watch", str(tmp_path))
    assert status == 0
    assert len(looks) == 3
    assert "stopped" in shown


@pytest.mark.parametrize("fresh", [[], ["--fresh"]])
def test_a_demo_is_refused_where_another_one_runs(fresh, tmp_path, capsys):
    (tmp_path / "demo").mkdir()
    with held(tmp_path / "demo"):
        status, _, said = command(capsys, "demo", "--epochs", "1", "--out", str(tmp_path / "demo"), *fresh)
    assert status == 2
    assert "demo: another run is writing here" in said
    assert [path.name for path in (tmp_path / "demo").iterdir()] == [".lock"]
