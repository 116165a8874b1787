"""What a run remembers of every epoch; stored in its checkpoint and drawn in the report."""

from typing import Literal

from crdnd.config import Frozen
from crdnd.counts import Count


class Validation(Frozen):
    """Natural and robust accuracy on the validation split."""

    clean: Count
    robust: Count


class Change(Frozen):
    """What a run changed about itself to go on; kept in its checkpoint and in `run.json`."""

    what: Literal["learning_rate", "micro_batch"]
    value: float
    """The highest learning rate, or the images of a micro-batch, from here on."""
    step: int
    """Steps done when it went on with it."""
    why: str

    def __str__(self) -> str:
        return f"{self.what} {self.value:g} from step {self.step} on: {self.why}"


class Epoch(Frozen):
    """One finished epoch: means over its batches, and the validation where there was one."""

    epoch: int
    """1 for the first."""
    loss: float
    terms: dict[str, float]
    """The weighted terms that add up to `loss`."""
    learning_rate: float
    seconds: float
    """Of its steps."""
    validation_seconds: float = 0.0
    """Of its validation, averages of weights and statistics included."""
    student_passes: float = 0.0
    """Evaluations of the student for each training image, those of the attack included."""
    teacher_passes: float = 0.0
    """Of all teachers."""
    validation: Validation | None = None
