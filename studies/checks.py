"""Do the checks for false security (docs/checks.md) accuse the guilty and leave the honest alone?

Twenty honest models (five methods, two seeds, three widths), CRDND as published with three seeds, and models broken on
purpose, all on the digits under linf eps 0.1 with `--preset full` and the demo's teacher as the surrogate. Runs and
verdicts are kept under `--out`, so that a stopped study goes on. Writes `results/checks.json`.

    python studies/checks.py
"""

import argparse
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from crdnd import load_data
from crdnd.evaluation import PRESETS, Label, Row, evaluate
from crdnd.io import atomic_write_text
from crdnd.provenance import commit, package_versions
from crdnd.recipe import make_recipe, merge, read_yaml
from crdnd.threat import ThreatModel

ROOT = Path(__file__).parents[1]
DEMO = ROOT / "src" / "crdnd" / "cli" / "demo.yaml"
HONEST = ("pgd_at", "trades", "ard", "iad", "rslad")
VARIANTS = ((8, 0), (8, 1), (16, 0), (4, 0))
"""Width and seed."""
EPOCHS = 30


class Broken(nn.Module):
    """A good network made unattackable by gradients, or by cross-entropy, without being any more robust."""

    def __init__(self, network: nn.Module, change: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.network, self.change = network, change

    def forward(self, x: Tensor) -> Tensor:
        """Logits, spoiled."""
        return self.change(self.network, x)


def _straight_through(network: nn.Module, x: Tensor) -> Tensor:
    rounded = (x * 8).round() / 8
    return network(x + (rounded - x).detach())


def _detached_branch(network: nn.Module, x: Tensor) -> Tensor:
    return 0.1 * network(x) + 0.9 * network(x.flip(-1).flip(-1).detach())


def _nan_gradients(network: nn.Module, x: Tensor) -> Tensor:
    return network(x) + (0 * x.flatten(1).sum(1, keepdim=True)).sqrt()  # sqrt has an infinite slope at 0


def _random(network: nn.Module, x: Tensor) -> Tensor:
    return network(x + 0.05 * torch.randn_like(x))


BROKEN: dict[str, tuple[Callable[[nn.Module, Tensor], Tensor], tuple[str, ...]]] = {
    "saturated": (lambda f, x: 1e4 * f(x), ("missing_gradients", "ce_against_margin", "logit_scale")),
    "scaled down": (lambda f, x: 1e-2 * f(x), ("logit_scale", "ce_against_margin")),
    "softmax": (lambda f, x: f(x).softmax(1), ("probabilities",)),
    "quantised": (lambda f, x: f((x * 8).round() / 8), ("missing_gradients",)),
    "quantised, straight through": (_straight_through, ("wrong_gradients",)),
    "detached branch": (_detached_branch, ("wrong_gradients",)),
    "NaN gradients": (_nan_gradients, ("missing_gradients",)),
    "random at test time": (_random, ("random_outputs",)),
    "normalised nowhere": (lambda f, x: f((x + 1) / 2), ("normalisation",)),
}
"""What is done to a good network, and the checks of which at least one must say so."""


def run(name: str, values: Mapping[str, Any], out: Path) -> nn.Module:
    """Train one model, or take it from before."""
    print(f"training {name} ...", flush=True)
    return make_recipe(merge(dict(values), {"out": str(out / name)}), name).run().model


def examine(model: nn.Module, name: str, surrogate: nn.Module, out: Path) -> dict[str, Any]:
    """One model under the preset full: what a reader of the study needs."""
    test = load_data("digits").test
    assert test is not None  # noqa: S101
    results = evaluate(
        model, test, threat=ThreatModel(eps=0.1), attacks=PRESETS["full"].attacks, checks=True, surrogate=surrogate,
        label=Label(name), work=out / "work",
    )  # fmt: skip
    row: Row = results.rows[0]
    print(f"{name}: {row.verdict}", flush=True)
    return {
        "model": name,
        "model_sha256": row.model_sha256,
        "protocol": results.protocol.fingerprint,
        "clean": row.clean.model_dump(),
        "worst_case": row.worst_case.model_dump(),
        "attacks": {key: count.model_dump() for key, count in row.attacks.items()},
        "verdict": row.verdict,
        "suspicious": [check.name for check in row.checks if check.suspicious],
        "checks": {check.name: {"number": check.number, "says": check.says} for check in row.checks},
    }


def main() -> None:
    """Train, examine, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/checks"), help="folder of runs and verdicts")
    parser.add_argument("--results", type=Path, default=ROOT / "results" / "checks.json")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--first-seed", type=int, default=0, help="2 for models that no threshold has seen")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    demo, out = read_yaml(DEMO), options.out
    shared = merge(demo["shared"], {"epochs": EPOCHS})
    teacher = run("teacher", merge(shared, demo["teacher"], {"role": "teacher"}), out)

    def student(method: str, width: int, seed: int) -> nn.Module:
        own = merge(shared, demo["student"], {"objective": method}, demo["students"][method] or {})
        distilled = {} if method in ("pgd_at", "trades") else {"teacher": str(out / "teacher")}
        values = merge(own, distilled, {"seed": seed, "model": {"name": "cnn", "width": width}})
        return run(f"{method}-{width}-{seed}", values, out)

    first: int = options.first_seed

    honest = {f"{m}, width {w}, seed {s + first}": student(m, w, s + first) for m in HONEST for w, s in VARIANTS}
    published = {f"crdnd, seed {seed}": student("crdnd", 8, seed) for seed in range(first, first + 3)}
    good = honest[f"pgd_at, width 8, seed {first}"]
    broken = {name: Broken(good, change) for name, (change, _) in BROKEN.items()}
    found = {
        kind: [examine(model, name, teacher, out) for name, model in models.items()]
        for kind, models in (("published", published), ("broken", broken), ("honest", honest))
    }
    named = {
        name: bool(set(BROKEN[name][1]) & set(entry["suspicious"]))
        for name, entry in zip(BROKEN, found["broken"], strict=True)
    }
    document = {
        "schema": "crdnd.study/1",
        "study": "checks",
        "command": f"python studies/checks.py --first-seed {first}",
        "first_seed": first,
        "versions": package_versions(),
        "commit": commit(),
        "false_alarms": sum(bool(entry["suspicious"]) for entry in found["honest"]),
        "honest_models": len(found["honest"]),
        "broken_named": named,
        **found,
    }
    atomic_write_text(options.results, json.dumps(document, indent=1) + "\n")
    print(f"{document['false_alarms']} of {document['honest_models']} honest models accused; broken named: {named}")


if __name__ == "__main__":
    main()
