"""The thin ResNets for 32x32 images of He et al. 2016 (arXiv 1512.03385), section 4.2: ResNet-8, -20, -56 and so on.

A 3x3 convolution, three stages of n = (d - 2) / 6 basic blocks with 16, 32 and 64 channels, mean, linear layer. By
default shortcuts have no weights, as in the paper (its option A): where a stage begins, every second pixel is taken and
the channels in the middle of twice as many, the others 0. With them ResNet-20 has 269,722 parameters for three channels
and 10 classes. `shortcut="projection"` is option B, a 1x1 convolution with batch norm (272,474).
"""

from typing import Literal

import torch.nn.functional as F
from pydantic import Field, field_validator
from torch import Tensor, nn

from crdnd.config import Frozen
from crdnd.models._resnet import PUBLISHED, BasicBlock, conv3x3


class CifarResNet(nn.Module):
    """Images (B, C, H, W) -> logits (B, K). Stages two and three halve the image, rounding up."""

    summary = (
        "thin ResNet-d for small images (He et al., section 4.2): 3 stages of (d - 2) / 6 basic blocks (w, 2w, 4w)"
    )
    published = PUBLISHED

    class Settings(Frozen):
        """The network's settings."""

        depth: int = Field(default=20, ge=8, description="Layers with weights: 6 n + 2 for n blocks a stage.")
        width: int = Field(default=16, ge=1, description="Channels of the first stage.")
        shortcut: Literal["zeros", "projection"] = Field(
            default="zeros", description="Where a stage begins: channels of zeros (option A), or a 1x1 convolution (B)."
        )

        @field_validator("depth")
        @classmethod
        def _whole_blocks(cls, depth: int) -> int:
            if (depth - 2) % 6:
                raise ValueError(f"must be 6 n + 2 for n blocks a stage, such as 8, 20, 56 or 110, got {depth}.")
            return depth

    def __init__(self, channels: int, num_classes: int, settings: Settings) -> None:
        super().__init__()
        w = settings.width
        self.conv1 = conv3x3(channels, w)
        self.bn1 = nn.BatchNorm2d(w)
        self.layer1 = _stage(w, w, 1, settings)
        self.layer2 = _stage(w, 2 * w, 2, settings)
        self.layer3 = _stage(2 * w, 4 * w, 2, settings)
        self.linear = nn.Linear(4 * w, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, K)."""
        maps = F.relu(self.bn1(self.conv1(x)), inplace=True)
        return self.linear(self.layer3(self.layer2(self.layer1(maps))).mean(dim=(2, 3)))


def _stage(inputs: int, outputs: int, stride: int, settings: CifarResNet.Settings) -> nn.Sequential:
    shortcut = _Zeros((outputs - inputs) // 2, outputs) if stride > 1 and settings.shortcut == "zeros" else None
    rest = (BasicBlock(outputs, outputs, 1) for _ in range((settings.depth - 2) // 6 - 1))
    return nn.Sequential(BasicBlock(inputs, outputs, stride, shortcut), *rest)


class _Zeros(nn.Module):
    """Every second pixel, between channels of zeros. (B, C, H, W) -> (B, outputs, H / 2, W / 2)."""

    def __init__(self, before: int, outputs: int) -> None:
        super().__init__()
        self.before, self.outputs = before, outputs

    def forward(self, x: Tensor) -> Tensor:
        after = self.outputs - self.before - x.shape[1]
        return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.before, after))


MODEL = CifarResNet
