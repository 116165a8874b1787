"""What the distribution says of itself."""

import ast
import re
import sys
import tomllib
from pathlib import Path

import yaml

import crdnd

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
DISTRIBUTIONS = {"PIL": "pillow", "sklearn": "scikit-learn", "yaml": "pyyaml", "autoattack": "robustbench"}
"""Those with another name than their module. AutoAttack is what robustbench needs, and on GitHub alone."""


def test_the_version_is_the_same_wherever_it_stands():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert PROJECT["project"]["version"] == crdnd.__version__ == citation["version"]
    assert PROJECT["project"]["license"] == citation["license"]


def test_whatever_is_imported_is_declared():
    project = PROJECT["project"]
    extras = [one for name, wanted in project["optional-dependencies"].items() if name != "dev" for one in wanted]
    declared = {re.match(r"[\w.-]+", one)[0] for one in [*project["dependencies"], *extras]}
    imported = {
        name.split(".")[0]
        for file in (ROOT / "src").rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        for name in (
            [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else [node.module or ""]
            if isinstance(node, ast.ImportFrom)
            else []
        )
    }
    others = imported - set(sys.stdlib_module_names) - {"crdnd"}
    assert {DISTRIBUTIONS.get(name, name) for name in others} - declared == set()


def test_whatever_goes_into_the_source_distribution_is_there():
    targets = PROJECT["tool"]["hatch"]["build"]["targets"]
    wanted = [*targets["sdist"]["include"], *targets["wheel"]["packages"], PROJECT["project"]["readme"], "LICENSE"]
    assert [name for name in wanted if not (ROOT / name).exists()] == []
    pages = {path.name for path in ROOT.glob("*.md")} | {path.name for path in ROOT.glob("*.cff")}
    assert pages - {"README.md"} <= set(targets["sdist"]["include"])
