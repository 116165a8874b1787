"""Write docs/settings.md: every setting of a recipe with its type, default and meaning."""

import runpy
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from crdnd.engine import Named
from crdnd.recipe import Recipe

PAGE = Path(__file__).resolve().parent / "settings.md"
METHODS = runpy.run_path(str(PAGE.with_name("methods.py")))
HEAD = """<!-- Written by docs/settings.py from the package's settings: change those, then run it again. -->

# Settings of a recipe

A recipe is a YAML file, `crdnd.recipe/1`, or the name of one of `crdnd recipes list`. Every key below goes there, or
behind `--set`, such as `--set optimizer.learning_rate=0.05`. Of a recipe, `--set` and the options of a command the
later wins. An unknown key is an error that names the nearest one.

`objective` and `model` are names, or a name with settings of its own: `objective: {name: crdnd, tau: 0.3}`. What a
method can be set to is on its page in [methods](methods/README.md); `crdnd list models` shows an architecture's.

"""


def kind(annotation: Any) -> str:
    """A type as a reader of YAML would say it."""
    origin, inner = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Literal:
        return " or ".join(f"`{value}`" for value in inner)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(kind(option) for option in inner)
    if origin is tuple:
        return f"list of {kind(inner[0])}"
    if annotation is type(None):
        return "nothing"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "name, or mapping" if annotation is Named else "mapping"
    return {str: "text", int: "whole number", float: "number", bool: "true or false"}.get(annotation, str(annotation))


def models(annotation: Any) -> list[type[BaseModel]]:
    """The settings classes inside a type, `Named` left out: its settings are those of what it names."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [] if annotation is Named else [annotation]
    return [found for option in typing.get_args(annotation) for found in models(option)]


def default(field: FieldInfo) -> str:
    """A field's default as a recipe writes it."""
    if field.is_required():
        return "required"
    if field.default is None or isinstance(field.default, BaseModel):
        return ""
    return f"`{METHODS['shown'](field.default)}`"


def settings(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Every setting by its dotted key, nested ones behind what holds them."""
    for name, field in model.model_fields.items():
        key = prefix + (field.alias or name)
        yield key, field
        for nested in models(field.annotation):
            yield from settings(nested, f"{key}.")


def page() -> str:
    """The whole page."""
    rows = [
        [f"`{key}`", kind(field.annotation).replace(" or nothing", ""), default(field), str(field.description)]
        for key, field in settings(Recipe)
    ]
    return HEAD + METHODS["table"](["setting", "type", "default", "what it is"], rows)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
