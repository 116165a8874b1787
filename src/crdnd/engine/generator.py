"""Torch's own generator, which modules such as dropout draw from; all draws of ours are functions of their samples."""

import torch
from torch import Tensor


def random_states(device: torch.device) -> dict[str, Tensor]:
    """The states of the processor's generator and of this device's own; other devices belong to other processes."""
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def set_random_states(states: dict[str, Tensor], device: torch.device) -> None:
    """Bring back what `random_states` gave; a device that is not there is left out."""
    if "cpu" in states:
        torch.set_rng_state(states["cpu"])
    if "cuda" in states and device.type == "cuda":
        torch.cuda.set_rng_state(states["cuda"], device)
