import json
from pathlib import Path
from typing import Any

import pytest
import torch

from crdnd import InputError, load_data
from crdnd.engine import TrainSettings
from crdnd.models import weights_sha256
from crdnd.recipe import Recipe, make_recipe, merge, parse_assignment, read_yaml

torch.set_num_threads(1)  # networks this small wait for their threads more than they compute


def recipe(out: Path | str = "o", **changes: Any) -> Recipe:
    values = {
        "objective": "natural",
        "model": {"name": "cnn", "width": 2},
        "threat": {"eps": "8/255"},
        "epochs": 1,
        "batch_size": 300,
        "out": str(out),
    }
    if "name" in changes.get("model", {}):
        del values["model"]  # another network has other settings
    return make_recipe(merge(values, changes))


def test_a_recipe_is_the_settings_of_a_run_with_names_for_the_rest():
    assert set(Recipe.model_fields) - set(TrainSettings.model_fields) == {
        "schema_", "data", "split_seed", "image_size", "label_noise", "model", "teacher", "teacher_weights",
        "second_teacher", "second_teacher_weights", "role", "out",
    }  # fmt: skip
    assert recipe(objective="crdnd").objective == recipe(objective={"name": "crdnd"}).objective
    assert recipe().threat.eps == 8 / 255


def test_a_model_is_written_with_its_settings_as_options_write_them():
    for model in ({"name": "cnn,width=3"}, {"name": "cnn,width=8", "width": 3}):
        assert recipe(model=model).model == recipe(model={"name": "cnn", "width": 3}).model
    values = recipe().model_dump(mode="json", by_alias=True) | {"model": "cnn,width=3"}
    assert make_recipe(values).model == recipe(model={"name": "cnn", "width": 3}).model
    with pytest.raises(InputError, match=r"model cnn,width: write it as cnn, or with settings as cnn,width=8"):
        recipe(model={"name": "cnn,width"})


def test_a_recipe_survives_its_own_dump():
    made = recipe(objective={"name": "trades", "beta": 2}, seeds={"order": 3}, schedule={"milestones": [0.5]})
    assert make_recipe(made.model_dump(mode="json", by_alias=True)) == made


@pytest.mark.parametrize("key", ["objective", "model", "threat", "out"])
def test_what_a_recipe_must_say_is_named(key):
    values = recipe().model_dump(mode="json", by_alias=True)
    del values[key]
    with pytest.raises(InputError, match=f"^teacher.yaml: {key}: this setting is required and was not given"):
        make_recipe(values, "teacher.yaml")


def test_the_last_of_several_layers_wins_key_by_key():
    layers = (
        {"objective": "ard", "model": {"name": "cnn", "width": 8}, "seed": 1, "threat": {"eps": 0.1}},
        {"objective": {"tau": 1}, "model": {"width": 2}, "threat": {"norm": "l2"}},
        {"seed": 2, "epochs": 3},
    )
    before = json.dumps(layers)
    assert merge(*layers) == {
        "objective": {"name": "ard", "tau": 1},
        "model": {"name": "cnn", "width": 2},
        "seed": 2,
        "epochs": 3,
        "threat": {"eps": 0.1, "norm": "l2"},
    }
    assert json.dumps(layers) == before
    assert merge({"objective": {"name": "ard", "tau": 1}}, {"objective": "rslad"}) == {"objective": "rslad"}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("epochs=3", {"epochs": 3}),
        ("optimizer.learning_rate=5e-2", {"optimizer": {"learning_rate": "5e-2"}}),
        ("seeds.order=7", {"seeds": {"order": 7}}),
        ("threat.eps=8/255", {"threat": {"eps": "8/255"}}),
        ("schedule.milestones=[0.5, 0.75]", {"schedule": {"milestones": [0.5, 0.75]}}),
        ("ema=null", {"ema": None}),
        ("optimizer.nesterov=false", {"optimizer": {"nesterov": False}}),
        ("teacher=package.module:name", {"teacher": "package.module:name"}),
        ("out=a=b", {"out": "a=b"}),
    ],
)
def test_an_assignment_is_a_key_and_a_value_in_yaml(text, expected):
    assert parse_assignment(text) == expected


def test_numbers_as_people_write_them_are_numbers():
    # YAML 1.1 takes 5e-2 for a word; the settings know better.
    made = make_recipe(merge(recipe().model_dump(by_alias=True), parse_assignment("optimizer.learning_rate=5e-2")))
    assert made.optimizer.learning_rate == 0.05


