"""The models that come with the package's sources."""

import re
import runpy
from pathlib import Path

import pytest
import torch

from crdnd import load_model, predict
from crdnd.cli import main
from crdnd.evaluation import load_results
from crdnd.models import parameter_count, read_card

WEIGHTS = Path(__file__).parent.parent / "weights"
FOLDERS = sorted(path.parent for path in WEIGHTS.glob("*/model.json"))
MEGABYTE = 10**6


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_a_model_is_small_and_what_its_card_says(folder):
    card, model = read_card(folder), load_model(folder)
    assert sum(file.stat().st_size for file in folder.iterdir()) < (25 if card.role == "teacher" else 10) * MEGABYTE
    assert parameter_count(model) == card.params
    assert predict(model, torch.rand(3, *card.architecture.input_shape)).probabilities.shape == (3, 10)


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_a_models_page_and_results_are_of_its_weights(folder, tmp_path):
    for file in folder.iterdir():
        if file.name != "README.md":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    with pytest.raises(SystemExit) as status:
        main(["card", str(tmp_path), "--license", "apache-2.0"])
    assert status.value.code in (0, None)
    assert (tmp_path / "README.md").read_text(encoding="utf-8") == (folder / "README.md").read_text(encoding="utf-8")
    if (folder / "evaluation.json").exists():
        card, results = read_card(folder), load_results(folder / "evaluation.json")
        assert [row.model_sha256 for row in results.rows] == [card.sha256]
        assert (results.protocol.norm, results.protocol.eps) == (card.threat.norm, card.threat.eps)
        assert "autoattack" in results.protocol.attacks


def test_a_student_names_a_teacher_that_lies_beside_it():
    cards = [read_card(folder) for folder in FOLDERS]
    wanted = {card.teacher_sha256 for card in cards if card.teacher_sha256}
    assert wanted <= {card.sha256 for card in cards if card.role == "teacher"}


def test_the_example_has_five_lines_and_runs(tmp_path, monkeypatch, capsys):
    page = (WEIGHTS / "README.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"^```python\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)
    assert len([line for line in block.splitlines() if line.strip()]) == 5
    (tmp_path / "example.py").write_text(block, encoding="utf-8")
    monkeypatch.chdir(WEIGHTS.parent)
    runpy.run_path(str(tmp_path / "example.py"))
    assert re.search(r"tensor\(\[(\d, ){3}\d\]\)", capsys.readouterr().out)
