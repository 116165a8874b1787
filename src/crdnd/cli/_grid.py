"""The grid of a comparison: what was asked for (`crdnd.compare/1`), and the runs that answer it."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

from pydantic import Field

from crdnd.cli._common import card_of
from crdnd.cli._runs import check_run, split_seen, uses_teacher
from crdnd.config import Frozen
from crdnd.counts import Count
from crdnd.data import Splits
from crdnd.engine import Validation
from crdnd.engine.settings import differences
from crdnd.errors import InputError, did_you_mean
from crdnd.recipe import Recipe, make_recipe, merge
from crdnd.report.comparison import NO_TEACHER, Trial, cell_name

SCHEMA = "crdnd.compare/1"
TEACHER_KEYS = ("teacher", "second_teacher")
"""Keys of a recipe that name a teacher of the comparison."""
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._,=+-]*")
Layers = Mapping[str, Any]


class Spec(Frozen):
    """The document `crdnd.compare/1`."""

    schema_: Literal["crdnd.compare/1"] = Field(default=SCHEMA, alias="schema")
    shared: dict[str, Any] = Field(default={}, description="Settings of all runs; every key is one of a recipe.")
    teachers: dict[str, dict[str, Any]] = Field(
        default={},
        description="A recipe's layers of a teacher to train, or {teacher: FOLDER} for one that exists, with "
        "teacher_weights where it is an architecture or a factory.",
    )
    students: dict[str, dict[str, Any]] = Field(min_length=1)
    objectives: dict[str, dict[str, Any]] = Field(
        min_length=1, description="A method's layers; its name is the label unless given. {trials: [...]} to choose."
    )
    seeds: tuple[int, ...] = Field(default=(0, 1, 2), min_length=1)
    splits: Literal["per_seed", "fixed"] = Field(
        default="per_seed",
        description="per_seed: every seed has its own split of the data, and its own teacher. fixed: all have one.",
    )
    trial_seeds: tuple[int, ...] = Field(default=(0,), min_length=1, description="Where trials are judged.")
    preset: str = Field(default="standard", description="Attacks, as for `crdnd evaluate`.")
    n: int | None = Field(default=None, ge=1, description="Only the first n test images; all by default.")
    baseline: str | None = Field(default=None, description="The objective that the others are compared with.")


@dataclass(frozen=True)
class Cell:
    """One method with one student, teacher and seed."""

    objective: str
    student: str
    teacher: str | None
    seed: int
    candidates: tuple[Recipe, ...]
    """One for each trial of the method; the only one where there is nothing to choose."""
    judged: tuple[tuple[Recipe, ...], ...] = ()
    """For each trial its runs on the trial seeds; empty where there is nothing to choose."""
    settings: tuple[dict[str, Any], ...] = ()
    """For each trial what it sets."""

    @property
    def name(self) -> str:
        """What the display and the log call it."""
        return cell_name(self.objective, self.student, self.teacher, self.seed)


@dataclass(frozen=True)
class Grid:
    """All runs of a comparison; jobs are named by their folder below that of the comparison."""

    cells: list[Cell] = field(default_factory=list[Cell])
    trials: dict[str, Recipe] = field(default_factory=dict[str, Recipe])
    teachers: dict[str, Recipe] = field(default_factory=dict[str, Recipe])
    """Those to be trained."""
    teacher_names: dict[str, str] = field(default_factory=dict[str, str])
    """The name of the entry, by what recipes call the teacher: its folder, or package.module:factory with weights."""


def make_grid(spec: Spec, out: Path) -> Grid:
    """Every run of a comparison as a recipe.

    Raises:
        InputError: anything in the spec that a run would refuse, in one line that says where.
    """
    _check(spec)
    grid, expansion = Grid(), _Expansion(spec, out)
    for label, entry in spec.objectives.items():
        for student in spec.students:
            for teacher in expansion.teachers_for(label, entry, student):
                seeds = [*spec.seeds, *(seed for seed in spec.trial_seeds if seed not in spec.seeds)]
                runs = {seed: expansion.candidates(label, entry, student, teacher, seed) for seed in seeds}
                judged, settings = (), ()
                if "trials" in entry:
                    judged = tuple(zip(*(runs[seed] for seed in spec.trial_seeds), strict=True))
                    settings = tuple(entry["trials"])
                    grid.trials.update({_below(out, run): run for trial in judged for run in trial})
                for seed in spec.seeds:
                    grid.cells.append(Cell(label, student, teacher, seed, runs[seed], judged, settings))
    grid.teachers.update(expansion.trained)
    grid.teacher_names.update(expansion.names)
    _check_runs(grid)
    return grid


class _Expansion:
    """Recipes of a spec, and the teachers that they ask for on the way."""

    def __init__(self, spec: Spec, out: Path) -> None:
        self.spec, self.out = spec, out
        self.trained: dict[str, Recipe] = {}
        self.names: dict[str, str] = {}

    def teachers_for(self, label: str, entry: Layers, student: str) -> Sequence[str | None]:
        """The teachers that a method runs with; (None,) for a method that looks at none."""
        layers = [self._layers(label, trial, student) for trial in trials_of(entry)]
        if not any(uses_teacher(trial, f"objectives.{label}") for trial in layers):
            return (None,)
        named = {str(trial["teacher"]) for trial in layers if "teacher" in trial}
        if len(named) > 1:
            raise InputError(f"objectives.{label}: its trials name several teachers; write an objective for each.")
        if not named and not self.spec.teachers:
            raise InputError(f"objectives.{label}: needs a teacher; give one with --teacher, or under teachers.")
        return tuple(named or self.spec.teachers)

    def candidates(self, label: str, entry: Layers, student: str, teacher: str | None, seed: int) -> tuple[Recipe, ...]:
        """The run of each trial for one seed."""
        folder = self.out / "cells" / label / student / (teacher or NO_TEACHER)
        split_seed = seed if self.spec.splits == "per_seed" else self.spec.shared.get("split_seed", 0)
        found: list[Recipe] = []
        for number, trial in enumerate(trials_of(entry), 1):
            layers = self._layers(label, trial, student)
            where = f"objectives.{label}"
            values = layers | ({"teacher": teacher} if uses_teacher(layers, where) else {})
            for key in TEACHER_KEYS:
                if key in values:
                    name = str(values[key])
                    values[key] = self._teacher(name, seed, split_seed, f"{where}.{key}")
                    values[f"{key}_weights"] = self.spec.teachers[name].get("teacher_weights")
            own = folder / f"trial-{number}" if "trials" in entry else folder
            place = {"seed": seed, "split_seed": split_seed, "out": str(own / f"seed-{seed}")}
            found.append(make_recipe(values | place, f"{where} with students.{student}"))
        return tuple(found)

    def _layers(self, label: str, trial: Layers, student: str) -> dict[str, Any]:
        return merge(self.spec.shared, self.spec.students[student], {"objective": label}, trial)

    def _teacher(self, name: str, seed: int, split_seed: Any, where: str) -> str:
        """What a recipe calls the teacher of that name."""
        if name not in self.spec.teachers:
            raise InputError(f"{where}: no such teacher {name!r}{did_you_mean(name, self.spec.teachers)}")
        entry = self.spec.teachers[name]
        weights = ""
        if "teacher" in entry:
            source = str(entry["teacher"])
            if entry.get("teacher_weights") is None:
                _check_existing(name, source, self.spec.shared.get("data", "digits"), split_seed)
            else:
                weights = f" with {entry['teacher_weights']}"
        else:
            folder = self.out / "teachers" / name
            own_seed = entry.get("seed", 0)
            if self.spec.splits == "per_seed":
                folder, own_seed = folder / f"seed-{seed}", seed
            place = {"seed": own_seed, "split_seed": split_seed, "role": "teacher", "out": str(folder)}
            recipe = make_recipe(merge(self.spec.shared, entry, place), f"teachers.{name}")
            self.trained.setdefault(_below(self.out, recipe), recipe)
            source = recipe.out
        self.names[source + weights] = name
        return source


def trials_of(entry: Layers) -> list[dict[str, Any]]:
    """An objective's layers, one for each of its trials: what they share, and what each sets on top of it."""
    common = {key: value for key, value in entry.items() if key != "trials"}
    return [merge(common, trial) for trial in entry.get("trials", [{}])]


