import json
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import typer

from crdnd import create_model, load_data, load_model
from crdnd.attacks import attack_names
from crdnd.cli import _main, main
from crdnd.config import build
from crdnd.evaluation import PRESETS, TABLE_ATTACKS, Results, load_adversarial, make_protocol
from crdnd.models import model_names, weights_sha256
from crdnd.objectives import objective_names
from crdnd.provenance import installed_version
from crdnd.recipe import Recipe
from crdnd.threat import ThreatModel

torch.set_num_threads(1)  # networks this small wait for their threads more than they compute

TINY = ("--model", "cnn", "--epochs", "1", "--set", "model.width=2")
ATTACKED = ("--set", "attack.steps=1")
LINF = ("--eps", "0.1")


class Ended(NamedTuple):
    """How a command ended and what it said."""

    status: int
    out: str
    err: str


Command = Callable[..., Ended]


@pytest.fixture
def crdnd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Run a command in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))

    def run(*arguments: str) -> Ended:
        monkeypatch.setattr(sys, "argv", ["crdnd", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        return Ended(ended.value.code, *capsys.readouterr())

    return run


@pytest.fixture(scope="module")
def natural(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run on the digits."""
    out = tmp_path_factory.mktemp("natural") / "run"
    with pytest.raises(SystemExit) as ended:
        main(["train", "--objective", "natural", *TINY, *LINF, "--out", str(out)])
    assert ended.value.code == 0
    return out


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# Help


OPTIONS = {
    "train": {
        "--recipe", "--set", "--images", "--data", "--data-dir", "--model", "--objective", "--eps", "--norm",
        "--epochs", "--seed",
        "--precision", "--tf32", "--deterministic", "--compile", "--save-every-steps", "--out", "--fresh", "--json",
    },
    "distill": {
        "--recipe", "--set", "--images", "--data", "--data-dir", "--teacher", "--teacher-weights", "--second-teacher",
        "--second-teacher-weights", "--model", "--objective", "--eps", "--norm", "--epochs", "--seed",
        "--precision", "--tf32", "--deterministic", "--compile", "--save-every-steps", "--out", "--fresh", "--json",
    },
    "check-teacher": {"--weights", "--data", "--data-dir", "--input", "--eps", "--norm", "--preset", "--n", "--json"},
    "evaluate": {
        "--recipe", "--set", "--weights", "--data", "--data-dir", "--n", "--preset", "--attacks", "--engine",
        "--surrogate", "--eps",
        "--norm", "--eps-sweep", "--per-class", "--batch-size", "--seed", "--save-adv", "--out", "--work", "--json",
    },
    "predict": {"--weights", "--top", "--distance", "--up-to", "--norm", "--json"},
    "export": {
        "--to", "--out", "--weights", "--data", "--data-dir", "--n", "--preset", "--square-queries", "--calibration",
        "--eps", "--norm", "--seed", "--fresh", "--json",
    },
    "compare": {
        "--recipe", "--set", "--objectives", "--student", "--teacher", "--seeds", "--data", "--data-dir", "--eps",
        "--norm",
        "--epochs", "--preset", "--n", "--baseline", "--out", "--jobs", "--fresh", "--json",
    },
    "study": {"--quick", "--part", "--out", "--results", "--jobs", "--json"},
    "diff": {"--json"},
    "demo": {"--recipe", "--out", "--jobs", "--epochs", "--seed", "--data-dir", "--fresh", "--json"},
    "list": {"--json"},
    "recipes": {"--json"},
    "runs": {"--json"},
    "status": {"--json"},
    "watch": set(),
    "estimate": {
        "--set", "--data", "--data-dir", "--teacher", "--teacher-weights", "--second-teacher",
        "--second-teacher-weights", "--teacher-model", "--model", "--objective", "--eps", "--norm", "--epochs",
        "--json",
    },
    "doctor": {"--json"},
    "card": {"--license"},
    "push": {"--private", "--revision", "--license", "--dry-run"},
    "pull": {"--out", "--sha256"},
    "data list": {"--data-dir", "--json"},
    "data get": {"--data-dir"},
    "data verify": {"--data-dir", "--json"},
    "data show": {"--out", "--per-class", "--data-dir"},
}  # fmt: skip


def test_commands_and_options_have_the_names_that_users_script_against():
    commands = dict(typer.main.get_command(_main.app).commands)
    data = commands.pop("data")
    commands |= {f"data {name}": command for name, command in data.commands.items()}
    found = {
        name: {option for parameter in command.params for option in parameter.opts if option.startswith("-")}
        for name, command in commands.items()
    }
    assert found == OPTIONS


FORMS = (
    "folder", ".safetensors", ".pt2", ".onnx", "URL#sha256=...", "hf:OWNER/NAME", "robustbench:NAME",
    "wrn,depth=34,width=10", "package.module:factory",
)  # fmt: skip


def test_whatever_takes_a_model_says_all_that_a_model_may_be():
    commands = dict(typer.main.get_command(_main.app).commands)
    takers = {
        "evaluate": "model", "predict": "model", "export": "model", "check-teacher": "teacher", "distill": "teacher",
        "compare": "teachers", "estimate": "teacher",
    }  # fmt: skip
    said = {
        f"{command} {name}": next(entry.help for entry in commands[command].params if entry.name == name)
        for command, name in takers.items()
    }
    said["recipe"] = Recipe.model_fields["teacher"].description
    assert {taker: [form for form in FORMS if form not in text] for taker, text in said.items()} == {
        taker: [] for taker in said
    }


@pytest.mark.parametrize("command", OPTIONS)
@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help_shows_every_option_and_an_example(command, flag, crdnd, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    shown = crdnd(*command.split(), flag)
    assert shown.status == 0
    assert not shown.err
    assert "Examples:" in shown.out
    assert f"crdnd {command}" in shown.out.split("Examples:")[1]
    assert all(option in shown.out for option in OPTIONS[command])


def test_the_command_without_a_command_shows_what_there_is(crdnd):
    shown = crdnd()
    assert shown.status == 0
    assert all(command.split()[0] in shown.out for command in OPTIONS)


SLOW_TO_IMPORT = ("torch", "numpy", "accelerate", "huggingface_hub", "plotly", "sklearn")


def test_the_version_is_that_of_the_package(crdnd):
    ended = crdnd("--version")
    assert (ended.status, ended.out.strip()) == (0, installed_version("crdnd"))


def test_help_does_not_wait_for_what_is_slow_to_import(tmp_path):
    script = f"""
import sys
import crdnd
from crdnd.cli import main
try:
    main(["train", "--help"])
except SystemExit:
    sys.exit(" ".join(sys.modules.keys() & {set(SLOW_TO_IMPORT)!r}))
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert not done.stderr.strip()
    assert "--objective" in done.stdout


@pytest.mark.parametrize(
    ("shell", "asked"),
    [
        ("bash", {"COMP_WORDS": "crdnd pu", "COMP_CWORD": "1"}),
        ("zsh", {"_TYPER_COMPLETE_ARGS": "crdnd pu"}),
        ("fish", {"_TYPER_COMPLETE_ARGS": "crdnd pu", "_TYPER_COMPLETE_FISH_ACTION": "get-args"}),
    ],
)
def test_shells_complete_commands(shell, asked, monkeypatch, capsys):
    for name, value in {"_CRDND_COMPLETE": f"complete_{shell}", **asked}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit):
        main([])
    found = capsys.readouterr().out
    assert "push" in found
    assert "pull" in found
    assert "train" not in found


def test_the_package_runs_as_a_module(tmp_path):
    command = [sys.executable, "-m", "crdnd", "list", "objectiv"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert not done.stdout
    assert re.fullmatch(r"error: unknown list 'objectiv'; did you mean 'objectives'\?.*\n", done.stderr)


# Lists and doctor

LISTS: dict[str, tuple[set[str], Callable[[], list[str]]]] = {
    "objectives": ({"name", "teachers", "paper"}, objective_names),
    "attacks": ({"name", "what", "paper"}, attack_names),
    "presets": ({"name", "what", "attacks"}, lambda: list(PRESETS)),
    "models": ({"name", "what", "settings"}, model_names),
}


@pytest.mark.parametrize("kind", LISTS)
def test_a_list_is_one_document(kind, crdnd):
    keys, names = LISTS[kind]
    shown = crdnd("list", kind, "--json")
    document = json.loads(shown.out)
    assert (shown.status, shown.err) == (0, "")
    assert set(document) == {kind}
    assert [entry["name"] for entry in document[kind]] == names()
    for entry in document[kind]:
        assert set(entry) == keys
        assert all(value not in (None, "") for value in entry.values())


@pytest.mark.parametrize("kind", LISTS)
def test_a_list_is_a_table_for_people(kind, crdnd):
    shown = crdnd("list", kind)
    assert (shown.status, shown.err) == (0, "")
    assert all(name in shown.out for name in LISTS[kind][1]())


def test_the_list_of_objectives_tells_how_many_teachers_each_needs(crdnd):
    entries = json.loads(crdnd("list", "objectives", "--json").out)["objectives"]
    assert {entry["name"]: entry["teachers"] for entry in entries} == {
        "natural": 0, "pgd_at": 0, "trades": 0, "mart": 0, "kd": 1, "ard": 1, "iad": 1, "rslad": 1, "adaad": 1,
        "adaiad": 1, "saad": 1, "crd": 1, "crdnd": 1, "crdnd_plus": 1, "akd": 2, "iad2": 2, "mtard": 2,
    }  # fmt: skip


def test_doctor_tells_versions_devices_threads_and_what_is_missing(crdnd):
    shown = crdnd("doctor", "--json")
    report = json.loads(shown.out)
    assert report["packages"]["torch"] == torch.__version__.split("+")[0] or report["packages"]["torch"] == str(
        torch.__version__
    )
    assert "threads" in report["devices"]["cpu"]
    assert {"crdnd", "python", "platform", "cores", "free_disk_gb", "problems"} <= set(report)
    assert shown.status == (1 if report["problems"] else 0)
    assert "torch" in crdnd("doctor").out


def test_a_command_that_is_stopped_says_so(crdnd, monkeypatch):
    from crdnd.cli import doctor

    def stopped(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(doctor, "installed_version", stopped)
    status, _, err = crdnd("doctor")
    assert (status, err.split()) == (130, ["stopped."])


def test_doctor_names_the_command_that_mends_a_gap(crdnd, monkeypatch):
    import crdnd.cli.doctor as doctor

    found = doctor.installed_version
    monkeypatch.setattr(doctor, "installed_version", lambda name: None if name == "plotly" else found(name))
    shown = crdnd("doctor", "--json")
    assert shown.status == 1
    (problem,) = json.loads(shown.out)["problems"]
    assert problem == {"what": "plotly is missing (reports)", "fix": f"{sys.executable} -m pip install plotly"}
    assert "pip install plotly" in crdnd("doctor").out


# Training


def test_train_makes_a_model_and_says_one_document(crdnd, tmp_path):
    command = ("train", "--objective", "trades", *TINY, *ATTACKED, *LINF, "--seed", "3", "--out", "runs/a", "--json")
    first, again = crdnd(*command), crdnd(*command)
    document = json.loads(first.out)
    assert (first.status, again.status) == (0, 0)
    assert "epoch 1/1" in first.err
    assert document == {
        "folder": "runs/a",
        "reused": False,
        "method": "trades",
        "model_sha256": weights_sha256(load_model(tmp_path / "runs" / "a")),
        "epochs": 1,
        "best_epoch": 1,
        "validation": document["validation"],
    }
    assert set(document["validation"]) == {"clean", "robust"}
    assert document["validation"]["clean"]["n"] == 200
    assert json.loads(again.out) == document | {"reused": True}
    card = json.loads((tmp_path / "runs" / "a" / "model.json").read_text())
    assert (card["method"], card["seed"], card["data"]) == ("trades", 3, "digits")
    assert card["command"] == "crdnd " + " ".join(command[:])


def test_a_run_of_the_command_line_has_a_first_page(natural):
    page = (natural / "README.md").read_text(encoding="utf-8")
    assert "trained by `natural` on digits" in page
    assert "robustness: not measured" in page


def test_train_tells_people_what_to_do_next(crdnd, natural):
    command = ("train", "--objective", "natural", *TINY, *LINF, "--out", str(natural))
    shown = crdnd(*command)
    assert shown.status == 0
    assert "already finished, reused" in shown.out
    assert f"crdnd evaluate {natural}" in shown.out
    assert re.search(r"Best epoch 1 of 1: validation clean \d+\.\d%, robust \d+\.\d%", shown.out)
    assert re.search(r"crdnd evaluate \S+$", shown.out.rstrip()), "the digits have a name, and no folder"


def test_the_next_command_of_a_run_of_ones_own_code_is_the_one_that_works(crdnd, tmp_path):
    Path("purenets.py").write_text(
        "from torch import nn\ndef flat():\n    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))\n"
    )
    own = ("--model", "purenets:flat", "--epochs", "1", "--norm", "l2", "--eps", "1/4", "--set", "split_seed=3")
    shown = crdnd("train", "--objective", "natural", *own, "--out", "r/with space")
    assert shown.status == 0, shown.err
    command = shlex.split(shown.out.partition("attack on test data: crdnd ")[2])
    assert command[:4] == ["evaluate", "purenets:flat", "--weights", "r/with space"]
    results = build(Results, json.loads(crdnd(*command, "--json").out))
    test = load_data("digits", 3).test
    assert results.protocol == make_protocol(test, ThreatModel(norm="l2", eps=0.25), TABLE_ATTACKS)
    card = json.loads((tmp_path / "r" / "with space" / "model.json").read_text())
    assert results.rows[0].model_sha256 == card["sha256"]
    refused = crdnd("evaluate", "r/with space")
    assert (refused.status, refused.err.count("\n")) == (2, 1)
    for form in (
        "give package.module:factory --weights 'r/with space'",
        "--teacher package.module:factory --teacher-weights 'r/with space'",
    ):
        assert form in refused.err


def test_the_next_command_names_a_folder_as_a_shell_reads_it(crdnd):
    shown = crdnd("train", "--objective", "natural", *TINY, *LINF, "--out", "r/with space")
    assert shown.out.rstrip().endswith("crdnd evaluate 'r/with space'")


@pytest.mark.parametrize(
    ("factory", "said"),
    [
        ("def net():\n    raise KeyError('no such part')", "KeyError: 'no such part'"),
        ("def net(width):\n    return width", "TypeError: net() missing 1 required positional argument: 'width'"),
    ],
)
@pytest.mark.parametrize(
    "command", [("train", "--objective", "natural", *LINF, "--out", "o", "--model"), ("evaluate",)]
)
def test_a_factory_that_fails_ends_in_one_line_that_names_it(factory, said, command, crdnd, monkeypatch):
    monkeypatch.delitem(sys.modules, "failingnets", raising=False)
    Path("failingnets.py").write_text(factory + "\n")
    ended = crdnd(*command, "failingnets:net")
    assert (ended.status, ended.out) == (2, "")
    message = f"failingnets:net: called without arguments, it failed ({said}); python -c "
    assert ended.err == f"error: {message}'import failingnets; failingnets.net()' shows where.\n"
    assert not Path("o").exists()


def test_a_run_in_the_folder_where_one_stands_is_meant_by_a_dot(crdnd):
    assert crdnd("train", "--objective", "natural", *TINY, *LINF, "--out", ".").status == 0
    assert Path("model.safetensors").exists()


def test_distill_makes_a_student_of_a_teacher(crdnd, natural, tmp_path):
    shown = crdnd(
        "distill", "--objective", "rslad", "--teacher", str(natural), *TINY, *ATTACKED, "--eps", "8/255",
        "--out", "student", "--json",
    )  # fmt: skip
    assert shown.status == 0, shown.err
    card = json.loads((tmp_path / "student" / "model.json").read_text())
    assert card["teacher_sha256"] == json.loads((natural / "model.json").read_text())["sha256"]
    assert card["threat"]["eps"] == 8 / 255
    assert json.loads(shown.out)["method"] == "rslad"


def test_a_changed_setting_is_shown_and_fresh_starts_over(crdnd, tmp_path):
    command = ("train", "--objective", "natural", *TINY, *LINF, "--out", "run", "--json")
    assert crdnd(*command).status == 0
    before = files(tmp_path / "run")
    refused = crdnd(*command, "--seed", "1")
    assert refused.status == 2
    assert not refused.out
    assert re.fullmatch(r"error: run: holds a run with other settings \(seed: 0 -> 1\)\. Use --fresh .*\n", refused.err)
    assert files(tmp_path / "run") == before
    fresh = crdnd(*command, "--seed", "1", "--fresh")
    assert (fresh.status, json.loads(fresh.out)["reused"]) == (0, False)
    assert "moved the old run to run.old-1" in fresh.err
    assert {name: data for name, data in before.items() if name != ".lock"} == files(tmp_path / "run.old-1")


def test_a_loss_that_turns_nan_ends_with_one_line_and_exit_1(crdnd, tmp_path):
    rate = ("--set", "optimizer.learning_rate=1e30")
    shown = crdnd("train", "--objective", "natural", *TINY, *LINF, *rate, "--out", "run", "--json")
    assert shown.status == 1
    assert not shown.out
    _, said = shown.err.splitlines()  # the first one says how many images the classes have
    assert re.fullmatch(r"error: the loss is not finite at step \d+ of 8; .*learning_rate.*--fresh.", said)


RECIPE = """
schema: crdnd.recipe/1
objective: {name: trades, beta: 2}
model: {name: cnn, width: 2}
threat: {norm: linf, eps: 8/255}
attack: {steps: 1}
epochs: 2
seed: 5
out: from-recipe
"""


def settings_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "run.json").read_text())["settings"]


def test_a_recipe_gives_the_settings_and_options_win(crdnd, tmp_path):
    Path("recipe.yaml").write_text(RECIPE)
    assert crdnd("train", "--recipe", "recipe.yaml", "--json").status == 0
    alone = settings_of(tmp_path / "from-recipe")
    assert alone["objective"] == {"name": "trades", "beta": 2.0, "loss_scale": 1.0}
    assert (alone["epochs"], alone["seed"], alone["threat"]["eps"]) == (2, 5, 8 / 255)
    options = ("--epochs", "1", "--eps", "0.1", "--set", "objective.beta=3", "--set", "seed=6", "--out", "both")
    assert crdnd("train", "--recipe", "recipe.yaml", *options).status == 0
    both = settings_of(tmp_path / "both")
    assert both["objective"]["beta"] == 3
    assert (both["epochs"], both["seed"], both["threat"]) == (1, 6, {"norm": "linf", "eps": 0.1})
    assert both["attack"]["steps"] == 1


def test_an_option_wins_over_set(crdnd, tmp_path):
    shown = crdnd("train", "--objective", "natural", *TINY, *LINF, "--set", "epochs=5", "--set", "out=no", "--out", "o")
    assert shown.status == 0
    assert settings_of(tmp_path / "o")["epochs"] == 1
    assert not (tmp_path / "no").exists()


def test_precision_and_its_company_are_options_of_a_run(crdnd, tmp_path):
    options = ("--precision", "bf16", "--deterministic", "--tf32", "--out", "o")
    assert crdnd("train", "--objective", "natural", *TINY, *LINF, *options).status == 0
    found = settings_of(tmp_path / "o")
    assert (found["precision"], found["deterministic"], found["tf32"]) == ("bf16", True, True)
    refused = crdnd("train", "--objective", "natural", *TINY, *LINF, "--precision", "half", "--compile", "--out", "p")
    assert refused.status == 2
    assert "precision" in refused.err


# Evaluation


def test_evaluate_takes_data_and_threat_model_from_the_card(crdnd, natural, tmp_path):
    shown = crdnd("evaluate", str(natural), "--json", "--out", "results.json")
    assert shown.status == 0, shown.err
    results = build(Results, json.loads(shown.out))
    (row,) = results.rows
    test = load_data("digits").test
    assert results.protocol == make_protocol(test, ThreatModel(eps=0.1), TABLE_ATTACKS)
    assert (row.method, row.role, row.checkpoint, row.seed, row.n) == ("natural", "student", "best", 0, 450)
    right = load_model(natural)(test.x).argmax(1) == test.y
    assert row.clean.correct == int(right.sum())
    assert row.worst_case.correct <= min(count.correct for count in row.attacks.values())
    assert (tmp_path / "results.json").read_text() == shown.out
    assert [line for line in shown.err.splitlines() if "attacking" in line] == [
        f"attacking with {name} ..." for name in TABLE_ATTACKS
    ]


def test_evaluate_takes_what_is_given_instead(crdnd, natural):
    options = ("--eps", "0.5", "--norm", "l2", "--attacks", "cw_inf,fgsm", "--seed", "4", "--json")
    results = build(Results, json.loads(crdnd("evaluate", str(natural), *options).out))
    assert results.protocol == make_protocol(
        load_data("digits").test, ThreatModel(norm="l2", eps=0.5), ["cw_inf", "fgsm"], seed=4
    )
    eps_alone = build(Results, json.loads(crdnd("evaluate", str(natural), "--eps", "0.2", *options[4:]).out))
    assert (eps_alone.protocol.norm, eps_alone.protocol.eps) == ("linf", 0.2)


def test_evaluate_takes_a_folder_a_file_and_a_factory(crdnd, natural):
    Path("mynets.py").write_text(
        "from crdnd import create_model\n"
        "def small():\n"
        "    return create_model('cnn', input_shape=(1, 8, 8), num_classes=10, width=3, seed=1)\n"
    )
    fgsm = ("--attacks", "fgsm", "--json")
    rows = [
        build(Results, json.loads(crdnd("evaluate", *spec, *fgsm).out)).rows[0]
        for spec in (
            (str(natural),),
            (str(natural / "model.safetensors"),),
            (str(natural / "last"),),
            ("mynets:small", "--data", "digits", "--eps", "0.1"),
        )
    ]
    assert rows[0] == rows[1]
    assert (rows[2].checkpoint, rows[2].clean.n) == ("last", 450)
    own = create_model("cnn", input_shape=(1, 8, 8), num_classes=10, width=3, seed=1)
    assert rows[3].model_sha256 == weights_sha256(own)
    assert (rows[3].method, rows[3].checkpoint) == ("mynets:small", None)


def test_evaluate_reads_a_recipe(crdnd, natural):
    Path("evaluate.yaml").write_text(f"model: {natural}\nattacks: [fgsm]\nthreat: {{eps: 0.3}}\n")
    results = build(Results, json.loads(crdnd("evaluate", "--recipe", "evaluate.yaml", "--json").out))
    assert results.protocol == make_protocol(load_data("digits").test, ThreatModel(eps=0.3), ["fgsm"])


def test_evaluate_shows_a_table_to_people(crdnd, natural):
    shown = crdnd("evaluate", str(natural), "--attacks", "fgsm")
    assert shown.status == 0
    assert "fgsm" in shown.out
    assert "450" in shown.out


def test_a_model_is_measured_on_the_test_images_of_its_own_split(crdnd):
    """Those of another split are among the images that it was trained on."""
    command = ("train", "--objective", "natural", *TINY, *LINF, "--set", "split_seed=1", "--out", "run")
    assert crdnd(*command).status == 0
    results = json.loads(crdnd("evaluate", "run", "--attacks", "fgsm", "--json").out)
    assert results["protocol"]["data_sha256"] == load_data("digits", 1).test.sha256


def test_results_are_not_lost_to_a_folder_that_is_not_there(crdnd, natural, tmp_path):
    shown = crdnd("evaluate", str(natural), "--attacks", "fgsm", "--out", "not/there.json")
    assert "attacking" not in shown.err or (tmp_path / "not" / "there.json").exists()


def test_a_preset_names_its_attacks_and_their_settings(crdnd, natural):
    quick = {"pgd_sat": {}, "cw_inf": {}, "apgd_t": {"iterations": 2, "targets": 1}}
    options = [f"attacks.apgd_t.{key}={value}" for key, value in quick["apgd_t"].items()]
    settings = [part for option in options for part in ("--set", option)]
    shown = crdnd("evaluate", str(natural), "--preset", "quick", *settings, "--n", "40", "--json")
    results = build(Results, json.loads(shown.out))
    test = load_data("digits").test.subset(torch.arange(40))
    assert results.protocol == make_protocol(test, ThreatModel(eps=0.1), quick)
    assert (results.rows[0].n, list(results.rows[0].attacks)) == (40, list(quick))


def test_attacks_on_the_command_line_replace_those_of_a_recipe_and_keep_their_settings(crdnd, natural):
    Path("r.yaml").write_text(f"model: {natural}\nattacks: {{square: {{queries: 3}}, fgsm: {{}}}}\n")
    both = json.loads(crdnd("evaluate", "--recipe", "r.yaml", "--n", "20", "--json").out)["protocol"]["attacks"]
    assert (list(both), both["square"]["queries"]) == (["square", "fgsm"], 3)
    one = crdnd("evaluate", "--recipe", "r.yaml", "--n", "20", "--attacks", "square,cw_inf", "--json")
    found = json.loads(one.out)["protocol"]["attacks"]
    assert (list(found), found["square"]["queries"]) == (["square", "cw_inf"], 3)


def test_evaluate_shows_classes_a_sweep_and_the_verdict(crdnd, natural):
    shown = crdnd(
        "evaluate", str(natural), "--attacks", "fgsm", "--n", "30", "--per-class", "--eps-sweep", "0.2,1/100,0.2,4/255",
        "--batch-size", "auto",
    )  # fmt: skip
    assert shown.status == 0, shown.err
    assert re.findall(r"^eps (\S+): ", shown.out, re.MULTILINE) == ["0.01", "4/255", "0.2"]
    assert re.search(r"^ +9 +.*/", shown.out, re.MULTILINE)
    assert re.search(r"^verdict: (consistent|suspicious because)", shown.out, re.MULTILINE)


def test_an_evaluation_goes_on_where_it_was_and_says_nothing_new(crdnd, natural):
    command = ("evaluate", str(natural), "--attacks", "square", "--set", "attacks.square.queries=5", "--json")
    first, again = crdnd(*command), crdnd(*command)
    assert first.out == again.out
    assert "attacking" in first.err
    assert "attacking" not in again.err
    fresh = crdnd(*command, "--work", "elsewhere")
    assert "attacking" in fresh.err
    assert fresh.out == first.out


def test_a_model_and_images_from_files_of_the_users(crdnd, natural):
    Path("othernets.py").write_text(
        "from crdnd import create_model\n"
        "def small():\n"
        "    return create_model('cnn', input_shape=(1, 8, 8), num_classes=10, width=2)\n"
    )
    test = load_data("digits").test
    np.savez("mine.npz", x=(test.x[:33] * 255).round().to(torch.uint8).numpy(), y=test.y[:33].numpy())
    torch.save(load_model(natural).state_dict(), "w.pt")
    options = ("--data", "mine.npz", "--eps", "0.1", "--attacks", "fgsm", "--json")
    shown = crdnd("evaluate", "othernets:small", "--weights", "w.pt", *options)
    assert shown.status == 0, shown.err
    results = build(Results, json.loads(shown.out))
    assert results.protocol.data == "mine"
    assert results.rows[0].model_sha256 == weights_sha256(load_model(natural))


def test_transfer_takes_its_images_from_another_model(crdnd, natural):
    options = ("--attacks", "transfer", "--n", "25", "--json")
    shown = crdnd("evaluate", str(natural), *options, "--surrogate", str(natural / "last"))
    settings = json.loads(shown.out)["protocol"]["attacks"]["transfer"]
    assert settings["surrogate_sha256"] == weights_sha256(load_model(natural / "last"))


def test_the_reference_engine_runs_the_official_attack(crdnd, natural, monkeypatch):
    pytest.importorskip("pyautoattack")
    options = ("--preset", "standard", "--n", "20", "--eps", "0.3", "--json")
    ours, theirs = (
        crdnd("evaluate", str(natural), *options),
        crdnd("evaluate", str(natural), *options[:-1], "--engine", "reference", "--json"),
    )
    (one,), (other,) = (build(Results, json.loads(shown.out)).rows for shown in (ours, theirs))
    assert abs(one.worst_case.correct - other.worst_case.correct) <= 1
    assert json.loads(theirs.out)["protocol"]["attacks"]["autoattack"]["package"].startswith("pyautoattack ")


def test_adversarial_images_are_written_and_can_be_verified(crdnd, natural):
    shown = crdnd("evaluate", str(natural), "--attacks", "cw_inf,fgsm", "--save-adv", "new/adv.safetensors", "--json")
    row = build(Results, json.loads(shown.out)).rows[0]
    found = load_adversarial("new/adv.safetensors", load_model(natural), load_data("digits").test)
    assert {name: len(entry.ids) for name, entry in found.items()} == {
        name: count.n - count.correct for name, count in row.attacks.items()
    }


def test_two_models_are_compared_sample_by_sample(crdnd, natural):
    for name, model in (("a", natural), ("b", natural / "last")):
        assert crdnd("evaluate", str(model), "--attacks", "fgsm", "--out", f"{name}.json").status == 0
    shown = crdnd("diff", "a.json", "b.json")
    assert shown.status == 0, shown.err
    assert all(word in shown.out for word in ("clean", "fgsm", "worst_case"))
    found = json.loads(crdnd("diff", "a.json", "b.json", "--json").out)
    one, other = (build(Results, json.loads(Path(f"{name}.json").read_text())).rows[0] for name in "ab")
    assert found["fgsm"]["points"] == pytest.approx(one.attacks["fgsm"].percent - other.attacks["fgsm"].percent)
    assert crdnd("evaluate", str(natural), "--attacks", "fgsm", "--eps", "0.2", "--out", "c.json").status == 0
    refused = crdnd("diff", "a.json", "c.json")
    assert (refused.status, refused.err.count("\n")) == (2, 1)
    assert "they differ in eps" in refused.err


# Mistakes

MISTAKES: dict[str, tuple[tuple[str, ...], str]] = {
    "command": (("trian",), "No such command 'trian'"),
    "option": (("train", "--objectve", "ard"), "No such option.*--objectve"),
    "number": (("train", "--epochs", "many"), "Invalid value for '--epochs'"),
    "too much": (("doctor", "now"), ".*unexpected extra argument"),
    "nothing to list": (("list",), "Missing argument"),
    "list": (("list", "modles"), "unknown list 'modles'; did you mean 'models'"),
    "no objective": (("train", *TINY, *LINF, "--out", "o"), "objective: .*required; give it with --objective"),
    "no model": (("train", "--objective", "natural", *LINF, "--out", "o"), "model: .*required; give it with --model"),
    "no eps": (("train", "--objective", "natural", *TINY, "--out", "o"), "threat: .*required; give it with --eps"),
    "norm without eps": (("train", "--objective", "natural", *TINY, "--norm", "l2", "--out", "o"), "threat.eps: .*req"),
    "no folder": (("train", "--objective", "natural", *TINY, *LINF), "out: .*required; give it with --out"),
    "folder without a name": (
        ("train", "--objective", "natural", *TINY, *LINF, "--out", ""),
        "out: is empty, as what an unset variable gives; name a folder, or write . for the current one",
    ),
    "folder without a name for a student": (
        ("distill", "--objective", "ard", "--teacher", "model", *TINY, *LINF, "--out", ""),
        "out: is empty, as what an unset variable gives",
    ),
    "folder of the teacher": (
        ("distill", "--objective", "ard", "--teacher", "model", *TINY, *LINF, "--out", "./model/", "--fresh"),
        r"out: is the teacher's folder; choose another\.$",
    ),
    "folder of the second teacher": (
        (
            *("distill", "--objective", "mtard", "--teacher", "model/last", "--second-teacher", "model"),
            *(*TINY, *LINF, "--out", "model"),
        ),
        r"out: is the teacher's folder; choose another\.$",
    ),
    "objective": (("train", "--objective", "trade", *TINY, *LINF, "--out", "o"), "did you mean 'trades'"),
    "model": (("train", "--objective", "natural", "--model", "cmn", *LINF, "--out", "o"), "did you mean 'cnn'"),
    "data": (("train", "--objective", "natural", *TINY, *LINF, "--data", "digit", "--out", "o"), "mean 'digits'"),
    "eps": (("train", "--objective", "natural", *TINY, "--eps", "8", "--out", "o"), "write 8/255 and not 8"),
    "eps in words": (("train", "--objective", "natural", *TINY, "--eps", "x", "--out", "o"), "threat.eps: 'x' is not"),
    "norm": (("train", "--objective", "natural", *TINY, *LINF, "--norm", "l1", "--out", "o"), "'linf' or 'l2'"),
    "setting": (
        ("train", "--objective", "natural", *TINY, *LINF, "--out", "o", "--set", "epoch=3"),
        "epoch: no such setting; did you mean 'epochs'",
    ),
    "set without a value": (
        ("train", "--objective", "natural", *TINY, *LINF, "--out", "o", "--set", "epochs"),
        "--set epochs: write it as key=value",
    ),
    "set that is no YAML": (
        ("train", "--objective", "natural", *TINY, *LINF, "--out", "o", "--set", "epochs=[1"),
        "--set epochs=\\[1: the value cannot be read",
    ),
    "epochs": (("train", "--objective", "natural", *TINY[:2], *LINF, "--epochs", "0", "--out", "o"), "epochs: .*got 0"),
    "test data": (
        ("train", "--objective", "natural", *TINY, *LINF, "--out", "o", "--set", "select_on=test"),
        "select_on: choosing a checkpoint on test data is refused",
    ),
    "teacher for train": (
        ("train", "--objective", "natural", *TINY, *LINF, "--out", "o", "--set", "teacher=x"),
        "teacher: `crdnd train` uses none.*crdnd distill",
    ),
    "teacher needed": (("train", "--objective", "ard", *TINY, *LINF, "--out", "o"), "objective ard needs a teacher"),
    "no teacher": (("distill", "--objective", "ard", *TINY, *LINF, "--out", "o"), "teacher: give one with --teacher"),
    "teacher": (("distill", "--objective", "ard", "--teacher", "t", *TINY, *LINF, "--out", "o"), "t: there is no such"),
    "factory": (
        ("distill", "--objective", "ard", "--teacher", "no:such", *TINY, *LINF, "--out", "o"),
        "no:such: cannot be imported",
    ),
    "teacher that has seen the test images": (
        ("distill", "--objective", "ard", "--teacher", "model", *TINY, *LINF, "--set", "split_seed=1", "--out", "o"),
        "teacher: was trained on split 0 of digits and has seen test images of split 1; use --set split_seed=0, or a",
    ),
    "second teacher that has seen them": (
        (
            *("distill", "--objective", "mtard", "--teacher", "no:such", "--second-teacher", "model", *TINY, *LINF),
            *("--set", "split_seed=1", "--out", "o"),
        ),
        "second_teacher: was trained on split 0 of digits and has seen test images of split 1; use --set split_seed=0",
    ),
    "classes of the model": (
        ("train", "--objective", "natural", *TINY, *LINF, "--out", "o", "--set", "model.num_classes=100"),
        r"model\.num_classes: cannot be set; the data say it, so leave it away",
    ),
    "classes of the method": (
        ("train", "--objective", "trades", *TINY, *LINF, "--out", "o", "--set", "objective.num_classes=100"),
        r"objective\.num_classes: cannot be set; the data say it, so leave it away",
    ),
    "no recipe": (("train", "--recipe", "none.yaml"), "none.yaml: cannot be read"),
    "nothing to evaluate": (("evaluate",), "MODEL: name the model to evaluate"),
    "no such model": (("evaluate", "nowhere"), "nowhere: there is no such model"),
    "not a model": (("evaluate", "empty"), "empty: is not a model folder, model.json is missing"),
    "attack": (("evaluate", "model", "--attacks", "pgdsat"), "unknown attack 'pgdsat'; did you mean 'pgd_sat'"),
    "preset": (("evaluate", "model", "--preset", "quik"), "unknown preset 'quik'; did you mean 'quick'"),
    "preset and attacks": (("evaluate", "model", "--preset", "quick", "--attacks", "fgsm"), "exclude each other"),
    "setting of an attack": (
        ("evaluate", "model", "--attacks", "square", "--set", "attacks.square.querys=3"),
        r"attacks\.square\.querys: no such setting; did you mean 'queries'",
    ),
    "attack that the preset has not": (
        ("evaluate", "model", "--preset", "quick", "--set", "attacks.square.queries=3"),
        r"attacks\.square: is no attack of the preset quick",
    ),
    "too many samples": (("evaluate", "model", "--n", "451"), "n: 451 samples were asked for, digits has 450"),
    "batch size": (("evaluate", "model", "--batch-size", "big"), "batch_size: must be a whole number .* got 'big'"),
    "sweep": (("evaluate", "model", "--eps-sweep", "8"), "eps_sweep: .*write 8/255 and not 8"),
    "sweep in words": (("evaluate", "model", "--eps-sweep", "a,b"), "eps_sweep: 'a' is not a number"),
    "no surrogate": (("evaluate", "model", "--attacks", "transfer"), "transfer: .*--surrogate"),
    "engine": (("evaluate", "model", "--engine", "ref"), "engine: must be own or reference, got 'ref'"),
    "engine without the attack": (("evaluate", "model", "--engine", "reference"), "engine: the reference has AutoAtt"),
    "weights of a folder": (("evaluate", "model", "--weights", "w.pt"), "weights: belong to a model given as package"),
    "document that is a folder": (
        ("evaluate", "model", "--attacks", "fgsm", "--out", "empty"),
        "out: empty is a folder",
    ),
    "images that are a folder": (
        ("evaluate", "model", "--attacks", "fgsm", "--save-adv", "empty"),
        "save_adversarial: empty is a folder; name a file in it",
    ),
    "nothing to compare": (("diff", "a.json", "b.json"), "a.json: cannot be read"),
    "eps of an evaluation": (("evaluate", "model", "--eps", "8"), "write 8/255 and not 8"),
    "l2 eps of an evaluation": (
        ("evaluate", "model", "--norm", "l2", "--eps", "128"),
        r"threat\.eps: l2 eps=128 makes any image of shape \[1, 8, 8\] grey",
    ),
    "norm of an evaluation": (("evaluate", "model", "--norm", "l2"), "the model's eps is for linf; give --eps for l2"),
    "data of an evaluation": (("evaluate", "model", "--data", "digit"), "did you mean 'digits'"),
    "setting of an evaluation": (("evaluate", "model", "--set", "atacks=[fgsm]"), "did you mean 'attacks'"),
    "threat that is a number": (("evaluate", "model", "--set", "threat=0.1"), "threat: "),
    "threat that is a word": (("evaluate", "model", "--set", "threat=linf"), "threat: "),
    "factory without data": (("evaluate", "crdnd.models:model_names"), "must return a torch.nn.Module, got list"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_costs_one_line_exit_2_and_nothing_else(name, crdnd, tmp_path, natural):
    arguments, message = MISTAKES[name]
    (tmp_path / "empty").mkdir()
    (tmp_path / "model").symlink_to(natural)
    before = sorted(tmp_path.iterdir())
    ended = crdnd(*arguments, *(["--json"] if len(arguments) > 1 and arguments[0] != "doctor" else []))
    assert ended.status == 2, ended.err
    assert not ended.out
    assert ended.err.count("\n") == 1
    assert re.match(f"(?i)error: .*{message}", ended.err)
    assert sorted(tmp_path.iterdir()) == before


RECIPES = {
    "threat: {eps: 0.1\n": "is not valid YAML: .*line 2",
    "- objective\n- trades\n": "must hold settings as `key: value`",
    "just words\n": "must hold settings as `key: value`",
    "!!python/object/apply:os.getcwd []\n": "is not valid YAML: .*python",
    "schema: crdnd.recipe/2\n": r"'crdnd\.recipe/2'; this version reads crdnd\.recipe/1",
    "epoch: 3\n": "epoch: no such setting; did you mean 'epochs'",
    "optimizer: {learning_rat: 3}\n": "optimizer.learning_rat: no such setting; did you mean 'learning_rate'",
    "optimizer: adam\n": "optimizer: ",
    "objective: [trades]\n": "objective: ",
    "1: 2\n": "1: ",
    "\xff": "is not valid YAML",
}


@pytest.mark.parametrize("text", RECIPES)
def test_a_recipe_that_cannot_be_used_costs_one_line(text, crdnd, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_bytes(text.encode("latin-1"))
    options = [*TINY, *LINF, "--out", "o", "--json"]
    if "objective" not in text:
        options += ["--objective", "natural"]
    ended = crdnd("train", "--recipe", str(path), *options)
    assert ended.status == 2, ended.err
    assert not ended.out
    assert ended.err.count("\n") == 1
    assert re.match(f"error: .*{RECIPES[text]}", ended.err)
    assert list(tmp_path.iterdir()) == [path]


def test_evaluate_refuses_a_recipe_of_another_format(crdnd, natural):
    Path("evaluate.yaml").write_text(f"schema: crdnd.recipe/2\nmodel: {natural}\n")
    ended = crdnd("evaluate", "--recipe", "evaluate.yaml", "--attacks", "fgsm", "--json")
    assert ended.status == 2
    assert not ended.out
    assert re.search(r"crdnd\.recipe/2.*crdnd\.recipe/1", ended.err)
