"""MobileNetV2 for 32x32 images: the small student of the field's tables; after Sandler et al. 2018 (arXiv 1801.04381).

The variant of the field's code: the first two of the paper's strides are 1, ReLU instead of ReLU6, no dropout, and a
block of stride 1 whose width changes has a shortcut with a 1x1 convolution. 2,296,922 parameters for three channels and
10 classes; without those shortcuts it would be the paper's 2,237,770. The width multiplier rounds channels to
multiples of 8, as the paper's code does; the last 1,280 channels grow with it and do not shrink.
"""

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from crdnd.config import Frozen
from crdnd.models._resnet import PUBLISHED, projection

STAGES = ((1, 16, 1, 1), (6, 24, 2, 1), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))
"""Expansion, channels, blocks and the stride of the first block."""


class MobileNetV2(nn.Module):
    """Images (B, C, H, W) -> logits (B, K). Three stages halve the image, rounding up."""

    summary = "MobileNetV2 for small images: 17 inverted residual blocks, with the projection shortcuts of the field"
    published = PUBLISHED

    class Settings(Frozen):
        """The network's settings."""

        width: float = Field(default=1.0, gt=0, description="Multiplier of all channels.")

    def __init__(self, channels: int, num_classes: int, settings: Settings) -> None:
        super().__init__()
        inputs, last = _rounded(32 * settings.width), _rounded(1280 * max(1.0, settings.width))
        self.conv1 = nn.Conv2d(channels, inputs, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(inputs)
        blocks: list[nn.Module] = []
        for expansion, width, count, stride in STAGES:
            outputs = _rounded(width * settings.width)
            for index in range(count):
                blocks.append(_Block(inputs, outputs, expansion, stride if index == 0 else 1))
                inputs = outputs
        self.layers = nn.Sequential(*blocks)
        self.conv2 = nn.Conv2d(inputs, last, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(last)
        self.linear = nn.Linear(last, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, K)."""
        maps = self.layers(F.relu(self.bn1(self.conv1(x)), inplace=True))
        # The field's code averages windows of 4x4: the same for 32x32 images, and only for them.
        return self.linear(F.relu(self.bn2(self.conv2(maps)), inplace=True).mean(dim=(2, 3)))


class _Block(nn.Module):
    """Widen with 1x1, filter each channel with 3x3, narrow with 1x1; a shortcut where the size stays."""

    def __init__(self, inputs: int, outputs: int, expansion: int, stride: int) -> None:
        super().__init__()
        inner = expansion * inputs
        self.conv1 = nn.Conv2d(inputs, inner, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(inner)
        self.conv2 = nn.Conv2d(inner, inner, 3, stride=stride, padding=1, groups=inner, bias=False)
        self.bn2 = nn.BatchNorm2d(inner)
        self.conv3 = nn.Conv2d(inner, outputs, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(outputs)
        self.shortcut = projection(inputs, outputs, 1) if stride == 1 else None

    def forward(self, x: Tensor) -> Tensor:
        inner = F.relu(self.bn1(self.conv1(x)), inplace=True)
        inner = F.relu(self.bn2(self.conv2(inner)), inplace=True)
        outer = self.bn3(self.conv3(inner))
        return outer if self.shortcut is None else outer + self.shortcut(x)


def _rounded(channels: float) -> int:
    """The nearest multiple of 8, at least 8, and not below nine tenths of what was asked for."""
    nearest = max(8, int(channels + 4) // 8 * 8)
    return nearest + 8 if nearest < 0.9 * channels else nearest


MODEL = MobileNetV2
