"""`crdnd study`: parts of a study are comparisons that share their teachers."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from crdnd.cli import main, study
from crdnd.cli._grid import make_grid
from crdnd.errors import InputError
from crdnd.recipe import Recipe

torch.set_num_threads(1)  # networks this small wait for their threads more than they compute

TINY: dict[str, Any] = {
    "all": {
        "shared": {"threat": {"eps": 0.1}, "epochs": 1, "batch_size": 300, "check_teacher": False},
        "students": {"cnn-2": {"model": {"name": "cnn", "width": 2}}},
        "seeds": [0],
        "preset": "quick",
        "n": 20,
    },
    "teachers": {
        "big": {"objective": "natural", "model": {"name": "cnn", "width": 3}},
        "spoiled": {"objective": "natural", "model": {"name": "cnn", "width": 3}, "label_noise": 0.3},
    },
    "parts": {
        "main": {"teachers": ["big"], "objectives": {"rslad": {}, "natural": {}}},
        "noise": {"teachers": ["big", "spoiled"], "objectives": {"rslad": {}}},
        "quick": {"teachers": ["big"], "objectives": {"natural": {}}, "seeds": [0]},
    },
}


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to work in, where `tiny` is a study."""
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(TINY))
    monkeypatch.setattr(study, "FOLDER", tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as ended:
        main(["study", *arguments])
    return int(ended.value.code or 0)


def test_parts_share_what_one_of_them_has_done(tiny, capsys):
    assert run("tiny", "--jobs", "1") == 0
    assert not (tiny / "results/tiny/quick.json").exists()
    parts = {part: json.loads((tiny / f"results/tiny/{part}.json").read_text()) for part in ("main", "noise")}
    assert len(parts["main"]["cells"]) == 2
    assert [cell["teacher"] for cell in parts["noise"]["cells"]] == ["big", "spoiled"]
    looks = (tiny / "results/test-log.jsonl").read_text().splitlines()
    assert len(looks) == 3  # rslad from big was measured once, for both
    capsys.readouterr()
    assert run("tiny", "--json") == 0
    assert [len(document["cells"]) for document in json.loads(capsys.readouterr().out)] == [2, 2]
    assert (tiny / "results/test-log.jsonl").read_text().splitlines() == looks


def test_a_part_that_is_measured_otherwise_keeps_its_runs(tiny, monkeypatch):
    assert run("tiny", "--quick", "--jobs", "1") == 0
    before = {file: file.stat().st_mtime_ns for file in (tiny / "runs").rglob("model.safetensors")}
    assert before
    (tiny / "tiny.yaml").write_text(yaml.safe_dump(TINY | {"all": TINY["all"] | {"n": 15}}))
    assert run("tiny", "--quick", "--jobs", "1") == 0
    assert {file: file.stat().st_mtime_ns for file in before} == before
    assert [cell["row"]["n"] for cell in json.loads((tiny / "results/tiny/quick.json").read_text())["cells"]] == [15]


def test_the_quick_form_is_a_part_of_its_own(tiny):
    assert run("tiny", "--quick", "--jobs", "1") == 0
    assert [file.name for file in (tiny / "results/tiny").iterdir()] == ["quick.json"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tinny"], "study: there is no 'tinny'; did you mean 'tiny'?"),
        (["tiny", "--part", "nose"], "--part: tiny has no part 'nose'; did you mean 'noise'?"),
        (["tiny", "--quick", "--part", "main"], "--quick: is a part of its own; leave out --part."),
    ],
)
def test_what_is_not_there_is_said_in_one_line(tiny, capsys, arguments, message):
    assert run(*arguments) == 2
    assert capsys.readouterr().err.startswith(f"error: {message}")
    assert not (tiny / "runs").exists()


@pytest.mark.parametrize("name", sorted(file.stem for file in study.FOLDER.glob("*.yaml")))
def test_every_shipped_study_can_be_run(name, tmp_path):
    parts = study.study_parts(name)
    assert study.QUICK in parts
    folders: dict[str, Recipe] = {}
    for spec in parts.values():
        grid = make_grid(spec, tmp_path)
        runs = [run for cell in grid.cells for run in cell.candidates]
        for run in [*runs, *grid.trials.values(), *grid.teachers.values()]:
            assert folders.setdefault(run.out, run) == run, "two parts mean different runs by one folder"


def test_an_unknown_study_is_refused():
    with pytest.raises(InputError, match="there is no 'nothing'"):
        study.study_parts("nothing")