def test_a_recipe_in_a_file_is_read_as_text(tmp_path):
    (tmp_path / "r.yaml").write_text("objective: ard # Zürich\nnote: 'ü'\n", encoding="utf-8")
    assert read_yaml(tmp_path / "r.yaml") == {"objective": "ard", "note": "ü"}
    with pytest.raises(InputError, match=r"r\.yaml/more: cannot be read"):
        read_yaml(tmp_path / "r.yaml" / "more")


def test_the_packaged_demo_is_made_of_recipes():
    import crdnd.cli.demo as demo

    content = read_yaml(Path(demo.__file__).with_name("demo.yaml"))
    assert content["schema"] == "crdnd.demo/1"
    assert list(content["students"]) == ["natural", "pgd_at", "trades", "ard", "iad", "rslad", "crdnd"]
    assert content["attacks"] == ["fgsm", "pgd_sat", "pgd_trades", "cw_inf"]
    assert content["shared"]["threat"] == {"norm": "linf", "eps": 0.1}
    assert content["teacher"]["objective"] == "trades"


# What a recipe does


def test_the_initial_weights_have_a_seed_of_their_own(tmp_path):
    # Training is switched off, so that the weights at the end are those at the start.
    frozen = {"optimizer": {"learning_rate": 1e-30, "momentum": 0.0, "nesterov": False, "weight_decay": 0.0}}
    weights = {}
    for name, seeds in {
        "base": {"seed": 0},
        "init": {"seed": 0, "seeds": {"init": 1}},
        "others": {"seed": 0, "seeds": {"order": 1, "augment": 1, "attack": 1}},
        "run": {"seed": 1},
        "run but init": {"seed": 1, "seeds": {"init": 0}},
    }.items():
        run = recipe(tmp_path / name, **frozen, **seeds).run()
        weights[name] = [value.detach().clone() for value in run.other.network.parameters()]

    def same(a: str, b: str) -> bool:
        return all((x - y).abs().max() < 1e-20 for x, y in zip(weights[a], weights[b], strict=True))

    assert same("base", "others")
    assert same("base", "run but init")
    assert same("init", "run")
    assert not same("base", "init")


def test_the_models_normalisation_is_that_of_the_training_images(tmp_path):
    run = recipe(tmp_path / "run").run()
    x = load_data("digits").train.x
    assert run.model.architecture.mean == pytest.approx([x.mean().item()], abs=1e-4)
    assert run.model.architecture.std == pytest.approx([x.std().item()], abs=1e-4)
    assert run.model.architecture.num_classes == 10


def test_a_recipe_trains_with_a_teacher_or_without(tmp_path):
    teacher = recipe(tmp_path / "teacher", role="teacher").run()
    assert json.loads((teacher.folder / "model.json").read_text())["role"] == "teacher"
    own = {"objective": "rslad", "attack": {"steps": 1}, "check_teacher": False}
    student = recipe(tmp_path / "student", teacher=str(teacher.folder), **own).run()
    card = json.loads((student.folder / "model.json").read_text())
    assert (card["role"], card["teacher_sha256"]) == ("student", weights_sha256(teacher.model))
    with pytest.raises(InputError, match="objective natural uses no teacher"):
        recipe(tmp_path / "o", teacher=str(teacher.folder)).run()


def test_another_split_is_another_run(tmp_path):
    recipe(tmp_path / "run").run()
    with pytest.raises(InputError, match=r"holds a run with other settings \(data: digits "):
        recipe(tmp_path / "run", split_seed=1).run()


def test_a_model_may_be_the_users_own_factory(tmp_path, monkeypatch):
    (tmp_path / "ownnets.py").write_text(
        "from torch import nn\n"
        "def flat():\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))\n"
    )  # fmt: skip
    monkeypatch.syspath_prepend(tmp_path)
    run = recipe(tmp_path / "run", model={"name": "ownnets:flat"}).run()
    assert [type(module).__name__ for module in run.model] == ["Flatten", "Linear"]


def factories(tmp_path, monkeypatch) -> str:
    (tmp_path / "drawnnets.py").write_text(
        "from torch import nn\n"
        "def drawn():\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))\n"
    )  # fmt: skip
    monkeypatch.syspath_prepend(tmp_path)
    return "drawnnets:drawn"


def test_a_factory_draws_its_weights_by_the_seed_of_the_run_and_nothing_else(tmp_path, monkeypatch):
    name, digits = factories(tmp_path, monkeypatch), load_data("digits")
    torch.manual_seed(5)
    before = torch.get_rng_state()
    built = [
        recipe(tmp_path, model={"name": name}, **seeds).build_model(digits)[1].weight
        for seeds in ({"seed": 3}, {"seed": 3}, {"seed": 0, "seeds": {"init": 3}}, {"seed": 4})
    ]
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(built[0], built[1])
    assert torch.equal(built[0], built[2])
    assert not torch.equal(built[0], built[3])


