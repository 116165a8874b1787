"""The processes that share a run: what they add up, what they agree on, and what is heard of one that has ended."""

import copy
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, cast

import torch
import torch.distributed
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env
from torch import Tensor, nn

from crdnd.errors import RunError, first_line
from crdnd.objectives import Processes

PATIENCE = timedelta(minutes=10)
"""How long a process waits for one that is silent; one that has died is noticed as its connection closes."""

LARGE_LAYER = 100_000
"""Numbers from which on a layer of a sharded network has a message of its own."""


def processes() -> PartialState:
    """This process among those that `accelerate launch` or torchrun started, and its device.

    `PartialState` alone does not read the variable by which `accelerate launch --cpu` says where to compute, and would
    choose Apple's MPS, which has no float64: sums and folded weights need it.
    """
    cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or torch.backends.mps.is_available()
    with _heard():
        return PartialState(cpu=cpu, timeout=PATIENCE)


class SharedRun(Processes):
    """The processes of a run, each with an equal share of every batch. One alone has nothing to tell.

    Every method that talks to the others has to be called by all of them, in the same order.

    Raises:
        RunError: another process has ended or is silent.
    """

    def __init__(self, state: PartialState) -> None:
        self.index, self.count, self.is_main = state.process_index, state.num_processes, state.is_main_process
        # What is agreed on goes from host to host, so that no device has to be waited for.
        self._hosts = None
        if self.count > 1 and torch.distributed.get_backend() != "gloo":
            self._hosts = torch.distributed.new_group(backend="gloo", timeout=PATIENCE)
        self.agree()  # one that ended now, with a mistake of the user's, would cut off those that still connect

    def gather(self, z: Tensor) -> Tensor:
        """All processes' rows in the order of the processes; gradients find their way back."""
        return cast("Tensor", _Gathered.apply(z)) if self.count > 1 else z

    def mean(self, z: Tensor) -> Tensor:
        """The mean over the processes, without gradients."""
        return self.means([z])[0]

    def means(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The means over the processes, without gradients, as new tensors; one message for each type of number."""
        return [total / self.count for total in self.sums(tensors)]

    def sums(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The sums over the processes, without gradients, as new tensors; one message for each type of number."""
        found = [z.detach().clone() for z in tensors]
        for dtype in dict.fromkeys(z.dtype for z in found) if self.count > 1 else ():
            places = [place for place, z in enumerate(found) if z.dtype == dtype]
            joined = torch.cat([found[place].flatten() for place in places])
            with _heard():
                torch.distributed.all_reduce(joined)
            for place, part in zip(places, joined.split([found[place].numel() for place in places]), strict=True):
                found[place] = part.view(found[place].shape)
        return found

    def agree(self, stop: int | None = None, *, main: bool = False) -> tuple[int | None, bool]:
        """What all do next: the exit status that any process was asked for, and what the main one says.

        Nobody gets an answer before everybody has asked. No device is waited for.
        """
        if self.count == 1:
            return stop, main
        told = torch.tensor([stop or 0, main and self.is_main])
        with _heard():
            torch.distributed.all_reduce(told, torch.distributed.ReduceOp.MAX, group=self._hosts)
        return int(told[0]) or None, bool(told[1])


def sharded(network: nn.Module, device: torch.device) -> nn.Module:
    """A frozen copy of a network of whose weights every process keeps its part; they meet layer by layer in a pass.

    It has to be called by all processes together, forwards and backwards. Small layers stay whole once they have met.
    """
    # Importing them takes as long as many a start of a run.
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    network = copy.deepcopy(network).requires_grad_(False)
    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    for layer in reversed(list(network.modules())[1:]):  # inner ones first: an outer one takes what is left
        if sum(parameter.numel() for parameter in layer.parameters(recurse=False)) >= LARGE_LAYER:
            fully_shard(layer, mesh=mesh)
    fully_shard(network, mesh=mesh)
    return network


@contextmanager
def _heard() -> Generator[None]:
    try:
        yield
    except RuntimeError as error:  # what gloo and NCCL raise when a connection closes or nobody answers
        raise RunError(
            f"another process of this run has ended or does not answer ({first_line(error)}); its own message says "
            "why. The last good checkpoint is kept: the same command goes on from there."
        ) from error


class _Gathered(torch.autograd.Function):
    """Gather forwards, add up backwards: every process's loss has a gradient for every process's rows."""

    @staticmethod
    def forward(ctx: Any, z: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.rows = len(z)
        parts = [torch.empty_like(z) for _ in range(torch.distributed.get_world_size())]
        with _heard():
            torch.distributed.all_gather(parts, z.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        total = gradient.contiguous().clone()
        with _heard():
            torch.distributed.all_reduce(total)
        first = torch.distributed.get_rank() * ctx.rows
        return total[first : first + ctx.rows]
