import re
import runpy
from pathlib import Path

import pytest
import torch

import crdnd

README = Path(__file__).parent.parent / "README.md"
BLOCKS = re.findall(r"^```python\n(.*?)^```$", README.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


@pytest.mark.skipif(not BLOCKS, reason="the README has no Python example yet")
def test_the_example_of_the_readme_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    for number, block in enumerate(BLOCKS):
        script = tmp_path / f"example{number}.py"
        script.write_text(block, encoding="utf-8")
        runpy.run_path(str(script))
    assert re.search(r"\d+/100", capsys.readouterr().out)


@pytest.mark.skipif(not BLOCKS, reason="the README has no Python example yet")
def test_the_example_of_the_readme_has_about_fifteen_lines():
    lines = [line for line in BLOCKS[0].splitlines() if line.strip() and not line.startswith(("import", "from"))]
    assert len(lines) <= 15


def test_the_readme_names_the_public_api():
    text = README.read_text(encoding="utf-8")
    assert [name for name in crdnd.__all__ if f"`{name}`" not in text] == []
