"""Export: a model as a file that predicts elsewhere, and what that file's accuracy is, naturally and under attack."""

from crdnd.export._int8 import dequantised
from crdnd.export.document import Cost, Equality, Export, Latency, Measured, Quantisation, Share, read_exports
from crdnd.export.run import FORMATS, TOLERANCE, check_target, export_model

__all__ = [
    "FORMATS",
    "TOLERANCE",
    "Cost",
    "Equality",
    "Export",
    "Latency",
    "Measured",
    "Quantisation",
    "Share",
    "check_target",
    "dequantised",
    "export_model",
    "read_exports",
]
