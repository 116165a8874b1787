"""What a comparison of methods measured: the document `crdnd.compare-results/1`, from which the leaderboard is made."""

from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from crdnd.config import Frozen, build
from crdnd.engine.history import Change, Validation
from crdnd.errors import InputError
from crdnd.evaluation import Protocol, Row
from crdnd.io import read_json

SCHEMA = "crdnd.compare-results/1"
NO_TEACHER = "no-teacher"


class Trial(Frozen):
    """One choice of settings for a method, and how it did on validation data."""

    settings: dict[str, Any]
    """Its layers of the recipe."""
    validation: Validation | None = None
    """Right answers over all trial seeds; None where a run diverged."""
    failed: str = ""
    """Why a run diverged."""


class Choice(Frozen):
    """The settings that a method runs with for one student and teacher, chosen on validation data alone."""

    objective: str
    student: str
    teacher: str | None
    trials: list[Trial]
    chosen: int | None
    """1 for the first of `trials`; None where all diverged."""


class TeacherRun(Frozen):
    """A teacher of the comparison."""

    name: str
    seed: int | None
    """None for one that existed before, or that all seeds share."""
    source: str
    """Its folder, or package.module:factory."""
    sha256: str | None
    """Of its weights, where it has a card."""


class CellResult(Frozen):
    """One run of one method: a student, a teacher, a seed."""

    objective: str
    student: str
    teacher: str | None
    seed: int
    split_seed: int
    folder: str = ""
    """The run, below the folder of the comparison."""
    trial: int | None = None
    """Which of the method's trials it is; None for a method that has none."""
    failed: str = ""
    """Why there are no numbers."""
    protocol: str = ""
    """Fingerprint of the one in `protocols` that `row` was measured under."""
    row: Row | None = None
    teacher_sha256: str | None = None
    epochs: int = 0
    best_epoch: int | None = None
    best: Validation | None = None
    last: Validation | None = None
    seconds: float = 0
    """Of training."""
    student_passes: float = 0
    """Evaluations of the student per training image, over the whole training."""
    teacher_passes: float = 0
    changes: tuple[Change, ...] = ()
    """What the run changed about itself to go on; its settings are then no longer those of the others."""

    @property
    def name(self) -> str:
        """What messages and the log call it."""
        return cell_name(self.objective, self.student, self.teacher, self.seed)


class Comparison(Frozen):
    """The document `crdnd.compare-results/1`."""

    schema_: Literal["crdnd.compare-results/1"] = Field(default=SCHEMA, alias="schema")
    spec: dict[str, Any]
    """What was asked for, as a `crdnd.compare/1`."""
    baseline: str | None
    protocols: list[Protocol]
    """One for each split of the data."""
    teachers: list[TeacherRun]
    choices: list[Choice]
    cells: list[CellResult]
    versions: dict[str, str]
    commit: str | None
    command: str

    def to_json(self) -> str:
        """The document as JSON text."""
        return self.model_dump_json(by_alias=True, indent=1) + "\n"


def cell_name(objective: str, student: str, teacher: str | None, seed: int) -> str:
    """A cell's name, unique in its comparison, such as rslad/cnn-8/trades-32/seed-0."""
    return "/".join((objective, student, teacher or NO_TEACHER, f"seed-{seed}"))


def load_comparison(path: str | Path) -> Comparison:
    """Read the document that `crdnd compare` wrote."""
    content = read_json(Path(path))
    if content.get("schema") != SCHEMA:
        raise InputError(f"{path}: has the format {content.get('schema')!r}; this version reads {SCHEMA}.")
    return build(Comparison, content, where=str(path))
