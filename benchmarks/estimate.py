"""How well `crdnd estimate` predicts: its seconds of an epoch over those that the epoch then takes.

Two runs are estimated and then made: RSLAD on the digits with the small CNN, and adversarial training of a narrow
ResNet-18 on made-up 32x32 images with one attack step. Both need only a few seconds an epoch. Estimate and epochs take
turns, because a shared machine drifts.

`ratio` is the worse of the two: predicted over measured, 0.8 to 1.2 is wanted. Printing is described in _pairs.py.
"""

import argparse
import statistics
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from _pairs import finish, machine, parser, progress, table

from crdnd import create_model, distill, load_data, train
from crdnd.data import ImageData, Splits
from crdnd.engine import estimate
from crdnd.random import Stream

IMAGES = 640
DIGITS: dict[str, Any] = {
    "objective": "rslad", "threat": {"eps": 0.1}, "augmentation": "shift", "epochs": 4, "validate_every": 4,
}  # fmt: skip
RESNET: dict[str, Any] = {
    "objective": "pgd_at", "threat": {"eps": "8/255"}, "attack": {"steps": 1}, "augmentation": "crop_flip",
    "batch_size": 64, "epochs": 2, "validate_every": 2,
}  # fmt: skip


def made_up() -> Splits:
    """Images of CIFAR-10's shape."""
    ids = torch.arange(IMAGES)
    pixels = Stream.of("benchmark", ids=ids).integers(0, 256, (3, 32, 32)).to(torch.uint8)
    whole = ImageData(pixels, ids % 10, 10, name="made up")
    return Splits(whole, whole.subset(torch.arange(64)))


def pair(name: str, turn: int) -> dict[str, float]:
    """Predicted and measured seconds of an epoch, and their ratio."""
    splits, settings = (load_data("digits"), DIGITS) if name == "digits" else (made_up(), RESNET)
    shape: dict[str, Any] = {"input_shape": splits.train.shape, "num_classes": 10}

    def student() -> torch.nn.Module:
        if name == "digits":
            return create_model("cnn", width=8, seed=turn, **shape)
        return create_model("resnet18", width=8, seed=turn, **shape)

    teacher = create_model("cnn", width=32, seed=1, **shape) if name == "digits" else None
    found = estimate(student(), splits, teachers=[teacher] if teacher else [], **settings)
    with TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        if teacher:
            run = distill(
                student(), splits, teacher=teacher, out=out, check_teacher=False, **settings
            )  # its weights are random
        else:
            run = train(student(), splits, out=out, **settings)
    measured = statistics.mean(epoch.seconds for epoch in run.history)
    return {"predicted": found.epoch_seconds, "measured": measured, "ratio": found.epoch_seconds / measured}


def main(options: argparse.Namespace) -> None:
    """Estimate, run, compare."""
    torch.set_num_threads(options.threads)
    found: dict[str, list[dict[str, float]]] = {"digits": [], "resnet18": []}
    for turn in range(options.repeats):
        progress(f"round {turn + 1} of {options.repeats}")
        for name, pairs in found.items():
            pairs.append(pair(name, turn))
    medians = {name: statistics.median(one["ratio"] for one in pairs) for name, pairs in found.items()}
    rows = [["run", "predicted", "measured", "predicted / measured"]]
    for name, pairs in found.items():
        predicted, measured = (statistics.median(one[key] for one in pairs) for key in ("predicted", "measured"))
        spread = f"{min(one['ratio'] for one in pairs):.2f} to {max(one['ratio'] for one in pairs):.2f}"
        rows.append([name, f"{predicted:.3f} s", f"{measured:.3f} s", f"{medians[name]:.2f} ({spread})"])
    worst = max(medians.values(), key=lambda value: abs(value - 1))
    document = {"machine": machine("cpu"), "pairs": found, "median_ratios": medians}
    finish(document, table(rows), worst, as_json=options.json)


if __name__ == "__main__":
    main(parser(__doc__, repeats=5).parse_args())
