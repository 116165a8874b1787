"""A small convolutional network for small images: three 3x3 convolutions of width w, 2w and 4w, mean, linear layer.

With width 8 and one channel it has 6,274 parameters for 10 classes.
"""

from pydantic import Field
from torch import Tensor, nn

from crdnd.config import Frozen


class CNN(nn.Module):
    """Images (B, C, H, W) -> logits (B, K)."""

    summary = "three 3x3 convolutions (w, 2w at stride 2, 4w at stride 2), batch norm, mean, linear layer"

    class Settings(Frozen):
        """The network's settings."""

        width: int = Field(default=8, ge=1, description="Channels of the first convolution.")

    def __init__(self, channels: int, num_classes: int, settings: Settings) -> None:
        super().__init__()
        w = settings.width
        self.features = nn.Sequential(
            *_block(channels, w, stride=1), *_block(w, 2 * w, stride=2), *_block(2 * w, 4 * w, stride=2)
        )
        self.classifier = nn.Linear(4 * w, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, K)."""
        return self.classifier(self.features(x).mean(dim=(2, 3)))


def _block(inputs: int, outputs: int, stride: int) -> list[nn.Module]:
    return [
        nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(inplace=True),
    ]


MODEL = CNN
