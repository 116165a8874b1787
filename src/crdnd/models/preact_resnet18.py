"""PreActResNet-18 for small images: norm and ReLU stand before each convolution; He et al. 2016 (arXiv 1603.05027).

A 3x3 convolution, four stages of two blocks with w, 2w, 4w and 8w channels, mean, linear layer: 11,171,146 parameters
with width 64, three channels and 10 classes. The code of Rice et al. 2020 (arXiv 2002.11569) and of AWP puts a norm and
a ReLU after the last block, as the paper does: `final_norm`, 1,024 more. A shortcut with weights starts behind the
first ReLU of its block. (The code of Wong et al. 2020 starts it before the norm, under the same names of tensors; that
network is not built here.)
"""

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from crdnd.config import Frozen
from crdnd.models._resnet import PUBLISHED, conv3x3


class PreActResNet18(nn.Module):
    """Images (B, C, H, W) -> logits (B, K). Stages two to four halve the image, rounding up."""

    summary = "PreActResNet-18 for small images: 3x3 stem, 4 stages of 2 pre-activation blocks (w, 2w, 4w, 8w)"
    published = PUBLISHED

    class Settings(Frozen):
        """The network's settings."""

        width: int = Field(default=64, ge=1, description="Channels of the first stage.")
        final_norm: bool = Field(default=False, description="Norm and ReLU after the last block, as Rice et al. 2020.")

    def __init__(self, channels: int, num_classes: int, settings: Settings) -> None:
        super().__init__()
        w = settings.width
        self.conv1 = conv3x3(channels, w)
        self.layer1 = nn.Sequential(_Block(w, w, 1), _Block(w, w, 1))
        self.layer2 = nn.Sequential(_Block(w, 2 * w, 2), _Block(2 * w, 2 * w, 1))
        self.layer3 = nn.Sequential(_Block(2 * w, 4 * w, 2), _Block(4 * w, 4 * w, 1))
        self.layer4 = nn.Sequential(_Block(4 * w, 8 * w, 2), _Block(8 * w, 8 * w, 1))
        self.bn = nn.BatchNorm2d(8 * w) if settings.final_norm else None
        self.linear = nn.Linear(8 * w, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, K)."""
        maps = self.layer4(self.layer3(self.layer2(self.layer1(self.conv1(x)))))
        if self.bn is not None:
            maps = F.relu(self.bn(maps), inplace=True)
        return self.linear(maps.mean(dim=(2, 3)))


class _Block(nn.Module):
    """Twice norm, ReLU, 3x3 convolution beside a shortcut. (B, C, H, W) -> (B, C', H / stride, W / stride)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = conv3x3(inputs, outputs, stride)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.conv2 = conv3x3(outputs, outputs)
        self.shortcut = None
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        inner = F.relu(self.bn1(x), inplace=True)
        shortcut = x if self.shortcut is None else self.shortcut(inner)
        return self.conv2(F.relu(self.bn2(self.conv1(inner)), inplace=True)) + shortcut


MODEL = PreActResNet18
