"""`crdnd compare`: what a spec expands to, how settings are chosen, and that cells are computed once."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import yaml

from crdnd import ThreatModel, create_model, load_data
from crdnd.cli import _jobs as _jobs_module
from crdnd.cli import compare as compare_module
from crdnd.cli import main
from crdnd.cli._grid import Spec, choose, judged, make_grid, measured_otherwise, what_differs
from crdnd.cli._jobs import Job, run_jobs, side_by_side, threads_for
from crdnd.cli.compare import _jobs, make_plan, measure_cell, run_plan
from crdnd.config import build
from crdnd.counts import Count
from crdnd.engine import Validation
from crdnd.errors import InputError, Interrupted, RunError
from crdnd.evaluation import PRESETS, make_protocol
from crdnd.io import exclusive
from crdnd.models import ModelCard, read_card, save_model
from crdnd.recipe import merge
from crdnd.report import Comparison, load_comparison
from crdnd.report.comparison import Trial

torch.set_num_threads(1)  # networks this small wait for their threads more than they compute

SPEC: dict[str, Any] = {
    "schema": "crdnd.compare/1",
    # Teachers of one epoch know nothing, which is what a teacher of a study must not be.
    "shared": {"data": "digits", "threat": {"eps": 0.1}, "epochs": 1, "batch_size": 300, "check_teacher": False},
    "teachers": {"big": {"objective": "natural", "model": {"name": "cnn", "width": 3}}},
    "students": {"cnn-2": {"model": {"name": "cnn", "width": 2}}},
    "objectives": {"rslad": {}, "natural": {}},
    "seeds": [0, 1],
    "preset": "quick",
    "baseline": "natural",
}


def spec(**changes: Any) -> Spec:
    """The spec above, with whole sections replaced."""
    return build(Spec, SPEC | changes)


def grid(tmp_path: Path, **changes: Any):
    return make_grid(spec(**changes), tmp_path / "out")


# What a spec expands to


def test_the_grid_is_every_combination_and_a_method_without_a_teacher_comes_once(tmp_path):
    teachers = SPEC["teachers"] | {"other": {"objective": "natural", "model": {"name": "cnn", "width": 4}}}
    students = SPEC["students"] | {"cnn-4": {"model": {"name": "cnn", "width": 4}}}
    found = grid(tmp_path, teachers=teachers, students=students)
    names = [cell.name for cell in found.cells]
    assert len(names) == len(set(names)) == 2 * 2 * 2 + 2 * 2
    assert {name for name in names if name.startswith("natural/")} == {
        f"natural/{student}/no-teacher/seed-{seed}" for student in students for seed in (0, 1)
    }
    assert set(found.teachers) == {f"teachers/{name}/seed-{seed}" for name in teachers for seed in (0, 1)}
    folders = [run.out for cell in found.cells for run in cell.candidates]
    assert len(set(folders)) == len(folders)


def test_every_seed_has_a_split_and_a_teacher_of_its_own(tmp_path):
    found = grid(tmp_path)
    for cell in found.cells:
        (run,) = cell.candidates
        assert (run.seed, run.split_seed, run.role) == (cell.seed, cell.seed, "student")
        if cell.objective == "rslad":
            assert run.teacher == str(tmp_path / "out" / "teachers" / "big" / f"seed-{cell.seed}")
        else:
            assert run.teacher is None
    for name, run in found.teachers.items():
        assert f"seed-{run.seed}" in name
        assert (run.split_seed, run.role) == (run.seed, "teacher")


def test_on_a_fixed_split_all_seeds_share_split_and_teacher(tmp_path):
    found = grid(tmp_path, splits="fixed", shared=SPEC["shared"] | {"split_seed": 7})
    assert {run.split_seed for cell in found.cells for run in cell.candidates} == {7}
    assert [cell.candidates[0].seed for cell in found.cells] == [0, 1, 0, 1]
    assert list(found.teachers) == ["teachers/big"]
    assert {run.teacher for cell in found.cells for run in cell.candidates if run.teacher} == {
        str(tmp_path / "out" / "teachers" / "big")
    }


def test_layers_lie_on_each_other_in_their_order(tmp_path):
    students = {"a": {"model": "cnn", "epochs": 2, "ema": 0.5}}
    objectives = {"soft": {"objective": {"name": "ard", "tau": 3}, "epochs": 3}, "ard": {"objective": {"tau": 2}}}
    found = grid(tmp_path, students=students, objectives=objectives, baseline=None, seeds=[0])
    soft, ard = (cell.candidates[0] for cell in found.cells)
    assert (soft.objective.name, soft.objective.settings, soft.epochs, soft.ema) == ("ard", {"tau": 3}, 3, 0.5)
    assert (ard.objective.name, ard.objective.settings, ard.epochs) == ("ard", {"tau": 2}, 2)


def test_trials_run_on_the_trial_seeds_and_share_the_rest(tmp_path):
    trials = [{"objective": {"tau": 1}}, {"objective": {"tau": 5}}]
    found = grid(tmp_path, objectives={"ard": {"epochs": 4, "trials": trials}}, baseline=None, trial_seeds=[1, 2])
    assert sorted(found.trials) == [f"cells/ard/cnn-2/big/trial-{t}/seed-{s}" for t in (1, 2) for s in (1, 2)]
    for cell in found.cells:
        assert [run.objective.settings for run in cell.candidates] == [{"tau": 1}, {"tau": 5}]
        assert {run.epochs for run in cell.candidates} == {4}
        assert [[run.seed for run in trial] for trial in cell.judged] == [[1, 2], [1, 2]]
        assert list(cell.settings) == trials
    assert found.cells[1].candidates[0] == found.cells[1].judged[0][0]  # so that the trial's run is reused
    assert set(found.teachers) == {f"teachers/big/seed-{seed}" for seed in (0, 1, 2)}


def test_cells_are_done_seed_by_seed(tmp_path):
    jobs = [job.name for job in _jobs(make_plan(spec(seeds=[1, 0]), tmp_path / "out"), tmp_path / "log")]
    assert jobs[:2] == ["teachers/big/seed-1", "teachers/big/seed-0"]
    assert [name.rpartition("/")[2] for name in jobs[2:]] == ["seed-1", "seed-1", "seed-0", "seed-0"]


def test_an_objective_may_name_its_teacher(tmp_path):
    teachers = SPEC["teachers"] | {"other": {"objective": "natural", "model": {"name": "cnn", "width": 4}}}
    found = grid(tmp_path, teachers=teachers, objectives={"rslad": {"teacher": "other"}}, baseline=None)
    assert {cell.teacher for cell in found.cells} == {"other"}
    assert [cell.candidates[0].teacher for cell in found.cells] == [
        str(tmp_path / "out" / "teachers" / "other" / f"seed-{seed}") for seed in (0, 1)
    ]
    assert all("big" not in name for name in found.teachers)


def test_a_method_whose_attack_asks_the_teacher_has_one(tmp_path):
    found = grid(tmp_path, objectives={"pgd_at": {"attack": {"loss": "kl_teacher"}}, "trades": {}}, baseline=None)
    assert {(cell.objective, cell.teacher) for cell in found.cells} == {("pgd_at", "big"), ("trades", None)}


MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "baseline": ({"baseline": "rslda"}, "baseline: no such objective 'rslda'; did you mean 'rslad'"),
    "method": ({"objectives": {"rslda": {}}, "baseline": None}, "unknown objective 'rslda'; did you mean 'rslad'"),
    "teacher": (
        {"objectives": {"rslad": {"teacher": "bog"}}, "baseline": None},
        "objectives.rslad.teacher: no such teacher 'bog'; did you mean 'big'",
    ),
    "no teacher": ({"teachers": {}}, "objectives.rslad: needs a teacher; give one with --teacher, or under teachers"),
    "setting": (
        {"students": {"s": {"model": "cnn", "epoch": 3}}},
        "objectives.rslad with students.s: epoch: no such setting; did you mean 'epochs'",
    ),
    "setting of a method": ({"objectives": {"rslad": {"objective": {"tau": 1}}}, "baseline": None}, "tau: no such"),
    "setting of a model": ({"students": {"s": {"model": {"name": "cnn", "widht": 3}}}}, "widht: no such setting"),
    "reserved": ({"students": {"s": {"model": "cnn", "seed": 3}}}, "students.s.seed: cannot be set here; list them"),
    "threat": ({"objectives": {"rslad": {"threat": {"eps": 0.2}}}}, "objectives.rslad.threat: cannot be set here"),
    "split": ({"shared": SPEC["shared"] | {"split_seed": 1}}, "shared.split_seed: .* write splits: fixed"),
    "name": ({"students": {"a/b": {"model": "cnn"}}}, "students.a/b: names are made of letters"),
    "trials": ({"objectives": {"ard": {"trials": {"tau": 1}}}}, "objectives.ard.trials: must be a list of settings"),
    "no seed": ({"seeds": []}, "seeds: "),
    "a seed twice": ({"seeds": [1, 1]}, "seeds: names a seed twice"),
    "no such folder": ({"teachers": {"big": {"teacher": "nowhere"}}}, "teachers.big: nowhere: there is no such model"),
    "a teacher and more": (
        {"teachers": {"big": {"teacher": "a", "epochs": 3}}},
        "teachers.big: one that exists is named alone",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_in_a_spec_costs_one_line_before_anything_runs(mistake, tmp_path):
    changes, message = MISTAKES[mistake]
    changes = {"baseline": None} | changes
    with pytest.raises(InputError, match=message) as refused:
        grid(tmp_path, **changes)
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "out").exists()


def test_a_teacher_that_has_seen_the_test_images_is_refused(tmp_path):
    images = load_data("digits").train
    model = create_model("cnn", input_shape=images.shape, num_classes=10, mean=[0.0], std=[1.0], seed=0, width=3)
    save_model(tmp_path / "teacher", model, ModelCard(schema="crdnd.model/1", data="digits", split_seed=4))
    given = {"teachers": {"old": {"teacher": str(tmp_path / "teacher")}}}
    message = r"teachers\.old: was trained on split 4 of digits and has seen test images of split 0; .*split_seed: 4"
    with pytest.raises(InputError, match=message):
        grid(tmp_path, **given)
    with pytest.raises(InputError, match=message):
        grid(tmp_path, **given, splits="fixed")
    found = grid(tmp_path, **given, splits="fixed", shared=SPEC["shared"] | {"split_seed": 4})
    assert {run.teacher for cell in found.cells for run in cell.candidates if run.teacher} == {
        str(tmp_path / "teacher")
    }
    assert not found.teachers
    save_model(tmp_path / "teacher", model, ModelCard(schema="crdnd.model/1", data="cifar10", split_seed=4))
    assert grid(tmp_path, **given).cells


# Which trial is chosen


def validation(clean: int, robust: int) -> Validation:
    return Validation(clean=Count(correct=clean, n=200), robust=Count(correct=robust, n=200))


def test_the_trial_with_the_highest_mean_robust_validation_accuracy_is_chosen():
    trials = [
        judged({}, [validation(190, 100), validation(190, 110)]),
        judged({}, [validation(150, 140), validation(150, 80)]),  # 220 of 400 against 210
        judged({}, [validation(199, 105), validation(199, 105)]),
    ]
    assert trials[1].validation == Validation(clean=Count(correct=300, n=400), robust=Count(correct=220, n=400))
    assert choose(trials) == 1


def test_of_equally_robust_trials_the_cleaner_then_the_earlier_is_chosen():
    trials = [
        judged({}, [validation(clean, robust)]) for clean, robust in ((160, 99), (150, 100), (170, 100), (170, 100))
    ]
    assert choose(trials) == 2


def test_a_trial_that_diverged_has_lost():
    trials = [Trial(settings={}, failed="NaN"), judged({}, [validation(20, 0)])]
    assert choose(trials) == 1
    assert choose(trials[:1]) is None


# What may change in a folder


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({}, []),
        ({"seeds": [1, 2, 0]}, []),
        ({"objectives": SPEC["objectives"] | {"ard": {}}, "baseline": "ard"}, []),
        ({"students": SPEC["students"] | {"b": {"model": "cnn"}}, "teachers": SPEC["teachers"] | {"c": {}}}, []),
        ({"shared": merge(SPEC["shared"], {"save_every_steps": 3})}, []),
        ({"seeds": [0]}, ["seed 1 is gone"]),
        ({"objectives": {"rslad": {}}}, ["objectives.natural is gone"]),
        ({"shared": merge(SPEC["shared"], {"epochs": 2})}, ["shared.epochs: 1 -> 2"]),
        ({"preset": "standard", "n": 9}, []),
        ({"trial_seeds": [1]}, ["trial_seeds: (0,) -> (1,)"]),
        ({"students": {"cnn-2": {"model": {"name": "cnn", "width": 3}}}}, ["students.cnn-2.model.width: 2 -> 3"]),
    ],
)
def test_a_folder_takes_more_cells_and_nothing_else(changes, found):
    assert what_differs(spec(), spec(**changes)) == found


def test_how_cells_are_measured_may_change():
    assert measured_otherwise(spec(), spec(preset="standard", n=9)) == ["preset: quick -> standard", "n: None -> 9"]
    assert measured_otherwise(spec(n=9), spec(n=9, seeds=[0, 1, 2])) == []


# Jobs


def fails(report, message: str) -> None:
    raise RunError(message)


def fails_later(report, path: Path) -> None:
    time.sleep(0.5)
    path.write_text("late")
    raise RunError("it broke")


def copies(report, source: Path, target: Path) -> None:
    target.write_text(source.read_text())


def writes(report, path: Path) -> None:
    path.write_text("done")


def test_a_failed_job_takes_those_that_need_it_along_and_no_others(tmp_path):
    jobs = [
        Job("first", fails, ("it broke",)),
        Job("needs first", writes, (tmp_path / "a",), ("first",)),
        Job("needs both", writes, (tmp_path / "b",), ("first", "needs first")),
        Job("waits for first", writes, (tmp_path / "c",), (), ("first", "needs both")),
    ]
    done: list[str] = []
    failed: dict[str, str] = {}
    run_jobs(jobs, processes=2, threads=1, on_step=lambda *_: None, on_done=done.append, on_failed=failed.__setitem__)
    assert done == ["waits for first"]
    assert failed["first"] == "it broke"
    assert failed["needs first"] == "first: it broke"
    assert set(failed) == {"first", "needs first", "needs both"}
    assert [path.name for path in tmp_path.iterdir()] == ["c"]
    with pytest.raises(RunError, match=r"^first: it broke$"):
        run_jobs(jobs, processes=1, threads=1, on_step=lambda *_: None, on_done=done.append)


def refuses(report, message: str) -> None:
    raise InputError(message)


def breaks(report) -> None:
    raise KeyError("no such place\nand more")


def test_a_job_that_is_refused_or_breaks_loses_no_other_one(tmp_path):
    jobs = [
        Job("refused", refuses, ("the teacher is at chance level",)),
        Job("broken", breaks, ()),
        Job("good", writes, (tmp_path / "c",)),
    ]
    done: list[str] = []
    failed: dict[str, str] = {}
    run_jobs(jobs, processes=2, threads=1, on_step=lambda *_: None, on_done=done.append, on_failed=failed.__setitem__)
    assert done == ["good"]
    assert failed["refused"] == "the teacher is at chance level"
    assert failed["broken"].startswith("KeyError: 'no such place")
    with pytest.raises(InputError, match=r"^refused: the teacher is at chance level$"):
        run_jobs(jobs, processes=1, threads=1, on_step=lambda *_: None, on_done=done.append)


def test_jobs_share_the_cores_and_never_a_gpu(monkeypatch):
    monkeypatch.setattr(_jobs_module, "cores", lambda: 6)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert [side_by_side(None, count) for count in (2, 6, 40)] == [2, 6, 6]
    assert [threads_for(count) for count in (2, 4, 9)] == [3, 1, 1]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert [side_by_side(wanted, 40) for wanted in (None, 3)] == [1, 3]


def test_a_job_waits_for_the_end_of_one_that_fails(tmp_path):
    late, copy = tmp_path / "late", tmp_path / "copy"
    jobs = [Job("copy", copies, (late, copy), (), ("late",)), Job("late", fails_later, (late,))]
    failed: dict[str, str] = {}
    run_jobs(
        jobs, processes=2, threads=1, on_step=lambda *_: None, on_done=lambda _: None, on_failed=failed.__setitem__
    )
    assert (failed, copy.read_text()) == ({"late": "it broke"}, "late")


# The command

RUN = SPEC | {
    "objectives": {
        "natural": {},
        "pgd_at": {"attack": {"steps": 1}, "trials": [{"optimizer": {"learning_rate": 1e30}}, {}, {"ema": 0.999}]},
        "broken": {"objective": "natural", "optimizer": {"learning_rate": 1e30}},
        "rslad": {"attack": {"steps": 1}},
    },
    "seeds": [0],
    "n": 60,
}
GOOD = ["natural/cnn-2/no-teacher", "pgd_at/cnn-2/no-teacher", "rslad/cnn-2/big"]


class Ended(NamedTuple):
    """How the command ended."""

    status: int
    out: str
    err: str


@pytest.fixture
def compare(capsys, monkeypatch):
    """Run the command in a folder of its own."""

    def run(folder: Path, *options: str, **changes: Any) -> Ended:
        monkeypatch.chdir(folder)
        Path("compare.yaml").write_text(yaml.safe_dump(RUN | changes, sort_keys=False))
        with pytest.raises(SystemExit) as ended:
            main(["compare", "--recipe", "compare.yaml", "--out", "out", *options])
        return Ended(int(ended.value.code), *capsys.readouterr())

    return run


@pytest.fixture(scope="module")
def done(tmp_path_factory) -> Path:
    """The folder of a comparison that ran to its end, with one cell that fails; tests work on a copy."""
    folder = tmp_path_factory.mktemp("compare")
    (folder / "compare.yaml").write_text(yaml.safe_dump(RUN, sort_keys=False))
    command = [sys.executable, "-m", "crdnd", "compare", "--recipe", "compare.yaml", "--out", "out"]
    ended = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert ended.returncode == 1, ended.stderr
    assert ended.stderr.splitlines()[-1].startswith(
        "error: 1 of 4 cells failed, broken/cnn-2/no-teacher/seed-0 because the loss is not finite"
    )
    (folder / "shown.txt").write_text(ended.stdout)
    return folder


@pytest.fixture
def copied(done: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(done, tmp_path / "copy"))


def document(folder: Path) -> Comparison:
    return load_comparison(folder / "out" / "compare.json")


def log(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "out" / "test-log.jsonl").read_text().splitlines()]


def weights(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Every model and evaluation, with the time at which it was written."""
    files = [path for name in ("model.safetensors", "evaluation.json") for path in (folder / "out").rglob(name)]
    return {str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.read_bytes()) for path in files}