def _below(out: Path, recipe: Recipe) -> str:
    return Path(recipe.out).relative_to(out).as_posix()


def _check(spec: Spec) -> None:
    """What can be said before anything is expanded."""
    for section in ("teachers", "students", "objectives"):
        for name in getattr(spec, section):
            if not NAME.fullmatch(name):
                raise InputError(f"{section}.{name}: names are made of letters, digits and . _ , = + - alone.")
    for key in ("seeds", "trial_seeds"):
        if len(set(getattr(spec, key))) < len(getattr(spec, key)):
            raise InputError(f"{key}: names a seed twice.")
    if spec.baseline is not None and spec.baseline not in spec.objectives:
        raise InputError(f"baseline: no such objective {spec.baseline!r}{did_you_mean(spec.baseline, spec.objectives)}")
    for label, entry in spec.objectives.items():
        trials: Any = entry.get("trials", [{}])
        if not isinstance(trials, list) or not trials or not all(isinstance(trial, dict) for trial in trials):
            raise InputError(
                f"objectives.{label}.trials: must be a list of settings, such as [{{objective: {{tau: 1}}}}]."
            )
    for where, layers in _all_layers(spec):
        for key, instead in _reserved(spec, where).items():
            if key in layers:
                raise InputError(f"{where}.{key}: cannot be set here; {instead}.")
    for name, entry in spec.teachers.items():
        if "teacher" in entry and set(entry) - {"teacher", "teacher_weights"}:
            raise InputError(f"teachers.{name}: one that exists is named alone, as {{teacher: FOLDER}}.")


