"""The ResNet-34 for 32x32 images; after He et al. 2016 (arXiv 1512.03385).

As `resnet18`, with stages of 3, 4, 6 and 3 basic blocks: 21,282,122 parameters for three channels and 10 classes.
"""

from crdnd.models._resnet import BasicBlock, ResNet


class ResNet34(ResNet):
    """Images (B, C, H, W) -> logits (B, K)."""

    summary = "ResNet-34 for small images: 3x3 stem, stages of 3, 4, 6, 3 basic blocks (w, 2w, 4w, 8w)"
    block = BasicBlock
    counts = (3, 4, 6, 3)


MODEL = ResNet34