@pytest.mark.slow
def test_the_document_says_what_was_measured_chosen_and_lost(done):
    found = document(done)
    assert [cell.name for cell in found.cells if cell.row] == [f"{name}/seed-0" for name in GOOD]
    (failed,) = (cell for cell in found.cells if cell.failed)
    assert failed.objective == "broken"
    assert "the loss is not finite" in failed.failed
    (choice,) = found.choices
    assert [bool(trial.failed) for trial in choice.trials] == [True, False, False]
    assert choice.chosen == choose(choice.trials) + 1
    test = load_data("digits", 0).test.subset(torch.arange(60))
    assert found.protocols == [make_protocol(test, ThreatModel(eps=0.1), PRESETS["quick"].attacks)]
    for cell in found.cells[:1] + found.cells[-1:]:
        card = read_card(done / "out" / cell.folder)
        assert (cell.row.model_sha256, cell.teacher_sha256, card.split_seed) == (card.sha256, card.teacher_sha256, 0)
        assert (cell.row.n, cell.epochs, cell.best_epoch) == (60, 1, 1)
        assert cell.best.robust.n == 200
        assert cell.seconds > 0
    (teacher,) = found.teachers
    assert (teacher.name, teacher.seed, teacher.sha256) == ("big", 0, found.cells[-1].teacher_sha256)
    assert found.cells[1].trial == choice.chosen
    assert f"trial-{choice.chosen}" in found.cells[1].folder


