"""The ResNet-50 for 32x32 images; after He et al. 2016 (arXiv 1512.03385).

As `resnet34`, with bottleneck blocks, which are four times wider outside (4w, 8w, 16w, 32w channels) than inside:
23,520,842 parameters for three channels and 10 classes.
"""

from crdnd.models._resnet import Bottleneck, ResNet


class ResNet50(ResNet):
    """Images (B, C, H, W) -> logits (B, K)."""

    summary = "ResNet-50 for small images: 3x3 stem, stages of 3, 4, 6, 3 bottleneck blocks (4w, 8w, 16w, 32w)"
    block = Bottleneck
    counts = (3, 4, 6, 3)


MODEL = ResNet50
