"""What an attack is: rounds that are run one after the other on whatever still stands."""

import inspect
import json
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, fields
from types import FunctionType
from typing import Any, ClassVar, final

import torch
from torch import Tensor

from crdnd.io import sha256
from crdnd.random import Stream
from crdnd.threat import ThreatModel

Classifier = Callable[[Tensor], Tensor]
"""Images (B, C, H, W) in [0, 1] -> logits (B, K)."""

PerSampleLoss = Callable[[Tensor], Tensor]
"""Inputs (B, ...) -> one loss per sample (B,), to be maximised."""

Search = Callable[[Classifier, Tensor, Tensor, ThreatModel, Stream], Tensor]
"""(model, x (B, C, H, W), y (B,), threat, draws) -> legal inputs (B, C, H, W), each sample on its own."""

Continuation = Callable[[Classifier, Tensor, Tensor, ThreatModel, Stream, Tensor], Tensor]
"""A search that begins at its last argument, where the round before left the samples (B, C, H, W)."""

UNTOLD = "which does not tell it from others"
"""Said in a setting that different attacks could share."""


def input_gradient(total: Tensor, x: Tensor) -> Tensor:
    """d total / d x; zeros where the model lets no gradient through, which a check then names."""
    if not total.requires_grad:
        return torch.zeros_like(x)
    (gradient,) = torch.autograd.grad(total, x, allow_unused=True, materialize_grads=True)
    return gradient


@dataclass(frozen=True, slots=True)
class Round:
    """One restart, one target class, a stretch of a long search, or the whole of an attack that has none of these."""

    attack: str
    index: int
    """Which restart or target class; the draws depend on it."""
    search: Search
    """From the natural images to the end of this round."""
    block: int = 0
    """Which stretch of a search that is too long to be lost by a kill."""
    go_on: Continuation | None = None
    """This stretch alone, where it is not the first one."""


@dataclass(frozen=True, kw_only=True)
class Attack(ABC):
    """A named attack with everything fixed; `dataclasses.replace` makes another one of it."""

    name: str = ""
    """The registry's key."""
    summary: str
    paper: str

    judged_on_all: ClassVar[bool] = False
    """Whether it runs on misclassified images too and is judged by its last iterate, as the tables' attacks are."""
    needs_gradients: ClassVar[bool] = True

    @abstractmethod
    def rounds(self, num_classes: int) -> list[Round]:
        """What is run, in this order, each on the samples that the ones before left standing."""

    def notes(self, num_classes: int) -> list[str]:
        """What a reader must know about this attack on so many classes; usually nothing."""
        return []

    def settings(self) -> dict[str, Any]:
        """What is set about the attack, for the protocol of a result."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {key: _plain(value) for key, value in values.items() if key not in ("name", "summary", "paper")}

    @final
    def identity(self) -> dict[str, Any]:
        """The settings, and the code of classes that are not the package's own: two attacks are the same if these are.

        What such code calls elsewhere is not seen.
        """
        code = [_code(kind) for kind in type(self).__mro__ if kind not in Attack.__mro__ and not _is_own(kind)]
        return self.settings() | ({"class": ", ".join(code)} if code else {})  # no field can have this name

    def __call__(self, model: Classifier, x: Tensor, y: Tensor, threat: ThreatModel, stream: Stream) -> Tensor:
        """Adversarial inputs for a batch.

        Args:
            model: images in [0, 1] -> logits; its modes are the caller's business, no gradient stays behind in it.
            x: natural images (B, C, H, W) in [0, 1].
            y: labels, int64 (B,).
            threat: the set the result stays in.
            stream: draws, one row for each sample.

        Returns:
            (B, C, H, W), detached and legal. Where no adversarial input was found: the last one tried by an attack
            that is judged at its last iterate, else the natural image.
        """
        x = x.detach()
        with torch.no_grad():
            logits = model(x)
        standing = logits.argmax(1) == y
        x_adv, last = x.clone(), x.clone()
        for number, part in enumerate(self.rounds(logits.shape[1])):
            everything = self.judged_on_all and number == 0
            rows = torch.arange(len(x), device=x.device) if everything else standing.nonzero()[:, 0]
            if not len(rows):
                break
            task = (model, x[rows], y[rows], threat, stream.take(rows).child(part.attack, part.index))
            found = part.go_on(*task, last[rows]) if part.go_on else part.search(*task)
            last[rows] = found
            with torch.no_grad():
                standing[rows] = model(found).argmax(1) == y[rows]
            kept = slice(None) if self.judged_on_all else ~standing[rows]
            x_adv[rows[kept]] = found[kept]
        return x_adv


def _plain(value: Any) -> str | int | float | bool:
    if isinstance(value, str | int | float | bool):
        return value
    if isinstance(value, FunctionType | type):
        return value.__name__ if _is_own(value) else _code(value)
    try:
        json.dumps(value)
    except (TypeError, ValueError):  # as a tensor, whose text leaves most of it out
        return f"{type(value).__module__}.{type(value).__qualname__}, {UNTOLD}"
    return str(value)


def _is_own(value: FunctionType | type) -> bool:
    return f"{_module(value)}.".startswith("crdnd.")


def _module(value: FunctionType | type) -> str:
    """Where its code is; a function may pass for another one (functools.wraps)."""
    return value.__module__ if isinstance(value, type) else value.__globals__["__name__"]


def _code(value: FunctionType | type) -> str:
    """The name of a class or function, and a hash of its text."""
    text = value if isinstance(value, type) else value.__code__
    name = f"{_module(value)}.{value.__qualname__ if isinstance(value, type) else value.__code__.co_qualname}"
    # Neither a lambda, whose text may hold others, nor made inside a function, whose values it may hold.
    if "<" not in name:
        with suppress(OSError, TypeError):
            return f"{name} {sha256(inspect.getsource(text).encode())[:16]}"
    return f"{name}, {UNTOLD}"
