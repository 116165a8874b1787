"""From a model to a file that predicts elsewhere: traced, compared with the model, measured, and put on record."""

import copy
import io
import json
import logging
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import nn

from crdnd.data import ImageData, stratified
from crdnd.engine import check_model
from crdnd.errors import InputError, RunError
from crdnd.evaluation import Listener, choose_attacks, evaluate
from crdnd.export._int8 import quantised, twin_of
from crdnd.export._measured import Verdicts, largest_difference, latencies, measured_of, probe
from crdnd.export._onnx import check_packages, joined, onnx_graph
from crdnd.export._program import EXAMPLES, INPUT, OUTPUT, Shape, Whole, folded, traced
from crdnd.export.document import Cost, Equality, Export, Quantisation, Share, remember
from crdnd.io import atomic_write_bytes, atomic_write_text, cannot_write, make_folder, sha256
from crdnd.models import About, adapted, fitted, has_gradients, input_shape, resolve_model, weights_sha256
from crdnd.provenance import command, commit, installed_version, package_versions
from crdnd.threat import ThreatModel

log = logging.getLogger("crdnd")

Format = Literal["onnx", "program", "int8"]
FORMATS: dict[Format, str] = {"onnx": ".onnx", "program": ".pt2", "int8": ".onnx"}
"""What a model becomes, and how the file's name ends."""
TOLERANCE = 1e-4
CALIBRATION = 512


def export_model(
    model: nn.Module,
    out: str | Path,
    to: Format,
    *,
    data: ImageData,
    threat: ThreatModel,
    attacks: Sequence[str] | Mapping[str, Any],
    training_data: ImageData | None = None,
    calibration_images: int = CALIBRATION,
    square_queries: int = 500,
    seed: int = 0,
    split: str = "test",
    class_names: tuple[str, ...] = (),
    source: str = "",
    folder: Path | None = None,
    fresh: bool = False,
    listener: Listener | None = None,
) -> Export:
    """Write a model to a file of one input `images` in [0, 1], any number and size, and measure that file.

    The file holds the resize (`crdnd.models.fitted`) and the normalisation. It is written only if its logits, before
    they are quantised, are those of the model. Then natural and robust accuracy are measured on the file itself: what
    the attacks find on the model is tried on it, Square attacks it directly, and for int8 the same attacks run on a
    dequantised twin with gradients. All that is kept in `<out>.json`.

    Args:
        model: images (B, C, H, W) in [0, 1] -> logits (B, K), with gradients; in float32.
        out: the file; its name ends as `FORMATS` says.
        to: `onnx`, `program` (torch.export) or `int8` (ONNX, quantised).
        data: what is measured on.
        threat: the adversary.
        attacks: white-box attacks, as for `evaluate`.
        training_data: for int8, where calibration images are taken from, stratified.
        calibration_images: how many, at most.
        square_queries: of Square on the file and on the model.
        seed: of the attacks' draws, of the calibration images and of the inputs that are compared.
        split: what the document calls this part of the data.
        class_names: of the logits; by default those of the data.
        source: what the document calls the model.
        folder: a model folder that remembers the export in `exports.json`; where it cannot, that is warned of.
        fresh: write over a file that is there.
        listener: told how far the attacks are.

    Raises:
        InputError: something handed in cannot be used, a package is missing, `out` cannot be written, or the file
            would not be equal to the model within 1e-4 on 1,000 inputs; nothing is written then.
    """
    out = Path(out)
    check_target(out, to, fresh=fresh)
    if not has_gradients(model):
        raise InputError("export: the model is an ONNX file without gradients; export the model it was made from.")
    if to == "int8" and training_data is None:
        raise InputError("export: int8 needs training data to calibrate with; give training_data.")
    device, (channels, height, width) = data.device, data.shape
    shape = input_shape(model) or (getattr(model, "channels", None) or channels, height, width)
    if channels != shape[0]:
        raise InputError(
            f"data: the images have {channels} channels, the file would take {shape[0]}; give such images."
        )
    seen = adapted(model, (channels, height, width), what="export")
    check_model(seen, data, "export")
    plan = choose_attacks(attacks)
    eager = copy.deepcopy(model).to("cpu").eval()
    identity = weights_sha256(model)
    names = class_names or data.class_names
    about = About(class_names=names, threat=threat, input_shape=shape, source_sha256=identity).metadata()

    x = probe(data, shape, seed)
    twin: nn.Module | None = None
    calibrated = 0
    with tempfile.TemporaryDirectory(prefix="crdnd-") as temporary:
        place = Path(temporary)
        if to == "program":
            content = _program(eager, shape, about)
            difference = _equal(eager, _opened(place / "program.pt2", content), x)
        else:
            graph = folded(traced(eager, shape, any_size=False), shape)
            core = onnx_graph(graph)
            content = joined(core, shape, about).SerializeToString()
            difference = _equal(eager, _opened(place / "float32.onnx", content), x)
            if to == "int8":
                images = _calibration(cast("ImageData", training_data), calibration_images, seed, shape)
                calibrated = len(images)
                small = quantised(core, images, place)
                content = joined(small, shape, about).SerializeToString()
                twin = twin_of(graph, core, small, images[:EXAMPLES])
                twin = adapted(twin, (channels, height, width), shape, "twin").to(device)
        file = _opened(place / out.name, content).to(device)

    verdicts, square = Verdicts(file, data), choose_attacks({"square": {"queries": square_queries}})["square"]
    on_model = evaluate(
        seen, data, threat=threat, attacks={**verdicts.shown(plan), "square": square}, seed=seed, listener=listener
    )
    verdicts.attacked(threat, square, plan, twin, seed, listener)
    (row,) = on_model.rows
    quantisation = None
    if to == "int8":
        agreeing, furthest = _agreement(seen, file, data)
        quantisation = Quantisation(
            calibration_images=calibrated, calibration_data=cast("ImageData", training_data).name,
            agreeing=agreeing, largest_difference=furthest,
        )  # fmt: skip
    export = Export(
        file=out.name, format=to, sha256=sha256(content), size_bytes=len(content), source=source,
        source_sha256=identity, input=INPUT, output=OUTPUT, input_shape=shape, class_names=names,
        equality=Equality(inputs=len(x), tolerance=TOLERANCE, largest_difference=difference),
        quantisation=quantisation, threat=threat, data=data.name, data_sha256=data.sha256, split=split, n=len(data),
        seed=seed, preset={name: attack.settings() for name, attack in plan.items()}, square_queries=square_queries,
        accuracy=verdicts.measured(), model_accuracy=measured_of(row),
        cost_clean=Cost.of(verdicts.text("clean"), row.verdicts["clean"]),
        cost_worst_case=Cost.of(verdicts.text("worst_case"), row.stands()),
        latency=latencies(eager, file.cpu(), x), versions=_versions(), commit=commit(), command=command(),
    )  # fmt: skip
    document = _document_of(out)
    try:
        document.unlink(missing_ok=True)  # it is about the file that was there before
    except OSError as error:
        raise cannot_write(document, error) from error
    atomic_write_bytes(out, content)
    atomic_write_text(document, export.to_json())
    if folder is not None:
        try:
            remember(folder, export)
        except (InputError, RunError) as error:  # somebody else's model, perhaps; what was measured is not lost to it
            log.warning("%s is complete, but the model's folder cannot remember it: %s", out, error)
    return export


