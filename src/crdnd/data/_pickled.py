"""Numbers, texts and arrays out of a pickle, without executing it.

A pickle is a program for a stack machine, and the standard library runs it. Here its instructions are only read (by
`pickletools`, which takes a pickle apart for printing), and the few of them that plain data needs are carried out:
containers, numbers, texts, and the two calls by which numpy writes an array. Whatever else a pickle may ask for (any
other function, any class) is refused by name.
"""

import math
import pickletools
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np

from crdnd.errors import InputError, first_line

# How the versions of numpy and Python name what stands in pickles of plain data; the values say what is done instead.
_KNOWN = {
    "numpy.core.multiarray _reconstruct": "array",
    "numpy._core.multiarray _reconstruct": "array",
    "numpy.core.numeric _frombuffer": "buffer",
    "numpy._core.numeric _frombuffer": "buffer",
    "numpy ndarray": "class",
    "numpy dtype": "type",
    "_codecs encode": "bytes",
    "__builtin__ bytes": "no bytes",
}
_VALUES = {
    "INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "BINFLOAT", "FLOAT",
    "STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8",
    "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8",
}  # fmt: skip
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_IGNORED = {"PROTO", "FRAME", "STOP"}


@dataclass
class _Global:
    name: str


@dataclass
class _Type:
    code: str
    order: str = "|"

    def numpy(self) -> Any:
        if not re.fullmatch(r"[uifb][1248]", self.code):
            raise ValueError(f"an array of the kind {self.code!r}")
        return np.dtype((self.order if self.order in ("<", ">") else "=") + self.code)


@dataclass
class _Array:
    value: Any = None


class _Mark:
    pass


def read_pickled(data: bytes, file: Path) -> Any:
    """What a pickle of plain data holds.

    Args:
        data: the file's content.
        file: what messages call it.

    Returns:
        Dictionaries, lists, tuples, numbers, texts, bytes and numpy arrays. Python 2's strings come as text with one
        character per byte.

    Raises:
        InputError: it asks for anything else, which is named, or is damaged.
    """
    try:
        return _Reader(file).read(data)
    except InputError:
        raise
    except (ValueError, LookupError, TypeError, ArithmeticError, AttributeError, MemoryError) as error:
        raise InputError(f"{file}: is no readable pickle of plain data ({first_line(error)}).") from None


