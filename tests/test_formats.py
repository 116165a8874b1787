"""Files of version 1 of each format; whatever the package becomes, these must be read or refused in one line."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from crdnd.config import build
from crdnd.engine import load_history
from crdnd.errors import InputError
from crdnd.evaluation import Results
from crdnd.io import read_json
from crdnd.models import load_model
from crdnd.recipe import Recipe, make_recipe, merge, read_yaml

FIXTURES = Path(__file__).parent / "fixtures"
DEMO = Path(__file__).parent.parent / "results" / "demo.json"


def recipe_into(folder: Path, **changes: object) -> Recipe:
    return make_recipe(merge(read_yaml(FIXTURES / "recipe-1.yaml"), changes, {"out": str(folder)}))


@pytest.fixture
def unfinished(tmp_path: Path) -> Path:
    return Path(shutil.copytree(FIXTURES / "run-1-unfinished", tmp_path / "run"))


@pytest.fixture
def finished(tmp_path: Path) -> Path:
    return Path(shutil.copytree(FIXTURES / "run-1-finished", tmp_path / "run"))


def test_a_model_of_format_1_is_loaded(finished: Path) -> None:
    for folder in (finished, finished / "last"):
        assert load_model(folder)(torch.rand(3, 1, 8, 8)).shape == (3, 10)


def test_a_finished_run_of_format_1_is_reused(finished: Path) -> None:
    before = (finished / "model.safetensors").read_bytes()
    run = recipe_into(finished).run()
    assert run.reused
    assert len(run.history) == 2
    assert (finished / "model.safetensors").read_bytes() == before


def test_an_unfinished_run_of_format_1_goes_on_where_it_was(unfinished: Path) -> None:
    steps: list[int] = []
    first = load_history(unfinished)
    run = recipe_into(unfinished).run(listener=lambda progress: steps.append(progress.step))
    assert steps == [12, 13, 14, 15, 16]
    assert run.history[:1] == first
    assert not run.reused


def test_a_setting_that_an_older_version_did_not_have_counts_as_its_default(unfinished: Path) -> None:
    document = read_json(unfinished / "run.json")
    del document["settings"]["clip_grad_norm"]
    (unfinished / "run.json").write_text(json.dumps(document))
    with pytest.raises(InputError, match=r"clip_grad_norm: None -> 1\.0"):
        recipe_into(unfinished, clip_grad_norm=1.0).run()
    recipe_into(unfinished).run()


@pytest.mark.parametrize("file", ["run.json", "checkpoint.json", "model.json"])
def test_a_file_of_another_format_is_refused_in_one_line_that_names_it(finished: Path, file: str) -> None:
    document = read_json(finished / file)
    document["schema"] = document["schema"].replace("/1", "/2")
    (finished / file).write_text(json.dumps(document))
    with pytest.raises(InputError, match=rf"{file}.*/2.*/1") as refusal:
        load_model(finished) if file == "model.json" else recipe_into(finished).run()
    assert "\n" not in str(refusal.value)


def test_a_recipe_of_another_format_is_refused() -> None:
    with pytest.raises(InputError, match=r"crdnd\.recipe/2.*crdnd\.recipe/1"):
        make_recipe({"schema": "crdnd.recipe/2"})


def test_the_published_results_are_of_format_1() -> None:
    results = build(Results, read_json(DEMO))
    assert results.protocol.fingerprint == results.protocol.with_fingerprint().fingerprint
    assert {row.checkpoint for row in results.rows} == {"best", "last"}


def test_the_readme_shows_the_published_results() -> None:
    script = Path(__file__).parent.parent / "docs" / "tables.py"
    assert subprocess.run([sys.executable, str(script), "--check"], check=False).returncode == 0
