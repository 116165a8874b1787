"""Is our AutoAttack as strong as the official one? Robust accuracy side by side on four models.

A linear model whose robust accuracy has a closed form, a robust and a natural student of the demo (`crdnd demo` first),
and a small network trained for this on CIFAR-10 (`--cifar FOLDER` with its binary files; left out without). The
official implementation runs with five seeds, ours with one: ours must not be above the lowest of theirs by more than
one image or their own range, whichever is larger. Writes `results/reference.json`.

    python studies/reference.py --demo runs/demo --cifar cifar-10-batches-bin
"""

import argparse
import json
import logging
import time
from pathlib import Path
from typing import Any

import torch
from pyautoattack import AutoAttack
from torch import Tensor, nn

from crdnd import ImageData, ThreatModel, create_model, evaluate, load_data, load_model, train
from crdnd.data import Splits, read_images
from crdnd.io import atomic_write_text
from crdnd.provenance import commit, package_versions

ROOT = Path(__file__).parents[1]
SEEDS = 5
NORMS = {"linf": "Linf", "l2": "L2"}


class Linear(nn.Module):
    """Ten logits that are linear in the pixels: the distance to each rival's hyperplane is known."""

    def __init__(self, data: ImageData) -> None:
        super().__init__()
        self.layer = nn.Linear(data.x[0].numel(), data.num_classes)
        optimizer = torch.optim.LBFGS(self.parameters(), max_iter=100)

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(self(data.x), data.y) + 1e-3 * self.layer.weight.square().sum()
            loss.backward()
            return loss

        optimizer.step(closure)  # pyright: ignore[reportArgumentType]

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        return self.layer(x.flatten(1))

    def stands(self, data: ImageData, eps: float) -> int:
        """How many images no perturbation within linf eps and the box can make lose to any one rival."""
        with torch.no_grad():
            x, weight, logits = data.x.flatten(1).double(), self.layer.weight.double(), self(data.x).double()
        up, down = (1 - x).clamp(max=eps), x.clamp(max=eps)
        stands = torch.ones(len(x), dtype=torch.bool)
        for rival in range(data.num_classes):
            slope = weight[rival] - weight[data.y]
            lead = logits[:, rival] - logits.gather(1, data.y[:, None])[:, 0]
            best = lead + (slope.clamp(min=0) * up - slope.clamp(max=0) * down).sum(1)
            stands &= (best < 0) | (data.y == rival)
        return int(stands.sum())


def official(model: nn.Module, data: ImageData, threat: ThreatModel, seed: int) -> int:
    """How many images stand under the official implementation."""
    attack = AutoAttack(model, device="cpu", eps=threat.eps, norm=NORMS[threat.norm], seed=seed, version="standard")
    x_adv, _ = attack.run_standard_evaluation(data.x, data.y, batch_size=256)
    with torch.no_grad():
        return int((model(x_adv).argmax(1) == data.y).sum())


def side_by_side(name: str, model: nn.Module, data: ImageData, threat: ThreatModel) -> dict[str, Any]:
    """Ours once, theirs with five seeds."""
    began = time.monotonic()
    row = evaluate(model, data, threat=threat, attacks=["autoattack"]).rows[0]
    model.eval()
    theirs = [official(model, data, threat, seed) for seed in range(SEEDS)]
    allowed = min(theirs) + max(1, max(theirs) - min(theirs))
    ours = row.worst_case.correct
    print(
        f"{name}, {threat}: ours {ours}, theirs {theirs} of {len(data)}, {time.monotonic() - began:.0f} s", flush=True
    )
    return {
        "model": name, "norm": threat.norm, "eps": threat.eps, "n": len(data), "clean": row.clean.correct,
        "ours": ours, "official": theirs, "allowed": allowed, "met": ours <= allowed, "model_sha256": row.model_sha256,
        "after_each_part": {
            part.removeprefix("autoattack/"): verdicts.count("1")
            for part, verdicts in row.verdicts.items() if "/" in part
        },
    }  # fmt: skip


def cifar_network(folder: Path, out: Path) -> tuple[nn.Module, ImageData]:
    """A small network after a short adversarial training on 4,000 images of CIFAR-10, and 100 test images."""
    whole = read_images(folder / "data_batch_1.bin")
    x, y = whole.batch(torch.arange(4500))
    parts = [ImageData(x[part], y[part], 10, name="cifar10") for part in (slice(0, 4000), slice(4000, 4500))]
    model = create_model("cnn", input_shape=(3, 32, 32), num_classes=10, width=8)
    run = train(
        model, Splits(parts[0], parts[1]), objective="pgd_at", threat=ThreatModel(eps="4/255"),
        attack={"steps": 3, "step": 0.5}, epochs=8, out=out,
    )  # fmt: skip
    test = read_images(folder)
    x, y = test.batch(torch.arange(100))
    return run.model, ImageData(x, y, 10, name="cifar10")


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo", type=Path, default=Path("runs/demo"), help="folder of the demo's runs")
    parser.add_argument("--cifar", type=Path, help="folder of CIFAR-10's binary files")
    parser.add_argument("--out", type=Path, default=Path("runs/reference"))
    parser.add_argument("--results", type=Path, default=ROOT / "results" / "reference.json")
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    splits = load_data("digits")
    test = splits.test
    assert test is not None  # noqa: S101
    torch.manual_seed(0)
    linear, small = Linear(splits.train).eval(), ThreatModel(eps=0.03)
    entries: list[dict[str, Any]] = []

    def add(entry: dict[str, Any]) -> None:
        """Keep what was measured, also if the rest never comes."""
        entries.append(entry)
        document = {
            "schema": "crdnd.study/1", "study": "reference", "command": "python studies/reference.py",
            "versions": package_versions(), "commit": commit(), "seeds": SEEDS, "entries": entries,
        }  # fmt: skip
        atomic_write_text(options.results, json.dumps(document, indent=1) + "\n")

    add(side_by_side("linear, digits", linear, test, small) | {"closed_form": linear.stands(test, small.eps)})
    for norm, eps, cifar_eps in (("linf", 0.1, "4/255"), ("l2", 0.5, 0.25)):
        threat = ThreatModel(norm=norm, eps=eps)
        add(side_by_side("natural, digits", load_model(options.demo / "natural"), test, threat))
        if options.cifar is not None:
            network, images = cifar_network(options.cifar, options.out / "cifar")
            add(side_by_side("cnn of width 8, CIFAR-10", network, images, ThreatModel(norm=norm, eps=cifar_eps)))
        add(side_by_side("ard, digits", load_model(options.demo / "ard"), test, threat))


if __name__ == "__main__":
    main()
