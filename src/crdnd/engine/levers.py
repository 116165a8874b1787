"""What makes a run faster and changes nothing of what it computes but rounding; each lever says what became of it.

The step itself knows none of them: it calls a network, and the network is computed another way.
"""

import logging
import os
from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from types import MethodType
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from crdnd.attacks import Folding, float32, frozen
from crdnd.engine.memory import out_of_memory
from crdnd.engine.settings import OptimizerSettings, TrainSettings
from crdnd.errors import first_line
from crdnd.models import evaluating
from crdnd.objectives import View

log = logging.getLogger("crdnd")

CUBLAS = "CUBLAS_WORKSPACE_CONFIG"
NATURAL: frozenset[View] = frozenset({"t_nat", "t_nat_features", "t2_nat"})
"""What teachers say of natural images, which stays while neither changes."""
BATCHES_COMPARED = 4
"""So many batches' worth of images have to be answered alike in other batches before an answer is kept for good."""


@dataclass(frozen=True)
class Levers:
    """What became of the levers, for `run.json`: on or off, and why."""

    found: dict[str, str] = field(default_factory=dict)

    def note(self, name: str, on: bool, why: str = "", *, warn: bool = False) -> None:
        """One lever's fate; `warn` where it was asked for and cannot be had."""
        self.found[name] = ("on" if on else "off") + (f": {why}" if why else "")
        if warn:
            log.warning("levers: %s is off: %s", name, why)


# Networks


def ways(settings: TrainSettings, device: torch.device) -> dict[str, bool | None]:
    """How `Folding` computes networks: whether it folds, and whether channels are last; None where it chooses."""
    chosen = settings.levers
    if chosen.compile:  # a compiler folds for itself, and traces no weights that are swapped
        return {"fold": False, "channels_last": False}
    fast = device.type == "cuda" and (settings.precision == "bf16" or settings.tf32)
    last = True if chosen.channels_last is None and fast else chosen.channels_last
    return {"fold": chosen.fold, "channels_last": last}


def student_folding(student: nn.Module, probe: Tensor, settings: TrainSettings, levers: Levers) -> Folding:
    """How the student is computed, in the attack and while it learns."""
    with evaluating(student):
        found = Folding(student, probe, **cast("Any", ways(settings, probe.device)))
    plain = not settings.levers.fold and settings.levers.channels_last is False
    why = "compile does it" if settings.levers.compile else "as set" if plain else "no layer for it, or answers differ"
    levers.note("fold", bool(str(found)), str(found) or why)
    return found


@contextmanager
def teaching(
    teachers: Iterable[nn.Module], probe: Tensor, settings: TrainSettings, *, whole: bool = True
) -> Generator[None]:
    """Frozen teachers for the body's time, computed the fast way where this process has the whole of their weights."""
    with ExitStack() as stack:
        for teacher in teachers:
            if settings.levers.checkpoint_teacher:
                stack.enter_context(checkpointed(teacher))
            way = cast("Any", ways(settings, probe.device))
            stack.enter_context(frozen(teacher, probe, **way) if whole else evaluating(teacher))
        yield


@contextmanager
def checkpointed(network: nn.Module) -> Generator[None]:
    """Keep only what goes into a network's blocks, and compute the rest again when gradients ask for it.

    Blocks are the children of its `nn.Sequential`s that have children; a network without any is one block.
    """
    blocks = _blocks(network) or [one for one in [network] if "forward" not in vars(one)]
    try:
        for block in blocks:
            block.forward = MethodType(_again, block)
        yield
    finally:
        for block in blocks:
            vars(block).pop("forward", None)


def _again(self: nn.Module, x: Tensor) -> Tensor:
    plain = type(self).forward
    if not (torch.is_grad_enabled() and x.requires_grad):
        return plain(self, x)
    # In eval mode nothing is drawn, so no generator has to be set back.
    return cast("Tensor", checkpoint(plain, self, x, use_reentrant=False, preserve_rng_state=False))