def _all_layers(spec: Spec) -> Iterator[tuple[str, Layers]]:
    yield "shared", spec.shared
    for name, layers in spec.teachers.items():
        yield f"teachers.{name}", layers
    for name, layers in spec.students.items():
        yield f"students.{name}", layers
    for name, entry in spec.objectives.items():
        yield f"objectives.{name}", entry
        for number, trial in enumerate(cast("list[Layers]", entry.get("trials", [])), 1):
            yield f"objectives.{name}.trials.{number}", trial


def _reserved(spec: Spec, where: str) -> dict[str, str]:
    """Keys of a recipe that the grid itself fills, and what to write instead."""
    kind = where.partition(".")[0]
    found = {"schema": "the whole file has one", "out": "the folder is given with --out", "role": "the grid knows it"}
    if kind != "teachers" or spec.splits == "per_seed":
        found["seed"] = "list them as seeds"
    if kind != "shared" or spec.splits == "per_seed":
        found["split_seed"] = "write splits: fixed and shared: {split_seed: ...}"
    if kind != "shared":
        found["data"] = "all runs share their data, which is set under shared"
    if kind in ("students", "objectives"):
        found["threat"] = "all are measured under one, which is set under shared"
    return found


def _check_existing(name: str, source: str, data: Any, split_seed: Any) -> None:
    """A teacher that exists is there, and has not seen the test images of its students."""
    if not Path(source).exists() and ":" not in source and "," not in source:
        raise InputError(f"teachers.{name}: {source}: there is no such model.")
    seen = split_seen(card_of(source), data, split_seed)
    if seen is not None:
        raise InputError(
            f"teachers.{name}: was trained on split {seen} of {data} and has seen test images of split {split_seed}; "
            f"write splits: fixed and shared: {{split_seed: {seen}}}, or have it trained here."
        )


def _check_runs(grid: Grid) -> None:
    """Settings that only a run itself would refuse, said before the first one starts."""
    seen: set[tuple[Any, ...]] = set()
    loaded: dict[tuple[str, int, int | None], Splits] = {}
    runs = [*grid.teachers.values(), *(run for cell in grid.cells for run in cell.candidates)]
    for run in runs:
        sources = [getattr(run, key) for key in TEACHER_KEYS]
        alike = (
            run.model_dump_json(exclude={"seed", "split_seed", "out", *TEACHER_KEYS}),
            *(grid.teacher_names.get(source, source) for source in sources),  # without the seed in its folder
        )
        if alike not in seen:
            seen.add(alike)
            data = run.data, run.split_seed, run.image_size
            splits = loaded[data] = loaded[data] if data in loaded else run.load_data()
            try:
                check_run(run, splits)
            except InputError as error:
                raise InputError(f"{Path(run.out).parent.as_posix()}: {error}") from None


def what_differs(old: Spec, new: Spec) -> list[str]:
    """How a spec's runs differ from those that a folder was made with, apart from cells that were added."""
    found = [f"shared.{text}" for text in differences(old.shared, new.shared, {})]
    found += _settings_that_differ(old, new, ("splits", "trial_seeds"))
    for section in ("teachers", "students", "objectives"):
        before, after = getattr(old, section), getattr(new, section)
        for name, entry in before.items():
            if name in after:
                found += [f"{section}.{name}.{text}" for text in differences(entry, after[name], {})]
            else:
                found.append(f"{section}.{name} is gone")
    return found + [f"seed {seed} is gone" for seed in old.seeds if seed not in new.seeds]


def measured_otherwise(old: Spec, new: Spec) -> list[str]:
    """How the measuring of two specs differs, which touches no training."""
    return _settings_that_differ(old, new, ("preset", "n"))


def _settings_that_differ(old: Spec, new: Spec, keys: Sequence[str]) -> list[str]:
    return differences({key: getattr(old, key) for key in keys}, {key: getattr(new, key) for key in keys}, {})


def judged(settings: dict[str, Any], validations: Sequence[Validation]) -> Trial:
    """A trial with its validations on the trial seeds: all right answers together, which rank as their mean does."""
    return Trial(
        settings=settings,
        validation=Validation(
            clean=_together([found.clean for found in validations]),
            robust=_together([found.robust for found in validations]),
        ),
    )


def _together(counts: Sequence[Count]) -> Count:
    return Count(correct=sum(count.correct for count in counts), n=sum(count.n for count in counts))


def choose(trials: Sequence[Trial]) -> int | None:
    """The trial with the highest robust validation accuracy; then clean; then the earlier. None where all diverged.

    Returns:
        Its place, 0 for the first.
    """
    ranked = [
        (trial.validation.robust.correct, trial.validation.clean.correct, -place)
        for place, trial in enumerate(trials)
        if trial.validation is not None
    ]
    return -max(ranked)[2] if ranked else None
