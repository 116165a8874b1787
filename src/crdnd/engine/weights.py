"""What is done to weights besides training them: averages, re-estimated batch norms, adversarial perturbation."""

from collections.abc import Generator, Iterable
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase  # pyright: ignore[reportPrivateUsage]

from crdnd.attacks import true_float32
from crdnd.data import ImageData
from crdnd.models import evaluating
from crdnd.random import permutation

_TINY = 1e-12


@torch.no_grad()
def average(averaged: nn.Module, student: nn.Module, share: float) -> None:
    """averaged <- (1 - share) * averaged + share * student, batch-norm statistics included; counters are copied."""
    # By parameters and buffers, which name a shared tensor once; a state dict names tied weights twice.
    own_tensors = [*averaged.parameters(), *averaged.buffers()]
    new_tensors = [*student.parameters(), *student.buffers()]
    for own, new in zip(own_tensors, new_tensors, strict=True):
        if own.is_floating_point():
            own.lerp_(new, share)
        else:
            own.copy_(new)


def reestimate_batch_norm(network: nn.Module, data: ImageData, batch_size: int) -> None:
    """Give the batch norms of averaged weights the statistics of the natural training images under these weights.

    The average of the statistics of many networks is not the statistics of their average (Izmailov et al. 2018, arXiv
    1803.05407).
    """
    norms = [m for m in network.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    if not norms:
        return
    momenta = [norm.momentum for norm in norms]
    with evaluating(network), true_float32(), torch.no_grad():
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # the mean over all batches
            norm.train()
        try:
            # An incomplete last batch would count as much as a whole one, and might have one image.
            whole = len(data) // batch_size * batch_size or len(data)
            # In a random order: of data sorted by class, a batch would not have the variance between classes.
            order = permutation(len(data), "batch norm")[:whole].to(data.device)
            for ids in order.split(batch_size):
                network(data.batch(ids)[0])
        finally:
            for norm, momentum in zip(norms, momenta, strict=True):
                norm.momentum = momentum


def moving_statistics(network: nn.Module) -> list[Tensor]:
    """The running means and variances that a step moves; those of layers in eval mode stay as they are."""
    norms = [module for module in network.modules() if isinstance(module, _NormBase) and module.training]
    found = [value for norm in norms for value in (norm.running_mean, norm.running_var)]
    return [value for value in found if value is not None]


def statistics(network: nn.Module) -> list[Tensor]:
    """A copy of the network's buffers, which passes in train mode move."""
    return [buffer.clone() for buffer in network.buffers()]


@torch.no_grad()
def put_back(network: nn.Module, before: list[Tensor]) -> None:
    """Bring back what `statistics` gave."""
    for buffer, value in zip(network.buffers(), before, strict=True):
        buffer.copy_(value)


@contextmanager
def keeping_statistics(network: nn.Module) -> Generator[None]:
    """A pass in the body leaves no trace in the network's buffers."""
    before = statistics(network)
    try:
        yield
    finally:
        put_back(network, before)


@contextmanager
def perturbed(weights: Iterable[Tensor], gradients: Iterable[Tensor], gamma: float) -> Generator[None]:
    """Each weight w moved by gamma ||w|| g / ||g|| for the body's time, and put back exactly.

    Adversarial weight perturbation, Wu et al. 2020 (arXiv 2004.05884), section 4.2 with one step.
    """
    moved = list(weights)
    before = [weight.detach().clone() for weight in moved]
    with torch.no_grad():
        for weight, gradient in zip(moved, gradients, strict=True):
            weight.add_(gradient * (gamma * weight.norm() / (gradient.norm() + _TINY)))
    try:
        yield
    finally:
        with torch.no_grad():
            for weight, value in zip(moved, before, strict=True):
                weight.copy_(value)


def perturbable(network: nn.Module) -> list[nn.Parameter]:
    """What adversarial weight perturbation moves: weights with more than one axis; no biases, no norms."""
    return [parameter for parameter in network.parameters() if parameter.requires_grad and parameter.ndim > 1]
