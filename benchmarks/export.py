"""Exported files beside the model: torch's eager mode, ONNX Runtime in float32 and in int8, on one CPU.

Networks have random weights and batch norms with statistics of images; images are random, 32 x 32. Files are made by
`crdnd.export.export_model`, so each was compared with its model on 1,000 inputs first. A job is one call at batch 64,
or so many calls at batch 1 that they take about as long; all three run in turns in one process, on `--threads` threads
each. ONNX Runtime gets numpy arrays, as its users call it.

`ratio` is the smallest, over networks and batches, of two shares of what is wanted: eager's time over that of ONNX
Runtime's float32 (1.0 is wanted), and eager's over int8's (1.5 is wanted). So 1 and more says that all of it is met.
Printing is described in _pairs.py.
"""

import argparse
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import onnxruntime
import torch
from _pairs import Job, Timing, finish, interleaved, machine, parser, progress, ratio, table
from torch import Tensor, nn

from crdnd.data import ImageData
from crdnd.export import Export, export_model
from crdnd.models import create_model
from crdnd.threat import ThreatModel

SHAPE, CLASSES = (3, 32, 32), 10
BATCHES = (1, 64)
TARGETS = {"onnx": 1.0, "int8": 1.5}
CALLS = 32
"""At batch 1 in one job."""


def task(name: str, seed: int) -> tuple[nn.Module, ImageData]:
    """A network in eval mode, and images with the classes that it sees in them."""
    draws = torch.Generator().manual_seed(seed)
    mean, std = [0.49, 0.48, 0.45], [0.25, 0.24, 0.26]
    model = create_model(name, input_shape=SHAPE, num_classes=CLASSES, mean=mean, std=std, seed=seed).train()
    with torch.no_grad():
        for _ in range(10):
            model(torch.rand(16, *SHAPE, generator=draws))
        x = torch.rand(128, *SHAPE, generator=draws)
        return model.eval(), ImageData(x, model.eval()(x).argmax(1), num_classes=CLASSES, name="random")


def written(model: nn.Module, data: ImageData, to: Any, folder: Path) -> tuple[Path, Export]:
    """The file and what its export says; the attacks are as short as they can be."""
    out = folder / f"{to}.onnx"
    export = export_model(
        model, out, to, data=data.subset(torch.arange(8)), threat=ThreatModel(norm="linf", eps=8 / 255),
        attacks=["fgsm"], square_queries=1, training_data=data, fresh=True,
    )  # fmt: skip
    return out, export


def eager(model: nn.Module, x: Tensor, calls: int) -> None:
    """Calls of the model."""
    with torch.no_grad():
        for _ in range(calls):
            model(x)


def runtime(session: onnxruntime.InferenceSession, x: Any, calls: int) -> None:
    """Calls of a file."""
    for _ in range(calls):
        session.run(["logits"], {"images": x})


def session(file: Path, threads: int) -> onnxruntime.InferenceSession:
    """A file as ONNX Runtime's users open it, on so many threads."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    return onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])


def main() -> None:
    """Measure, then print."""
    options = arguments()
    torch.set_num_threads(options.threads)
    found: dict[str, dict[str, Any]] = {}
    rows: list[tuple[object, ...]] = [("network", "batch", "what", "median (min to max)", "over eager", "wanted")]
    shares: list[float] = []
    with tempfile.TemporaryDirectory() as temporary:
        for name in options.model:
            progress(f"exporting {name}")
            model, data = task(name, options.seed)
            files = {to: written(model, data, to, Path(temporary)) for to in TARGETS}
            sessions = {to: session(file, options.threads) for to, (file, _) in files.items()}
            for batch in BATCHES:
                x, calls = data.x[:batch].contiguous(), CALLS if batch == 1 else 1
                jobs: dict[str, Job] = {"eager": partial(eager, model, x, calls)}
                jobs |= {to: partial(runtime, one, x.numpy(), calls) for to, one in sessions.items()}
                timings = interleaved(jobs, repeats=options.repeats, warm_up=options.warm_up)
                ratios = {to: ratio(timings["eager"], timings[to]) for to in TARGETS}
                shares += [ratios[to] / wanted for to, wanted in TARGETS.items()]
                found[f"{name}, batch {batch}"] = {"seconds": timings, "calls": calls, "ratios": ratios}
                rows += [line(name, batch, what, timing, ratios) for what, timing in timings.items()]
            found[f"{name}, files"] = {
                to: {"bytes": export.size_bytes, "largest_difference": export.equality.largest_difference}
                for to, (_, export) in files.items()
            }
    facts = machine("cpu") | {"onnxruntime": onnxruntime.__version__}
    document = {"benchmark": "export", "machine": facts, "targets": TARGETS, "found": found}
    lines = [", ".join(f"{key} {fact}" for key, fact in facts.items()), *table(rows)]
    finish(document, lines, min(shares), as_json=options.json)


def line(name: str, batch: int, what: str, timing: Timing, ratios: dict[str, float]) -> tuple[object, ...]:
    """A row of the table."""
    if what == "eager":
        return name, batch, what, timing, "", ""
    verdict = "met" if ratios[what] >= TARGETS[what] else "missed"
    return name, batch, what, timing, f"{ratios[what]:.2f}", f"{TARGETS[what]} {verdict}"


def arguments() -> argparse.Namespace:
    """What the command line says."""
    result = parser(__doc__, repeats=15)
    result.add_argument("--model", nargs="+", default=["mobilenet_v2", "resnet18"], help="default %(default)s")
    result.add_argument("--seed", type=int, default=0, help="of weights and images (default %(default)s)")
    return result.parse_args()


if __name__ == "__main__":
    main()
