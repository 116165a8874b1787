"""`crdnd train` and `crdnd distill`."""

import shlex
import sys
from contextlib import nullcontext, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from crdnd.cli._common import (
    DataDirOption,
    DataOption,
    EpochsOption,
    EpsOption,
    FreshOption,
    ImagesOption,
    JsonOption,
    ModelOption,
    NamedRecipeOption,
    NormOption,
    ObjectiveOption,
    OutOption,
    SecondTeacherOption,
    SecondTeacherWeightsOption,
    SeedOption,
    SetOption,
    TeacherOption,
    TeacherWeightsOption,
    card_of,
    given,
    print_json,
    settings_of,
    showing,
)
from crdnd.cli._images import check_folder, teacher_folder, teacher_of, with_defaults
from crdnd.errors import InputError

if TYPE_CHECKING:
    from crdnd.engine import Run
    from crdnd.recipe import Recipe

PrecisionOption = Annotated[str | None, typer.Option("--precision", help="Of training: fp32 or bf16.")]
Tf32Option = Annotated[bool | None, typer.Option("--tf32", help="TF32 in training, on GPUs that have it.")]
DeterministicOption = Annotated[
    bool | None, typer.Option("--deterministic", help="On a GPU: the same bits in every run; slower.")
]
CompileOption = Annotated[
    bool | None, typer.Option("--compile", help="torch.compile, with CUDA graphs on a GPU; plain where it fails.")
]
SaveOption = Annotated[
    int | None, typer.Option("--save-every-steps", help="Save this often; bounds what a kill costs.")
]


def train_command(
    recipe: NamedRecipeOption = None,
    assignments: SetOption = None,
    images: ImagesOption = None,
    data: DataOption = None,
    data_dir: DataDirOption = None,
    model: ModelOption = None,
    objective: ObjectiveOption = None,
    eps: EpsOption = None,
    norm: NormOption = None,
    epochs: EpochsOption = None,
    seed: SeedOption = None,
    precision: PrecisionOption = None,
    tf32: Tf32Option = None,
    deterministic: DeterministicOption = None,
    compile_networks: CompileOption = None,
    save_every_steps: SaveOption = None,
    out: OutOption = None,
    fresh: FreshOption = False,
    json: JsonOption = False,
) -> None:
    """Train a model without a teacher. The same command again goes on where it was stopped.

    Examples:

        crdnd train --objective trades --model cnn --set model.width=32 --eps 0.1 --out runs/teacher

        crdnd train --recipe teacher.yaml --epochs 30

        crdnd train --images photos --out runs/teacher
    """
    options = given(
        data=data, model__name=model, objective__name=objective, threat__eps=eps, threat__norm=norm, epochs=epochs,
        seed=seed, precision=precision, tf32=tf32, deterministic=deterministic, levers__compile=compile_networks,
        save_every_steps=save_every_steps, out=out,
    )  # fmt: skip
    settings = settings_of(recipe, assignments, options)
    if settings.get("teacher") is not None:
        raise InputError("teacher: `crdnd train` uses none; the command with a teacher is `crdnd distill`.")
    if check_folder(images, settings):
        settings = with_defaults({**settings, "data": images}, "teacher")
    _do(settings, fresh=fresh, json=json)


