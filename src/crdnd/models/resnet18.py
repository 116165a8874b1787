"""The ResNet-18 for 32x32 images that the tables of robust distillation use; after He et al. 2016 (arXiv 1512.03385).

A 3x3 convolution without max pool, four stages of two basic blocks with w, 2w, 4w and 8w channels, mean, linear layer.
With width 64, three channels and 10 classes it has 11,173,962 parameters.
"""

from crdnd.models._resnet import BasicBlock, ResNet


class ResNet18(ResNet):
    """Images (B, C, H, W) -> logits (B, K)."""

    summary = "ResNet-18 for small images: 3x3 stem, 4 stages of 2 basic blocks (w, 2w, 4w, 8w), mean, linear layer"
    block = BasicBlock
    counts = (2, 2, 2, 2)


MODEL = ResNet18
