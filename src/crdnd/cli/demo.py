"""`crdnd demo`: a robust teacher, seven students of the same kind, four attacks, one report."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from crdnd.cli._common import (
    DataDirOption,
    EpochsOption,
    FreshOption,
    JobsOption,
    JsonOption,
    RecipeOption,
    SeedOption,
    given,
    print_json,
)
from crdnd.cli._runs import current_evaluation, held_out_images, saved_in, uses_teacher

if TYPE_CHECKING:
    from torch import nn

    from crdnd.evaluation import Results
    from crdnd.recipe import Recipe

RESULTS, REPORT = "results.json", "report.html"
GALLERY_SAMPLES, GALLERY_ATTACK = 4, "cw_inf"


def demo_command(
    recipe: RecipeOption = None,
    out: Annotated[Path, typer.Option("--out", help="Folder of the runs and the report.")] = Path("runs/demo"),
    jobs: JobsOption = None,
    epochs: EpochsOption = None,
    seed: SeedOption = None,
    data_dir: DataDirOption = None,
    fresh: FreshOption = False,
    json: JsonOption = False,
) -> None:
    """Train a robust teacher and seven students on handwritten digits, attack them all, write a report.

    Finished parts are reused; a stopped demo goes on where it was.

    Examples:

        crdnd demo

        crdnd demo --epochs 5 --out runs/quick
    """
    from pydantic import Field

    from crdnd.attacks import load_attack
    from crdnd.config import Frozen, build
    from crdnd.recipe import make_recipe, merge, read_yaml

    class Demo(Frozen):
        """The document `crdnd.demo/1`."""

        schema_: Literal["crdnd.demo/1"] = Field(default="crdnd.demo/1", alias="schema")
        shared: dict[str, Any]
        teacher: dict[str, Any]
        student: dict[str, Any]
        students: dict[str, dict[str, Any]]
        attacks: tuple[str, ...]

    packaged = Path(__file__).with_name("demo.yaml")
    source = recipe or packaged
    demo = build(Demo, read_yaml(source), where=str(source))
    for name in demo.attacks:
        load_attack(name)  # a wrong name is said now, not after the training
    changes = given(epochs=epochs, seed=seed)
    if epochs is not None:
        changes["check_teacher"] = False  # cut short, the demo's own teacher may know nothing yet
    teacher = merge(demo.shared, demo.teacher, changes, {"role": "teacher", "out": str(out / "teacher")})
    recipes = {"teacher": make_recipe(teacher, "teacher")}
    for name, own in demo.students.items():
        values = merge(demo.shared, demo.student, {"objective": name}, own, changes, {"out": str(out / name)})
        distilled = {"teacher": str(out / "teacher")} if uses_teacher(values, name) else {}
        recipes[name] = make_recipe(values | distilled, name)
    _run(recipes, demo.attacks, out, jobs, fresh=fresh, json=json)


def _run(
    recipes: Mapping[str, "Recipe"], attacks: tuple[str, ...], out: Path, jobs: int | None, *, fresh: bool, json: bool
) -> None:
    from rich.console import Console

    from crdnd.cli._jobs import Job, run_jobs, showing_jobs, side_by_side, threads_for
    from crdnd.engine import is_finished
    from crdnd.evaluation import combine, load_results
    from crdnd.io import atomic_write_text, exclusive, make_folder
    from crdnd.models import EVALUATION
    from crdnd.report import findings, results_table

    reused = [] if fresh else [name for name in recipes if is_finished(out / name)]
    work = [
        Job(name, train_and_evaluate, (recipe, attacks, fresh), ("teacher",) if recipe.teacher else ())
        for name, recipe in recipes.items()
    ]
    make_folder(out)
    # Beside the locks of its runs: another demo with --fresh would move a finished teacher away from its students.
    with exclusive(out):
        with showing_jobs(list(recipes), reused) as display, saved_in(out):
            processes = side_by_side(jobs, len(work))
            threads = threads_for(processes)
            run_jobs(work, processes=processes, threads=threads, on_step=display.step, on_done=display.done)
        results = combine([load_results(out / name / EVALUATION) for name in recipes])
        atomic_write_text(out / RESULTS, results.to_json())
        _write_report(results, recipes, out)
    if json:
        print_json(results.to_json().rstrip())
        return
    console = Console(highlight=False, soft_wrap=True)
    console.print(results_table(results))
    for finding in findings(results):
        console.print(f"- {finding}")
    if reused:
        console.print(f"Reused from before: {', '.join(reused)}. Start over with --fresh.")
    console.print(f"Results: {out / RESULTS}\nReport:  {out / REPORT}")


def train_and_evaluate(
    report: Callable[[int, int], None], recipe: "Recipe", attacks: tuple[str, ...], fresh: bool
) -> None:
    """One run of the demo, in a process of its own: train, attack both checkpoints, write `evaluation.json`."""
    from crdnd.evaluation import Label, combine, evaluate, make_protocol
    from crdnd.io import atomic_write_text
    from crdnd.models import EVALUATION, weights_sha256

    test = held_out_images(recipe)
    run = recipe.run(fresh=fresh, listener=lambda progress: report(progress.step, progress.steps))
    report(1, 1)
    other = "last" if recipe.select == "best" else "best"
    models: dict[Literal["best", "last"], nn.Module] = {recipe.select: run.model, other: run.other}
    fingerprint = make_protocol(test, recipe.threat, attacks).fingerprint
    if current_evaluation(run.folder, fingerprint, [weights_sha256(model) for model in models.values()]):
        return
    name = recipe.objective.name
    results = [
        evaluate(
            model, test, threat=recipe.threat, attacks=attacks, label=Label(name, recipe.role, recipe.seed, checkpoint)
        )
        for checkpoint, model in models.items()
    ]
    atomic_write_text(run.folder / EVALUATION, combine(results).to_json())


def _write_report(results: "Results", recipes: Mapping[str, "Recipe"], out: Path) -> None:
    from crdnd.engine import load_history
    from crdnd.evaluation import examples
    from crdnd.models import load_model
    from crdnd.provenance import command
    from crdnd.report import findings, write_report

    first = recipes["teacher"]
    labels = {
        name: f"{recipe.objective.name} (teacher)" if recipe.role == "teacher" else recipe.objective.name
        for name, recipe in recipes.items()
    }
    write_report(
        out / REPORT,
        title="Small networks under attack",
        results=results,
        histories={label: load_history(out / name) for name, label in labels.items()},
        gallery=examples(
            {label: load_model(out / name) for name, label in labels.items()},
            held_out_images(first),
            first.threat,
            GALLERY_ATTACK,
            count=GALLERY_SAMPLES,
        ),
        notes=findings(results),
        command=command(),
    )