def _blocks(network: nn.Module) -> list[nn.Module]:
    found: list[nn.Module] = []
    for child in network.children():
        whole = isinstance(network, nn.Sequential) and any(True for _ in child.children())
        whole = whole and not isinstance(child, nn.Sequential) and "forward" not in vars(child)
        found += [child] if whole else _blocks(child)
    return found


class Compiled:
    """Calls of networks through `torch.compile`; as they are from the first failure on.

    Args:
        levers: where a failure is noted.
        graphs: whether a step's kernels are launched as one CUDA graph.
    """

    def __init__(self, levers: Levers, *, graphs: bool) -> None:
        self._levers, self._graphs = levers, graphs
        self._compiled: dict[nn.Module, Callable[[Tensor], Tensor]] = {}
        self._failed = False

    def __call__(self, network: nn.Module, x: Tensor) -> Tensor:
        """network(x)."""
        if self._failed:
            return network(x)
        try:
            if network not in self._compiled:
                mode = "reduce-overhead" if self._graphs else None
                self._compiled[network] = cast("Callable[[Tensor], Tensor]", torch.compile(network, mode=mode))
            logits = self._compiled[network](x)
        except Exception as error:  # whatever a compiler lacks or refuses, the network itself can be called
            if out_of_memory(error):  # of the network as it is there may be enough for fewer images only
                raise
            self._failed = True
            self._levers.note("compile", False, f"{type(error).__name__}: {first_line(error)}", warn=True)
            return network(x)
        # The memory of a graph's outputs is used again by its next call.
        return logits.clone() if self._graphs else logits


def plainly(network: nn.Module, x: Tensor) -> Tensor:
    """network(x), as it is."""
    return network(x)


def caller(settings: TrainSettings, device: torch.device, levers: Levers) -> Callable[[nn.Module, Tensor], Tensor]:
    """How a step calls a network."""
    levers.note("compile", settings.levers.compile, "CUDA graphs" if settings.levers.compile and _cuda(device) else "")
    return Compiled(levers, graphs=_cuda(device)) if settings.levers.compile else plainly


# What teachers say of natural images


class Memory:
    """The teachers' views of natural images, by sample, for the epochs in which an image is as it is.

    A pass gives the views of a sample bit for bit again only where they do not depend on the rest of its batch. That
    is looked at, not believed: nothing is recalled before the views of so many samples have come out equal in other
    company. All of a batch is recalled or none of it, for fewer images may be computed another way.

    Args:
        samples: how many there are.
        bound: bytes that it may take; above them it keeps nothing.
        levers: where it is noted if it ends.
    """

    def __init__(self, samples: int, bound: float, levers: Levers) -> None:
        self._samples, self._bound, self._levers = samples, bound, levers
        self._kept: dict[str, Tensor] = {}
        self._known = torch.zeros(samples, dtype=torch.bool)
        self._equal, self._over = 0, False

    def recall(self, ids: Tensor) -> dict[str, Tensor] | None:
        """The views of these samples, int64 (B,) on the CPU, where a look costs no wait; None if one is unknown."""
        if self._over or self._equal < BATCHES_COMPARED * len(ids) or not bool(self._known[ids].all()):
            return None
        return {name: kept[ids.to(kept.device)] for name, kept in self._kept.items()}

    def keep(self, ids: Tensor, views: Mapping[str, Tensor]) -> None:
        """Take note of what was computed for these samples."""
        found = {name: view.detach() for name, view in views.items() if name in NATURAL}
        if not found:
            return
        size = self._samples * sum(view[0].nbytes for view in found.values())
        if size > self._bound:
            self._end(f"it would take {size / 2**20:.3g} MiB")
        if not self._over:
            self._compare(ids, found)
        if not self._over:
            for name, view in found.items():
                self._kept[name][ids.to(view.device)] = view
            self._known[ids] = True

    def _compare(self, ids: Tensor, found: Mapping[str, Tensor]) -> None:
        """See that what is known of some of these samples came out again."""
        again = self._known[ids].nonzero()[:, 0]
        for name, view in found.items():
            kept = self._kept.setdefault(name, view.new_zeros(self._samples, *view.shape[1:]))
            if not torch.equal(view[again.to(view.device)], kept[ids[again].to(kept.device)]):
                self._end("an image's answer depends on the others of its batch")
                return
        self._equal += len(again)

    def _end(self, why: str) -> None:
        self._over = True
        self._kept.clear()
        self._levers.note("keep_teacher", False, why)


