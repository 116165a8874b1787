"""Adversarial examples to look at: the same images, attacked for each model."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from crdnd.attacks import adversarial, load_attack
from crdnd.data import ImageData
from crdnd.evaluation.run import predict
from crdnd.threat import ThreatModel


@dataclass(frozen=True)
class Example:
    """One image, what an attack made of it, and what a model sees in both."""

    method: str
    attack: str
    sample: int
    label: str
    natural: NDArray[np.float32]
    """(C, H, W) in [0, 1]."""
    adversarial: NDArray[np.float32]
    """(C, H, W) in [0, 1]."""
    predicted_natural: str
    confidence_natural: float
    """Softmax probability of the predicted class."""
    predicted_adversarial: str
    confidence_adversarial: float


def examples(
    models: Mapping[str, nn.Module], data: ImageData, threat: ThreatModel, attack: str, *, count: int, seed: int = 0
) -> list[Example]:
    """The first `count` images of different classes, attacked for every model as `evaluate` attacks them."""
    ids = _first_of_each_class(data.y)[:count]
    x, y = data.batch(ids)
    found: list[Example] = []
    for method, model in models.items():
        x_adv = adversarial(model, load_attack(attack), x, y, ids, threat, seed)
        natural, attacked = predict(model, x), predict(model, x_adv)
        for index, sample in enumerate(ids.tolist()):
            seen, fooled = int(natural.classes[index]), int(attacked.classes[index])
            found.append(
                Example(
                    method=method,
                    attack=attack,
                    sample=sample,
                    label=data.class_names[int(y[index])],
                    natural=x[index].cpu().numpy(),
                    adversarial=x_adv[index].cpu().numpy(),
                    predicted_natural=data.class_names[seen],
                    confidence_natural=float(natural.probabilities[index, seen]),
                    predicted_adversarial=data.class_names[fooled],
                    confidence_adversarial=float(attacked.probabilities[index, fooled]),
                )
            )
    return found


def _first_of_each_class(y: Tensor) -> Tensor:
    """Ids of the first sample of each class, in the order of the data."""
    first = [int((y == label).nonzero()[0, 0]) for label in y.unique()]
    return torch.tensor(sorted(first), device=y.device)
