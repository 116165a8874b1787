"""Inner maximisations: what a training attack ascends, as a function of views."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from crdnd.losses import cross_entropy, kl, margin
from crdnd.objectives._base import Objective, TrainingAttack, View, Views


@dataclass(frozen=True)
class InnerLoss:
    """A per-sample loss of views. Views of x are computed once before the attack, views of x' in every step.

    A teacher's view of x' carries gradients to x'.
    """

    needs: frozenset[View]
    loss: Callable[[Views], Tensor]


INNER_LOSSES: dict[str, InnerLoss] = {
    "ce": InnerLoss(frozenset({"s_adv"}), lambda v: cross_entropy(v["s_adv"], v.target)),
    "margin": InnerLoss(frozenset({"s_adv"}), lambda v: margin(v["s_adv"], v.y)),
    "kl_teacher": InnerLoss(frozenset({"s_adv", "t_nat"}), lambda v: kl(v["t_nat"], v["s_adv"])),
    "trades": InnerLoss(frozenset({"s_adv", "s_nat"}), lambda v: kl(v["s_nat"], v["s_adv"])),
    "adaad": InnerLoss(frozenset({"s_adv", "t_adv"}), lambda v: kl(v["t_adv"], v["s_adv"])),
    "linear_teacher": InnerLoss(frozenset({"s_adv", "t_linear"}), lambda v: kl(v["t_linear"], v["s_adv"])),
}
"""Keyed by `TrainingAttack.loss`."""


def attack_needs(attack: TrainingAttack | None) -> frozenset[View]:
    """The views that a training attack looks at."""
    return INNER_LOSSES[attack.loss].needs if attack else frozenset()


def needs_teacher(method: Objective | type[Objective], attack: TrainingAttack | None) -> bool:
    """Whether a method with this training attack looks at a teacher."""
    return any(view.startswith("t_") for view in method.needs | attack_needs(attack))


def needs_teacher_gradients(method: Objective | type[Objective], attack: TrainingAttack | None) -> bool:
    """Whether a method with this training attack looks at how a teacher's predictions change with its images."""
    return "t_adv" in attack_needs(attack) or "t_linear" in method.needs | attack_needs(attack)


def needs_second_teacher(method: Objective | type[Objective]) -> bool:
    """Whether a method looks at a second teacher."""
    return any(view.startswith("t2_") for view in method.needs)
