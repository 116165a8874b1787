"""Does a model stay right? One verdict for each sample, computed in true float32."""

from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from crdnd.attacks._base import Attack
from crdnd.data import ImageData
from crdnd.models import evaluating
from crdnd.random import Stream
from crdnd.threat import ThreatModel


def attack_stream(seed: int, ids: Tensor) -> Stream:
    """The draws of an evaluation; an attack takes its own by its name and restart."""
    return Stream.of("attack", seed, ids=ids)


def adversarial(
    model: nn.Module, attack: Attack, x: Tensor, y: Tensor, ids: Tensor, threat: ThreatModel, seed: int
) -> Tensor:
    """Adversarial images (B, C, H, W) for a batch; the draws depend on (seed, attack, restart, sample id) alone."""
    with evaluating(model):
        return attack(model, x, y, threat, attack_stream(seed, ids))


def verdicts(
    model: nn.Module,
    data: ImageData,
    attacked: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None,
    *,
    ids: Tensor | None = None,
    batch_size: int,
) -> Tensor:
    """Whether the model's prediction is right for each sample, bool (N,); computed in true float32.

    Args:
        model: images in [0, 1] -> logits; used in eval mode and given its own modes back.
        data: the samples, on the model's device.
        attacked: (images, labels, ids) -> images to predict on; by default the natural ones.
        ids: which samples; by default all.
        batch_size: how many go through the model at once.
    """
    ids = torch.arange(len(data), device=data.device) if ids is None else ids
    right: list[Tensor] = []
    with true_float32():
        for part in ids.split(batch_size) if len(ids) else ():
            x, y = data.batch(part)
            if attacked is not None:
                x = attacked(x, y, part)
            with evaluating(model), torch.no_grad():
                right.append(model(x).argmax(1) == y)
    return torch.cat(right) if right else torch.zeros(0, dtype=torch.bool, device=data.device)


@contextmanager
def true_float32() -> Generator[None]:
    """TF32 off for the body: a verdict is judged in float32 whatever the training precision was."""
    matmul, convolution = torch.backends.cuda.matmul, torch.backends.cudnn
    flags: list[tuple[Any, str, Any]] = [(matmul, "allow_tf32", False), (convolution, "allow_tf32", False)]
    try:
        before = [getattr(owner, name) for owner, name, _ in flags]
    except RuntimeError:  # the caller uses torch's newer flags, and the two kinds do not mix
        flags = [(matmul, "fp32_precision", "ieee"), (convolution.conv, "fp32_precision", "ieee")]
        before = [getattr(owner, name) for owner, name, _ in flags]
    try:
        for owner, name, off in flags:
            setattr(owner, name, off)
        yield
    finally:
        for (owner, name, _), value in zip(flags, before, strict=True):
            setattr(owner, name, value)
