"""Checkpoints: tensors in a safetensors file named by its step, and a JSON that points to it and holds the rest.

The JSON is replaced last and in one go. A kill before that leaves the old JSON with the old tensors, a kill after it
the new ones; there is no moment at which neither pair is whole. Nothing in either file is ever executed.
"""

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import safetensors.torch
from pydantic import Field
from torch import Tensor

from crdnd.config import Frozen, build
from crdnd.engine.history import Change, Epoch
from crdnd.errors import InputError
from crdnd.io import atomic_write_bytes, atomic_write_text, read_json, read_verified, sha256
from crdnd.models import parse_tensors

POINTER, SCHEMA = "checkpoint.json", "crdnd.checkpoint/1"
WAY_OUT = "run again with --fresh to move it aside and start over"


class Checkpoint(Frozen):
    """The document `crdnd.checkpoint/1`; its tensors lie in `file`."""

    schema_: Literal["crdnd.checkpoint/1"] = Field(default="crdnd.checkpoint/1", alias="schema")
    file: str = ""
    sha256: str = ""
    step: int
    """Optimiser steps done."""
    steps: int | None = None
    """Of the whole run; older versions did not say."""
    finished: bool
    seconds: float
    """Of the unfinished epoch so far."""
    history: tuple[Epoch, ...]
    best_epoch: int | None
    """1 for the first; None before the first validation."""
    changes: tuple[Change, ...] = ()
    """In the order in which they were made."""


def save_checkpoint(folder: Path, checkpoint: Checkpoint, tensors: Mapping[str, Tensor]) -> None:
    """Write a checkpoint and remove the one it replaces."""
    data = safetensors.torch.save({key: value.detach().cpu().contiguous().clone() for key, value in tensors.items()})
    file = f"checkpoint-{checkpoint.step:08d}.safetensors"
    atomic_write_bytes(folder / file, data)
    pointer = checkpoint.model_copy(update={"file": file, "sha256": sha256(data)})
    atomic_write_text(folder / POINTER, pointer.model_dump_json(by_alias=True, indent=1) + "\n")
    for old in folder.glob("checkpoint-*.safetensors"):
        if old.name != file:
            with contextlib.suppress(OSError):
                old.unlink()


def load_checkpoint(folder: Path) -> tuple[Checkpoint, dict[str, Tensor]] | None:
    """The folder's checkpoint, or None where no step was saved yet.

    Raises:
        InputError: a file is truncated or damaged; the message says what to do.
    """
    checkpoint = read_checkpoint(folder)
    if checkpoint is None:
        return None
    file = folder / checkpoint.file
    return checkpoint, parse_tensors(read_verified(file, checkpoint.sha256, WAY_OUT), file)


def read_checkpoint(folder: Path) -> Checkpoint | None:
    """The checkpoint without its tensors, or None where no step was saved yet."""
    pointer = folder / POINTER
    if not pointer.exists():
        return None
    try:
        content = read_json(pointer)
        if content.get("schema") != SCHEMA:
            raise InputError(f"it has the format {content.get('schema')!r}, this version reads {SCHEMA}")
        return build(Checkpoint, content)
    except InputError as error:
        raise InputError(f"{pointer}: is not a readable checkpoint ({error}); {WAY_OUT}.") from None
