import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from crdnd import load_data, load_model
from crdnd.cli import main
from crdnd.config import build
from crdnd.engine import is_finished
from crdnd.engine.checkpoint import read_checkpoint
from crdnd.evaluation import Results, make_protocol
from crdnd.models import weights_sha256
from crdnd.threat import ThreatModel

RECIPE = """
schema: crdnd.demo/1
shared:
  data: digits
  threat: {norm: linf, eps: 0.1}
  epochs: 5
  batch_size: 300
teacher: {objective: trades, model: {name: cnn, width: 3}, attack: {steps: 1}}
student: {model: {name: cnn, width: 2}}
students:
  natural: {}
  rslad: {attack: {steps: 1}}
attacks: [fgsm, pgd_sat]
"""
NAMES = ("teacher", "natural", "rslad")


def run_demo(folder: Path, *options: str, recipe: str = RECIPE) -> int:
    (folder / "demo.yaml").write_text(recipe)
    with pytest.raises(SystemExit) as ended:
        main(["demo", "--recipe", str(folder / "demo.yaml"), "--out", str(folder / "out"), *options])
    return int(ended.value.code)


def content(folder: Path) -> dict[str, bytes]:
    """Every file but locks, logs and the report, which shows when it was made."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name not in (".lock", "run.log")]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files if path.suffix != ".html"}


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a demo that ran to its end; tests that change it work on a copy."""
    folder = tmp_path_factory.mktemp("demo")
    assert run_demo(folder, "--epochs", "2") == 0
    return folder


