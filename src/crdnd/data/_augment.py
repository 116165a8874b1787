"""Augmentation in batches on the data's own device, drawn per sample, so that it needs no workers and no state."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from crdnd.random import Stream

Augmentation = Literal["none", "shift", "crop_flip"]


def augment(x: Tensor, kind: Augmentation, stream: Stream) -> Tensor:
    """Augment a batch. (B, C, H, W) in [0, 1] -> the same shape.

    none: as it is. shift: moved by up to 1 pixel each way, zeros come in. crop_flip: moved by up to 4 pixels, and
    mirrored left to right with probability 1/2.
    """
    if kind == "none":
        return x
    if kind == "shift":
        return _moved(x, 1, stream)
    mirrored = stream.child("flip").integers(0, 2, (1, 1, 1)).bool()
    return torch.where(mirrored, _moved(x, 4, stream).flip(3), _moved(x, 4, stream))


def _moved(x: Tensor, most: int, stream: Stream) -> Tensor:
    batch, channels, height, width = x.shape
    offset = stream.child("move").integers(0, 2 * most + 1, (2,))
    rows = (offset[:, 0, None] + torch.arange(height, device=x.device))[:, None, :, None]
    columns = (offset[:, 1, None] + torch.arange(width, device=x.device))[:, None, None, :]
    samples = torch.arange(batch, device=x.device)[:, None, None, None]
    planes = torch.arange(channels, device=x.device)[None, :, None, None]
    return F.pad(x, (most, most, most, most))[samples, planes, rows, columns]
