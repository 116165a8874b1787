"""Recipes of published settings: commented YAML files, `crdnd.recipe/1`, named METHOD-DATA-STUDENT.

Every schedule in them is written in fractions of the run, so the short form of a recipe is the recipe with fewer
epochs and nothing else; `rslad-cifar10-resnet18-short` names that of `rslad-cifar10-resnet18`.
"""

import re
from pathlib import Path

from crdnd.errors import InputError, did_you_mean

SHORT, SHORT_EPOCHS = "-short", 30
_EPOCHS = re.compile(r"^epochs: (\d+)  # (.*)$", re.MULTILINE)


def recipe_names() -> list[str]:
    """The shipped recipes, sorted; each has a short form besides, which is not listed."""
    return sorted(file.stem for file in Path(__file__).parent.glob("*.yaml"))


def recipe_text(name: str) -> str:
    """A shipped recipe as commented YAML, to read or to write into a file and change.

    Args:
        name: one of `recipe_names()`, or that with `-short` behind it.

    Raises:
        InputError: there is no such recipe.
    """
    full = name.removesuffix(SHORT)
    if full not in recipe_names():
        raise InputError(f"recipe: there is no {name!r}{did_you_mean(full, recipe_names())}")
    text = (Path(__file__).parent / f"{full}.yaml").read_text(encoding="utf-8")
    if full == name:
        return text
    shortened = rf"epochs: {SHORT_EPOCHS}  # the short form; the published run has \1 (\2)"
    return f"# The short form: {SHORT_EPOCHS} epochs, everything else in proportion.\n" + _EPOCHS.sub(shortened, text)
