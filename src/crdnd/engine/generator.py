"""Torch's own generator, which modules such as dropout draw from; all draws of ours are functions of their samples."""

import torch
from torch import Tensor


def random_states() -> dict[str, Tensor]:
    """The state of every device's generator."""
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states |= {f"cuda{index}": value for index, value in enumerate(torch.cuda.get_rng_state_all())}
    return states


def set_random_states(states: dict[str, Tensor]) -> None:
    """Bring back what `random_states` gave; devices that are not there are left out."""
    if "cpu" in states:
        torch.set_rng_state(states["cpu"])
    cuda = [states[key] for key in sorted(states) if key.startswith("cuda")]
    if cuda and torch.cuda.is_available() and len(cuda) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(cuda)
