"""The processes that share an evaluation."""

from accelerate import PartialState
from accelerate.utils import parse_flag_from_env


def processes() -> PartialState:
    """This process among those that `accelerate launch` or torchrun started, and its device.

    `PartialState` alone does not read the variable by which `accelerate launch --cpu` says where to compute.
    """
    return PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"))
