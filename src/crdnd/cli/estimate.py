"""`crdnd estimate`."""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from crdnd.cli._common import (
    DataDirOption,
    DataOption,
    EpochsOption,
    EpsOption,
    JsonOption,
    ModelOption,
    NormOption,
    ObjectiveOption,
    SecondTeacherOption,
    SecondTeacherWeightsOption,
    SetOption,
    TeacherOption,
    TeacherWeightsOption,
    duration,
    given,
    print_json,
    settings_of,
)
from crdnd.errors import InputError

if TYPE_CHECKING:
    from torch import nn

    from crdnd.data import Splits
    from crdnd.engine import Counts, Estimate
    from crdnd.recipe import Recipe

MADE_UP: dict[str, tuple[int, int, int]] = {
    "cifar10": (3, 32, 32),
    "cifar100": (3, 32, 32),
    "tiny_imagenet": (3, 64, 64),
    "svhn": (3, 32, 32),
    "mnist": (1, 28, 28),
    "fashion_mnist": (1, 28, 28),
}
"""Shapes of the images of data sets that may not be on this machine."""


def estimate_command(
    recipe: Annotated[
        Path | None, typer.Argument(metavar="[RECIPE]", help="YAML file, or a name of `crdnd recipes list`.")
    ] = None,
    assignments: SetOption = None,
    data: DataOption = None,
    data_dir: DataDirOption = None,
    teacher: TeacherOption = None,
    teacher_weights: TeacherWeightsOption = None,
    second_teacher: SecondTeacherOption = None,
    second_teacher_weights: SecondTeacherWeightsOption = None,
    teacher_models: Annotated[
        list[str] | None,
        typer.Option(
            "--teacher-model",
            help="Instead of a teacher an architecture with random weights, as wrn,depth=34,width=10, which costs the "
            "same. Repeat it for a second teacher.",
        ),
    ] = None,
    model: ModelOption = None,
    objective: ObjectiveOption = None,
    eps: EpsOption = None,
    norm: NormOption = None,
    epochs: EpochsOption = None,
    json: JsonOption = False,
) -> None:
    """Predict the time and memory of a run on this machine from a few of its steps, before anyone starts it.

    Where a public data set is not on this machine, images of its shape are made up, which cost the same.

    Examples:

        crdnd estimate rslad-cifar10-resnet18-short --teacher-model wrn,depth=34,width=10

        crdnd estimate --objective trades --model cnn --eps 0.1 --epochs 40
    """
    from crdnd.engine import TrainSettings, estimate
    from crdnd.recipe import make_recipe

    options = given(
        data=data, teacher=teacher, teacher_weights=teacher_weights, second_teacher=second_teacher,
        second_teacher_weights=second_teacher_weights, model__name=model, objective__name=objective,
        threat__eps=eps, threat__norm=norm, epochs=epochs,
    )  # fmt: skip
    run = make_recipe({"out": "."} | settings_of(recipe, assignments, options))
    splits, counts = _data(run)
    found = estimate(
        run.build_model(splits),
        splits,
        teachers=_teachers(run, splits, teacher_models or []),
        counts=counts,
        **{name: getattr(run, name) for name in TrainSettings.model_fields},
    )
    if json:
        print_json(dataclasses.asdict(found) | {"extrapolated": found.extrapolated, "made_up_images": bool(counts)})
    else:
        _report(found, made_up=bool(counts))


def _data(run: "Recipe") -> tuple["Splits", "Counts | None"]:
    """The run's data; for a public set that is not there a few images of its shape, and how many it has."""
    from crdnd.data import HELD_OUT, ImageData, Splits, load_info

    files = load_info(run.data).files if run.data in MADE_UP else None
    try:
        return run.load_data(), None
    except InputError:
        if files is None:
            raise
    import torch

    from crdnd.engine import Counts
    from crdnd.random import Stream

    images, classes = files.counts["train"], files.classes
    ids = torch.arange(min(run.batch_size, images))
    pixels = Stream.of("estimate", ids=ids % 64).integers(0, 256, MADE_UP[run.data]).to(torch.uint8)
    some = ImageData(pixels, ids % classes, classes, name=run.data)
    held_out = round(HELD_OUT * images)
    return Splits(some, some, split_seed=run.split_seed), Counts(images - held_out, held_out)


def _teachers(run: "Recipe", splits: "Splits", architectures: list[str]) -> list["nn.Module"]:
    from crdnd.cli._runs import uses_teacher
    from crdnd.models import resolve_model
    from crdnd.objectives import load_objective, needs_second_teacher

    layers = run.model_dump(include={"objective", "attack", "igdm"})
    wanted = uses_teacher(layers) + needs_second_teacher(load_objective(run.objective.name))
    given = ((run.teacher, run.teacher_weights), (run.second_teacher, run.second_teacher_weights))
    known = [(name, weights) for name, weights in given if name is not None]
    if len(known) + len(architectures) != wanted:
        raise InputError(
            f"teacher: {run.objective.name} looks at {wanted}, given are {len(known) + len(architectures)}; name each "
            "by --teacher, or as --teacher-model wrn,depth=34,width=10 for one with random weights."
        )
    made = [run.model_copy(update=_named(text)).build_model(splits) for text in architectures]
    return [*(resolve_model(name, weights) for name, weights in known), *made]


def _named(text: str) -> dict[str, Any]:
    from crdnd.engine import Named
    from crdnd.models import parse_spec

    name, settings = parse_spec(text, "--teacher-model")
    return {"model": Named(**{"name": name, **settings})}


def _report(found: "Estimate", *, made_up: bool) -> None:
    epoch, validation = duration(found.epoch_seconds), duration(found.validation_seconds)
    print(f"epoch       {epoch}: {found.steps_per_epoch} steps of {duration(found.step_seconds)}")
    print(f"validation  {validation} at most")
    print(f"run         {duration(found.run_seconds)}: {found.epochs} epochs, {found.validations} validations")
    if found.peak_memory is not None:
        print(f"memory      {found.peak_memory / 2**30:.2f} GiB at the peak")
    images = " with made-up images" if made_up else ""
    print(
        f"Measured on {found.device}, {found.threads} threads: the median of {found.steps_timed} steps of "
        f"{found.measured_batch_size} images{images}, the first steps left out."
    )
    if found.extrapolated:
        print(
            f"A step of {found.batch_size} images takes long here: time and memory are extrapolated from steps of "
            f"{found.measured_batch_size}."
        )
