"""What CRDND's adaptive compensation module does, by class and by sample, with good and spoiled teachers.

Reads the students that `crdnd study crdnd-plus --part spoiled` has trained and attacked, `crdnd` with the module and
without it. Nothing is trained or attacked here. By class: the accuracies a_i that stand on the diagonal of M, and the
angle by which M turns a student's predictions on the test images. By sample: how many test images stand against all
attacks, where the teacher is right about the natural image and where it is not. Writes `results/crdnd-plus/acm.json`.

    python studies/acm.py --runs runs/studies/crdnd-plus
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from crdnd import load_data, load_model
from crdnd.engine.checkpoint import load_checkpoint
from crdnd.io import atomic_write_text
from crdnd.objectives.crdnd import CRDND, Kind, compensate
from crdnd.provenance import commit, package_versions
from crdnd.report.comparison import CellResult, load_comparison

ROOT = Path(__file__).parents[1]
KINDS: tuple[Kind, ...] = ("nat", "adv")
SIDES = {"with": "crdnd", "without": "crdnd-no-acm"}


def accuracies(folder: Path) -> dict[Kind, Tensor]:
    """a_i on natural and on adversarial images, (K,) each, as the method used them in the run's last epoch."""
    loaded = load_checkpoint(folder)
    assert loaded is not None, f"{folder}: not trained"  # noqa: S101
    kept = loaded[1]["objective/previous"]
    method = CRDND(kept.shape[-1])
    method.previous.copy_(kept)
    return {kind: found for kind in KINDS if (found := method.accuracies(kind)) is not None}


def one_seed(cells: dict[str, CellResult], runs: Path) -> dict[str, Any]:
    """Both students of a seed and a teacher."""
    cell = cells["with"]
    test = load_data("digits", split_seed=cell.split_seed).test
    assert test is not None  # noqa: S101
    teacher = load_model(runs / "teachers" / str(cell.teacher) / f"seed-{cell.seed}")
    student = load_model(runs / cell.folder)
    a = accuracies(runs / cell.folder)
    with torch.no_grad():
        images, labels = test.batch(torch.arange(len(test)))
        right = teacher(images).argmax(1) == labels
        logits = student(images)
    turned = compensate(logits, a["nat"].to(logits))
    degrees = torch.rad2deg(torch.acos(F.cosine_similarity(logits, turned, dim=1).clamp(-1, 1)))
    stands = {side: _stands(found) for side, found in cells.items()}
    return {
        "teacher": cell.teacher,
        "seed": cell.seed,
        "accuracy_natural": a["nat"].tolist(),
        "accuracy_adversarial": a["adv"].tolist(),
        "degrees": [degrees[labels == label].mean().item() for label in range(test.num_classes)],
        "turned_over": int((turned.argmax(1) != logits.argmax(1)).sum()),
        "teacher_right": {"n": int(right.sum())} | {side: int(found[right].sum()) for side, found in stands.items()},
        "teacher_wrong": {"n": int((~right).sum())}
        | {side: int(found[~right].sum()) for side, found in stands.items()},
    }


def _stands(cell: CellResult) -> Tensor:
    """Which test images stand against all attacks, (N,) bool."""
    assert cell.row is not None  # noqa: S101
    return torch.tensor([verdict == "1" for verdict in cell.row.stands()])


def main() -> None:
    """Look at every pair of students, then write what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs/studies/crdnd-plus"), help="folder of the study's runs")
    parser.add_argument("--results", type=Path, default=ROOT / "results" / "crdnd-plus")
    options = parser.parse_args()
    comparison = load_comparison(options.results / "spoiled.json")
    found = {(cell.objective, cell.teacher, cell.seed): cell for cell in comparison.cells}
    entries = [
        one_seed({side: found[name, teacher, seed] for side, name in SIDES.items()}, options.runs)
        for teacher in comparison.spec["teachers"]
        for seed in comparison.spec["seeds"]
    ]
    document = {
        "schema": "crdnd.study/1", "study": "acm", "command": "python studies/acm.py",
        "versions": package_versions(), "commit": commit(), "entries": entries,
    }  # fmt: skip
    atomic_write_text(options.results / "acm.json", json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