def distill_command(
    recipe: NamedRecipeOption = None,
    assignments: SetOption = None,
    images: ImagesOption = None,
    data: DataOption = None,
    data_dir: DataDirOption = None,
    teacher: TeacherOption = None,
    teacher_weights: TeacherWeightsOption = None,
    second_teacher: SecondTeacherOption = None,
    second_teacher_weights: SecondTeacherWeightsOption = None,
    model: ModelOption = None,
    objective: ObjectiveOption = None,
    eps: EpsOption = None,
    norm: NormOption = None,
    epochs: EpochsOption = None,
    seed: SeedOption = None,
    precision: PrecisionOption = None,
    tf32: Tf32Option = None,
    deterministic: DeterministicOption = None,
    compile_networks: CompileOption = None,
    save_every_steps: SaveOption = None,
    out: OutOption = None,
    fresh: FreshOption = False,
    json: JsonOption = False,
) -> None:
    """Train a small student from a robust teacher. The same command again goes on where it was stopped.

    --objective has no default, because no method leads everywhere. In comparisons of small networks here, crdnd_plus
    stands highest under AutoAttack of the methods with a teacher: on the digits (docs/study-crdnd-plus.md), ard with
    tau 1 about a point below and rslad two and a half, and on CIFAR-10 (docs/cifar10.md), both three points below.
    trades or pgd_at, without a teacher, stand as high, and in a network of 496 weights mart stands higher. CRDND as
    published looks better under PGD than it is.

    The teacher's natural accuracy on validation images is measured first. At chance level it is refused, with the
    likely cause (normalisation, [0, 255] inputs, order of channels or classes); `crdnd check-teacher` measures alone.

    With --images nothing else is needed: what is not given is chosen for these images and said, a method too. Without
    --teacher a suitable one is trained first, into the folder OUT-teacher; the same command goes on with whichever of
    the two runs was stopped. docs/your_own_images.md is a walk-through.

    Examples:

        crdnd distill --images photos --out runs/student

        crdnd distill --teacher runs/teacher --objective rslad --model cnn --eps 0.1 --out runs/student

        crdnd distill --teacher runs/teacher --objective ard --set objective.tau=1 --model cnn --eps 0.1 --out runs/ard

        crdnd distill --recipe rslad-cifar10-resnet18-short --teacher runs/teacher --out runs/rslad
    """
    options = given(
        data=data, teacher=teacher, teacher_weights=teacher_weights, second_teacher=second_teacher,
        second_teacher_weights=second_teacher_weights, model__name=model, objective__name=objective,
        threat__eps=eps, threat__norm=norm, epochs=epochs, seed=seed, precision=precision, tf32=tf32,
        deterministic=deterministic, levers__compile=compile_networks, save_every_steps=save_every_steps, out=out,
    )  # fmt: skip
    settings = settings_of(recipe, assignments, options)
    if check_folder(images, settings):
        given_settings = {**settings, "data": images}
        settings = with_defaults(given_settings, "student")
        if settings.get("teacher") is None:
            settings["teacher"] = _train_teacher(settings, given_settings, fresh=fresh)
    if settings.get("teacher") is None:
        raise InputError("teacher: give one with --teacher; the command without a teacher is `crdnd train`.")
    _do(settings, fresh=fresh, json=json)


REQUIRED = {"objective": "--objective", "model": "--model", "threat": "--eps", "out": "--out"}


def _train_teacher(settings: dict[str, Any], given_settings: dict[str, Any], *, fresh: bool) -> str:
    """Train the teacher that is missing, or go on with it. Returns its folder."""
    _check_student(settings, fresh=fresh)
    run = _run(teacher_of(settings, given_settings), fresh=fresh)
    state = "was trained before" if run.reused else "is trained"
    print(f"the teacher {state}; now the student is, in {settings['out']}", file=sys.stderr)
    return str(run.folder)


def _check_student(settings: dict[str, Any], *, fresh: bool) -> None:
    """What the student's run would refuse is said before hours go into its teacher."""
    from crdnd.cli._runs import check_run
    from crdnd.config import build
    from crdnd.engine import TrainSettings
    from crdnd.engine.run import check_goes_on, check_place
    from crdnd.models import resolve_model
    from crdnd.recipe import make_recipe

    _check_required(settings)
    for key in ("teacher_weights", "teacher_input"):
        if settings.get(key) is not None:
            raise InputError(f"{key}: is for a teacher that is given; give --teacher too, or leave it away.")
    recipe = make_recipe({**settings, "teacher": teacher_folder(settings)})
    check_place(recipe.out, (recipe.second_teacher, recipe.second_teacher_weights), fresh=fresh)
    splits = recipe.load_data()
    check_run(recipe, splits)
    if not fresh:
        own = build(TrainSettings, recipe.of_training())
        check_goes_on(Path(recipe.out), own, recipe.build_model(splits), splits)
    if recipe.second_teacher is not None:
        resolve_model(recipe.second_teacher, recipe.second_teacher_weights)


