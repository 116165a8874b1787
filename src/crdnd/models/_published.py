"""State dicts that others published, under the names that this package has for the same tensors."""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

PREFIXES = ("module.", "_orig_mod.", "model.", "network.")
"""What wrappers put before every name: DataParallel, torch.compile, RobustBench and others, this package."""
NORMALIZATIONS = (("mean", "std"), ("mu", "sigma"), ("normalize.mean", "normalize.std"))
"""RobustBench's names of the normalisation that a network carries inside; the first pair is this package's too."""
COUNTER = "num_batches_tracked"


@dataclass(frozen=True)
class Published:
    """How others write the weights of an architecture."""

    renamed: tuple[tuple[str, str], ...] = ()
    """Patterns in their names, and what this package has instead; applied one after another."""
    unused: tuple[str, str] | None = None
    """A part that their code makes and never calls, and the part that it is a twin of. It is dropped."""
    sign: str = ""
    """A tensor that only the code with `variant` has."""
    variant: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """Settings of the networks with the `sign`; their code normalises inside, with numbers that the file lacks."""


def unwrapped(tensors: Mapping[str, Tensor], own: Collection[str]) -> dict[str, Tensor]:
    """Names without the prefixes that all have (those of a normalisation aside) and the model's own have not."""
    found, apart = dict(tensors), {name for pair in NORMALIZATIONS for name in pair}
    while not set(own) <= found.keys():
        names = found.keys() - apart
        prefix = next((p for p in PREFIXES if names and all(name.startswith(p) for name in names)), None)
        if prefix is None or all(name.startswith(prefix) for name in own):
            break
        found = {name.removeprefix(prefix): value for name, value in found.items()}
    return found


def split_normalization(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], tuple[Tensor, Tensor] | None]:
    """The tensors without mean and std, and these two, of shape (C,), if both are there."""
    for pair in NORMALIZATIONS:
        if all(name in tensors for name in pair):
            mean, std = (tensors[name].flatten() for name in pair)
            return {name: value for name, value in tensors.items() if name not in pair}, (mean, std)
    return dict(tensors), None


def renamed(tensors: Mapping[str, Tensor], own: Mapping[str, Tensor], published: Published) -> dict[str, Tensor]:
    """The tensors of a network under its own names; what fits no name keeps the one it has.

    Args:
        tensors: without prefixes and normalisation.
        own: the network's tensors.
        published: how others write them.
    """
    found = _without_twin(tensors, published)
    if found.keys() != own.keys():
        found = {_rename(name, published): value for name, value in found.items()}
    # Files from before PyTorch counted batches, or from other frameworks, lack the counters, which nothing reads.
    counters = {name: value for name, value in own.items() if name.endswith(COUNTER)}
    return counters | found


def _rename(name: str, published: Published) -> str:
    for pattern, replacement in published.renamed:
        name = re.sub(pattern, replacement, name)
    return name


def _without_twin(tensors: Mapping[str, Tensor], published: Published) -> dict[str, Tensor]:
    """Without the unused part, where it is the twin it should be; else with all."""
    if published.unused is None:
        return dict(tensors)
    shapes = [
        {name.removeprefix(part): value.shape for name, value in tensors.items() if name.startswith(part)}
        for part in published.unused
    ]
    if shapes[0] != shapes[1]:
        return dict(tensors)
    return {name: value for name, value in tensors.items() if not name.startswith(published.unused[0])}
