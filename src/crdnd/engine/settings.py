"""Settings of a training run. Two runs with the same settings on the same machine end in the same weights."""

from collections.abc import Mapping
from itertools import pairwise
from typing import Any, Literal, cast

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from crdnd.config import Frozen, build, parse_fractions
from crdnd.data import augmentation_names
from crdnd.objectives import AttackLoss, TrainingAttack
from crdnd.threat import ThreatModel


class Named(BaseModel):
    """Something from a registry with its own settings: `crdnd`, or `{name: crdnd, tau: 0.3}`."""

    model_config = ConfigDict(frozen=True, extra="allow")

    name: str = Field(description="Its key in the registry.")

    @model_validator(mode="before")
    @classmethod
    def _from_name(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value

    @property
    def settings(self) -> dict[str, Any]:
        """All but the name."""
        return dict(self.model_extra or {})


class OptimizerSettings(Frozen):
    """The optimiser; its learning rate is the schedule's highest."""

    name: Literal["sgd", "adamw"] = Field(default="sgd", description="The optimiser.")
    learning_rate: float = Field(default=0.1, gt=0, description="Highest learning rate.")
    momentum: float = Field(default=0.9, ge=0, lt=1, description="Of SGD.")
    nesterov: bool = Field(default=True, description="Of SGD.")
    weight_decay: float = Field(default=5e-4, ge=0, description="On all parameters, as the field does.")


class ScheduleSettings(Frozen):
    """How the learning rate changes over the run."""

    name: Literal["cosine", "step", "constant"] = Field(
        default="cosine", description="cosine: falls to 0. step: drops at milestones. constant: stays."
    )
    milestones: tuple[float, ...] = Field(
        default=(0.5, 0.75),
        description="step: where it drops, as fractions of the run; 215/300 is the end of epoch 215 of 300.",
    )
    factor: float = Field(default=0.1, gt=0, lt=1, description="step: what it is multiplied by at each drop.")
    warmup: float = Field(default=0.0, ge=0, lt=1, description="Part of the run over which it rises from 0.")

    _read_milestones = field_validator("milestones", mode="before")(parse_fractions)


def _known_augmentation(value: Any) -> Any:
    augmentation_names(str(value))
    return value


class AugmentationPhase(Frozen):
    """An augmentation for a part of the run."""

    name: str = Field(description="The augmentation.")
    until: float | None = Field(
        default=None, gt=0, lt=1, description="Where the phase ends, as a fraction of the run; the last ends with it."
    )

    _name_is_known = field_validator("name", mode="before")(_known_augmentation)


LEAST_SEED, SEEDS_END = -(2**63), 2**63
"""What generators take."""


class Seeds(Frozen):
    """Separate seeds; each is the run's `seed` unless given."""

    init: int | None = Field(default=None, ge=LEAST_SEED, lt=SEEDS_END, description="Initial weights.")
    order: int | None = Field(default=None, ge=LEAST_SEED, lt=SEEDS_END, description="Order of the samples.")
    augment: int | None = Field(default=None, ge=LEAST_SEED, lt=SEEDS_END, description="Augmentation.")
    attack: int | None = Field(default=None, ge=LEAST_SEED, lt=SEEDS_END, description="Starts of the training attack.")


def _attack(name: str) -> str | None:
    """The description of the setting that an override replaces."""
    return TrainingAttack.model_fields[name].description


class AttackOverrides(Frozen):
    """What differs from the training attack that the method's paper names."""

    loss: AttackLoss | None = Field(default=None, description=_attack("loss"))
    steps: int | None = Field(default=None, ge=1, description=_attack("steps"))
    step: float | None = Field(default=None, gt=0, description=_attack("step"))
    start: Literal["none", "uniform", "gaussian"] | None = Field(default=None, description=_attack("start"))
    restarts: int | None = Field(default=None, ge=1, description=_attack("restarts"))
    eps_warmup: float | None = Field(default=None, ge=0, lt=1, description=_attack("eps_warmup"))
    mode: Literal["train", "eval"] | None = Field(default=None, description=_attack("mode"))


class WeightPerturbation(Frozen):
    """Adversarial weight perturbation, Wu et al. 2020 (arXiv 2004.05884): the loss at the worst weights nearby."""

    gamma: float = Field(default=0.005, gt=0, description="Length of a layer's move over that of its weights.")
    warmup: float = Field(default=0.05, ge=0, lt=1, description="Part of the run without it: 10 of 200 epochs.")


class LeverSettings(Frozen):
    """What makes a run faster and changes its numbers by rounding alone; `run.json` says what became of each."""

    fold: bool = Field(
        default=True,
        description="Fold batch norms into convolutions, and compute small and wide convolutions as products, while "
        "weights stand still.",
    )
    channels_last: bool | None = Field(
        default=None,
        description="Layout of the images in convolutions; by default where it pays: on a CPU but for the widest "
        "layers, on a GPU in bf16 and TF32.",
    )
    fused_optimizer: bool = Field(default=True, description="One kernel for the update of all weights.")
    keep_teacher: float = Field(
        default=64.0,
        ge=0,
        description="MiB at most for what the teachers say of natural images, kept over the epochs without "
        "augmentation; 0 keeps nothing. It changes no weights, and no counted pass: those are what the method asks.",
    )
    compile: bool = Field(
        default=False,
        description="Send the networks' passes through torch.compile, with CUDA graphs on a GPU; it takes the place "
        "of fold.",
    )
    checkpoint_teacher: bool = Field(
        default=False,
        description="Compute a teacher's layers again where an attack asks for its gradients, instead of keeping them: "
        "less memory, more time.",
    )


class TrainSettings(Frozen):
    """Everything about a run but its networks, data and folder."""

    objective: Named = Field(description="The method, and its settings.")
    threat: ThreatModel = Field(description="The adversary to withstand.")
    attack: AttackOverrides = Field(
        default=AttackOverrides(), description="Changes to the method's own training attack."
    )
    epochs: int = Field(default=100, ge=1, description="Passes over the training data.")
    batch_size: int = Field(default=128, ge=2, description="Images a step, over all processes.")
    micro_batch: int | None = Field(
        default=None,
        ge=2,
        description="Images that the networks see at once, with the batch's gradients added up; by default the whole "
        "batch. Out of memory, a run halves it and goes on. Batch norms in train mode then normalise by it.",
    )
    optimizer: OptimizerSettings = Field(default=OptimizerSettings(), description="What changes the weights.")
    schedule: ScheduleSettings = Field(default=ScheduleSettings(), description="The learning rate over the run.")
    clip_grad_norm: float | None = Field(default=None, gt=0, description="Largest norm of the whole gradient.")
    on_nan: Literal["stop", "retry"] = Field(
        default="stop",
        description="On a loss or weights that are not finite. retry: go back to the end of the epoch before, with "
        "half the learning rate, at most twice.",
    )
    ema: float | None = Field(
        default=None,
        gt=0,
        lt=1,
        description="Decay of the averaged weights, which are then the result; "
        "at step t at most (1 + t) / (10 + t), so that a short run does not end in its random start.",
    )
    swa: float | None = Field(
        default=None,
        ge=0,
        lt=1,
        description="From which part of the run on the weights at the ends of epochs are averaged; the average is then "
        "the result.",
    )
    awp: WeightPerturbation | None = Field(default=None, description="Adversarial weight perturbation.")
    igdm: float | None = Field(
        default=None,
        gt=0,
        description="Weight, at the end of the run, of the matching of the teacher's input gradients (IGDM); it grows "
        "from 0, and `loss_scale` holds for it too. Both networks then also see x - (x' - x), which may leave [0, 1].",
    )
    repair: bool = Field(
        default=False,
        description="Swap a wrong teacher's largest logit and that of the label, on x and on x'. Not for methods that "
        "measure themselves how right or how steep the teacher is (crdnd, crdnd_plus, iad, iad2, adaiad, saad), nor "
        "with igdm.",
    )
    check_teacher: bool = Field(
        default=True, description="Measure teachers on validation images first, and refuse those at chance level."
    )
    teacher_input: tuple[int, int, int] | None = Field(
        default=None, description="(C, H, W) of the images that the teacher was made for, where it does not say itself."
    )
    augmentation: str | tuple[AugmentationPhase, ...] = Field(
        default="none",
        description="What is done to the images: none, shift (digits), crop_flip, cropshift, random_erasing, "
        "idbh_weak, mixup or cutmix (see `crdnd.data.augment`); several as crop_flip+cutmix; or phases, such as "
        "[{name: cropshift, until: 0.5}, {name: idbh_weak}]. An epoch has the phase in which it begins.",
    )
    sync_batch_norm: bool = Field(
        default=False,
        description="Whether the student's batch norms normalise by the joined batch of all processes instead of each "
        "process's share; on GPUs only.",
    )
    shard_teacher: bool = Field(
        default=False,
        description="Whether several processes keep a part of each teacher's weights each (FSDP), for teachers that do "
        "not fit a device; slower.",
    )
    validate_every: int = Field(
        default=1, ge=1, description="Epochs between validations; the last epoch always has one."
    )
    select: Literal["best", "last"] = Field(default="best", description="Which weights are the result; both are kept.")
    select_on: Literal["validation"] = Field(default="validation", description="Where `best` is judged.")
    precision: Literal["fp32", "bf16"] = Field(
        default="fp32", description="Of training; validation is always in float32."
    )
    tf32: bool = Field(default=False, description="TF32 in training on GPUs that have it; never in validation.")
    deterministic: bool = Field(
        default=False, description="On a GPU: only kernels that give the same bits in every run; slower."
    )
    levers: LeverSettings = Field(default=LeverSettings(), description="What makes the run faster.")
    seed: int = Field(default=0, ge=LEAST_SEED, lt=SEEDS_END, description="Seed of everything that is drawn.")
    seeds: Seeds = Field(default=Seeds(), description="Separate seeds for parts of it.")
    save_every_steps: int | None = Field(
        default=None,
        ge=1,
        description="Save after every so many steps; by default at the end of an epoch, at most every 10 s "
        "and for at most 1% of the time.",
    )
    trackers: tuple[str, ...] = Field(
        default=(),
        description="Experiment trackers of Accelerate: tensorboard, wandb, mlflow and others. Where nothing is set, "
        "`crdnd train` and `crdnd distill` take tensorboard if it is installed.",
    )

    def seed_for(self, purpose: Literal["init", "order", "augment", "attack"]) -> int:
        """The seed of that purpose: its own, or the run's."""
        own: int | None = getattr(self.seeds, purpose)
        return self.seed if own is None else own

    @model_validator(mode="after")
    def _one_average(self) -> "TrainSettings":
        if self.ema is not None and self.swa is not None:
            raise ValueError("ema and swa are two ways to average the weights; choose one.")
        return self

    @property
    def augmentations(self) -> tuple[str, ...]:
        """Of all phases."""
        if isinstance(self.augmentation, str):
            return (self.augmentation,)
        return tuple(phase.name for phase in self.augmentation)

    def augmentation_at(self, progress: float) -> str:
        """The augmentation of an epoch that begins when this much of the run is done, in [0, 1)."""
        if isinstance(self.augmentation, str):
            return self.augmentation
        return next(phase.name for phase in self.augmentation if phase.until is None or progress < phase.until)

    @field_validator("augmentation", mode="before")
    @classmethod
    def _name_or_phases(cls, value: Any) -> Any:
        """Checked here and not by the union, whose errors would speak of both of its sides."""
        if isinstance(value, str):
            return _known_augmentation(value)
        if not isinstance(value, list | tuple) or not value:
            raise ValueError(f"write a name, or phases as [{{name: cropshift, until: 0.5}}, ...], got {value!r}.")
        found = cast("list[Any] | tuple[Any, ...]", value)
        phases = [build(AugmentationPhase, phase, f"phase {number}") for number, phase in enumerate(found, 1)]
        for number, phase in enumerate(phases, 1):
            if (phase.until is None) != (number == len(phases)):
                fix = "needs an until" if phase.until is None else "is the last and takes no until"
                raise ValueError(f"phase {number} ({phase.name}) {fix}.")
        ends = [phase.until for phase in phases if phase.until is not None]
        for before, after in pairwise(ends):
            if after <= before:
                raise ValueError(f"until must rise from phase to phase, got {after:g} after {before:g}.")
        return tuple(phases)

    @field_validator("select_on", mode="before")
    @classmethod
    def _never_on_test(cls, value: Any) -> Any:
        if value == "test":
            raise ValueError(
                "choosing a checkpoint on test data is refused, its accuracy would be worthless; use validation."
            )
        return value


# What a run may change on its way without becoming another run.
FREE_SETTINGS = frozenset(
    {"save_every_steps", "trackers", "check_teacher", "shard_teacher", "on_nan", "levers.keep_teacher"}
)


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested values by dotted key.

    >>> flatten({"threat": {"eps": 0.1}, "seed": 0})
    {'threat.eps': 0.1, 'seed': 0}
    """
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= flatten(cast("Mapping[str, Any]", value), f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def differences(old: Mapping[str, Any], new: Mapping[str, Any], defaults: Mapping[str, Any]) -> list[str]:
    """'key: old -> new' for every setting that differs; one that an older version did not have was at its default."""
    before, after = flatten(defaults) | flatten(old), flatten(new)
    keys = [*after, *(key for key in before if key not in after)]
    return [
        f"{key}: {before.get(key)} -> {after.get(key)}"
        for key in keys
        if before.get(key) != after.get(key) and not {key, key.split(".")[0]} & FREE_SETTINGS
    ]
