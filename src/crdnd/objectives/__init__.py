"""Training methods, one file each; the file name is the method's name. They see views and never a model."""

from crdnd import registry
from crdnd.objectives._base import (
    VIEWS,
    AttackLoss,
    LossTerms,
    Objective,
    ObjectiveSettings,
    Processes,
    Sizes,
    TrainingAttack,
    View,
    Views,
)
from crdnd.objectives._inner import (
    INNER_LOSSES,
    InnerLoss,
    attack_needs,
    needs_second_teacher,
    needs_teacher,
    needs_teacher_gradients,
)

__all__ = [
    "INNER_LOSSES",
    "VIEWS",
    "AttackLoss",
    "InnerLoss",
    "LossTerms",
    "Objective",
    "ObjectiveSettings",
    "Processes",
    "Sizes",
    "TrainingAttack",
    "View",
    "Views",
    "attack_needs",
    "load_objective",
    "needs_second_teacher",
    "needs_teacher",
    "needs_teacher_gradients",
    "objective_names",
]


def objective_names() -> list[str]:
    """The registry's keys."""
    return registry.names("objectives")


def load_objective(name: str) -> type[Objective]:
    """The method of that name, or an InputError with a suggestion."""
    return registry.load("objectives", name, "METHOD")