def test_settings_beside_a_factory_are_refused_because_nobody_would_read_them(tmp_path, monkeypatch):
    name, digits = factories(tmp_path, monkeypatch), load_data("digits")
    for own, key in (({"width": 8, "typo": 1}, "width"), ({"normalization": "cifar10"}, "normalization")):
        with pytest.raises(InputError, match=f"^model.{key}: drawnnets:drawn is called without settings, so it would"):
            recipe(model={"name": name} | own).build_model(digits)
    # What shipped recipes say of their model is true of a factory's, which sees the images as they are.
    assert len(recipe(model={"name": name, "normalization": "none"}).build_model(digits)) == 2


@pytest.mark.parametrize(
    ("key", "value", "instead"),
    [
        ("model.num_classes", 100, "the data say it, so leave it away"),
        ("model.input_shape", [1, 8, 8], "the data say it, .* image_size"),
        ("model.seed", 3, "write seeds.init"),
        ("objective.num_classes", 100, "the data say it, so leave it away"),
        ("objective.sizes", 1, "the networks say them, so leave it away"),
    ],
)
def test_what_the_run_hands_to_a_model_or_a_method_is_refused_as_a_setting(key, value, instead):
    part, _, own = key.partition(".")
    with pytest.raises(InputError, match=f"^{key}: cannot be set; {instead}"):
        recipe(**{part: {own: value}}).build_model(load_data("digits"))


@pytest.mark.parametrize(
    ("own", "mean", "std"),
    [
        ({"normalization": "none"}, [0.0], [1.0]),
        ({"normalization": "mnist"}, [0.1307], [0.3081]),
        ({"mean": [0.3], "std": [0.4]}, [0.3], [0.4]),
        ({"normalization": None}, None, None),
    ],
)
def test_a_model_is_behind_the_normalisation_that_is_stated(own, mean, std):
    digits = load_data("digits")
    model = recipe(model=own).build_model(digits).eval()
    if mean is None:
        mean, std = ([round(value, 4) for value in values] for values in digits.train.mean_and_std())
    assert model.architecture.settings == {"width": 2}
    x = digits.train.x[:5]
    expected = model.network((x - torch.tensor(mean)) / torch.tensor(std))
    torch.testing.assert_close(model(x), expected)


@pytest.mark.parametrize(
    ("own", "message"),
    [
        ({"normalization": "cifar"}, "model cnn: normalization: no such one 'cifar'; did you mean 'cifar10'"),
        ({"mean": [0.5]}, "model cnn: mean and std are given together"),
        ({"normalization": "none", "mean": [0.5], "std": [0.5]}, "model cnn: give normalization, or mean and std"),
        ({"normalization": "cifar10"}, "model cnn: mean has 3 values for 1 channels"),
        ({"mean": "a", "std": [1.0]}, "model cnn: mean: input should be a valid tuple, got 'a'"),
    ],
)
def test_a_normalisation_that_cannot_be_is_refused(own, message):
    with pytest.raises(InputError, match=message):
        recipe(model=own).build_model(load_data("digits"))


def test_settings_of_an_architecture_are_checked():
    for model, message in {"cnm": "did you mean 'cnn'", "cnn": "wdth: no such setting; did you mean 'width'"}.items():
        with pytest.raises(InputError, match=message):
            recipe(model={"name": model, "wdth": 3}).run()


def test_wrong_labels_are_as_many_as_asked_for_and_spare_all_but_the_training_data(tmp_path):
    clean = recipe(out=tmp_path).load_data()
    tenth, third = (recipe(out=tmp_path, label_noise=share).load_data() for share in (0.1, 1 / 3))
    wrong = [splits.train.y != clean.train.y for splits in (tenth, third)]
    assert [int(one.sum()) for one in wrong] == [round(len(clean.train) / 10), round(len(clean.train) / 3)]
    assert bool((wrong[1] | ~wrong[0]).all())  # more noise spoils the same samples, and more
    assert len(((third.train.y - clean.train.y)[wrong[1]] % 10).unique()) == 9
    assert tenth.validation.sha256 == clean.validation.sha256
    assert tenth.sha256 != clean.sha256
    other = recipe(out=tmp_path, label_noise=0.1, split_seed=1).load_data().train.y
    assert not torch.equal(other != recipe(out=tmp_path, split_seed=1).load_data().train.y, wrong[0])
