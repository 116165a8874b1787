"""`crdnd recipes`."""

from typing import Annotated, Any

import typer

from crdnd.cli._common import JsonOption, print_json
from crdnd.errors import InputError, did_you_mean


def recipes_command(
    action: Annotated[str, typer.Argument(metavar="list|show", help="What to do.")],
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="The recipe to show.")] = None,
    json: JsonOption = False,
) -> None:
    """List the recipes of published settings, or show one with the place that each of its values comes from.

    Every recipe has a short form of 30 epochs: its name with -short behind it.

    Examples:

        crdnd recipes list

        crdnd recipes show rslad-cifar10-resnet18 > mine.yaml

        crdnd distill --recipe rslad-cifar10-resnet18-short --teacher runs/teacher --out runs/rslad
    """
    from crdnd.recipe import parse_yaml
    from crdnd.recipes import recipe_names, recipe_text

    if action not in ("list", "show"):
        raise InputError(f"unknown action {action!r}{did_you_mean(action, ('list', 'show'))}")
    if action == "show":
        if name is None:
            raise InputError("recipes show: name one of `crdnd recipes list`.")
        text = recipe_text(name)
        if json:
            print_json(parse_yaml(text, name))
        else:
            print(text, end="")
        return
    if name is not None:
        raise InputError(f"recipes list: takes no name; `crdnd recipes show {name}` shows one.")
    entries = [_entry(name) for name in recipe_names()]
    if json:
        print_json({"recipes": entries})
        return
    from rich import box
    from rich.console import Console
    from rich.table import Table

    # The name says method, data and student.
    columns = ("name", "epochs", "paper")
    table = Table(*columns, box=box.SIMPLE_HEAD)
    for column in table.columns[:-1]:  # the paper's has the words to wrap
        column.no_wrap = True
    for entry in entries:
        table.add_row(*(str(entry[key]) for key in columns))
    Console().print(table)
    print("NAME-short is the same recipe with 30 epochs. A recipe names no teacher: give it with --teacher.")


def _entry(name: str) -> dict[str, Any]:
    from crdnd.objectives import load_objective
    from crdnd.recipe import make_recipe, parse_yaml
    from crdnd.recipes import recipe_text

    recipe = make_recipe(parse_yaml(recipe_text(name), name) | {"out": name}, name)
    return {
        "name": name,
        "method": recipe.objective.name,
        "data": recipe.data,
        "student": recipe.model.name,
        "epochs": recipe.epochs,
        "paper": load_objective(recipe.objective.name).paper,
    }
