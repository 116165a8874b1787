"""A model made for images of another shape: a teacher of 32 x 32 colour images for a student of 28 x 28 grey ones."""

import torch
from torch import Tensor, nn

from crdnd.errors import InputError
from crdnd.models._base import Normalized
from crdnd.models._exported import ExportedModel
from crdnd.models._foreign import OnnxModel

Shape = tuple[int, int, int]


class Adapted(nn.Module):
    """A model behind a change of the images' shape. (B, C, H, W) in [0, 1] -> logits (B, K).

    Images change as `fitted` says. That is linear, so gradients flow through.

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
        rows, columns = _interpolations(given[1:], wanted[1:])
        self.register_buffer("rows", rows.to(dtype), persistent=False)
        self.register_buffer("columns", columns.to(dtype), persistent=False)

    def adapt(self, x: Tensor) -> Tensor:
        """Images (B, *given) as the model wants them, (B, *wanted)."""
        if tuple(x.shape[1:]) != self.given:
            raise InputError(f"takes images of shape {self.given}, got {tuple(x.shape[1:])}.")
        return _fitted(x, self.rows, self.columns, self.wanted[0])

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
    if own is None and isinstance(model, Normalized):
        own = (model.channels, *(wanted or given)[1:])
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
        return None if model.takes_any_size else model.architecture.input_shape
    return model.input_shape if isinstance(model, ExportedModel | OnnxModel) else None


def fitted(x: Tensor, shape: Shape) -> Tensor:
    """Images of any size as a model wants them. (B, C, H, W) in [0, 1] -> (B, *shape) in [0, 1].

    They are scaled until they just cover `shape`, and what then stands over is cut off at both ends; grey images are
    repeated for a model of colour images. Sizes change by bilinear interpolation, anti-aliased where they shrink, as
    Pillow's BILINEAR does; two matrix products, so the result is the same every time on every device.

    Raises:
        InputError: the images have another number of channels than `shape`, and are not grey.
    """
    if x.shape[1] not in (1, shape[0]):
        raise InputError(f"images have {x.shape[1]} channels, the model takes {shape[0]}.")
    rows, columns = _interpolations((x.shape[2], x.shape[3]), shape[1:])
    return _fitted(x, rows.to(x), columns.to(x), shape[0])


def _fitted(x: Tensor, rows: Tensor, columns: Tensor, channels: int) -> Tensor:
    return (rows.to(x.dtype) @ x @ columns.to(x.dtype).T).expand(-1, channels, -1, -1)


def _interpolations(given: tuple[int, int], wanted: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """The matrices (wanted, given) that scale and crop rows and columns, float64; identities where sizes agree.

    Sizes become tensors before anything is computed with them, so that an exported graph takes images of any size.
    """
    heights, widths = (torch.scalar_tensor(size, dtype=torch.float64) for size in given)
    scale = torch.minimum(heights / wanted[0], widths / wanted[1])
    rows, columns = (_interpolation(size, into, scale) for size, into in zip(given, wanted, strict=True))
    return rows, columns


def _interpolation(size: int, wanted: int, scale: Tensor) -> Tensor:
    """Along one side: `wanted` pixels, each `scale` given ones wide, from the middle. -> (wanted, size)."""
    spare = torch.scalar_tensor(size, dtype=torch.float64) - wanted * scale
    centres = spare / 2 + (torch.arange(wanted, dtype=torch.float64)[:, None] + 0.5) * scale
    distance = (torch.arange(size, dtype=torch.float64) + 0.5 - centres).abs() / scale.clamp(min=1)
    weights = (1 - distance).clamp(min=0)
    return weights / weights.sum(dim=1, keepdim=True)
