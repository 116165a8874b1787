"""Registries without registration: the key is the file name, so a folder listing is the registry.

A method, attack, model or data set is one file in its folder; files that start with an underscore are shared parts.
Nothing is imported to list the names, and two entries can never have the same one.
"""

import importlib
from pathlib import Path
from typing import Any

from crdnd.errors import InputError, did_you_mean


def names(kind: str) -> list[str]:
    """The keys of a registry, sorted. `kind` is a folder of the package: objectives, attacks, models, data."""
    folder = Path(__file__).parent / kind
    return sorted(file.stem for file in folder.glob("*.py") if not file.stem.startswith("_"))


def load(kind: str, name: str, symbol: str) -> Any:
    """Import `crdnd.<kind>.<name>` and return its `symbol`; an unknown name is an InputError with a suggestion."""
    if name not in names(kind):
        singular = {"objectives": "objective", "attacks": "attack", "models": "model", "data": "data set"}[kind]
        raise InputError(f"unknown {singular} {name!r}{did_you_mean(name, names(kind))}")
    return getattr(importlib.import_module(f"crdnd.{kind}.{name}"), symbol)