@pytest.mark.slow
def test_every_look_at_test_data_is_in_the_log(done):
    entries, cells = log(done), {cell.name: cell for cell in document(done).cells}
    assert sorted(entry["cell"] for entry in entries) == sorted(f"{name}/seed-0" for name in GOOD)
    for entry in entries:
        cell = cells[entry["cell"]]
        assert entry["model_sha256"] == cell.row.model_sha256
        assert entry["protocol"] == cell.protocol
        assert entry["worst_case"] == cell.row.worst_case.model_dump()
        assert re.match(r"\d{4}-\d\d-\d\dT", entry["time"])


@pytest.mark.slow
def test_the_command_shows_the_leaderboard_and_where_the_files_are(done):
    shown = (done / "shown.txt").read_text()
    assert all(name in shown for name in ("natural", "pgd_at", "rslad", "broken", "compare.json", "report.html"))
    for name in ("report.html", "leaderboard.csv", "leaderboard.tex"):
        assert "rslad" in (done / "out" / name).read_text()


@pytest.mark.slow
def test_finished_cells_are_not_computed_again_and_a_new_seed_computes_its_own(copied, compare):
    before, looks = weights(copied), len(log(copied))
    again = compare(copied, "--json")
    assert again.status == 1
    assert [line.split(": ")[:2] for line in again.err.splitlines()[:-1]] == [
        ["broken/cnn-2/no-teacher/seed-0", "failed"]
    ]
    assert Comparison.model_validate_json(again.out) == document(copied)
    assert (weights(copied), len(log(copied))) == (before, looks)
    more = compare(copied, seeds=[0, 1])
    assert more.status == 1
    after = weights(copied)
    assert {name: after[name] for name in before} == before
    assert all("seed-1/" in name for name in after.keys() - before.keys())
    assert sorted(entry["cell"] for entry in log(copied)[looks:]) == sorted(f"{name}/seed-1" for name in GOOD)
    assert {cell.split_seed for cell in document(copied).cells} == {0, 1}
    assert len({cell.protocol for cell in document(copied).cells if cell.row}) == 2


