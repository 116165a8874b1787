"""A model and its settings on one line: `wrn,depth=34,width=10`."""

import re
from typing import Any

import yaml

from crdnd.errors import InputError


def parse_spec(text: str, where: str = "") -> tuple[str, dict[str, Any]]:
    """A name and settings; values are read as YAML, a list in brackets keeps its commas.

    >>> parse_spec("wrn,depth=34,mean=[0.5, 0.5, 0.5]")
    ('wrn', {'depth': 34, 'mean': [0.5, 0.5, 0.5]})
    """
    name, *parts = (part.strip() for part in re.split(r",(?![^\[]*\])", text))
    settings: dict[str, Any] = {}
    for part in parts:
        key, equals, value = (piece.strip() for piece in part.partition("="))
        try:
            settings[key] = yaml.safe_load(value)
        except yaml.YAMLError:
            equals = ""
        if not equals or not key:
            name = ""
    if not name:
        raise InputError(f"{where} {text}".strip() + ": write it as cnn, or with settings as cnn,width=8.")
    return name, settings
