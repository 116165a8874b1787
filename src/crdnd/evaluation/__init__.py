"""Evaluation: which samples a model gets right under attack, as a document with its protocol."""

from crdnd.evaluation.result import Protocol, Results, Row
from crdnd.evaluation.run import TABLE_ATTACKS, Label, Prediction, combine, evaluate, predict, worst_case

__all__ = [
    "TABLE_ATTACKS",
    "Label",
    "Prediction",
    "Protocol",
    "Results",
    "Row",
    "combine",
    "evaluate",
    "predict",
    "worst_case",
]