def teacher_memory(
    samples: int, needs: frozenset[View], settings: TrainSettings, levers: Levers, *, sharded: bool = False
) -> Memory | None:
    """A memory of what teachers say, where an image comes back as it was.

    Images that are moved would have to be known at each of their places: with the 9 of `shift` a batch of 128 is
    wholly known after some 60 epochs, which is how long a run on the digits is.

    Args:
        samples: how many training images there are.
        needs: the views that a step computes.
        settings: of the run.
        levers: where it is noted.
        sharded: whether the processes meet in every pass of a teacher, so that none may leave one out.
    """
    reasons = {
        "as set": not settings.levers.keep_teacher,
        "no teacher is asked about natural images": not needs & NATURAL,
        "the attack asks for its slope": "t_linear" in needs,
        "augmentation changes the images": "none" not in settings.augmentations,
        "there is one epoch": settings.epochs == 1,
        "micro-batches differ in size": settings.micro_batch is not None,
        "every process has but a part of the teachers": sharded,
    }
    why = next((reason for reason, holds in reasons.items() if holds), "")
    levers.note("keep_teacher", not why, why or f"at most {settings.levers.keep_teacher:g} MiB")
    return None if why else Memory(samples, settings.levers.keep_teacher * 2**20, levers)


# The update, and the process


def make_optimizer(
    trained: list[nn.Parameter], settings: OptimizerSettings, device: torch.device, fused: bool, levers: Levers
) -> torch.optim.Optimizer:
    """The optimiser; one kernel for all weights where that is wanted and there is one."""
    values: dict[str, Any] = {"lr": settings.learning_rate, "weight_decay": settings.weight_decay}
    kind: type[torch.optim.Optimizer] = torch.optim.AdamW
    if settings.name == "sgd":
        kind = torch.optim.SGD
        values |= {"momentum": settings.momentum, "nesterov": settings.nesterov and settings.momentum > 0}
    if not fused:
        levers.note("fused_optimizer", False, "as set")
        return kind(trained, **values)
    try:
        found = kind(trained, **values, fused=True)
    except (RuntimeError, TypeError) as error:  # no fused kernel for this device or type
        levers.note("fused_optimizer", False, first_line(error), warn=True)
        return kind(trained, **values)
    levers.note("fused_optimizer", True)
    return found


@contextmanager
def arithmetic(settings: TrainSettings, device: torch.device) -> Generator[None]:
    """TF32 as set, and kernels that always give the same bits, or the fastest ones, for the body's time."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    benchmark = torch.backends.cudnn.benchmark
    if settings.deterministic and _cuda(device):
        os.environ.setdefault(CUBLAS, ":4096:8")  # read when cuBLAS starts
    with float32(tf32=settings.tf32):
        try:
            if settings.deterministic:
                torch.use_deterministic_algorithms(True)
            torch.backends.cudnn.benchmark = _cuda(device) and not settings.deterministic
            yield
        finally:
            torch.use_deterministic_algorithms(before[0], warn_only=before[1])
            torch.backends.cudnn.benchmark = benchmark


def note_precision(settings: TrainSettings, device: torch.device, levers: Levers) -> None:
    """What the arithmetic of this device makes of the settings."""
    levers.found["precision"] = settings.precision
    useless = settings.tf32 and not _cuda(device)
    levers.note("tf32", settings.tf32 and not useless, "the device has none" if useless else "", warn=useless)
    levers.note("deterministic", settings.deterministic)
    levers.note("checkpoint_teacher", settings.levers.checkpoint_teacher)


def _cuda(device: torch.device) -> bool:
    return device.type == "cuda"


def without_waiting(ids: Tensor, device: torch.device) -> Tensor:
    """Ids on the device; a copy from memory that the system may move would stop a GPU's queue."""
    return ids.pin_memory().to(device, non_blocking=True) if _cuda(device) else ids.to(device)
