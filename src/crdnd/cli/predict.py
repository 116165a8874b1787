"""`crdnd predict`."""

import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from crdnd.cli._common import MODEL_FORMS, JsonOption, NormOption, WeightsOption, described, print_json
from crdnd.errors import InputError, first_line

if TYPE_CHECKING:
    from torch import Tensor, nn

    from crdnd.threat import ThreatModel

SCHEMA = "crdnd.predictions/1"
BATCH = 64
FURTHER = 4
"""How many times the model's own eps the search for an adversarial image goes, unless --up-to says how far."""
UP_TO: dict[str, float] = {"linf": 32 / 255, "l2": 2.0}
"""Likewise, for a model that does not say what it was trained to withstand."""


def predict_command(
    model: Annotated[str, typer.Argument(metavar="MODEL", help=MODEL_FORMS)],
    images: Annotated[list[str], typer.Argument(metavar="IMAGE...", help="Images, or folders of them.")],
    weights: WeightsOption = None,
    top: Annotated[int, typer.Option("--top", min=1, help="Show the K most likely classes.", metavar="K")] = 1,
    distance: Annotated[
        bool, typer.Option("--distance", help="Also look for the nearest adversarial image; takes a while.")
    ] = False,
    up_to: Annotated[
        str | None,
        typer.Option("--up-to", metavar="EPS", help="How far --distance looks; 4 times the model's own eps."),
    ] = None,
    norm: NormOption = None,
    json: JsonOption = False,
) -> None:
    """Say what a model sees in images, of any size and kind: the class and its probability.

    Images are brought to the model's size as in training. A file that cannot be read is named and skipped, and the exit
    status is then 2.

    --distance looks for the smallest change of an image that makes the model say another class. What it shows is the
    size of the smallest one that was found, so an upper bound: there may be a smaller one, and "none found" is no proof
    that there is none.

    Examples:

        crdnd predict runs/student cat.jpg dog.png

        crdnd predict runs/student photos/new --top 3 --json

        crdnd predict student.onnx cat.jpg --distance --up-to 16/255
    """
    from crdnd.config import build
    from crdnd.evaluation import nearest_adversarial, predict, processes
    from crdnd.models import input_shape, resolve_model, weights_sha256
    from crdnd.threat import ThreatModel

    network = resolve_model(model, weights).to(processes().device)
    card = described(network, model, weights)
    search = None
    if distance:
        search = build(ThreatModel, _search(card.threat, norm, up_to), where="distance")
    elif norm is not None or up_to is not None:
        raise InputError(f"{'norm' if up_to is None else 'up_to'}: belongs to --distance; give that too.")
    files, unreadable = _expanded(images)
    shape = input_shape(network)
    shown: list[dict[str, Any]] = []
    for start in range(0, len(files), BATCH if shape else 1):
        readable, x = _read(files[start : start + (BATCH if shape else 1)], network, shape, unreadable)
        if x is None:
            continue
        x = x.to(processes().device)
        try:
            probabilities = predict(network, x).probabilities.cpu()
        except (RuntimeError, ValueError, TypeError, IndexError) as error:
            raise InputError(
                f"{model}: cannot process images of shape {tuple(x.shape[1:])}: {first_line(error)}"
            ) from None
        if not bool(probabilities.isfinite().all()):
            raise InputError(f"{model}: returns NaN or infinite logits for {readable[0]}.")
        found = [None] * len(readable)
        if search is not None:
            found = nearest_adversarial(network, x, norm=search.norm, bound=search.eps).tolist()
        for file, row, eps in zip(readable, probabilities, found, strict=True):
            entry: dict[str, Any] = {"file": str(file), "classes": _most_likely(row, card.class_names, top)}
            if search is not None:
                eps = eps if eps is not None and math.isfinite(eps) else None
                entry["distance"] = {"norm": search.norm, "eps": eps, "up_to": search.eps}
            shown.append(entry)
    for problem in unreadable:
        print(f"skipped: {problem}", file=sys.stderr)
    if json:
        document = {"schema": SCHEMA, "model": model, "model_sha256": weights_sha256(network)}
        print_json({**document, "images": shown, "unreadable": unreadable})
    elif shown:
        _print(shown)
    if unreadable:
        raise typer.Exit(2)


def _search(threat: "ThreatModel | None", norm: str | None, up_to: str | None) -> dict[str, Any]:
    """Norm and bound of the search: those given, else by the model's own threat model."""
    chosen = norm or (threat.norm if threat else "linf")
    if up_to is not None:
        return {"norm": chosen, "eps": up_to}
    if threat and threat.norm == chosen and threat.eps > 0:
        eps = FURTHER * threat.eps
        return {"norm": chosen, "eps": min(eps, 0.99) if chosen == "linf" else eps}
    return {"norm": chosen, "eps": UP_TO.get(chosen, 0.0)}


def _expanded(images: Sequence[str]) -> tuple[list[Path], list[str]]:
    """The files, folders resolved to the images in them; and what cannot be read of it, with the reason."""
    from crdnd.data import image_files

    files: list[Path] = []
    problems: list[str] = []
    for name in images:
        path = Path(name)
        inside = list(image_files(path)) if path.is_dir() else [path]
        if not inside:
            problems.append(f"{name}: this folder holds no images.")
        files += inside
    return files, problems


def _read(
    files: Sequence[Path], network: "nn.Module", shape: tuple[int, int, int] | None, problems: list[str]
) -> "tuple[list[Path], Tensor | None]":
    """The images that can be read, (B, C, H, W) in [0, 1], and their files; what is wrong with others is appended."""
    from crdnd.data import read_image, stacked

    size = shape[1:] if shape else None
    channels = shape[0] if shape else getattr(network, "channels", None)
    readable: list[Path] = []
    arrays: list[Any] = []
    for file in files:
        try:
            arrays.append(read_image(file, size, channels))
        except InputError as error:
            problems.append(str(error))
        else:
            readable.append(file)
    return readable, stacked(arrays, readable).float() / 255 if readable else None


def _most_likely(probabilities: "Tensor", names: Sequence[str], top: int) -> list[dict[str, Any]]:
    values, labels = probabilities.topk(min(top, len(probabilities)))
    return [
        {"class": names[label] if label < len(names) else str(label), "probability": value}
        for label, value in zip(labels.tolist(), values.tolist(), strict=True)
    ]


def _print(shown: list[dict[str, Any]]) -> None:
    from rich import box
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    searched = "distance" in shown[0]
    table = Table(
        "image", "class", "probability", *(["nearest adversarial image"] if searched else []), box=box.SIMPLE_HEAD
    )
    for entry in shown:
        for number, found in enumerate(entry["classes"]):
            cells = [escape(entry["file"]) if number == 0 else "", escape(found["class"])]
            cells.append(f"{100 * found['probability']:.1f}%")
            if searched:
                cells.append(_distance(entry["distance"]) if number == 0 else "")
            table.add_row(*cells)
    Console(highlight=False).print(table)


def _distance(found: dict[str, Any]) -> str:
    def shown(eps: float) -> str:
        return f"{eps:.4f} ({255 * eps:.1f}/255)" if found["norm"] == "linf" else f"{eps:.3g}"

    if found["eps"] is None:
        return f"none found up to {found['norm']} {shown(found['up_to'])}"
    return f"{found['norm']} {shown(found['eps'])}"
