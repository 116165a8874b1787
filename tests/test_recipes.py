"""The shipped recipes: what they say, that they say where it comes from, and how commands find them."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from crdnd import InputError
from crdnd.cli import main
from crdnd.cli._grid import make_grid
from crdnd.cli.compare import _spec
from crdnd.engine import make_objective
from crdnd.engine.schedule import learning_rate_factor
from crdnd.engine.settings import ScheduleSettings
from crdnd.objectives import load_objective, needs_second_teacher, needs_teacher
from crdnd.recipe import Recipe, make_recipe, parse_yaml, read_recipe
from crdnd.recipes import recipe_names, recipe_text

DATA = {"cifar10": 10, "cifar100": 100}
MODELS = {"resnet18": {}, "mobilenet_v2": {}, "wrn_34_10": {"depth": 34, "width": 10, "activation": "relu"}}
NAMES = recipe_names()


def values(name: str) -> dict[str, Any]:
    return parse_yaml(recipe_text(name), name)


def recipe(name: str) -> Recipe:
    return make_recipe(values(name) | {"out": "o"}, name)


def test_the_published_settings_are_there():
    assert len(NAMES) == len(set(NAMES))
    for method in ("rslad", "crdnd"):
        for data in DATA:
            assert {f"{method}-{data}-resnet18", f"{method}-{data}-mobilenet_v2"} <= set(NAMES)
    assert {name.partition("-")[0] for name in NAMES} == {
        "rslad", "crdnd", "ard", "iad", "adaad", "mtard", "trades", "pgd_at",
    }  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_is_what_its_name_says_and_builds_its_method(name):
    method, data, model = name.split("-")
    made = recipe(name)
    assert (made.objective.name, made.data) == (method, data)
    assert made.model.name == model.removesuffix("_34_10")
    assert made.model.settings == MODELS[model] | {"normalization": "none"}, "as in the sources' codes"
    assert made.role == ("teacher" if model.startswith("wrn") else "student")
    kind = load_objective(method)
    teachers = needs_teacher(kind, kind.attack) + needs_second_teacher(kind)
    _, attack = make_objective(made, DATA[data], teachers=teachers)
    assert attack is not None
    assert attack.steps == 10
    assert attack.step * made.threat.eps == pytest.approx(2 / 255, abs=0.0009)


@pytest.mark.parametrize("name", NAMES)
def test_every_value_stands_beside_the_place_it_comes_from(name):
    head, _, body = recipe_text(name).partition("\nschema:")
    places = set(re.findall(r"^#   (\w+)  ", head, re.MULTILINE)) | {"the", "what"}  # of the format and the role
    section = re.compile(r"[a-z]+:")
    for line in ("schema:" + body).splitlines():
        if not section.fullmatch(line):
            setting, comment = line.split("  # ")
            assert re.fullmatch(r" *[a-z_]+: \S.*", setting), line
            assert re.match(r"\w+", comment).group() in places, line  # pyright: ignore[reportOptionalMemberAccess]
    assert "Teacher" in head or "teacher" in head
    assert "A run of this length was not made with this package." in " ".join(head.replace("#", " ").split())


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_names_no_teacher_and_no_folder(name):
    assert not {"teacher", "second_teacher", "out", "seed"} & set(values(name))


@pytest.mark.parametrize("name", NAMES)
def test_the_short_form_has_30_epochs_and_the_same_proportions(name):
    full, short = values(name), values(f"{name}-short")
    assert short == full | {"epochs": 30}
    before, after = recipe(name), recipe(f"{name}-short")
    for part in range(300):
        assert learning_rate_factor(after.schedule, part / 300) == learning_rate_factor(before.schedule, part / 300)
    assert f"the published run has {full['epochs']} (" in recipe_text(f"{name}-short")


@pytest.mark.parametrize(
    ("name", "ends"),
    [
        ("rslad-cifar10-resnet18", (215, 260, 285)),
        ("mtard-cifar100-resnet18", (215, 260, 285)),
        ("ard-cifar10-mobilenet_v2", (100, 150)),
        ("pgd_at-cifar10-wrn_34_10", (100, 105)),
        ("trades-cifar10-wrn_34_10", (74,)),
    ],
)
@pytest.mark.parametrize("steps", [7, 351, 390])
def test_the_learning_rate_drops_at_the_first_step_behind_the_published_epoch(name, ends, steps):
    made = recipe(name)
    total = made.epochs * steps
    for drops, epoch in enumerate(ends):
        at = [learning_rate_factor(made.schedule, step / total) for step in (epoch * steps - 1, epoch * steps)]
        assert at == pytest.approx([0.1**drops, 0.1 ** (drops + 1)])


def test_milestones_are_read_as_people_write_them_and_epochs_are_refused():
    assert ScheduleSettings.model_validate({"milestones": ["215/300", 0.9]}).milestones == (215 / 300, 0.9)
    for wrong, message in (
        ([100, 150], "schedule.milestones: are fractions of the run, such as 100/200 for epoch 100 of 200, got 100"),
        (["1/0"], "schedule.milestones: '1/0' is not a number"),
        (0.5, "schedule.milestones: input should be a valid tuple"),
    ):
        with pytest.raises(InputError, match=message):
            make_recipe(values(NAMES[0]) | {"out": "o", "schedule": {"name": "step", "milestones": wrong}})


def test_the_drops_of_mtard_are_read_in_the_same_way():
    mtard = load_objective("mtard")
    assert mtard(3, drops=["215/300", 0.9]).settings.drops == (215 / 300, 0.9)
    with pytest.raises(InputError, match=r"objective: drops: are fractions of the run, such as 100/200"):
        mtard(3, drops=[215, 260])


def test_a_name_that_is_none_suggests_one():
    with pytest.raises(InputError, match="no 'rslad-cifar10-resnet'; did you mean 'rslad-cifar10-resnet18'"):
        recipe_text("rslad-cifar10-resnet")
    with pytest.raises(InputError, match="no 'crdnd-cifar10-resnt18-short'; did you mean 'crdnd-cifar10-resnet18'"):
        read_recipe(Path("crdnd-cifar10-resnt18-short"))


def test_a_file_is_read_before_a_name_and_a_path_is_never_a_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert read_recipe(Path(NAMES[0])) == values(NAMES[0])
    Path(NAMES[0]).write_text("epochs: 7\n")
    assert read_recipe(Path(NAMES[0])) == {"epochs": 7}
    for missing in ("mine.yaml", f"folder/{NAMES[1]}"):
        with pytest.raises(InputError, match=f"^{missing}: cannot be read"):
            read_recipe(Path(missing))


# Commands


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[object, str, str]:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    return ended.value.code, *capsys.readouterr()


def test_what_show_prints_is_a_file_to_change(tmp_path, capsys):
    name = "crdnd-cifar100-resnet18"
    status, out, err = run(capsys, "recipes", "show", name)
    assert (status, err) == (0, "")
    (tmp_path / "mine.yaml").write_text(out)
    assert read_recipe(tmp_path / "mine.yaml") == values(name)
    assert out == recipe_text(name)
    assert json.loads(run(capsys, "recipes", "show", f"{name}-short", "--json")[1]) == values(name) | {"epochs": 30}


def test_the_list_says_what_each_recipe_is(capsys):
    entries = json.loads(run(capsys, "recipes", "list", "--json")[1])["recipes"]
    assert [entry["name"] for entry in entries] == NAMES
    for entry in entries:
        assert "-".join([entry["method"], entry["data"], entry["student"]]) == entry["name"].removesuffix("_34_10")
        assert entry["epochs"] >= 76
        assert re.search(r"\d{4}", entry["paper"])
    shown = run(capsys, "recipes", "list")
    assert all(name in shown[1] for name in NAMES)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("recipes", "lst"), "unknown action 'lst'; did you mean 'list'?"),
        (("recipes", "show"), "recipes show: name one of `crdnd recipes list`."),
        (("recipes", "list", "x"), "recipes list: takes no name"),
        (("recipes", "show", "rslad-cifar10"), "recipe: there is no 'rslad-cifar10'; did you mean 'rslad-cifar10"),
        (("distill", "--recipe", NAMES[0]), "teacher: give one with --teacher"),
        (("distill", "--recipe", NAMES[0], "--teacher", "t"), "out: this setting is required; give it with --out"),
        (("train", "--recipe", "pgd-cifar10-wrn_34_10"), "recipe: there is no 'pgd-cifar10-wrn_34_10'; did you mean"),
        (("compare", "--recipe", "rslad-cifar10"), "recipe: there is no 'rslad-cifar10'; did you mean"),
    ],
)
def test_what_a_command_lacks_is_said_in_one_line(arguments, message, capsys):
    status, out, err = run(capsys, *arguments)
    assert (status, out) == (2, "")
    assert err.startswith(f"error: {message}")
    assert err.count("\n") == 1


def test_a_run_of_a_shipped_recipe_takes_what_options_change(tmp_path, capsys):
    out = tmp_path / "run"
    small = ("--data", "digits", "--model", "cnn", "--epochs", "1", "--eps", "0.1", "--set", "attack.steps=1")
    status, _, _ = run(
        capsys, "distill", "--recipe", "rslad-cifar10-resnet18-short", *small, "--out", str(out), "--json",
        "--teacher", _teacher(tmp_path, capsys),
    )  # fmt: skip
    assert status == 0
    settings = json.loads((out / "run.json").read_text())["settings"]
    assert settings["objective"] == {"name": "rslad", "alpha": 5 / 6, "loss_scale": 0.1}
    assert settings["optimizer"]["weight_decay"] == 2e-4
    assert settings["schedule"]["milestones"] == [215 / 300, 260 / 300, 285 / 300]
    assert settings["epochs"] == 1
    architecture = json.loads((out / "model.json").read_text())["architecture"]
    assert (architecture["mean"], architecture["std"]) == ([0.0], [1.0]), "another network sees them in [0, 1] too"


def _teacher(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> str:
    out = str(tmp_path / "teacher")
    assert run(
        capsys, "train", "--objective", "natural", "--model", "cnn", "--epochs", "1", "--eps", "0.1", "--out", out
    )[0] == 0  # fmt: skip
    return out


def test_a_comparison_shares_the_settings_of_a_recipe_but_for_its_method_and_attack(tmp_path):
    spec = _spec(
        Path("rslad-cifar10-resnet18-short"), ["split_seed=1"], {"data": "digits"}, {"seeds": [0, 1]},
        "rslad,trades", ["cnn,width=2"], ["somewhere:teacher"],
    )  # fmt: skip
    cells = {cell.objective: cell.candidates[0] for cell in make_grid(spec, tmp_path).cells}
    rslad, trades = cells["rslad"], cells["trades"]
    for made in (rslad, trades):
        assert (made.epochs, made.split_seed, made.optimizer.weight_decay) == (30, 1, 2e-4)
        assert made.model.settings == {"width": 2}
    assert rslad.objective.settings["loss_scale"] == 0.1
    assert rslad.attack.loss == "kl_teacher"
    assert trades.objective.settings == {}
    assert trades.attack.loss is None
    own = _spec(Path("rslad-cifar10-resnet18"), [], {}, {}, None, [], [])
    assert (list(own.objectives), list(own.students)) == (["rslad"], ["resnet18"])


def test_a_comparison_takes_a_recipes_teacher(tmp_path):
    file = tmp_path / "mine.yaml"
    teacher = {"teacher": "some:where", "teacher_weights": "w.pt"}
    file.write_text(yaml.safe_dump(values("ard-cifar10-mobilenet_v2") | teacher | {"out": "o"}))
    spec = _spec(file, [], {}, {}, None, [], [])
    assert spec.teachers == {"teacher": teacher}
    assert spec.splits == "fixed"
    assert not {*teacher, "out"} & set(spec.shared)