@pytest.mark.slow
def test_other_settings_are_refused_in_one_line_and_fresh_starts_over(copied, compare):
    before = weights(copied)
    refused = compare(copied, "--epochs", "2")
    assert (refused.status, refused.out, refused.err.count("\n")) == (2, "", 1)
    assert re.match(
        r"error: out: holds a comparison with other settings \(shared\.epochs: 1 -> 2\).*--fresh", refused.err
    )
    assert weights(copied) == before
    objectives = {"natural": {}}
    assert compare(copied, "--epochs", "2", "--fresh", objectives=objectives).status == 0
    assert [cell.epochs for cell in document(copied).cells] == [2]
    assert (copied / "out.old-1" / "compare.json").exists()


@pytest.mark.slow
def test_a_cell_without_its_evaluation_is_measured_again_and_not_trained(copied, compare):
    (cell, *_) = document(copied).cells
    (copied / "out" / cell.folder / "evaluation.json").write_text("{}")
    (copied / "out" / "compare.json").write_text(document(copied).model_copy(update={"cells": []}).to_json())
    before, looks = (copied / "out" / cell.folder / "model.safetensors").stat().st_mtime_ns, len(log(copied))
    assert compare(copied).status == 1
    assert (copied / "out" / cell.folder / "model.safetensors").stat().st_mtime_ns == before
    assert [entry["cell"] for entry in log(copied)[looks:]] == [cell.name]
    assert document(copied).cells[0] == cell


