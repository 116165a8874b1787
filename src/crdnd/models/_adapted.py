"""A model made for images of another shape: a teacher of 32 x 32 colour images for a student of 28 x 28 grey ones."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from crdnd.errors import InputError
from crdnd.models._base import Normalized
from crdnd.models._exported import ExportedModel
from crdnd.models._foreign import OnnxModel

Shape = tuple[int, int, int]


class Adapted(nn.Module):
    """A model behind a change of the images' shape. (B, C, H, W) in [0, 1] -> logits (B, K).

    Sizes change by bilinear interpolation, anti-aliased where they shrink, and grey images are repeated for a model of
    colour images. All of it is linear, so gradients flow through, and two matrix products, so they are the same every
    time on every device. Pixels stay in [0, 1].

    Args:
        model: takes images of shape `wanted`.
        given: (C, H, W) of the images that come.
        wanted: (C, H, W) of the images that the model was made for.
    """

    rows: Tensor
    columns: Tensor

    def __init__(self, model: nn.Module, given: Shape, wanted: Shape) -> None:
        super().__init__()
        self.model, self.given, self.wanted = model, given, wanted
        dtype = next((parameter.dtype for parameter in model.parameters()), torch.float32)
        # What no checkpoint needs to hold: it follows from the shapes.
        self.register_buffer("rows", _interpolation(given[1], wanted[1]).to(dtype), persistent=False)
        self.register_buffer("columns", _interpolation(given[2], wanted[2]).to(dtype), persistent=False)

    def adapt(self, x: Tensor) -> Tensor:
        """Images (B, *given) as the model wants them, (B, *wanted)."""
        if tuple(x.shape[1:]) != self.given:
            raise InputError(f"takes images of shape {self.given}, got {tuple(x.shape[1:])}.")
        resized = self.rows.to(x.dtype) @ x @ self.columns.to(x.dtype).T
        return resized.expand(-1, self.wanted[0], -1, -1)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of images in [0, 1]."""
        return self.model(self.adapt(x))


def adapted(model: nn.Module, given: Shape, wanted: Shape | None = None, what: str = "model") -> nn.Module:
    """The model for images of shape `given`: itself, unless it is known to be made for others.

    Args:
        model: images -> logits.
        given: (C, H, W) of the images that come.
        wanted: what the model was made for, where it does not know that itself.
        what: what messages call the model.

    Raises:
        InputError: `wanted` is not what the model itself says, or its channels cannot be made from those given.
    """
    own = input_shape(model)
    if own is not None and wanted not in (None, own):
        raise InputError(f"{what}: itself says that it takes {list(own)}, and not {list(wanted)}; leave that away.")
    wanted = own or wanted
    if wanted is None or wanted == given:
        return model
    if given[0] not in (1, wanted[0]):
        raise InputError(
            f"{what}: cannot process images of shape {given}: it was made for {wanted}, and no channels can be made of "
            "others except of grey."
        )
    return Adapted(model, given, wanted)


def input_shape(model: nn.Module) -> Shape | None:
    """(C, H, W) of the images that a model was made for; None where it does not say."""
    if isinstance(model, Normalized):
        return model.architecture.input_shape
    return model.input_shape if isinstance(model, ExportedModel | OnnxModel) else None


def _interpolation(size: int, wanted: int) -> Tensor:
    """The matrix (wanted, size) that interpolates linearly along one side, float64; the identity where they agree."""
    identity = torch.eye(size, dtype=torch.float64)[None, None]
    resized = F.interpolate(identity, (wanted, size), mode="bilinear", align_corners=False, antialias=wanted < size)
    return resized[0, 0]
