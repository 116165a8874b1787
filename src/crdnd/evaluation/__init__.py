"""Evaluation: which samples a model gets right under attack, as a document with its protocol."""

from crdnd.evaluation.examples import Example, examples
from crdnd.evaluation.result import Protocol, Results, Row
from crdnd.evaluation.run import TABLE_ATTACKS, Label, Prediction, combine, evaluate, make_protocol, predict, worst_case

__all__ = [
    "TABLE_ATTACKS",
    "Example",
    "Label",
    "Prediction",
    "Protocol",
    "Results",
    "Row",
    "combine",
    "evaluate",
    "examples",
    "make_protocol",
    "predict",
    "worst_case",
]
