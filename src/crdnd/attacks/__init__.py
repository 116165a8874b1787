"""Attacks: pure functions that look for a legal input which fools a model. One file, one attack."""

from crdnd.attacks._base import UNTOLD, Attack, Classifier, PerSampleLoss, Round, input_gradient
from crdnd.attacks._frozen import PROBE, Folding, answers, frozen
from crdnd.attacks._load import attack_names, load_attack
from crdnd.attacks._pgd import TableAttack, pgd
from crdnd.attacks._sequence import Sequence
from crdnd.attacks._verdicts import adversarial, attack_stream, float32, true_float32, verdicts

__all__ = [
    "PROBE",
    "UNTOLD",
    "Attack",
    "Classifier",
    "Folding",
    "PerSampleLoss",
    "Round",
    "Sequence",
    "TableAttack",
    "adversarial",
    "answers",
    "attack_names",
    "attack_stream",
    "float32",
    "frozen",
    "input_gradient",
    "load_attack",
    "pgd",
    "true_float32",
    "verdicts",
]
