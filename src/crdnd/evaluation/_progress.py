"""What an evaluation has found so far: one small file for each batch, so that a kill costs a batch at most."""

import itertools
import uuid
from collections.abc import Generator
from dataclasses import dataclass, replace
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from crdnd.errors import InputError
from crdnd.io import atomic_write_bytes, make_folder

SUFFIX, LEFT_SUFFIX = ".chunk.safetensors", ".left.safetensors"
PROBE = "probe.safetensors"
SAME = 1e-3
"""Largest relative difference of two computations of one model, at other thread counts or on other devices."""


@dataclass(frozen=True)
class Chunk:
    """What one round of an attack did to one batch."""

    step: str
    """Which round of which attack."""
    ids: Tensor
    """int64 (B,)."""
    stands: Tensor
    """bool (B,)."""
    adversarial: Tensor | None = None
    """The images of those that fell, where they are kept."""
    left: Tensor | Path | None = None
    """Where those that stand were left, (B', C, H, W), or the file that holds it, if the next round goes on there."""


class Progress:
    """The chunks of one evaluation, in a folder of their own, or in memory only."""

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        writer = uuid.uuid4().hex[:12]  # a process's number would come again, in a notebook or a container at once
        self._names = (f"{writer}-{number}" for number in itertools.count())
        self.found: dict[str, list[Chunk]] = {}
        if folder is not None:
            make_folder(folder)
        self.reload()

    def add(self, chunk: Chunk) -> None:
        """Keep a chunk, on disk first."""
        if self.folder is not None:
            name = next(self._names)
            if isinstance(chunk.left, Tensor):
                path = self.folder / f"{name}{LEFT_SUFFIX}"  # before the chunk, which says that the round is over
                atomic_write_bytes(path, safetensors.torch.save({"left": chunk.left.cpu().contiguous()}))
                chunk = replace(chunk, left=path)
            tensors = {"ids": chunk.ids.cpu(), "stands": chunk.stands.to(torch.uint8).cpu()}
            if chunk.adversarial is not None:
                tensors["adversarial"] = chunk.adversarial.cpu().contiguous()
            data = safetensors.torch.save(tensors, metadata={"step": chunk.step})
            atomic_write_bytes(self.folder / f"{name}{SUFFIX}", data)
        self.found.setdefault(chunk.step, []).append(chunk)

    def reload(self) -> None:
        """Read the folder anew, with what other processes have added to it."""
        if self.folder is not None:
            self.found = {}
            for chunk in _chunks(self.folder):
                self.found.setdefault(chunk.step, []).append(chunk)

    def left(self, step: str, ids: Tensor) -> Tensor | None:
        """Where a round left these samples (B,), as images (B, C, H, W); None unless it is known for all of them."""
        wanted = ids.cpu()
        known, images = torch.zeros(len(wanted), dtype=torch.bool), torch.empty(0)
        for chunk in self.found.get(step, []):
            stood = chunk.ids[chunk.stands]
            here = torch.isin(wanted, stood)
            if not here.any():
                continue
            content = _read(chunk.left).get("left") if isinstance(chunk.left, Path) else chunk.left
            if content is None:
                return None
            images = images if len(images) else content.new_empty(len(wanted), *content.shape[1:])
            images[here] = content[(wanted[here][:, None] == stood).int().argmax(1)]
            known |= here
        return images.to(ids.device) if known.all() else None

    def forget(self, step: str, ids: Tensor) -> None:
        """Where this round left samples is of no use any more, if these are all of them."""
        own = set(ids.tolist())
        chunks = self.found.get(step, [])
        for number, chunk in enumerate(chunks):
            if chunk.left is not None and own.issuperset(chunk.ids.tolist()):
                if isinstance(chunk.left, Path):
                    chunk.left.unlink(missing_ok=True)
                chunks[number] = replace(chunk, left=None)


def _chunks(folder: Path) -> Generator[Chunk]:
    for path in sorted(folder.glob(f"*{SUFFIX}")):
        try:
            with safetensors.safe_open(path, "pt") as file:
                step = (file.metadata() or {})["step"]
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            left = path.with_name(path.name.removesuffix(SUFFIX) + LEFT_SUFFIX)
            yield Chunk(
                step, tensors["ids"], tensors["stands"].bool(), tensors.get("adversarial"),
                left if left.exists() else None,
            )  # fmt: skip
        except (SafetensorError, KeyError, OSError) as error:
            raise InputError(f"{path}: is damaged ({error}); delete it, its batch is then attacked again.") from None


def work_number(root: Path, name: str, probe: tuple[Tensor, Tensor], *, random: bool) -> int:
    """Which of the folders `work_folder(root, name, number)` keeps the verdicts of one model under one protocol.

    Weights do not tell two models apart whose code differs, such as one with a softmax and one without. So a folder
    also remembers what its model answers to a few images, and a model that answers otherwise gets a folder of its own.
    A model that is random never answers twice the same; it gets a new folder each time, and cannot go on in an old one.

    Args:
        root: the folder of all evaluations; may not exist yet.
        name: of the data, the weights and the protocol.
        probe: logits and input gradients of a few images.
        random: whether the model is.
    """
    answers = {"logits": probe[0].detach().cpu().contiguous(), "gradients": probe[1].detach().cpu().contiguous()}
    for number in itertools.count(1):
        folder = work_folder(root, name, number)
        known = _read(folder / PROBE)
        if not known and any(folder.glob(f"*{SUFFIX}")):
            continue  # verdicts of nobody knows which model
        if not known:
            make_folder(folder)
            atomic_write_bytes(folder / PROBE, safetensors.torch.save(answers))
            return number
        if not random and all(_close(known.get(key), value) for key, value in answers.items()):
            return number
    raise AssertionError("itertools.count ends only when a folder is found")


def work_folder(root: Path, name: str, number: int) -> Path:
    """The folder of that number."""
    return root / (name if number == 1 else f"{name}-{number}")


def _read(path: Path) -> dict[str, Tensor]:
    """What a file holds; nothing where it has gone or is damaged."""
    try:
        return safetensors.torch.load_file(path)
    except (SafetensorError, OSError):
        return {}


def _close(known: Tensor | None, value: Tensor) -> bool:
    if known is None or known.shape != value.shape:
        return False
    # NaN is a possible answer; it must be given in the same places.
    known, value = known.nan_to_num(1e30), value.nan_to_num(1e30)
    return bool((known - value).norm() <= SAME * value.norm())
