"""What the residual networks share: blocks, and the four stages of ResNet-18, -34 and -50 for small images.

The tensors have the names of the code that the field's checkpoints come from (`layer2.0.shortcut.1.weight`).
"""

from typing import ClassVar

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from crdnd.config import Frozen
from crdnd.models._published import Published

PUBLISHED = Published(renamed=((r"^fc\.", "linear."), (r"\.downsample\.", ".shortcut.")))
"""torchvision's names, which some of the field's code has for the same network."""


def conv3x3(inputs: int, outputs: int, stride: int = 1) -> nn.Conv2d:
    """A 3x3 convolution that keeps the size, or halves it at stride 2, rounding up."""
    return nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)


def projection(inputs: int, outputs: int, stride: int) -> nn.Sequential:
    """The shortcut past a block: nothing where sizes agree, else a 1x1 convolution with batch norm."""
    if stride == 1 and inputs == outputs:
        return nn.Sequential()
    return nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False), nn.BatchNorm2d(outputs))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut. (B, C, H, W) -> (B, C', H / stride, W / stride)."""

    expansion = 1

    def __init__(self, inputs: int, width: int, stride: int, shortcut: nn.Module | None = None) -> None:
        super().__init__()
        self.conv1 = conv3x3(inputs, width, stride)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = conv3x3(width, width)
        self.bn2 = nn.BatchNorm2d(width)
        self.shortcut = shortcut or projection(inputs, width, stride)

    def forward(self, x: Tensor) -> Tensor:
        """relu(bn(conv(relu(bn(conv(x))))) + shortcut(x))."""
        inner = F.relu(self.bn1(self.conv1(x)), inplace=True)
        return F.relu(self.bn2(self.conv2(inner)) + self.shortcut(x), inplace=True)


class Bottleneck(nn.Module):
    """Convolutions 1x1, 3x3 and 1x1, the last four times wider, beside a shortcut; the 3x3 one has the stride."""

    expansion = 4

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = conv3x3(width, width, stride)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, 4 * width, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(4 * width)
        self.shortcut = projection(inputs, 4 * width, stride)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, 4 width, H / stride, W / stride)."""
        inner = F.relu(self.bn1(self.conv1(x)), inplace=True)
        inner = F.relu(self.bn2(self.conv2(inner)), inplace=True)
        return F.relu(self.bn3(self.conv3(inner)) + self.shortcut(x), inplace=True)


class ResNet(nn.Module):
    """Images (B, C, H, W) -> logits (B, K). Stages two to four halve the image, rounding up."""

    block: ClassVar[type[BasicBlock | Bottleneck]]
    counts: ClassVar[tuple[int, ...]]
    """Blocks in each stage."""
    published = PUBLISHED

    class Settings(Frozen):
        """The network's settings."""

        width: int = Field(default=64, ge=1, description="Channels of the first stage.")

    def __init__(self, channels: int, num_classes: int, settings: Settings) -> None:
        super().__init__()
        w, grown = settings.width, self.block.expansion
        self.conv1 = conv3x3(channels, w)
        self.bn1 = nn.BatchNorm2d(w)
        self.layer1 = self._stage(w, w, 1, self.counts[0])
        self.layer2 = self._stage(grown * w, 2 * w, 2, self.counts[1])
        self.layer3 = self._stage(2 * grown * w, 4 * w, 2, self.counts[2])
        self.layer4 = self._stage(4 * grown * w, 8 * w, 2, self.counts[3])
        self.linear = nn.Linear(8 * grown * w, num_classes)

    def _stage(self, inputs: int, width: int, stride: int, count: int) -> nn.Sequential:
        outputs = self.block.expansion * width
        rest = (self.block(outputs, width, 1) for _ in range(count - 1))
        return nn.Sequential(self.block(inputs, width, stride), *rest)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, K)."""
        maps = F.relu(self.bn1(self.conv1(x)), inplace=True)
        maps = self.layer4(self.layer3(self.layer2(self.layer1(maps))))
        # The field's code averages windows of 4x4: the same for 32x32 images, and only for them.
        return self.linear(maps.mean(dim=(2, 3)))
