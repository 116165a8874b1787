"""The processes that share a batch, for methods that relate its samples."""

from typing import Any, cast

import torch
import torch.distributed
from accelerate import Accelerator
from torch import Tensor

from crdnd.objectives import Processes


class SharedBatch(Processes):
    """The processes of an accelerator, each with an equal share of every batch."""

    def __init__(self, accelerator: Accelerator) -> None:
        self._accelerator = accelerator
        self.index = accelerator.process_index

    def gather(self, z: Tensor) -> Tensor:
        """All processes' rows in the order of the processes; gradients find their way back."""
        return cast("Tensor", _Gathered.apply(z)) if self._accelerator.num_processes > 1 else z

    def mean(self, z: Tensor) -> Tensor:
        """The mean over the processes, without gradients."""
        return cast("Tensor", self._accelerator.reduce(z.detach().clone(), "mean"))


class _Gathered(torch.autograd.Function):
    """Gather forwards, add up backwards: every process's loss has a gradient for every process's rows."""

    @staticmethod
    def forward(ctx: Any, z: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.rows = len(z)
        parts = [torch.empty_like(z) for _ in range(torch.distributed.get_world_size())]
        torch.distributed.all_gather(parts, z.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        total = gradient.contiguous().clone()
        torch.distributed.all_reduce(total)
        first = torch.distributed.get_rank() * ctx.rows
        return total[first : first + ctx.rows]
