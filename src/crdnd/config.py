"""Settings: frozen pydantic models, and errors that name the key, what it was and the way out."""

import types
import typing
from fractions import Fraction
from typing import Any, TypeVar, cast

from pydantic import BaseModel, ConfigDict, ValidationError

from crdnd.errors import InputError, did_you_mean


class Frozen(BaseModel):
    """A settings object: never changes, knows its keys, refuses others."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=(), ser_json_inf_nan="strings")


def parse_number(value: Any) -> Any:
    """Read a number as people write it, plain or as a fraction such as "8/255"; what is no text is left as it is.

    >>> parse_number("8/255") == 8 / 255
    True
    """
    if not isinstance(value, str):
        return value
    try:
        return float(Fraction(value.replace(" ", "")))
    except (ValueError, ZeroDivisionError):
        raise ValueError(f"{value!r} is not a number; write 0.1 or 8/255.") from None


def parse_fractions(value: Any) -> Any:
    """Read moments as fractions of a run, each as `parse_number` does; what is no list is left as it is.

    >>> parse_fractions(["100/200", 0.75])
    [0.5, 0.75]
    """
    if not isinstance(value, list | tuple):
        return value
    found = [parse_number(moment) for moment in cast("list[Any] | tuple[Any, ...]", value)]
    for moment in found:
        if isinstance(moment, int | float) and not 0 < moment < 1:
            raise ValueError(f"are fractions of the run, such as 100/200 for epoch 100 of 200, got {moment:g}.")
    return found


Model = TypeVar("Model", bound=BaseModel)


def build(model: type[Model], values: Any, where: str = "") -> Model:
    """Make a settings object from plain values, or raise an InputError of one line.

    Args:
        model: the pydantic model to make.
        values: usually a mapping, as a YAML file or keyword arguments give it.
        where: what the message puts before the key, such as "objective crdnd".
    """
    try:
        return model.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        raise InputError(_explain(model, first["loc"], first["type"], first["msg"], first["input"], where)) from None


def _explain(
    model: type[BaseModel], location: tuple[int | str, ...], kind: str, message: str, value: Any, where: str
) -> str:
    key = ".".join(str(part) for part in location)
    prefix = ": ".join(part for part in (where, key) if part)
    if kind == "extra_forbidden":
        siblings = _keys(model, location[:-1])
        return f"{prefix}: no such setting{did_you_mean(str(location[-1]), siblings)}"
    if kind == "missing":
        return f"{prefix}: this setting is required and was not given."
    # Our own validators already say what came and what to write; pydantic's say only what was expected.
    if kind == "value_error":
        text = message.removeprefix("Value error, ")
        return f"{prefix}: {text}" if prefix else text
    return f"{prefix}: {message[0].lower()}{message[1:]}, got {value!r}."


def _keys(model: type[BaseModel], path: tuple[int | str, ...]) -> list[str]:
    """The keys that `model` allows at `path`."""
    current: Any = model
    for part in path:
        field = current.model_fields.get(part) if _is_model(current) else None
        if field is None:
            break
        options = typing.get_args(field.annotation) if _is_union(field.annotation) else (field.annotation,)
        current = next((option for option in options if _is_model(option)), None)
    return [field.alias or name for name, field in current.model_fields.items()] if _is_model(current) else []


def _is_model(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, BaseModel)


def _is_union(kind: Any) -> bool:
    return typing.get_origin(kind) in (typing.Union, types.UnionType)
