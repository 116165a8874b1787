"""`crdnd compare`: which method is better, for which student, with which teacher."""

import json as json_module
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from crdnd.cli._common import (
    MODEL_FORMS,
    DataDirOption,
    DataOption,
    EpochsOption,
    EpsOption,
    FreshOption,
    JobsOption,
    JsonOption,
    NormOption,
    given,
    print_json,
)
from crdnd.cli._runs import current_evaluation, held_out_images, saved_in
from crdnd.errors import DivergenceError, InputError, RunError

if TYPE_CHECKING:
    from crdnd.cli._grid import Cell, Grid, Spec
    from crdnd.evaluation import Protocol
    from crdnd.recipe import Recipe
    from crdnd.report.comparison import CellResult, Comparison, Trial

RESULTS, REPORT, CSV, LATEX, LOG = "compare.json", "report.html", "leaderboard.csv", "leaderboard.tex", "test-log.jsonl"
DIVERGED = "diverged.txt"
RECIPE_SCHEMA = "crdnd.recipe/1"


def compare_command(
    recipe: Annotated[
        Path | None,
        typer.Option(
            "--recipe",
            help="YAML file, crdnd.compare/1, or a name of `crdnd recipes list`, whose settings all methods then "
            "share; options win over it.",
        ),
    ] = None,
    assignments: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Any setting that all runs share. Repeatable."),
    ] = None,
    objectives: Annotated[
        str | None, typer.Option("--objectives", help="Methods with commas between; see `crdnd list objectives`.")
    ] = None,
    students: Annotated[
        list[str] | None, typer.Option("--student", help="Architecture and settings, as cnn,width=8. Repeatable.")
    ] = None,
    teachers: Annotated[list[str] | None, typer.Option("--teacher", help=f"{MODEL_FORMS} Repeatable.")] = None,
    seeds: Annotated[int | None, typer.Option("--seeds", min=1, help="How many: 5 runs the seeds 0 to 4.")] = None,
    data: DataOption = None,
    data_dir: DataDirOption = None,
    eps: EpsOption = None,
    norm: NormOption = None,
    epochs: EpochsOption = None,
    preset: Annotated[
        str | None, typer.Option("--preset", help="Attacks: quick, apgd, rslad-table, standard, rand or full.")
    ] = None,
    n: Annotated[int | None, typer.Option("--n", min=1, help="Only the first N test images.")] = None,
    baseline: Annotated[
        str | None, typer.Option("--baseline", help="The method that the others are compared with.")
    ] = None,
    out: Annotated[str, typer.Option("--out", help="Folder of the runs and the leaderboard.")] = "runs/compare",
    jobs: JobsOption = None,
    fresh: FreshOption = False,
    json: JsonOption = False,
) -> None:
    """Compare methods over students, teachers and seeds: train all, attack all, write a leaderboard.

    A method with several settings to choose from (trials of a recipe) runs with those that have the highest robust
    accuracy on validation data, chosen for each student and teacher before any test image is looked at. A stopped
    comparison goes on with the same command; more seeds, methods, students or teachers extend it; with another --preset
    or --n what is trained is measured again. A cell that fails loses no other one: the rest goes on, and the exit
    status is 1.

    Teachers given as options exist already, so all seeds share the split of the data that such a teacher was trained
    on. A recipe can have a teacher trained for each seed on a split of its own.

    Examples:

        crdnd compare --objectives rslad,ard --student cnn,width=8 --teacher runs/teacher --eps 0.1 --seeds 5 --baseline rslad

        crdnd compare --objectives trades,pgd_at --student cnn,width=8 --student cnn,width=16 --eps 0.1 --epochs 30

        crdnd compare --recipe compare.yaml --out runs/compare

        crdnd compare --recipe rslad-cifar10-resnet18-short --objectives rslad,crdnd --teacher runs/teacher
    """  # noqa: E501
    from crdnd.io import exclusive, make_folder, move_aside
    from crdnd.recipe import NO_FOLDER

    if not out.strip():
        raise InputError(f"out: {NO_FOLDER}")
    folder = Path(out)
    shared = given(data=data, threat__eps=eps, threat__norm=norm, epochs=epochs)
    options = given(preset=preset, n=n, baseline=baseline, seeds=None if seeds is None else list(range(seeds)))
    spec = _spec(recipe, assignments or [], shared, options, objectives, students or [], teachers or [])
    plan = make_plan(spec, folder)  # whatever is wrong with it is said before anything is written
    make_folder(folder)
    with exclusive(folder):
        if fresh:
            move_aside(folder, [RESULTS])
        refuse_another(folder / RESULTS, spec, "Use --fresh to move it aside and start over, or choose another --out.")
        comparison = run_plan(plan, folder / RESULTS, folder / LOG, jobs)
        _report(comparison, folder, json=json)
    raise_failures(comparison)