@pytest.fixture
def copied(done: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A demo that ran to its end, in the same place as before as far as its runs can tell."""
    monkeypatch.chdir(tmp_path)
    return Path(shutil.copytree(done, tmp_path / "copy"))


def results_of(folder: Path) -> Results:
    return build(Results, json.loads((folder / "out" / "results.json").read_text()))


@pytest.mark.slow
def test_the_demo_measures_every_model_best_and_last(done):
    results = results_of(done)
    assert [(row.method, row.role, row.checkpoint) for row in results.rows] == [
        ("trades", "teacher", "best"),
        ("trades", "teacher", "last"),
        ("natural", "student", "best"),
        ("natural", "student", "last"),
        ("rslad", "student", "best"),
        ("rslad", "student", "last"),
    ]
    test = load_data("digits").test
    assert results.protocol == make_protocol(test, ThreatModel(eps=0.1), ["fgsm", "pgd_sat"])
    for row in results.rows:
        assert (row.n, row.seed) == (450, 0)
        assert set(row.attacks) == {"fgsm", "pgd_sat"}
        assert row.model == ("cnn(width=3)" if row.role == "teacher" else "cnn(width=2)")
        assert row.worst_case.correct <= min(row.clean.correct, *(count.correct for count in row.attacks.values()))


@pytest.mark.slow
def test_every_row_of_the_demo_is_about_a_model_in_its_folder(done):
    rows = iter(results_of(done).rows)
    test = load_data("digits").test
    for name in NAMES:
        for folder in (done / "out" / name, done / "out" / name / "last"):
            row, model = next(rows), load_model(folder)
            assert row.model_sha256 == weights_sha256(model)
            assert row.params == sum(parameter.numel() for parameter in model.parameters())
            assert row.clean.correct == int((model(test.x).argmax(1) == test.y).sum())
    # The comparison would miss a mix-up if both checkpoints were the same.
    assert len({row.model_sha256 for row in results_of(done).rows}) > len(NAMES)
    teacher = json.loads((done / "out" / "teacher" / "model.json").read_text())
    student = json.loads((done / "out" / "rslad" / "model.json").read_text())
    assert (teacher["role"], student["role"]) == ("teacher", "student")
    assert student["teacher_sha256"] == teacher["sha256"]


@pytest.mark.slow
def test_the_demo_writes_a_report_of_one_file(done):
    report = (done / "out" / "report.html").read_text()
    assert report.lstrip().lower().startswith("<!doctype html>")
    assert "rslad" in report


@pytest.mark.slow
def test_a_second_demo_reuses_everything_and_says_so(copied, capsys):
    before = content(copied)
    assert run_demo(copied, "--epochs", "2") == 0
    shown = capsys.readouterr()
    assert "Reused from before: teacher, natural, rslad." in " ".join(shown.out.split())
    assert set(shown.err.splitlines()) == {f"{name}: reused" for name in NAMES}
    assert content(copied) == before


@pytest.mark.slow
def test_a_demo_without_one_of_its_runs_makes_it_again_the_same(copied, capsys):
    before = results_of(copied)
    shutil.rmtree(copied / "out" / "rslad")
    (copied / "out" / "natural" / "evaluation.json").write_text("{}")
    assert run_demo(copied, "--epochs", "2", "--json") == 0
    shown = capsys.readouterr()
    assert build(Results, json.loads(shown.out)) == before
    assert results_of(copied) == before
    assert set(shown.err.splitlines()) == {"teacher: reused", "natural: reused", "rslad: done"}


@pytest.mark.slow
def test_a_demo_with_other_attacks_reuses_the_models_and_measures_again(copied, capsys):
    before = results_of(copied)
    assert run_demo(copied, "--epochs", "2", recipe=RECIPE.replace("[fgsm, pgd_sat]", "[fgsm]")) == 0
    assert "Reused from before: teacher, natural, rslad." in " ".join(capsys.readouterr().out.split())
    after = results_of(copied)
    assert after.protocol == make_protocol(load_data("digits").test, ThreatModel(eps=0.1), ["fgsm"])
    assert [row.model_sha256 for row in after.rows] == [row.model_sha256 for row in before.rows]
    assert [row.attacks["fgsm"] for row in after.rows] == [row.attacks["fgsm"] for row in before.rows]


@pytest.mark.slow
def test_a_changed_demo_is_refused_and_fresh_starts_over(copied, capsys):
    before = content(copied)
    assert run_demo(copied, "--epochs", "2", "--seed", "1") == 2
    shown = capsys.readouterr()
    assert not shown.out
    assert re.match(r"error: (teacher|natural|rslad): .*\(.*seed: 0 -> 1\).*--fresh", shown.err.splitlines()[-1])
    assert content(copied) == before
    assert run_demo(copied, "--epochs", "2", "--seed", "1", "--fresh") == 0
    assert {row.seed for row in results_of(copied).rows} == {1}
    assert content(copied / "out" / "rslad.old-1") == content_of(before, "out/rslad/")


def content_of(files: dict[str, bytes], prefix: str) -> dict[str, bytes]:
    return {name.removeprefix(prefix): data for name, data in files.items() if name.startswith(prefix)}


MISTAKES = {
    "a setting that only its run can judge": (
        RECIPE.replace("natural: {}", "natural: {optimizer: {learning_rate: 1e-3}, attack: {steps: 1}}"),
        "natural: attack.steps: objective natural trains without an attack",
    ),
    "a setting": (RECIPE.replace("natural: {}", "natural: {epoch: 3}"), "natural: epoch: no such setting"),
    "a method": (RECIPE.replace("natural: {}", "natrual: {}"), "unknown objective 'natrual'; did you mean 'natural'"),
    "an attack": (RECIPE.replace("pgd_sat]", "pgdsat]"), "unknown attack 'pgdsat'; did you mean 'pgd_sat'"),
    "a key": (RECIPE + "attcks: [fgsm]\n", "attcks: no such setting; did you mean 'attacks'"),
    "another format": (RECIPE.replace("crdnd.demo/1", "crdnd.demo/2"), r"schema: .*crdnd\.demo/1.*crdnd\.demo/2"),
}


@pytest.mark.slow
@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_in_the_recipe_of_a_demo_costs_one_line(mistake, tmp_path, capsys):
    recipe, message = MISTAKES[mistake]
    assert run_demo(tmp_path, "--epochs", "2", "--json", recipe=recipe) == 2
    shown = capsys.readouterr()
    assert not shown.out
    lines = [line for line in shown.err.splitlines() if not line.endswith((": done", ": reused"))]
    assert len(lines) == 1
    assert re.search(f"^error: .*{message}", lines[0])
    assert not (tmp_path / "out" / "results.json").exists()


def test_a_demo_knows_its_attacks_before_it_trains(tmp_path):
    assert run_demo(tmp_path, "--epochs", "2", recipe=RECIPE.replace("pgd_sat]", "pgdsat]")) == 2
    assert not (tmp_path / "out" / "teacher").exists()


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="this system has no signals to a group of processes")
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stopped_demo_leaves_no_process_and_goes_on(number, code, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    (tmp_path / "demo.yaml").write_text(
        RECIPE.replace("epochs: 5", "epochs: 10\n  validate_every: 10").replace("300", "32")
    )
    command = [sys.executable, "-m", "crdnd", "demo", "--recipe", "demo.yaml", "--out", "out", "--json"]
    process = subprocess.Popen(
        command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    # A run catches signals from before its first step on; what it says earlier is of its data.
    log = out / "teacher" / "run.log"
    while process.poll() is None and not (log.exists() and "epoch 1/" in log.read_text(encoding="utf-8")):
        time.sleep(0.01)
    children = psutil.Process(process.pid).children(recursive=True)
    assert children
    # Ctrl-C goes to all processes of a terminal, SIGTERM to the one that was named.
    os.killpg(process.pid, number) if number == signal.SIGINT else process.send_signal(number)
    shown, said = process.communicate()
    assert process.returncode == code
    assert not shown
    way_on = "The same command, without --fresh, goes on from there."
    assert said.splitlines()[-1] == f"stopped; everything is saved in out. {way_on}"
    assert "Traceback" not in said
    _, alive = psutil.wait_procs(children, timeout=10)
    assert not alive
    assert not is_finished(out / "teacher")
    assert read_checkpoint(out / "teacher") is not None
    assert not (out / "results.json").exists()

    if number == signal.SIGINT:
        monkeypatch.chdir(tmp_path)
        with pytest.raises(SystemExit) as ended:
            main(command[3:])
        assert ended.value.code == 0
        assert len(json.loads(capsys.readouterr().out)["rows"]) == 6