def _check_required(settings: dict[str, Any]) -> None:
    for key, option in REQUIRED.items():
        if key not in settings:
            raise InputError(f"{key}: this setting is required; give it with {option} or in a recipe.")


def _do(settings: dict[str, Any], *, fresh: bool, json: bool) -> None:
    from crdnd.engine.processes import processes

    run = _run(settings, fresh=fresh)
    if processes().is_main_process:
        _report(run, settings, json=json)


def _run(settings: dict[str, Any], *, fresh: bool) -> "Run":
    from crdnd.engine.processes import processes
    from crdnd.recipe import make_recipe
    from crdnd.report import write_model_card

    _check_required(settings)
    if find_spec("tensorboard") is not None:
        # Not the setting's own default: to import it takes half a second, which every process of a comparison, every
        # estimate and every short run of a script would pay.
        settings.setdefault("trackers", ["tensorboard"])
    recipe = make_recipe(settings)
    speaks = processes().is_main_process
    with showing(recipe.objective.name) if speaks else nullcontext() as listener:
        _check_teachers(recipe, quiet=not speaks)
        run = recipe.run(fresh=fresh, listener=listener)
    if speaks:
        with suppress(InputError):  # a README that the user wrote stays
            write_model_card(run.folder)
    return run


def _check_teachers(recipe: "Recipe", *, quiet: bool) -> None:
    """Refuse teachers that have seen the student's test images; say where the robust one withstands something else."""
    from crdnd.cli._runs import split_seen

    for key in ("teacher", "second_teacher"):
        teacher: str | None = getattr(recipe, key)
        weights: str | None = getattr(recipe, f"{key}_weights")
        if teacher is None:
            continue
        card = card_of(teacher, weights)
        seen = split_seen(card, recipe.data, recipe.split_seed)
        if seen is not None:
            raise InputError(
                f"{key}: was trained on split {seen} of {recipe.data} and has seen test images of split "
                f"{recipe.split_seed}; use --set split_seed={seen}, or a teacher of split {recipe.split_seed}."
            )
        if key == "teacher" and card is not None and card.threat not in (None, recipe.threat) and not quiet:
            print(
                f"warning: the teacher was trained for {card.threat}, the student is for {recipe.threat}",
                file=sys.stderr,
            )


def _report(run: "Run", settings: dict[str, Any], *, json: bool) -> None:
    from crdnd.data import has_test
    from crdnd.models import read_card
    from crdnd.recipe import make_recipe

    card = read_card(run.folder)
    best = run.history[run.best_epoch - 1].validation
    assert best is not None, "only validated epochs can be best"  # noqa: S101
    if json:
        print_json(
            {
                "folder": str(run.folder),
                "reused": run.reused,
                "method": card.method,
                "model_sha256": card.sha256,
                "epochs": len(run.history),
                "best_epoch": run.best_epoch,
                "validation": best.model_dump(),
            }
        )
        return
    print(
        f"{run.folder}: {'already finished, reused' if run.reused else 'done'}. Best epoch {run.best_epoch} of ", end=""
    )
    print(f"{len(run.history)}: validation clean {best.clean.percent:.1f}%, robust {best.robust.percent:.1f}%.")
    recipe = make_recipe(settings)
    own_code = card.architecture is None
    is_path = "data" in settings and Path(recipe.data).exists()
    code = [recipe.model.name, "--weights"] if own_code else []
    what, command = "test data", ["crdnd", "evaluate", *code, str(run.folder)]
    if is_path and not has_test(Path(recipe.data)):
        what = "images that it was not trained on"
        command += ["--data", "PATH"]
    elif is_path or own_code:
        command += ["--data", recipe.data]
    if own_code:
        command += _told_by_a_card(recipe)
    print(f"Measure it under attack on {what}: {shlex.join(command)}")


def _told_by_a_card(recipe: "Recipe") -> list[str]:
    """Options that say what an evaluation finds in a model's card, for weights that are given beside their code."""
    options = ["--eps", str(recipe.threat.eps), "--norm", recipe.threat.norm]
    if recipe.split_seed:
        options += ["--set", f"split_seed={recipe.split_seed}"]
    if recipe.image_size is not None:
        options += ["--set", f"image_size={recipe.image_size}"]
    return options