def check_target(out: Path, to: Format, *, fresh: bool = False) -> None:
    """What can be known of an export before model and data are read.

    Raises:
        InputError: there is no such format, the name does not end as its files do, a package is missing, the place
            cannot be written, or the file is there already.
    """
    if to not in FORMATS:
        raise InputError(f"to: must be one of {', '.join(FORMATS)}, got {to!r}.")
    if out.suffix != FORMATS[to]:
        raise InputError(f"out: a file of the format {to} ends in {FORMATS[to]}, got {out.name}.")
    if to != "program":
        check_packages()
    make_folder(out.parent)
    try:
        with tempfile.TemporaryFile(dir=out.parent):
            pass
    except OSError as error:
        raise cannot_write(out, error) from error
    if out.is_dir():
        raise InputError(f"out: {out} is a folder; name a file.")
    if _document_of(out).is_dir():
        raise InputError(f"out: {_document_of(out)} is a folder; choose another --out.")
    if out.exists() and not fresh:
        raise InputError(f"out: {out} is there already; use --fresh to write over it, or choose another --out.")


def _document_of(out: Path) -> Path:
    """Where what was measured of a file is kept."""
    return out.with_name(f"{out.name}.json")


def _program(model: nn.Module, shape: Shape, about: Mapping[str, str]) -> bytes:
    program = traced(Whole(model, shape), shape, any_size=True)
    content = io.BytesIO()
    torch.export.save(program, content, extra_files={"crdnd.json": json.dumps(about)})
    return content.getvalue()


def _opened(path: Path, content: bytes) -> nn.Module:
    """A file as whoever evaluates it would open it."""
    path.write_bytes(content)
    return resolve_model(str(path))


def _equal(model: nn.Module, file: nn.Module, x: torch.Tensor) -> float:
    """The largest difference of a logit, or an InputError if it is too large."""
    found = largest_difference(model, file, x)
    if not found <= TOLERANCE:
        raise InputError(
            f"export: the logits of the file differ from the model's by {found:.2g} on {len(x)} inputs, more than "
            f"{TOLERANCE:g}; nothing was written."
        )
    return found


def _calibration(data: ImageData, count: int, seed: int, shape: Shape) -> torch.Tensor:
    """At most so many images, each class in proportion, as the model takes them: (N, *shape)."""
    ids = torch.arange(len(data))
    if len(data) > count:
        ids = stratified(data.y, [count, len(data) - count], "calibration", seed)[0]
    return fitted(data.batch(ids)[0].cpu().float(), shape)


def _agreement(model: nn.Module, file: nn.Module, data: ImageData) -> tuple[Share, float]:
    """How many images get the same class, and the largest difference of a logit."""
    agreeing, furthest = 0, 0.0
    with torch.no_grad():
        for ids in torch.arange(len(data), device=data.device).split(256):
            x, _ = data.batch(ids)
            expected, found = model(x), file(x)
            agreeing += int((expected.argmax(1) == found.argmax(1)).sum())
            furthest = max(furthest, float((expected - found).abs().max()))
    return Share.of(agreeing, len(data)), furthest


def _versions() -> dict[str, str]:
    return package_versions() | {name: installed_version(name) or "missing" for name in ("onnx", "onnxruntime")}