@dataclass(frozen=True)
class Plan:
    """A comparison, worked out and found to be in order."""

    spec: "Spec"
    out: Path
    """The folder of the runs, which comparisons with the same teachers may share."""
    grid: "Grid"
    protocols: Mapping[int, "Protocol"]
    """What the cells are measured under, by the seed of the split."""


def make_plan(spec: "Spec", out: Path) -> Plan:
    """Work a comparison out; nothing is written.

    Raises:
        InputError: anything in the spec that a run would refuse, in one line that says where.
    """
    from crdnd.cli._grid import make_grid
    from crdnd.evaluation import make_protocol
    from crdnd.evaluation import preset as preset_of

    grid, preset = make_grid(spec, out), preset_of(spec.preset)
    runs = {cell.candidates[0].split_seed: cell.candidates[0] for cell in grid.cells}
    return Plan(spec, out, grid, {
        split_seed: make_protocol(held_out_images(run, spec.n), run.threat, preset.attacks, checks=preset.checks)
        for split_seed, run in runs.items()
    })  # fmt: skip


def refuse_another(document: Path, spec: "Spec", instead: str) -> None:
    """Refuse a document of another comparison, and say what to do instead.

    One that this comparison only adds cells to is the same, and so is one that measures the same runs otherwise, which
    is said.
    """
    from crdnd.cli._grid import Spec, measured_otherwise, what_differs
    from crdnd.config import build
    from crdnd.report.comparison import load_comparison

    if document.exists():
        old = build(Spec, load_comparison(document).spec, where=str(document))
        found = what_differs(old, spec)
        if found:
            raise InputError(
                f"{document.parent}: holds a comparison with other settings ({'; '.join(found)}). {instead}"
            )
        if again := measured_otherwise(old, spec):
            print(
                f"{document}: was measured otherwise ({'; '.join(again)}); trained runs are kept and measured anew, "
                "and its numbers are replaced at the end",
                file=sys.stderr,
            )


def run_plan(plan: Plan, document: Path, log: Path, processes: int | None) -> "Comparison":
    """Do what a comparison has not done yet.

    Args:
        plan: the comparison.
        document: where `crdnd.compare-results/1` is written.
        log: what every look at test data is appended to.
        processes: runs side by side; see `side_by_side`.
    """
    # The spec is on disk before the first run, so that a killed comparison is not mixed up with another one. Numbers
    # whose runs are gone, or of another protocol, stay as they are until all are there that replace them.
    if not document.exists():
        _write(document, _collect(plan, {}))
    comparison = _collect(plan, _run(plan, log, processes))
    _write(document, comparison)
    return comparison


def raise_failures(comparison: "Comparison") -> None:
    """End with exit status 1 where a cell has failed."""
    failed = [cell for cell in comparison.cells if cell.failed]
    if failed:
        raise RunError(
            f"{len(failed)} of {len(comparison.cells)} cells failed, {failed[0].name} because {failed[0].failed}"
        )


def _spec(
    recipe: Path | None,
    assignments: Sequence[str],
    shared: dict[str, Any],
    options: dict[str, Any],
    objectives: str | None,
    students: Sequence[str],
    teachers: Sequence[str],
) -> "Spec":
    """What was asked for: the recipe, and options over it. What options list replaces what the recipe lists."""
    from crdnd.cli._grid import SCHEMA, Spec
    from crdnd.config import build
    from crdnd.recipe import merge, parse_assignment, read_recipe

    values = read_recipe(recipe) if recipe else {}
    if values.get("schema") == RECIPE_SCHEMA:
        values = _of_recipe(values)
    if values.get("schema", SCHEMA) != SCHEMA:
        raise InputError(f"{recipe}: has the format {values['schema']!r}; this version reads {SCHEMA}.")
    below: Any = values.get("shared", {})
    if not isinstance(below, dict):
        raise InputError(f"shared: must hold settings of a recipe, got {below!r}.")
    values["shared"] = merge(below, *(parse_assignment(text) for text in assignments), shared)
    if objectives is not None:
        own: Any = values.get("objectives")
        known: dict[str, Any] = own if isinstance(own, dict) else {}
        names = [name.strip() for name in objectives.split(",")]
        values["objectives"] = {name: known.get(name, {}) for name in names}
    if students:
        values["students"] = dict(_student(text) for text in students)
    if teachers:
        named = {_teacher_name(text): {"teacher": text} for text in teachers}
        if len(named) < len(teachers):
            raise InputError("teachers: two have the same name; name them in a recipe.")
        values |= {"teachers": named, "splits": "fixed"}
    for key, option in {"objectives": "--objectives", "students": "--student"}.items():
        if not values.get(key):
            raise InputError(f"{key}: this setting is required; give it with {option} or in a recipe.")
    return build(Spec, merge(values, options), where=str(recipe or ""))


