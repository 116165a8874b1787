"""Measure models under attack: one verdict per sample and attack, and the worst case of each sample."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from crdnd.attacks import adversarial, attack_names, load_attack, verdicts
from crdnd.counts import Count
from crdnd.data import ImageData, as_data
from crdnd.engine import check_model
from crdnd.errors import InputError
from crdnd.evaluation.result import Protocol, Results, Row
from crdnd.models import Normalized, evaluating, parameter_count, weights_sha256
from crdnd.threat import ThreatModel

TABLE_ATTACKS = ("fgsm", "pgd_sat", "pgd_trades", "cw_inf")


@dataclass(frozen=True)
class Label:
    """What a row of results says about a model besides its numbers."""

    method: str = "unknown"
    role: Literal["teacher", "student"] = "student"
    seed: int | None = None
    checkpoint: Literal["best", "last"] | None = None


def evaluate(
    model: nn.Module,
    data: Any,
    *,
    threat: ThreatModel,
    attacks: Sequence[str] = TABLE_ATTACKS,
    seed: int = 0,
    split: str = "test",
    batch_size: int = 256,
    label: Label | None = None,
    listener: Callable[[str], None] | None = None,
) -> Results:
    """Natural and robust accuracy of a model; its modes, gradients and the global random state are left alone.

    Args:
        model: images (B, C, H, W) in [0, 1] -> logits (B, K).
        data: `ImageData`, a pair of tensors (images, labels) or a map-style data set; all of it is evaluated.
        threat: the adversary.
        attacks: names of table attacks, each judged at its last iterate on every image.
        seed: of the attacks' starts, which depend on (seed, attack, sample) and not on the batch.
        split: what the protocol calls this part of the data.
        batch_size: changes speed and memory, no verdict.
        label: what the row says about the model.
        listener: called with the name of each attack before it runs.

    Returns:
        A document with one row. `worst_case` counts the samples that are right naturally and under every attack.
    """
    images = as_data(data)
    protocol = make_protocol(images, threat, attacks, seed, split)
    check_model(model, images, "model")
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    images = images.to(device)

    clean = verdicts(model, images, batch_size=batch_size)
    survived: dict[str, Tensor] = {}
    for name in attacks:
        attack = load_attack(name)
        if listener:
            listener(name)
        survived[name] = verdicts(
            model,
            images,
            lambda x, y, ids, name=name, attack=attack: adversarial(model, attack, name, x, y, ids, threat, seed),
            batch_size=batch_size,
        )
    about = label or Label()
    row = Row(
        method=about.method,
        role=about.role,
        model=str(model.architecture) if isinstance(model, Normalized) else type(model).__name__,
        params=parameter_count(model),
        seed=about.seed,
        checkpoint=about.checkpoint,
        n=len(images),
        clean=_count(clean),
        attacks={name: _count(verdict) for name, verdict in survived.items()},
        worst_case=_count(worst_case(clean, survived.values())),
        model_sha256=weights_sha256(model),
    )
    return Results(schema="crdnd.results/1", protocol=protocol, rows=[row])


def make_protocol(
    data: ImageData, threat: ThreatModel, attacks: Sequence[str], seed: int = 0, split: str = "test"
) -> Protocol:
    """The protocol that `evaluate` follows with these arguments."""
    if not attacks:
        raise InputError(f"attacks: name at least one of {', '.join(attack_names())}.")
    return Protocol(
        data=data.name,
        data_sha256=data.sha256,
        split=split,
        n=len(data),
        norm=threat.norm,
        eps=threat.eps,
        attacks={name: load_attack(name).settings() for name in attacks},
        seed=seed,
    ).with_fingerprint()


def worst_case(clean: Tensor, survived: Iterable[Tensor]) -> Tensor:
    """Samples that are right naturally and under every attack; bool (N,), iterable of (N,) -> (N,).

    The smallest of the attacks' accuracies would be too high: two attacks at 50% that break different halves leave
    nothing standing.
    """
    return torch.stack([clean, *survived]).all(dim=0)


def combine(results: Sequence[Results]) -> Results:
    """One document of all rows; results of different protocols are refused, they do not belong in one table."""
    fingerprints = {result.protocol.fingerprint for result in results}
    if len(fingerprints) != 1:
        raise InputError(f"results of {len(fingerprints)} different protocols cannot stand in one table.")
    rows = [row for result in results for row in result.rows]
    return Results(schema="crdnd.results/1", protocol=results[0].protocol, rows=rows)


def _count(verdict: Tensor) -> Count:
    return Count(correct=int(verdict.sum()), n=len(verdict))


@dataclass(frozen=True)
class Prediction:
    """Classes and probabilities of a batch of images."""

    classes: Tensor
    """int64 (B,)."""
    probabilities: Tensor
    """(B, K), each row adds up to 1."""


def predict(model: nn.Module, images: Tensor) -> Prediction:
    """What a model sees in images (B, C, H, W) in [0, 1]."""
    with evaluating(model), torch.no_grad():
        probabilities = model(images).softmax(dim=1)
    return Prediction(probabilities.argmax(1), probabilities)
