"""The small network for 28x28 images of TRADES (Zhang et al. 2019, arXiv 1901.08573), which many use for MNIST.

Four 3x3 convolutions without padding (w, w, 2w, 2w channels), max pools after the second and the fourth, two hidden
layers of 200 units. With width 32 it has 312,202 parameters for one channel and 10 classes. No batch norm. Its tensors
have the names of TRADES' code (`feature_extractor.conv1.weight`); its last layer does not begin with zeros, from which
an attack would have no gradient.
"""

from typing import ClassVar

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from crdnd.config import Frozen


class SmallCNN(nn.Module):
    """Images (B, C, H, W), at least 16x16 -> logits (B, K)."""

    summary = "TRADES' network for 28x28 images: 4 convolutions (w, w, 2w, 2w), 2 max pools, 2 hidden layers of 200"
    smallest: ClassVar[int] = 16

    class Settings(Frozen):
        """The network's settings."""

        width: int = Field(default=32, ge=1, description="Channels of the first two convolutions.")
        dropout: float = Field(
            default=0.0, ge=0, lt=1, description="After the first hidden layer; TRADES trains with 0.5."
        )

    def __init__(self, channels: int, num_classes: int, settings: Settings) -> None:
        super().__init__()
        w = settings.width
        self.feature_extractor = nn.ModuleDict(
            {
                "conv1": nn.Conv2d(channels, w, 3),
                "conv2": nn.Conv2d(w, w, 3),
                "conv3": nn.Conv2d(w, 2 * w, 3),
                "conv4": nn.Conv2d(2 * w, 2 * w, 3),
            }
        )
        self.classifier = nn.ModuleDict(
            {"fc1": nn.Linear(2 * w * 4 * 4, 200), "fc2": nn.Linear(200, 200), "fc3": nn.Linear(200, num_classes)}
        )
        self.dropout = nn.Dropout(settings.dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, K)."""
        convolution, linear = self.feature_extractor, self.classifier
        for first, second in (("conv1", "conv2"), ("conv3", "conv4")):
            x = F.relu(convolution[second](F.relu(convolution[first](x), inplace=True)), inplace=True)
            x = F.max_pool2d(x, 2)
        # 28x28 images have become 4x4, which this leaves as they are.
        x = F.adaptive_avg_pool2d(x, 4).flatten(1)
        x = self.dropout(F.relu(linear["fc1"](x), inplace=True))
        return linear["fc3"](F.relu(linear["fc2"](x), inplace=True))


MODEL = SmallCNN
