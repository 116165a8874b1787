"""Do the levers cost accuracy? Final robust accuracy on the digits with all of them on, against plain float32.

Every seed has a split, a teacher and first weights of its own, which both sides share: an RSLAD student that is trained
with bf16 and every lever, and one in float32 with none. Judged is the worst case of the table attacks on test data,
paired by seed; the 95% interval of the mean difference has to lie inside +-2 points. Writes `results/levers.json`, and
every look at test data to `results/test-log.jsonl`.

    python studies/levers.py --seeds 20 --threads 1
"""

import argparse
import dataclasses
import json
import logging
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import nn

from crdnd import ThreatModel, create_model, distill, evaluate, load_data, train
from crdnd.io import atomic_write_text
from crdnd.provenance import commit, package_versions
from crdnd.report.leaderboard import estimate

ROOT = Path(__file__).parents[1]
MARGIN = 2.0
THREAT = ThreatModel(norm="linf", eps=0.1)
SIDES: dict[str, dict[str, Any]] = {
    "plain": {
        "precision": "fp32",
        "levers": {"fold": False, "channels_last": False, "fused_optimizer": False, "keep_teacher": 0},
    },
    "levers": {"precision": "bf16", "tf32": True, "levers": {"checkpoint_teacher": True}},
}


def network(width: int, seed: int) -> nn.Module:
    """A CNN for the digits."""
    return create_model("cnn", input_shape=(1, 8, 8), num_classes=10, width=width, seed=seed)


def one_seed(seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """Both sides of a seed."""
    splits = load_data("digits", split_seed=seed)
    test = splits.test
    assert test is not None  # noqa: S101
    out = options.out / str(seed)
    shared: dict[str, Any] = {
        "threat": THREAT, "augmentation": "shift", "validate_every": 5, "seed": seed, "select": "last",
    }  # fmt: skip
    teacher = train(
        network(32, seed), splits, role="teacher", objective="trades", epochs=options.teacher_epochs,
        out=out / "teacher", **shared,
    ).model  # fmt: skip
    found: dict[str, Any] = {"seed": seed}
    for side, changes in SIDES.items():
        changes = changes | {"levers": changes["levers"] | {"compile": options.compile and side == "levers"}}
        run = distill(
            network(8, seed), splits, teacher=teacher, objective="rslad", epochs=options.epochs, out=out / side,
            **shared, **changes,
        )  # fmt: skip
        row = evaluate(run.model, test, threat=THREAT).rows[0]
        found[side] = {
            "worst_case": row.worst_case.model_dump(), "clean": row.clean.model_dump(),
            "seconds": sum(epoch.seconds for epoch in run.history), "model_sha256": row.model_sha256,
            "became": json.loads((run.folder / "run.json").read_text())["levers"],
        }  # fmt: skip
        look = {"study": "levers", "time": datetime.now(UTC).isoformat(timespec="seconds"), "seed": seed, "side": side}
        with options.results.with_name("test-log.jsonl").open("a") as log:
            log.write(json.dumps(look | {"model_sha256": row.model_sha256, "n": row.worst_case.n}) + "\n")
    difference = found["levers"]["worst_case"]["correct"] - found["plain"]["worst_case"]["correct"]
    return found | {"difference": 100 * difference / len(test)}


def main() -> None:
    """Train both sides of every seed, then write what they differ by."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=20, help="fixed before the first look (default %(default)s)")
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--teacher-epochs", type=int, default=40)
    parser.add_argument("--compile", action="store_true", help="torch.compile too")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("runs/levers"), help="folder of the runs")
    parser.add_argument("--results", type=Path, default=ROOT / "results" / "levers.json")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    logging.disable(logging.WARNING)
    entries: list[dict[str, Any]] = []
    for seed in range(options.seeds):
        entries.append(one_seed(seed, options))
        found = estimate([entry["difference"] for entry in entries])
        inside = found.low is not None and found.high is not None and -MARGIN < found.low <= found.high < MARGIN
        document = {
            "schema": "crdnd.study/1", "study": "levers",
            "command": f"python studies/levers.py --seeds {options.seeds} --epochs {options.epochs}",
            "versions": package_versions(), "commit": commit(), "threads": options.threads, "seeds": options.seeds,
            "epochs": options.epochs, "margin": MARGIN, "difference": dataclasses.asdict(found),
            "done": len(entries) == options.seeds, "met": inside, "sides": SIDES, "entries": entries,
        }  # fmt: skip
        atomic_write_text(options.results, json.dumps(document, indent=1) + "\n")
        print(f"seed {seed}: {entries[-1]['difference']:+.2f} points, mean {found}", flush=True)


if __name__ == "__main__":
    main()