@pytest.mark.slow
def test_numbers_whose_runs_are_gone_stay_until_there_are_new_ones(copied, monkeypatch):
    def stopped(*_):
        raise Interrupted("", 130)

    file = copied / "out" / "compare.json"
    before = file.read_bytes()
    monkeypatch.setattr(compare_module, "_run", stopped)
    monkeypatch.chdir(copied)
    for folder in ("cells", "teachers"):
        shutil.rmtree(f"out/{folder}")
    plan = make_plan(build(Spec, document(copied).spec), Path("out"))
    with pytest.raises(Interrupted):
        run_plan(plan, file, copied / "log", 1)
    assert file.read_bytes() == before


OTHER = ("--preset", "apgd", "--n", "20")


def other_protocol() -> str:
    test = load_data("digits", 0).test.subset(torch.arange(20))
    return make_protocol(test, ThreatModel(eps=0.1), PRESETS["apgd"].attacks).fingerprint


def models(folder: Path) -> dict[str, tuple[int, bytes]]:
    return {name: value for name, value in weights(folder).items() if name.endswith(".safetensors")}


@pytest.mark.slow
def test_another_protocol_measures_every_cell_again_and_trains_none(copied, compare):
    before, looks, old = models(copied), len(log(copied)), document(copied)
    again = compare(copied, *OTHER)
    assert again.status == 1  # the broken cell
    said = r"^out/compare\.json: was measured otherwise \(preset: quick -> apgd; n: 60 -> 20\); trained runs are kept"
    assert re.search(said, again.err, re.MULTILINE)
    assert models(copied) == before
    new = document(copied)
    assert [protocol.fingerprint for protocol in new.protocols] == [other_protocol()]
    assert [(cell.name, cell.protocol, cell.row.n) for cell in new.cells if cell.row] == [
        (f"{name}/seed-0", other_protocol(), 20) for name in GOOD
    ]
    assert all(list(cell.row.attacks) == list(PRESETS["apgd"].attacks) for cell in new.cells if cell.row)
    assert new.choices == old.choices
    assert sorted((entry["cell"], entry["protocol"]) for entry in log(copied)[looks:]) == [
        (f"{name}/seed-0", other_protocol()) for name in GOOD
    ]
    header = (copied / "out" / "leaderboard.csv").read_text()
    assert "apgd_ce" in header
    assert "pgd_sat" not in header
    report = (copied / "out" / "report.html").read_text()
    assert other_protocol() in report
    assert old.protocols[0].fingerprint not in report
    looks = len(log(copied))
    assert "was measured otherwise" not in compare(copied, *OTHER).err
    assert len(log(copied)) == looks


