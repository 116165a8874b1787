"""Does a model stay right? One verdict for each sample, computed in true float32."""

from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, contextmanager
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
def float32(*, tf32: bool) -> Generator[None]:
    """TF32 on or off for the body."""
    matmul, convolution = torch.backends.cuda.matmul, torch.backends.cudnn
    flags: list[tuple[Any, str, Any]] = [(matmul, "allow_tf32", tf32), (convolution, "allow_tf32", tf32)]
    try:
        before = [getattr(owner, name) for owner, name, _ in flags]
    except RuntimeError:  # the caller uses torch's newer flags, and the two kinds do not mix
        value = "tf32" if tf32 else "ieee"
        flags = [(matmul, "fp32_precision", value), (convolution.conv, "fp32_precision", value)]
        before = [getattr(owner, name) for owner, name, _ in flags]
    try:
        for owner, name, wanted in flags:
            setattr(owner, name, wanted)
        yield
    finally:
        for (owner, name, _), value in zip(flags, before, strict=True):
            setattr(owner, name, value)


def true_float32() -> AbstractContextManager[None]:
    """TF32 off for the body: a verdict is judged in float32 whatever the training precision was."""
    return float32(tf32=False)
