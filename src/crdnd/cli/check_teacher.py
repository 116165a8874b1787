"""`crdnd check-teacher`: what a teacher knows of the data, and what stands of it under attack, before anyone trains."""

from typing import TYPE_CHECKING, Annotated, Any

import typer

from crdnd.cli._common import (
    MODEL_FORMS,
    DataDirOption,
    DataOption,
    EpsOption,
    JsonOption,
    NormOption,
    WeightsOption,
    card_of,
    given,
    print_json,
    was_trained_on,
)

if TYPE_CHECKING:
    from crdnd.engine import TeacherCheck
    from crdnd.evaluation import Results

SCHEMA = "crdnd.teacher/1"


def check_teacher_command(
    teacher: Annotated[str, typer.Argument(metavar="TEACHER", help=MODEL_FORMS)],
    weights: WeightsOption = None,
    data: DataOption = None,
    data_dir: DataDirOption = None,
    teacher_input: Annotated[
        str | None, typer.Option("--input", metavar="C,H,W", help="What it was made for, where it does not say itself.")
    ] = None,
    eps: EpsOption = None,
    norm: NormOption = None,
    preset: Annotated[str, typer.Option("--preset", help="Attacks, as for `crdnd evaluate`.")] = "quick",
    n: Annotated[int, typer.Option("--n", min=1, help="At most so many validation images under attack.")] = 500,
    json: JsonOption = False,
) -> None:
    """Measure a teacher on validation images: natural accuracy, and what stands under the student's threat model.

    A teacher at chance level is refused with the likely cause, as `crdnd distill` would. Data are those that it was
    trained on, unless given; with --eps it is attacked too. Test images are not looked at.

    Examples:

        crdnd check-teacher runs/teacher --eps 0.1

        crdnd check-teacher mypackage.nets:wide --weights wide.pt --data cifar10 --eps 8/255 --json
    """
    from crdnd.config import build
    from crdnd.data import load_data
    from crdnd.engine import check_model, measure_teacher, some_images
    from crdnd.evaluation import Label, evaluate, processes
    from crdnd.evaluation import preset as preset_of
    from crdnd.models import adapted, device_of, input_shape, resolve_model, weights_sha256
    from crdnd.threat import ThreatModel

    attacked = None
    if eps is not None or norm is not None:
        attacked = build(ThreatModel, given(eps=eps, norm=norm), where="threat")
    plan = preset_of(preset)
    network = resolve_model(teacher, weights).to(processes().device)
    card = card_of(teacher, weights)
    name = data or (card.data if card else "") or "digits"
    split_seed = card.split_seed if card and was_trained_on(card, name) else 0
    wanted = _shape(teacher_input)
    images = load_data(name, split_seed, model_shape=input_shape(network) or wanted).validation
    channels, height, width = images.shape
    seen = adapted(network, (channels, height, width), wanted, "teacher")
    check_model(seen, images, "teacher")
    images = images.to(device_of(network))
    found = measure_teacher(seen, images)
    results = None
    if attacked is not None:
        results = evaluate(
            seen,
            images.subset(some_images(images, n)),
            threat=attacked,
            attacks=plan.attacks,
            checks=plan.checks,
            split="validation",
            label=Label(card.method if card and card.method else teacher, "teacher"),
        )
    if json:
        print_json(
            {
                "schema": SCHEMA,
                "teacher": teacher,
                "model_sha256": weights_sha256(network),
                "data": name,
                **found.model_dump(mode="json"),
                "results": results.model_dump(mode="json", by_alias=True) if results else None,
                "verdict": _verdict(found, results),
            }
        )
        return
    print(found)
    if results is not None:
        from rich.console import Console

        from crdnd.report.table import results_table

        Console(highlight=False).print(results_table(results))
    print(f"verdict: {_verdict(found, results)}")


def _shape(text: str | None) -> Any:
    """`3,32,32` as a shape."""
    from crdnd.errors import InputError

    if text is None:
        return None
    parts = text.split(",")
    if len(parts) != 3 or not all(part.strip().isdecimal() and int(part) for part in parts):
        raise InputError(f"--input {text}: write it as C,H,W, such as 3,32,32.")
    return tuple(int(part) for part in parts)


def _verdict(found: "TeacherCheck", results: "Results | None") -> str:
    """What the numbers say of it as a robust teacher, in one line."""
    if found.warning:
        return found.warning
    if results is None:
        return "it knows the data; give --eps to see what stands under attack"
    row = results.rows[0]
    threat = f"{results.protocol.norm} eps {results.protocol.eps:.4g}"
    stands = f"{row.worst_case.percent:.1f}% stand under {', '.join(row.attacks)} at {threat}"
    if row.worst_case.interval()[0] <= 100 * (found.chance or 0):
        return f"{stands}: it is not robust under this threat model, and its students will hardly be"
    return f"{stands}: {row.verdict or 'usable as a robust teacher'}"
