"""WRN-d-w, the wide residual network of Zagoruyko and Komodakis 2016 (arXiv 1605.07146): the field's usual teacher.

A 3x3 convolution to 16 channels, three stages of n = (d - 4) / 6 pre-activation blocks with 16w, 32w and 64w channels,
batch norm, activation, mean, linear layer. WRN-34-10 has 46,160,474 parameters for three channels and 10 classes. The
tensors have the names of TRADES' code (`block1.layer.0.convShortcut.weight`), so that others' weights fit.

The networks of Gowal et al. 2020 (arXiv 2010.03593) and Rebuffi et al. 2021 (arXiv 2103.01946) are the variant with
`activation="silu"` and `padding="same"`; RSLAD's teacher for CIFAR-100, a WRN-70-16, is one of them.
"""

from typing import Literal

import torch.nn.functional as F
from pydantic import Field, field_validator
from torch import Tensor, nn

from crdnd.config import Frozen
from crdnd.models._published import Published

Activation = Literal["relu", "silu"]
Padding = Literal["symmetric", "same"]


class WideResNet(nn.Module):
    """Images (B, C, H, W) -> logits (B, K). Stages two and three halve the image, rounding up."""

    summary = "wide ResNet WRN-d-w for small images: 3 stages of (d - 4) / 6 pre-activation blocks (16w, 32w, 64w)"
    published = Published(
        # Gowal et al. and Rebuffi et al., and after them RobustBench and RSLAD's teacher for CIFAR-100.
        renamed=(
            (r"^init_conv\.", "conv1."),
            (r"^layer\.0\.block\.", "block1.layer."),
            (r"^layer\.1\.block\.", "block2.layer."),
            (r"^layer\.2\.block\.", "block3.layer."),
            (r"\.batchnorm_0\.", ".bn1."),
            (r"\.conv_0\.", ".conv1."),
            (r"\.batchnorm_1\.", ".bn2."),
            (r"\.conv_1\.", ".conv2."),
            (r"\.shortcut\.", ".convShortcut."),
            (r"^batchnorm\.", "bn1."),
            (r"^logits\.", "fc."),
        ),
        # TRADES' code makes this stage and never calls it; the weights of TRADES and RSLAD have it.
        unused=("sub_block1.", "block1."),
        sign="init_conv.weight",
        variant={"activation": "silu", "padding": "same"},
    )

    class Settings(Frozen):
        """The network's settings."""

        depth: int = Field(default=34, ge=10, description="Layers with weights: 6 n + 4 for n blocks a stage.")
        width: int = Field(default=10, ge=1, description="How many times wider than a ResNet of 16, 32, 64 channels.")
        activation: Activation = Field(default="relu", description="relu, or silu as in Gowal et al. 2020.")
        padding: Padding = Field(
            default="symmetric",
            description="Where a 3x3 convolution halves the image. same: as TensorFlow pads, more below and right.",
        )

        @field_validator("depth")
        @classmethod
        def _whole_blocks(cls, depth: int) -> int:
            if (depth - 4) % 6:
                raise ValueError(f"must be 6 n + 4 for n blocks a stage, such as 16, 28, 34 or 70, got {depth}.")
            return depth

    def __init__(self, channels: int, num_classes: int, settings: Settings) -> None:
        super().__init__()
        widths = [16 * settings.width, 32 * settings.width, 64 * settings.width]
        self.conv1 = nn.Conv2d(channels, 16, 3, padding=1, bias=False)
        self.block1 = _Stage(16, widths[0], 1, settings)
        self.block2 = _Stage(widths[0], widths[1], 2, settings)
        self.block3 = _Stage(widths[1], widths[2], 2, settings)
        self.bn1 = nn.BatchNorm2d(widths[2])
        self.relu = _activation(settings.activation)
        self.fc = nn.Linear(widths[2], num_classes)
        for module in self.modules():  # as TRADES' code begins, after He et al. 2015 (arXiv 1502.01852)
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        nn.init.zeros_(self.fc.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, K)."""
        maps = self.block3(self.block2(self.block1(self.conv1(x))))
        # The field's code averages windows of 8x8: the same for 32x32 images, and only for them.
        return self.fc(self.relu(self.bn1(maps)).mean(dim=(2, 3)))


class _Stage(nn.Module):
    """Blocks in a row; the first one changes the width and the size. `layer` is a name that published weights have."""

    def __init__(self, inputs: int, outputs: int, stride: int, settings: WideResNet.Settings) -> None:
        super().__init__()
        blocks = [_Block(inputs, outputs, stride, settings)]
        blocks += [_Block(outputs, outputs, 1, settings) for _ in range((settings.depth - 4) // 6 - 1)]
        self.layer = nn.Sequential(*blocks)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


class _Block(nn.Module):
    """Twice norm, activation, 3x3 convolution beside a shortcut. (B, C, H, W) -> (B, C', H / stride, W / stride)."""

    def __init__(self, inputs: int, outputs: int, stride: int, settings: WideResNet.Settings) -> None:
        super().__init__()
        self._pads = stride > 1 and settings.padding == "same"
        self.bn1 = nn.BatchNorm2d(inputs)
        self.relu1 = _activation(settings.activation)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=0 if self._pads else 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.relu2 = _activation(settings.activation)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.convShortcut = None if inputs == outputs else nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        inner = self.relu1(self.bn1(x))
        # A shortcut with weights starts behind the first activation, one without starts before it.
        shortcut = x if self.convShortcut is None else self.convShortcut(inner)
        if self._pads:
            height, width = inner.shape[2:]
            inner = F.pad(inner, (width % 2, 1, height % 2, 1))
        return shortcut + self.conv2(self.relu2(self.bn2(self.conv1(inner))))


def _activation(name: Activation) -> nn.Module:
    return nn.ReLU(inplace=True) if name == "relu" else nn.SiLU()


MODEL = WideResNet
