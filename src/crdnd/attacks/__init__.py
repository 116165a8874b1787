"""Attacks: pure functions that look for a legal input which raises a per-sample loss. One file, one attack."""

from crdnd import registry
from crdnd.attacks._pgd import Classifier, PerSampleLoss, TableAttack, pgd
from crdnd.attacks._verdicts import adversarial, verdicts

__all__ = [
    "Classifier",
    "PerSampleLoss",
    "TableAttack",
    "adversarial",
    "attack_names",
    "load_attack",
    "pgd",
    "verdicts",
]


def attack_names() -> list[str]:
    """The registry's keys."""
    return registry.names("attacks")


def load_attack(name: str) -> TableAttack:
    """The attack of that name, or an InputError with a suggestion."""
    return registry.load("attacks", name, "ATTACK")
