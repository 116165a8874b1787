"""Adversarially robust distillation: small image classifiers that stay right under attack.

The names below are the public API. They are imported on first use, so that `import crdnd` is cheap.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from crdnd.data import ImageData, Splits, load_data
    from crdnd.engine import Run, distill, train
    from crdnd.errors import InputError, Interrupted, RunError
    from crdnd.evaluation import Prediction, Results, evaluate, predict
    from crdnd.models import create_model, load_model
    from crdnd.threat import ThreatModel

__version__ = "0.1.0"

_HOME = {
    "ImageData": "crdnd.data",
    "InputError": "crdnd.errors",
    "Interrupted": "crdnd.errors",
    "Prediction": "crdnd.evaluation",
    "Results": "crdnd.evaluation",
    "Run": "crdnd.engine",
    "RunError": "crdnd.errors",
    "Splits": "crdnd.data",
    "ThreatModel": "crdnd.threat",
    "create_model": "crdnd.models",
    "distill": "crdnd.engine",
    "evaluate": "crdnd.evaluation",
    "load_data": "crdnd.data",
    "load_model": "crdnd.models",
    "predict": "crdnd.evaluation",
    "train": "crdnd.engine",
}

__all__ = [
    "ImageData",
    "InputError",
    "Interrupted",
    "Prediction",
    "Results",
    "Run",
    "RunError",
    "Splits",
    "ThreatModel",
    "create_model",
    "distill",
    "evaluate",
    "load_data",
    "load_model",
    "predict",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'crdnd' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