def _of_recipe(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """The recipe of one run as a comparison: its method and its student, all else shared with what options add.

    The training attack goes with the method, since other papers name others.
    """
    from crdnd.config import build
    from crdnd.engine import Named

    run = {key: value for key, value in recipe.items() if key not in ("schema", "role", "seed", "out")}
    method = {key: run.pop(key) for key in ("objective", "attack") if key in run}
    model = run.pop("model", None)
    values: dict[str, Any] = {"shared": run}
    if method:
        values["objectives"] = {build(Named, method.get("objective"), "objective").name: method}
    if model is not None:
        values["students"] = {build(Named, model, "model").name: {"model": model}}
    if "teacher" in run:
        teacher = {key: run.pop(key) for key in ("teacher", "teacher_weights") if key in run}
        values |= {"teachers": {"teacher": teacher}, "splits": "fixed"}
    return values


def _student(text: str) -> tuple[str, dict[str, Any]]:
    """`cnn,width=8` as a name and layers of a recipe."""
    from crdnd.models import parse_spec

    name, settings = parse_spec(text, "--student")
    return "".join(text.split()).replace(":", "."), {"model": {"name": name, **settings}}


def _teacher_name(text: str) -> str:
    from crdnd.models import is_remote, remote_name

    if is_remote(text):
        return remote_name(text)
    return text.partition(":")[2] if ":" in text and not Path(text).exists() else Path(text).resolve().name


def _run(plan: Plan, log: Path, processes: int | None) -> dict[str, str]:
    """Run what is not done yet. Returns the jobs that failed, with why."""
    from crdnd.cli._jobs import run_jobs, showing_jobs, side_by_side, threads_for

    work = list(_jobs(plan, log))
    failures: dict[str, str] = {}
    if not work:
        return failures
    processes = side_by_side(processes, len(work))
    with showing_jobs([job.name for job in work]) as display, saved_in(plan.out):

        def on_failed(name: str, why: str) -> None:
            failures[name] = why
            display.failed(name, why)

        run_jobs(
            work, processes=processes, threads=threads_for(processes),
            on_step=display.step, on_done=display.done, on_failed=on_failed,
        )  # fmt: skip
    return failures


def _jobs(plan: Plan, log: Path) -> Iterator[Any]:
    """Teachers, then trials, then cells, without what is done or what only that needs.

    Every cell comes after all trials: no test image is looked at before the settings of every method are chosen. Cells
    go seed by seed, so that a comparison that was stopped has pairs to compare.
    """
    from crdnd.cli._grid import TEACHER_KEYS
    from crdnd.cli._jobs import Job
    from crdnd.engine import is_finished

    grid, seeds = plan.grid, plan.spec.seeds
    cells = [cell for cell in grid.cells if _measured(cell, plan) is None]
    asked = {run.out for cell in cells for trial in cell.judged for run in trial}
    trials = {name: run for name, run in grid.trials.items() if run.out in asked and not _is_over(run)}
    by_folder = {run.out: name for name, run in grid.teachers.items() if not is_finished(Path(run.out))}

    def teachers_of(runs: Sequence["Recipe"]) -> tuple[str, ...]:
        sources = {getattr(run, key, None) for run in runs for key in TEACHER_KEYS}
        return tuple(name for folder, name in by_folder.items() if folder in sources)

    needed = {
        name for runs in [tuple(trials.values()), *(cell.candidates for cell in cells)] for name in teachers_of(runs)
    }
    for name in by_folder.values():
        if name in needed:
            yield Job(name, train_run, (grid.teachers[name],))
    names = {run.out: name for name, run in trials.items()}
    for name, run in trials.items():
        yield Job(name, train_run, (run, True), teachers_of([run]))
    for cell in sorted(cells, key=lambda cell: seeds.index(cell.seed)):
        own = tuple(names[run.out] for trial in cell.judged for run in trial if run.out in names)
        arguments = (cell, plan.spec.preset, plan.spec.n, log)
        yield Job(cell.name, measure_cell, arguments, (*teachers_of(cell.candidates), *own), tuple(trials))


def train_run(report: Callable[[int, int], None], recipe: "Recipe", may_diverge: bool = False) -> None:
    """Train a teacher or a trial, in a process of its own. A trial that diverges has lost, which is no failure."""
    from crdnd.io import atomic_write_text

    try:
        recipe.run(listener=lambda progress: report(progress.step, progress.steps))
    except DivergenceError as error:
        if not may_diverge:
            raise
        atomic_write_text(Path(recipe.out) / DIVERGED, f"{error}\n")


def measure_cell(report: Callable[[int, int], None], cell: "Cell", preset: str, n: int | None, log: Path) -> None:
    """One cell, in a process of its own: train with the chosen settings, attack, write `evaluation.json`."""
    from crdnd.evaluation import Label, evaluate
    from crdnd.evaluation import preset as preset_of
    from crdnd.io import atomic_write_text
    from crdnd.models import EVALUATION

    recipe = _chosen(cell)
    if recipe is None:
        reasons = [trial.failed for trial in _trials(cell) or []]
        raise RunError(f"all its trials diverged: {reasons[0]}")
    run = recipe.run(listener=lambda progress: report(progress.step, progress.steps))
    report(1, 1)
    plan = preset_of(preset)
    results = evaluate(
        run.model,
        held_out_images(recipe, n),
        threat=recipe.threat,
        attacks=plan.attacks,
        checks=plan.checks,
        label=Label(recipe.objective.name, recipe.role, recipe.seed, recipe.select),
        work=run.folder / "evaluation",
    )
    row = results.rows[0]
    line = {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "cell": cell.name,
        "model_sha256": row.model_sha256,
        "protocol": results.protocol.fingerprint,
        "worst_case": row.worst_case.model_dump(),
    }
    # Before the result, so that a kill in between cannot hide a look at test data.
    with log.open("a", encoding="utf-8") as file:
        file.write(json_module.dumps(line) + "\n")
    atomic_write_text(run.folder / EVALUATION, results.to_json())


def _is_over(run: "Recipe") -> bool:
    from crdnd.engine import is_finished

    return is_finished(Path(run.out)) or (Path(run.out) / DIVERGED).exists()


def _trials(cell: "Cell") -> "list[Trial] | None":
    """How the trials of a cell's method did on validation data; None while one of them is not over."""
    from crdnd.cli._grid import judged
    from crdnd.engine import is_finished
    from crdnd.engine.checkpoint import read_checkpoint
    from crdnd.report.comparison import Trial

    found: list[Trial] = []
    for settings, runs in zip(cell.settings, cell.judged, strict=True):
        notes = [Path(run.out) / DIVERGED for run in runs]
        diverged = [note.read_text(encoding="utf-8").strip() for note in notes if note.exists()]
        if diverged:
            found.append(Trial(settings=settings, failed=diverged[0]))
            continue
        if not all(is_finished(Path(run.out)) for run in runs):
            return None
        validations = []
        for run in runs:
            checkpoint = read_checkpoint(Path(run.out))
            assert checkpoint is not None and checkpoint.best_epoch is not None, "it is finished"  # noqa: S101, PT018
            epoch = checkpoint.history[checkpoint.best_epoch - 1 if run.select == "best" else -1]
            assert epoch.validation is not None, "only validated epochs can be chosen"  # noqa: S101
            validations.append(epoch.validation)
        found.append(judged(settings, validations))
    return found


def _chosen(cell: "Cell") -> "Recipe | None":
    """The run of a cell, with the chosen settings; None where trials are not over, or all have diverged."""
    from crdnd.cli._grid import choose

    if not cell.judged:
        return cell.candidates[0]
    trials = _trials(cell)
    place = None if trials is None else choose(trials)
    return None if place is None else cell.candidates[place]


def _measured(cell: "Cell", plan: Plan) -> "CellResult | None":
    """A cell's numbers, if it is finished and was measured under this protocol."""
    from crdnd.cli._common import card_of
    from crdnd.engine.checkpoint import read_checkpoint
    from crdnd.models import read_card
    from crdnd.report.comparison import CellResult

    recipe = _chosen(cell)
    folder = Path(recipe.out) if recipe else plan.out
    checkpoint = read_checkpoint(folder) if recipe else None
    if recipe is None or checkpoint is None or not checkpoint.finished:
        return None
    try:
        card = read_card(folder)
    except InputError:
        return None
    teacher = card_of(recipe.teacher, recipe.teacher_weights) if recipe.teacher is not None else None
    if teacher is not None and teacher.sha256 != card.teacher_sha256:
        return None  # the run itself says what is wrong
    fingerprint = plan.protocols[recipe.split_seed].fingerprint
    results = current_evaluation(folder, fingerprint, [card.sha256])
    if results is None:
        return None
    history, best = checkpoint.history, checkpoint.best_epoch
    return CellResult(
        objective=cell.objective,
        student=cell.student,
        teacher=cell.teacher,
        seed=cell.seed,
        split_seed=recipe.split_seed,
        folder=folder.relative_to(plan.out).as_posix(),
        trial=cell.candidates.index(recipe) + 1 if cell.judged else None,
        protocol=fingerprint,
        row=results.rows[0],
        teacher_sha256=card.teacher_sha256,
        epochs=len(history),
        best_epoch=best,
        best=history[best - 1].validation if best else None,
        last=history[-1].validation,
        seconds=sum(epoch.seconds for epoch in history),
        student_passes=sum(epoch.student_passes for epoch in history),
        teacher_passes=sum(epoch.teacher_passes for epoch in history),
        changes=checkpoint.changes,
    )


def _collect(plan: Plan, failures: Mapping[str, str]) -> "Comparison":
    """The document of what the folder holds."""
    from crdnd.cli._common import card_of, has_card
    from crdnd.cli._grid import choose
    from crdnd.provenance import command, commit, package_versions
    from crdnd.report.comparison import CellResult, Choice, Comparison, TeacherRun

    cells: list[CellResult] = []
    choices: dict[tuple[str, str, str | None], Choice] = {}
    for cell in plan.grid.cells:
        key = (cell.objective, cell.student, cell.teacher)
        found = _measured(cell, plan)
        if found is None and cell.name in failures:
            found = CellResult(
                objective=cell.objective,
                student=cell.student,
                teacher=cell.teacher,
                seed=cell.seed,
                split_seed=cell.candidates[0].split_seed,
                failed=failures[cell.name],
            )
        cells += [found] if found else []
        trials = _trials(cell) if cell.judged and key not in choices else None
        if trials is not None:
            place = choose(trials)
            choices[key] = Choice(
                objective=cell.objective,
                student=cell.student,
                teacher=cell.teacher,
                trials=trials,
                chosen=None if place is None else place + 1,
            )
    trained = {run.out: run for run in plan.grid.teachers.values()}
    return Comparison(
        schema="crdnd.compare-results/1",
        spec=plan.spec.model_dump(mode="json", by_alias=True),
        baseline=plan.spec.baseline,
        protocols=list({protocol.fingerprint: protocol for protocol in plan.protocols.values()}.values()),
        teachers=[
            TeacherRun(
                name=name,
                seed=trained[source].seed if source in trained else None,
                source=source,
                sha256=card.sha256 if card else None,
            )
            for source, name in plan.grid.teacher_names.items()
            for card in [card_of(source)]
            if source not in trained or has_card(Path(source))
        ],
        choices=list(choices.values()),
        cells=cells,
        versions=package_versions(),
        commit=commit(),
        command=command(),
    )


def _write(document: Path, comparison: "Comparison") -> None:
    from crdnd.io import atomic_write_text

    atomic_write_text(document, comparison.to_json())


def _report(comparison: "Comparison", out: Path, *, json: bool) -> None:
    """The leaderboard: files, and what the command prints."""
    from rich.console import Console

    from crdnd.io import atomic_write_text
    from crdnd.report import leaderboard, write_comparison
    from crdnd.report.leaderboard import notes, tables, to_csv, to_latex

    if any(cell.row is not None for cell in comparison.cells):
        board = leaderboard(comparison)
        atomic_write_text(out / CSV, to_csv(board))
        atomic_write_text(out / LATEX, to_latex(board))
        write_comparison(out / REPORT, comparison)
        if not json:
            console = Console(highlight=False)
            for table in tables(board):
                console.print(table)
            plain = Console(highlight=False, soft_wrap=True, markup=False)
            for note in notes(comparison):
                plain.print(f"- {note}")
            plain.print(f"Results: {out / RESULTS}, {out / CSV}, {out / LATEX}\nReport:  {out / REPORT}")
    if json:
        print_json(comparison.to_json().rstrip())
