"""The pages that are written from the source."""

import re
import runpy
from pathlib import Path

import pytest
from pydantic import Field

from crdnd.objectives import ObjectiveSettings, load_objective, objective_names
from crdnd.recipe import Recipe
from crdnd.recipes import recipe_names

DOCS = Path(__file__).parent.parent / "docs"
GENERATOR = runpy.run_path(str(DOCS / "methods.py"))
SETTINGS = runpy.run_path(str(DOCS / "settings.py"))
COMPARISONS = runpy.run_path(str(DOCS / "comparisons.py"))


def test_the_pages_of_the_methods_are_those_of_their_files():
    committed = {file.name: file.read_text(encoding="utf-8") for file in (DOCS / "methods").glob("*")}
    written = GENERATOR["pages"]()
    stale = sorted(name for name in written.keys() | committed.keys() if written.get(name) != committed.get(name))
    assert not stale, f"run `python docs/methods.py` to write these pages of docs/methods/ again: {', '.join(stale)}"


@pytest.mark.parametrize("name", objective_names())
def test_a_page_says_all_there_is_to_set(name):
    method, pages = load_objective(name), GENERATOR["pages"]()
    for key in method.settings_class.model_fields:
        assert f"\n| `{key}` | `" in pages[f"{name}.md"]
    assert f"[`{name}`]({name}.md)" in pages["README.md"]
    assert method.paper in pages["README.md"]


def test_a_page_shows_values_as_a_recipe_writes_them_and_escapes_bars():
    class Settings(ObjectiveSettings):
        drops: tuple[float, ...] = Field(default=(215 / 300, 0.95), description="KL(T || S).")
        centre: bool = Field(default=False, description="Whether.")

    class Method(load_objective("rslad")):
        settings_class = Settings

    assert GENERATOR["settings"](Method).splitlines()[2:4] == [
        r"| `drops` | `[0.7167, 0.95]` | KL(T \|\| S). |",
        "| `centre` | `false` | Whether. |",
    ]


def test_the_page_of_the_settings_is_that_of_the_package():
    written = SETTINGS["page"]()
    assert SETTINGS["PAGE"].read_text(encoding="utf-8") == written, "run `python docs/settings.py`"


def test_the_page_of_the_settings_has_every_key_with_what_it_is():
    keys = {key for key, field in SETTINGS["settings"](Recipe) if field.description}
    assert keys >= {"objective", "threat.eps", "optimizer.learning_rate", "awp.gamma", "augmentation.until", "schema"}
    assert {key for key in keys if "." not in key} == {
        field.alias or name for name, field in Recipe.model_fields.items()
    }
    assert keys == {key for key, _ in SETTINGS["settings"](Recipe)}, "every setting has a description"
    assert "| `attack.steps` | whole number |  | Ascent steps. |" in SETTINGS["page"]()
    assert "| `optimizer.weight_decay` | number | `0.0005` |" in SETTINGS["page"]()


def test_the_page_of_the_recipes_names_each_of_them():
    page = (DOCS / "recipes.md").read_text(encoding="utf-8")
    assert set(re.findall(r"`([a-z_]+-cifar100?-[a-z0-9_]+)`", page)) == set(recipe_names())


@pytest.mark.parametrize("name", COMPARISONS["PAGES"])
def test_the_page_of_a_comparison_is_that_of_its_results(name):
    written = COMPARISONS["page"](name)
    assert COMPARISONS["target"](name).read_text(encoding="utf-8") == written, "run `python docs/comparisons.py`"
