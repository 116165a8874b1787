"""Evaluation: which samples a model gets right under attack, as a document with its protocol."""

from crdnd.engine.processes import processes
from crdnd.evaluation._plan import PRESETS, TABLE_ATTACKS, Preset, choose_attacks, preset
from crdnd.evaluation._reference import reference
from crdnd.evaluation._runner import Listener, Step
from crdnd.evaluation.compare import Difference, compare, paired_difference
from crdnd.evaluation.examples import Example, examples
from crdnd.evaluation.found import Found, load_adversarial
from crdnd.evaluation.nearest import nearest_adversarial
from crdnd.evaluation.result import Check, Protocol, Results, Row, load_results
from crdnd.evaluation.run import Label, Prediction, combine, evaluate, make_protocol, predict, worst_case

__all__ = [
    "PRESETS",
    "TABLE_ATTACKS",
    "Check",
    "Difference",
    "Example",
    "Found",
    "Label",
    "Listener",
    "Prediction",
    "Preset",
    "Protocol",
    "Results",
    "Row",
    "Step",
    "choose_attacks",
    "combine",
    "compare",
    "evaluate",
    "examples",
    "load_adversarial",
    "load_results",
    "make_protocol",
    "nearest_adversarial",
    "paired_difference",
    "predict",
    "preset",
    "processes",
    "reference",
    "worst_case",
]
