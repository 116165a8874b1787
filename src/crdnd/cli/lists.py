"""`crdnd list`."""

from typing import Annotated, Any

import typer

from crdnd.cli._common import JsonOption, print_json
from crdnd.errors import InputError, did_you_mean


def list_command(
    kind: Annotated[str, typer.Argument(metavar="objectives|attacks|presets|models", help="What to list.")],
    json: JsonOption = False,
) -> None:
    """List what there is to choose from. Data sets are listed by `crdnd data list`.

    Examples:

        crdnd list objectives

        crdnd list attacks --json
    """
    listings = {
        "objectives": _objectives,
        "attacks": _attacks,
        "presets": _presets,
        "models": _models,
    }
    if kind in ("datasets", "data"):
        raise InputError("list: data sets have a command of their own, `crdnd data list`.")
    if kind not in listings:
        raise InputError(f"unknown list {kind!r}{did_you_mean(kind, listings)}")
    entries = listings[kind]()
    if json:
        print_json({kind: entries})
        return
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(*(key.replace("_", " ") for key in entries[0]), box=box.SIMPLE_HEAD)
    for entry in entries:
        table.add_row(*(_shown(value) for value in entry.values()))
    Console().print(table)


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return ", ".join(f"{key}={item}" for key, item in value.items()) if isinstance(value, dict) else str(value)


def _objectives() -> list[dict[str, Any]]:
    from crdnd.objectives import load_objective, needs_second_teacher, needs_teacher, objective_names

    methods = {name: load_objective(name) for name in objective_names()}
    return [
        {
            "name": name,
            "teachers": needs_teacher(method, method.attack) + needs_second_teacher(method),
            "paper": method.paper,
        }
        for name, method in methods.items()
    ]


def _attacks() -> list[dict[str, Any]]:
    from crdnd.attacks import attack_names, load_attack

    attacks = {name: load_attack(name) for name in attack_names()}
    return [{"name": name, "what": attack.summary, "paper": attack.paper} for name, attack in attacks.items()]


def _presets() -> list[dict[str, Any]]:
    from crdnd.evaluation import PRESETS

    return [
        {"name": name, "what": preset.summary, "attacks": ", ".join(preset.attacks)} for name, preset in PRESETS.items()
    ]


def _models() -> list[dict[str, Any]]:
    from crdnd import registry
    from crdnd.models import model_names

    models = {name: registry.load("models", name, "MODEL") for name in model_names()}
    return [
        {"name": name, "what": model.summary, "settings": model.Settings().model_dump()}
        for name, model in models.items()
    ]
