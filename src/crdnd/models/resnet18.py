"""The ResNet-18 for 32x32 images that the tables of robust distillation use; after He et al. 2016 (arXiv 1512.03385).

A 3x3 convolution without max pool, four stages of two basic blocks with w, 2w, 4w and 8w channels, mean, linear layer.
With width 64, three channels and 10 classes it has 11,173,962 parameters. The tensors have the names of the code that
the field's checkpoints come from (`layer2.0.shortcut.1.weight`), so that others' weights fit.
"""

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from crdnd.config import Frozen


class ResNet18(nn.Module):
    """Images (B, C, H, W) -> logits (B, K). Stages two to four halve the image, rounding up."""

    summary = "ResNet-18 for small images: 3x3 stem, 4 stages of 2 basic blocks (w, 2w, 4w, 8w), mean, linear layer"

    class Settings(Frozen):
        """The network's settings."""

        width: int = Field(default=64, ge=1, description="Channels of the first stage.")

    def __init__(self, channels: int, num_classes: int, settings: Settings) -> None:
        super().__init__()
        w = settings.width
        self.conv1 = _conv3x3(channels, w, stride=1)
        self.bn1 = nn.BatchNorm2d(w)
        self.layer1 = _stage(w, w, stride=1)
        self.layer2 = _stage(w, 2 * w, stride=2)
        self.layer3 = _stage(2 * w, 4 * w, stride=2)
        self.layer4 = _stage(4 * w, 8 * w, stride=2)
        self.linear = nn.Linear(8 * w, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, K)."""
        maps = F.relu(self.bn1(self.conv1(x)), inplace=True)
        maps = self.layer4(self.layer3(self.layer2(self.layer1(maps))))
        # The field's code averages windows of 4x4: the same for 32x32 images, and only for them.
        return self.linear(maps.mean(dim=(2, 3)))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut. (B, C, H, W) -> (B, C', H / stride, W / stride)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = _conv3x3(inputs, outputs, stride)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = _conv3x3(outputs, outputs, stride=1)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Sequential()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, x: Tensor) -> Tensor:
        """relu(bn(conv(relu(bn(conv(x))))) + shortcut(x))."""
        inner = F.relu(self.bn1(self.conv1(x)), inplace=True)
        return F.relu(self.bn2(self.conv2(inner)) + self.shortcut(x), inplace=True)


def _stage(inputs: int, outputs: int, stride: int) -> nn.Sequential:
    return nn.Sequential(BasicBlock(inputs, outputs, stride), BasicBlock(outputs, outputs, stride=1))


def _conv3x3(inputs: int, outputs: int, stride: int) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)


MODEL = ResNet18
