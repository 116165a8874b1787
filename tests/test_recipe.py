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
    return make_recipe(merge(values, changes))


def test_a_recipe_is_the_settings_of_a_run_with_names_for_the_rest():
    assert set(Recipe.model_fields) - set(TrainSettings.model_fields) == {
        "schema_", "data", "split_seed", "image_size", "label_noise", "model", "teacher", "teacher_weights",
        "second_teacher", "second_teacher_weights", "role", "out",
    }  # fmt: skip
    assert recipe(objective="crdnd").objective == recipe(objective={"name": "crdnd"}).objective
    assert recipe().threat.eps == 8 / 255


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