@pytest.mark.slow
def test_a_comparison_stopped_under_another_protocol_never_mixes_two(copied, compare, monkeypatch):
    def stopped(plan, log, processes):
        measure_cell(lambda *_: None, plan.grid.cells[0], plan.spec.preset, plan.spec.n, log)
        raise Interrupted("", 130)

    shutil.rmtree(copied / "out" / "cells" / "rslad")  # its numbers are of the old protocol alone
    files = {name: (copied / "out" / name).read_bytes() for name in ("compare.json", "leaderboard.csv", "report.html")}
    with monkeypatch.context() as patched:
        patched.setattr(compare_module, "_run", stopped)
        assert compare(copied, *OTHER).status == 130
    assert {name: (copied / "out" / name).read_bytes() for name in files} == files
    looks = log(copied)
    assert [entry["protocol"] == other_protocol() for entry in looks] == [False, False, False, True]
    assert compare(copied, *OTHER).status == 1
    assert {cell.protocol for cell in document(copied).cells if cell.row} == {other_protocol()}
    assert sorted(entry["cell"] for entry in log(copied)[len(looks) :]) == [f"{name}/seed-0" for name in GOOD[1:]]


def test_a_second_command_in_the_same_folder_is_refused_in_one_line(tmp_path, compare):
    (tmp_path / "out").mkdir()
    with exclusive(tmp_path / "out"):
        refused = compare(tmp_path)
    assert (refused.status, refused.out) == (2, "")
    assert refused.err == "error: out: another run is writing here; wait for it or choose another --out.\n"
    assert [path.name for path in (tmp_path / "out").iterdir()] == [".lock"]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="this system has no process groups")
