"""What every method is made of: the views it may look at, the terms it returns, the attack it trains against.

Views are named `<model>_<input>`: `s` student, `t` teacher; `nat` the natural images x, `adv` the adversarial x'. The
plain name holds logits (B, K), the name with `_features` the input of the last linear layer (B, D).
"""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal, get_args

import torch
from pydantic import Field
from torch import Tensor, nn

from crdnd.config import Frozen, build
from crdnd.threat import Start

View = Literal[
    "s_nat", "s_adv", "t_nat", "t_adv", "s_nat_features", "s_adv_features", "t_nat_features", "t_adv_features"
]
VIEWS: tuple[View, ...] = get_args(View)


class Views:
    """What an objective sees of one batch: never a model, only predictions, features and labels.

    Args:
        y: labels, int64 (B,).
        progress: how much of the run is done, in [0, 1); a paper's "from epoch 60 of 200" is progress >= 0.3.
        views: the tensors, by name.
        target: what cross-entropy is taken with: soft labels (B, K) where an augmentation mixes images, with y their
            dominant class; by default y.
    """

    def __init__(
        self, y: Tensor, progress: float = 0.0, *, views: Mapping[str, Tensor], target: Tensor | None = None
    ) -> None:
        self.y = y
        self.target = y if target is None else target
        self.progress = progress
        self._views = views

    def __getitem__(self, name: View) -> Tensor:
        try:
            return self._views[name]
        except KeyError:
            raise KeyError(f"view {name!r} was not computed; list it in `needs`") from None


class LossTerms:
    """Named, already weighted, per-sample terms, each (B,). The loss is their sum, averaged over the batch."""

    def __init__(self, **terms: Tensor) -> None:
        self.terms = terms

    @property
    def per_sample(self) -> Tensor:
        """The sum of the terms for each sample, (B,)."""
        return torch.stack(list(self.terms.values())).sum(dim=0)

    @property
    def total(self) -> Tensor:
        """What is minimised: the mean over the batch of `per_sample`."""
        return self.per_sample.mean()

    def scaled(self, factor: float) -> "LossTerms":
        """Every term times `factor`."""
        return LossTerms(**{name: factor * term for name, term in self.terms.items()})


class TrainingAttack(Frozen):
    """The inner maximisation of a training run."""

    loss: Literal["ce", "margin", "kl_teacher", "trades"] = Field(
        default="ce",
        description="ce: CE(S(x'), y). margin: max_{j != y} z_j - z_y. kl_teacher: KL(T(x) || S(x')). "
        "trades: KL(S(x) || S(x')).",
    )
    steps: int = Field(default=10, ge=1, description="Ascent steps.")
    step: float = Field(default=0.25, gt=0, description="Length of a step as a fraction of eps.")
    start: Start = Field(
        default="uniform", description="none: at x. uniform: in the ball. gaussian: x + 0.001 N(0, 1)."
    )
    mode: Literal["train", "eval"] = Field(
        default="eval",
        description="Mode of the student's batch norm while it is attacked; train also moves its statistics.",
    )


class ObjectiveSettings(Frozen):
    """What all methods have; each adds its own."""

    loss_scale: float = Field(
        default=1.0,
        gt=0,
        description="Factor on the whole loss; 1/K where a paper's code averages its KL terms over classes.",
    )


class Objective(nn.Module):
    """A training method: which views it needs, which attack it trains against, which terms it minimises.

    A method is one file in `crdnd/objectives/` that ends in `METHOD = <its class>`. State that a method keeps between
    steps is made of buffers, so that it is part of every checkpoint.

    Args:
        num_classes: K.
        settings: values for `settings_class` by name.
    """

    paper: ClassVar[str]
    needs: ClassVar[frozenset[View]]
    attack: ClassVar[TrainingAttack | None]
    """The training attack of the paper; None trains on natural images alone."""
    summed: ClassVar[tuple[str, ...]] = ()
    """Buffers that are sums over samples; several processes add theirs up before `end_epoch`."""
    settings_class: ClassVar[type[ObjectiveSettings]] = ObjectiveSettings

    def __init__(self, num_classes: int, **settings: Any) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.settings = build(self.settings_class, settings, where="objective")

    def terms(self, v: Views) -> LossTerms:
        """The outer problem: weighted per-sample terms."""
        raise NotImplementedError

    def forward(self, v: Views) -> LossTerms:
        """The terms times `loss_scale`."""
        return self.terms(v).scaled(self.settings.loss_scale)

    def observe(self, v: Views) -> None:
        """Take note of a batch after its update; only for methods that keep state."""

    def end_epoch(self) -> None:
        """Turn what the epoch's batches showed into the state that the next epoch uses."""
