"""A batch size that fits into memory, from what the model keeps for one image."""

import os

import torch
from torch import Tensor, nn

from crdnd.data import ImageData
from crdnd.models import evaluating

LARGEST, SMALLEST = 512, 8
SHARE = 0.4
"""Of the free memory; attacks keep about ten images of state for each sample, and other processes live here too."""
STATES = 12


def batch_size_that_fits(model: nn.Module, data: ImageData) -> int:
    """A power of two between 8 and 512 whose attack fits into the memory that is free now."""
    ids = torch.arange(min(2, len(data)), device=data.device)
    x, _ = data.batch(ids)
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        kept[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
        return tensor

    weights = {parameter.data_ptr() for parameter in model.parameters()}
    with evaluating(model), torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        model(x.requires_grad_(True))
    activations = sum(size for address, size in kept.items() if address not in weights)
    one = 2 * activations // len(ids) + STATES * x[0].numel() * x.element_size()
    fitting = int(SHARE * _free(x.device) / max(one, 1))
    return max(SMALLEST, min(LARGEST, 1 << max(fitting, 1).bit_length() - 1))


def _free(device: torch.device) -> int:
    """Bytes that are free on the device."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # not every platform says
        return 2 << 30