def test_a_killed_comparison_goes_on_with_the_same_command(tmp_path, compare):
    changes = {"objectives": {"natural": {}, "rslad": {"attack": {"steps": 1}}}}
    (tmp_path / "compare.yaml").write_text(yaml.safe_dump(RUN | changes, sort_keys=False))
    command = [sys.executable, "-m", "crdnd", "compare", "--recipe", "compare.yaml", "--out", "out", "--jobs", "1"]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL, start_new_session=True)
    while process.poll() is None and not list((tmp_path / "out").rglob("evaluation.json")):
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    before = weights(tmp_path)
    ended = compare(tmp_path, **changes)
    assert ended.status == 0, ended.err
    after = weights(tmp_path)
    assert {name: after[name] for name in before} == before
    assert len(after) > len(before)
    assert [cell.name for cell in document(tmp_path).cells] == [f"{GOOD[0]}/seed-0", f"{GOOD[2]}/seed-0"]
    assert len(log(tmp_path)) == 2


def test_options_make_the_same_spec_as_a_recipe(tmp_path, compare, monkeypatch):
    from crdnd.cli.compare import _spec

    found = _spec(
        None, ["batch_size=300"], {"threat": {"eps": "0.1"}, "epochs": 1},
        {"seeds": [0, 1], "preset": "quick", "n": 60},
        "rslad,natural", ["cnn,width=2", "cnn"], ["runs/big", "package.module:factory"],
    )  # fmt: skip
    assert found == build(
        Spec,
        {
            "shared": {"threat": {"eps": "0.1"}, "epochs": 1, "batch_size": 300},
            "teachers": {"big": {"teacher": "runs/big"}, "factory": {"teacher": "package.module:factory"}},
            "students": {"cnn,width=2": {"model": {"name": "cnn", "width": 2}}, "cnn": {"model": {"name": "cnn"}}},
            "objectives": {"rslad": {}, "natural": {}},
            "seeds": [0, 1],
            "splits": "fixed",
            "preset": "quick",
            "n": 60,
        },
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "objectives: this setting is required; give it with --objectives or in a recipe"),
        (("--objectives", "natural"), "students: this setting is required; give it with --student or in a recipe"),
        (("--objectives", "natural", "--student", "cnn,8"), "--student cnn,8: write it as cnn, or with settings"),
        (("--objectives", "natural", "--student", "cnn"), "threat: this setting is required"),
        (("--objectives", "natrual", "--student", "cnn", "--eps", "0.1"), "did you mean 'natural'"),
        (("--objectives", "natural", "--student", "cnn", "--eps", "0.1", "--preset", "quik"), "did you mean 'quick'"),
        (("--recipe", "none.yaml"), "none.yaml: cannot be read"),
        (("--objectives", "natural", "--student", "cnn", "--eps", "0.1", "--out", ""), "out: is empty, as what an"),
    ],
)
def test_a_mistake_in_the_options_costs_one_line(options, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        main(["compare", *options, "--json"])
    shown = capsys.readouterr()
    assert (ended.value.code, shown.out, shown.err.count("\n")) == (2, "", 1)
    assert message in shown.err
    assert not list(tmp_path.iterdir())
