"""How near the nearest adversarial image is: the smallest distance that a bounded search finds."""

import dataclasses

import torch
from torch import Tensor, nn

from crdnd.attacks import Attack, Sequence, adversarial, load_attack, true_float32
from crdnd.config import build
from crdnd.models import evaluating, lets_gradients_through
from crdnd.threat import Norm, ThreatModel

HALVINGS = 7
"""Bisections after the first look at the bound: the answer is known to 1/128 of it."""
ITERATIONS, TARGETS, QUERIES = 20, 3, 1000


def nearest_adversarial(model: nn.Module, x: Tensor, *, norm: Norm, bound: float, seed: int = 0) -> Tensor:
    """Distances (B,) of the nearest images found that the model takes for another class; infinite where none was.

    Bisection on eps in (0, bound]. At each eps AutoPGD ascends cross-entropy, then the targeted DLR loss towards three
    classes; a model without gradients is searched with 1,000 queries of Square. So a distance is an upper bound: there
    may be nearer ones that no attack found, and there is no proof that there are none. Images are compared as floating
    point, not rounded to 256 levels. A result depends on the image, not on the others of the batch.

    Args:
        model: images (B, C, H, W) in [0, 1] -> logits; used in eval mode and given its own modes back.
        x: the images, on the model's device.
        norm: of the distance.
        bound: the largest distance to look at.
        seed: of the attack's draws.

    Raises:
        InputError: the bound is not plausible for this norm.
    """
    build(ThreatModel, {"norm": norm, "eps": bound}, where="distance").check_for(x.shape[1:])
    attack = _attack(gradients=lets_gradients_through(model, x))
    with true_float32(), evaluating(model), torch.no_grad():
        y = model(x).argmax(1)
    nearest = x.new_full((len(x),), torch.inf)
    low, high = torch.zeros_like(nearest), torch.full_like(nearest, bound)
    found = torch.ones_like(y, dtype=torch.bool)
    for step in range(1 + HALVINGS):
        tried = high if step == 0 else (low + high) / 2
        for eps in (
            tried[found].unique().tolist()
        ):  # a threat model has one eps, so images that try the same go together
            rows = (found & (tried == eps)).nonzero()[:, 0]
            threat = ThreatModel(norm=norm, eps=eps)
            # Every image is sample 0, so that its draws do not depend on its place.
            x_adv = _found(model, attack, x[rows], y[rows], torch.zeros_like(rows), threat, seed)
            fooled = _fooled(model, x_adv, y[rows])
            distance = torch.where(fooled, threat.distance(x_adv, x[rows]), torch.inf)
            nearest[rows] = torch.minimum(nearest[rows], distance)
            high[rows] = torch.where(fooled, tried[rows], high[rows])
            low[rows] = torch.where(fooled, low[rows], tried[rows])
        if step == 0:
            found = nearest.isfinite()
    return nearest


def _found(
    model: nn.Module, attack: Attack, x: Tensor, y: Tensor, ids: Tensor, threat: ThreatModel, seed: int
) -> Tensor:
    with true_float32():
        return adversarial(model, attack, x, y, ids, threat, seed)


def _fooled(model: nn.Module, x_adv: Tensor, y: Tensor) -> Tensor:
    with true_float32(), evaluating(model), torch.no_grad():
        return model(x_adv).argmax(1) != y


def _attack(*, gradients: bool) -> Attack:
    def small(name: str, **settings: int) -> Attack:
        return dataclasses.replace(load_attack(name), **settings)

    if not gradients:
        return small("square", queries=QUERIES)
    parts = small("apgd_ce", iterations=ITERATIONS), small("apgd_t", iterations=ITERATIONS, targets=TARGETS)
    return Sequence(name="nearest", summary="", paper="", parts=parts)