class _Reader:
    def __init__(self, file: Path) -> None:
        self.file = file
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def read(self, data: bytes) -> Any:
        for opcode, argument, _ in pickletools.genops(data):
            self._do(opcode.name, argument)
        if len(self.stack) != 1:
            raise ValueError("it does not end with one value")
        return _plain(self.stack[0])

    def _do(self, name: str, argument: Any) -> None:
        stack = self.stack
        if name in _VALUES:
            stack.append(argument)
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name == "MARK":
            stack.append(_Mark())
        elif name in ("EMPTY_DICT", "EMPTY_LIST"):
            stack.append({} if name == "EMPTY_DICT" else [])
        elif name in ("DICT", "LIST", "TUPLE"):
            values = self._since_mark()
            stack.append({"DICT": _pairs, "LIST": list, "TUPLE": tuple}[name](values))
        elif name in ("TUPLE1", "TUPLE2", "TUPLE3"):
            stack.append(tuple(self._pop(int(name[-1]))))
        elif name in ("APPEND", "APPENDS"):
            values = self._pop(1) if name == "APPEND" else self._since_mark()
            _of_type(stack[-1], list).extend(values)
        elif name in ("SETITEM", "SETITEMS"):
            values = self._pop(2) if name == "SETITEM" else self._since_mark()
            _of_type(stack[-1], dict).update(_pairs(values))
        elif name in ("PUT", "BINPUT", "LONG_BINPUT"):
            self.memo[argument] = stack[-1]
        elif name == "MEMOIZE":
            self.memo[len(self.memo)] = stack[-1]
        elif name in ("GET", "BINGET", "LONG_BINGET"):
            stack.append(self.memo[argument])
        elif name in ("GLOBAL", "STACK_GLOBAL"):
            stack.append(self._global(argument if name == "GLOBAL" else " ".join(map(str, self._pop(2)))))
        elif name == "REDUCE":
            function, arguments = self._pop(2)
            stack.append(self._call(_of_type(function, _Global), _of_type(arguments, tuple)))
        elif name == "BUILD":
            (state,) = self._pop(1)
            _build(stack[-1], _of_type(state, tuple))
        elif name not in _IGNORED:
            self._refuse(f"the instruction {name}")

    def _pop(self, count: int) -> list[Any]:
        if len(self.stack) < count:
            raise ValueError("it takes more from its stack than there is")
        values = self.stack[len(self.stack) - count :]
        del self.stack[len(self.stack) - count :]
        return values

    def _since_mark(self) -> list[Any]:
        at = max(place for place, value in enumerate(self.stack) if isinstance(value, _Mark))
        values = self.stack[at + 1 :]
        del self.stack[at:]
        return values

    def _global(self, name: str) -> _Global:
        if name not in _KNOWN:
            self._refuse(name.replace(" ", "."))
        return _Global(name)

    def _call(self, function: _Global, arguments: tuple[Any, ...]) -> Any:
        kind = _KNOWN[function.name]
        if kind == "array":
            return _Array()
        if kind == "type":
            return _Type(_text(arguments[0]))
        if kind == "bytes":
            return _text(arguments[0]).encode("latin-1")
        if kind == "no bytes" and not arguments:
            return b""
        if kind == "buffer":
            data, of_type, shape, order = arguments
            return _Array(_array(data, of_type, shape, order == "F"))
        return self._refuse(function.name.replace(" ", "."))

    def _refuse(self, what: str) -> Any:
        raise InputError(
            f"{self.file}: is a pickle that asks for {what}; only plain numbers, texts and arrays are read, "
            "and nothing in it is executed."
        )


def _build(thing: Any, state: tuple[Any, ...]) -> None:
    """Carry out the one call of `__setstate__` that numpy's types and arrays have in a pickle."""
    if isinstance(thing, _Type):
        thing.order = _text(state[1])
    elif isinstance(thing, _Array):
        _, shape, of_type, fortran, data = state
        thing.value = _array(data, of_type, shape, bool(fortran))
    else:
        raise TypeError(f"a state for a {type(thing).__name__}")


def _array(data: Any, of_type: Any, shape: Any, fortran: bool) -> Any:
    raw = data.encode("latin-1") if isinstance(data, str) else bytes(_of_type(data, bytes | bytearray))
    kind = _of_type(of_type, _Type).numpy()
    sizes = tuple(int(size) for size in _of_type(shape, tuple))
    if min(sizes, default=0) < 0 or math.prod(sizes) * kind.itemsize != len(raw):
        raise ValueError(f"an array of shape {sizes} with {len(raw)} bytes")
    return np.frombuffer(raw, kind).reshape(sizes, order="F" if fortran else "C")


def _pairs(values: list[Any]) -> dict[Any, Any]:
    return dict(zip(values[::2], values[1::2], strict=True))


def _text(value: Any) -> str:
    return value.decode("latin-1") if isinstance(value, bytes) else _of_type(value, str)


def _of_type(value: Any, kind: Any) -> Any:
    if not isinstance(value, kind):
        raise TypeError(f"a {type(value).__name__} where another kind of value belongs")
    return value


def _plain(value: Any) -> Any:
    """The value with its arrays in place. None is looked for deeper than in a dictionary's values: no batch has any."""
    if isinstance(value, dict):
        return {key: _unpacked(item) for key, item in cast("dict[Any, Any]", value).items()}
    return _unpacked(value)


def _unpacked(value: Any) -> Any:
    if isinstance(value, _Global | _Type | _Mark):
        raise ValueError("a type stands where data belongs")
    return value.value if isinstance(value, _Array) else value
