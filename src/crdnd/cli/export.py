"""`crdnd export`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from crdnd.cli._common import (
    MODEL_FORMS,
    DataDirOption,
    DataOption,
    EpsOption,
    JsonOption,
    NormOption,
    SeedOption,
    WeightsOption,
    described,
    fill_from_card,
    given,
    is_at_hand,
    print_json,
    showing_attacks,
)
from crdnd.cli._runs import first

if TYPE_CHECKING:
    from crdnd.data import Splits
    from crdnd.export.run import Format

MEASURED = 1000


def export_command(
    model: Annotated[str, typer.Argument(metavar="MODEL", help=MODEL_FORMS)],
    to: Annotated[str, typer.Option("--to", help="onnx, program (torch.export), or int8 (ONNX, quantised).")],
    out: Annotated[Path, typer.Option("--out", help="The file: .onnx, for a program .pt2. FILE.json lies beside it.")],
    weights: WeightsOption = None,
    data: DataOption = None,
    data_dir: DataDirOption = None,
    n: Annotated[
        int | None, typer.Option("--n", min=1, help=f"Measure on the first N images; else at most {MEASURED}.")
    ] = None,
    preset: Annotated[str, typer.Option("--preset", help="Attacks, as for `crdnd evaluate`.")] = "quick",
    square_queries: Annotated[
        int, typer.Option("--square-queries", min=1, help="Queries of Square on the file itself.")
    ] = 500,
    calibration: Annotated[
        int, typer.Option("--calibration", min=1, help="For int8: at most so many training images.")
    ] = 512,
    eps: EpsOption = None,
    norm: NormOption = None,
    seed: SeedOption = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Write over FILE.")] = False,
    json: JsonOption = False,
) -> None:
    """Write a model to a file that predicts without this package, and measure that file under attack again.

    Resize and normalisation are in the file; its input `images` takes any number of images of any size in [0, 1]. It
    is refused unless its logits are those of the model. Data and threat model are those that the model was trained
    for, unless given.

    Examples:

        crdnd export runs/student --to onnx --out student.onnx

        crdnd export runs/student --to int8 --out student-int8.onnx --preset standard --square-queries 5000

        crdnd export mypackage.nets:small --weights small.pt --data images.npz --eps 8/255 --to program --out small.pt2
    """
    from crdnd.config import Frozen, build
    from crdnd.data import load_data, load_test, with_classes
    from crdnd.evaluation import preset as preset_of
    from crdnd.evaluation import processes
    from crdnd.export import check_target, export_model
    from crdnd.models import device_of, input_shape, resolve_model
    from crdnd.threat import ThreatModel

    class Settings(Frozen):
        """What is measured, and how."""

        data: str
        split_seed: int = 0
        threat: ThreatModel
        seed: int = 0

    check_target(out, cast("Format", to), fresh=fresh)
    plan = preset_of(preset)
    network = resolve_model(model, weights).to(processes().device)
    card = described(network, model, weights)
    values = given(data=data, threat__eps=eps, threat__norm=norm, seed=seed)
    fill_from_card(values, card)
    settings = build(Settings, values)
    shape = input_shape(network)
    splits: Splits | None = None
    if to == "int8" or data is None:
        trained_on = card.data if is_at_hand(card.data) else settings.data
        splits = load_data(trained_on, settings.split_seed, model_shape=shape)
    if splits is not None and data is None:
        measured, split = (splits.test, "test") if splits.test else (splits.validation, "validation")
    else:
        measured, split = load_test(settings.data, settings.split_seed, model_shape=shape), "test"
    if card.class_names:
        measured = with_classes(measured, card.class_names)
    measured = first(measured, n or min(MEASURED, len(measured)), settings.data)
    place = Path(model)
    with showing_attacks() as listener:
        export = export_model(
            network,
            out,
            cast("Format", to),
            data=measured.to(device_of(network)),
            threat=settings.threat,
            attacks=plan.attacks,
            training_data=splits.train if splits else None,
            calibration_images=calibration,
            square_queries=square_queries,
            seed=settings.seed,
            split=split,
            class_names=card.class_names,
            source=model,
            folder=place if weights is None and place.is_dir() else None,
            fresh=fresh,
            listener=listener,
        )
    if json:
        print_json(export.to_json().rstrip())
        return
    from rich.console import Console

    from crdnd.report.exported import export_table

    console = Console(highlight=False)
    console.print(export_table(export))
    console.print(f"{out} takes `{export.input}` and returns `{export.output}`; measured in {out}.json", soft_wrap=True)
