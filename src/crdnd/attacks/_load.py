"""Attacks by their names."""

import dataclasses

from crdnd import registry
from crdnd.attacks._base import Attack


def attack_names() -> list[str]:
    """The registry's keys."""
    return registry.names("attacks")


def load_attack(name: str) -> Attack:
    """The attack of that name, or an InputError with a suggestion."""
    return dataclasses.replace(registry.load("attacks", name, "ATTACK"), name=name)
