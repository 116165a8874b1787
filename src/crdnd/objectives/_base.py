"""What every method is made of: the views it may look at, the terms it returns, the attack it trains against.

Views are named `<model>_<input>`: `s` student, `t` teacher, `t2` second teacher; `nat` the natural images x, `adv` the
adversarial x', `mirror` x - (x' - x). The plain name holds logits (B, K), the name with `_features` the input of the
last linear layer (B, D). `t_linear` is the teacher at x' by its slope at x: T(x) whose logit of the label y moves by
<grad T_y(x), x' - x>.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

import torch
from pydantic import Field
from torch import Tensor, nn

from crdnd.config import Frozen, build
from crdnd.random import Stream
from crdnd.threat import Start

View = Literal[
    "s_nat", "s_adv", "s_mirror", "s_nat_features", "s_adv_features",
    "t_nat", "t_adv", "t_mirror", "t_linear", "t_nat_features", "t_adv_features",
    "t2_nat", "t2_adv",
]  # fmt: skip
VIEWS: tuple[View, ...] = get_args(View)


class Views:
    """What an objective sees of one batch: never a model, only predictions, features and labels.

    Args:
        y: labels, int64 (B,).
        progress: how much of the run is done, in [0, 1); a paper's "from epoch 60 of 200" is progress >= 0.3.
        views: the tensors, by name.
        target: labels that augmentation has mixed, (B, K), each with the larger share on y.
        draws: draws for these samples, and their ids; without them, samples are numbered by their place in the batch.
    """

    def __init__(
        self,
        y: Tensor,
        progress: float = 0.0,
        *,
        views: Mapping[str, Tensor],
        target: Tensor | None = None,
        draws: Stream | None = None,
    ) -> None:
        self.y = y
        self.progress = progress
        self.target = y if target is None else target
        """What cross-entropy compares with: y, or the mixed labels."""
        self.draws = draws or Stream.of("views", ids=torch.arange(len(y), device=y.device))
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


AttackLoss = Literal["ce", "margin", "kl_teacher", "trades", "adaad", "linear_teacher"]


class TrainingAttack(Frozen):
    """The inner maximisation of a training run."""

    loss: AttackLoss = Field(
        default="ce",
        description="ce: CE(S(x'), y). margin: max_{j != y} z_j - z_y. kl_teacher: KL(T(x) || S(x')). "
        "trades: KL(S(x) || S(x')). adaad: KL(T(x') || S(x')), with gradients through the teacher. "
        "linear_teacher: the same, T(x') by the teacher's slope at x.",
    )
    steps: int = Field(default=10, ge=1, description="Ascent steps.")
    step: float = Field(default=0.25, gt=0, description="Length of a step as a fraction of eps.")
    start: Start = Field(
        default="uniform", description="none: at x. uniform: in the ball. gaussian: x + 0.001 N(0, 1)."
    )
    restarts: int = Field(default=1, ge=1, description="Runs from new starts; each sample keeps its highest loss.")
    eps_warmup: float = Field(default=0.0, ge=0, lt=1, description="Part of the run over which eps rises from 0.")
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


@dataclass(frozen=True)
class Sizes:
    """What a method with heads on features or memory of samples must know of its run."""

    student_features: int
    """D of `s_nat_features`."""
    teacher_features: int
    """D of `t_nat_features`; 0 without a teacher."""
    samples: int
    """How many training images there are; their ids are below it."""
    seed: int = 0
    """Of initial weights."""


class Processes:
    """The processes that share a batch; here one that has it all, the engine knows of others.

    A method whose terms relate samples gathers what it relates them with, so that a batch shared by processes has the
    terms and the gradients of the joined one.
    """

    index = 0

    def gather(self, z: Tensor) -> Tensor:
        """All processes' rows in the order of the processes; gradients find their way back. (B, ...) -> (P B, ...)."""
        return z

    def mean(self, z: Tensor) -> Tensor:
        """The mean over the processes, without gradients."""
        return z


class Objective(nn.Module):
    """A training method: which views it needs, which attack it trains against, which terms it minimises.

    A method is one file in `crdnd/objectives/` that ends in `METHOD = <its class>`. State that a method keeps between
    steps is made of buffers, and heads that it trains are parameters, so that both are part of every checkpoint.

    Args:
        num_classes: K.
        sizes: of the run; only methods with heads or memory ask for them.
        settings: values for `settings_class` by name.
    """

    paper: ClassVar[str]
    needs: ClassVar[frozenset[View]]
    attack: ClassVar[TrainingAttack | None]
    """The training attack of the paper; None trains on natural images alone."""
    summed: ClassVar[tuple[str, ...]] = ()
    """Buffers that are sums over samples; several processes add theirs up before `end_epoch`."""
    relates_samples: ClassVar[bool] = False
    """Whether a sample's terms depend on the others of its batch; the loss is then always that of the whole batch."""
    repairable: ClassVar[bool] = True
    """Whether the run may repair a teacher before the method sees it: not where the method measures itself how right
    the teacher is, or how its predictions change from point to point."""
    settings_class: ClassVar[type[ObjectiveSettings]] = ObjectiveSettings

    def __init__(self, num_classes: int, *, sizes: Sizes | None = None, **settings: Any) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.processes = Processes()
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
