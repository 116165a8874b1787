"""Write the tables of the pages that have some from the files in results/; with --check tell whether they are."""

import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import comparisons
import study
from crdnd.config import build
from crdnd.evaluation import Results, load_results
from crdnd.models import read_card
from crdnd.report.comparison import load_comparison
from writing import table

ROOT = Path(__file__).resolve().parent.parent
START, END = "<!-- table: {name} -->\n", "<!-- end of table -->"


def read(name: str) -> Any:
    """A document of results/."""
    return json.loads((ROOT / "results" / name).read_text(encoding="utf-8"))


def demo() -> str:
    """The best checkpoint of every model."""
    results = build(Results, read("demo.json"))
    attacks, rows = list(results.protocol.attacks), list[list[str]]()
    for row in results.rows:
        if row.checkpoint == "best":
            name = f"{row.method} (the teacher)" if row.role == "teacher" else row.method
            low, high = row.worst_case.interval()
            accuracies = [f"{count.percent:.1f}" for count in (row.clean, *row.attacks.values())]
            worst = f"**{row.worst_case.percent:.1f}** [{low:.1f}, {high:.1f}]"
            rows.append([name, f"{row.params:,}", *accuracies, worst])
    return table(["method", "parameters", "clean", *attacks, "**worst case**"], rows)


def reference() -> str:
    """Images that stand under our AutoAttack and under the official one."""
    rows = [
        [
            entry["model"], entry["norm"], f"{entry['eps']:.4g}", f"{entry['clean']}/{entry['n']}", str(entry["ours"]),
            " ".join(map(str, entry["official"])), str(entry.get("closed_form", "")),
        ]
        for entry in read("reference.json")["entries"]
    ]  # fmt: skip
    header = ["model", "norm", "eps", "right", "ours", "official, five seeds", "closed form, one rival at a time"]
    return table(header, rows, left=2)


def speed() -> str:
    """Ratios of the benchmarks, with what is wanted."""
    rows: list[list[str]] = []
    for name in ("benchmark-autoattack.json", "benchmark-autoattack-resnet18.json"):
        found = read(name)
        stand = f"{found['stand']['crdnd']} of {found['n']} stand"
        memory = found["memory"]
        peak = f", peak memory {memory['crdnd'] / memory['official']:.2f} of its" if memory else ""
        what = f"AutoAttack, {found['model']}, {stand}{peak}"
        rows.append([what, "pyautoattack", f"{found['ratio']:.2f}", f"{found['target']:g}"])
    found = read("benchmark-pgd.json")
    rows += [
        [f"PGD-10, {found['settings']['model']}", rival, f"{entry['ratio']:.2f}", f"{entry['target']:g}"]
        for rival, entry in found["ratios"].items()
    ]
    found = read("benchmark-data.json")
    share = f"{100 * found['share_of_a_step']:.2g}% of a ResNet-18 step"
    rivals = {"pictures": "worker processes, Pillow's images", "tensors": "worker processes, bytes in memory"}
    for name, rival in rivals.items():
        wanted = f"{found['targets']['ratio']:g}" if name == "pictures" else "-"
        rows.append([f"crop_flip of 128 images, {share}", rival, f"{found['over_crdnd'][name]:.1f}", wanted])
    for name in ("benchmark-step.json", "benchmark-step-batch-32.json"):
        found = read(name)
        given, memory = found["settings"], found["peak_memory_bytes"]
        peak = f"peak memory {memory['ours'] / memory['reference']:.2f} of its"
        what = f"step of RSLAD, {given['student']} from {given['teacher']}, batch {given['batch_size']}, {peak}"
        rows.append(
            [
                what.replace(",depth=16,width=4", "-16-4"),
                "the published loop",
                f"{found['ratio']:.2f}",
                f"{found['target']:g}",
            ]
        )
    found = read("benchmark-export.json")
    for what, entry in found["found"].items():
        rows += [
            [f"exported {what}, {kind}", "the model, eager", f"{entry['ratios'][kind]:.2f}", f"{wanted:g}"]
            for kind, wanted in found["targets"].items()
            if "ratios" in entry  # beside the sizes of the files
        ]
    return table(["what", "beside", "their time over ours", "wanted"], rows, left=2)


def models() -> str:
    """The models in weights/, with what was measured of each."""
    rows: list[list[str]] = []
    for folder in sorted(path.parent for path in (ROOT / "weights").glob("*/model.json")):
        card = read_card(folder)
        size = (folder / "model.safetensors").stat().st_size / 1e6
        measured = ["-", "not measured", "not measured"]
        if (folder / "evaluation.json").exists():
            (row,) = load_results(folder / "evaluation.json").rows
            low, high = row.worst_case.interval()
            worst = f"**{row.worst_case.percent:.1f}** [{low:.1f}, {high:.1f}]"
            measured = [f"{row.worst_case.n:,}", f"{row.clean.percent:.1f}", worst]
        what = f"{card.role}, by `{card.method}`"
        rows.append([f"[`{folder.name}`]({folder.name}/README.md)", what, f"{card.params:,}", f"{size:.1f}", *measured])
    return table(["folder", "what it is", "parameters", "MB", "test images", "natural", "worst case"], rows, left=2)


def compared(name: str, methods: str) -> str:
    """All methods of a comparison; `methods` is the folder of their pages as seen from the text's."""
    return comparisons.standings(load_comparison(comparisons.results(name)), methods)


TABLES: dict[str, dict[str, Callable[[], str]]] = {
    "README.md": {
        "results/demo.json": demo,
        "results/crdnd-plus": study.summary,
        "results/cifar10": partial(compared, "cifar10", "docs/methods"),
    },
    "docs/evidence.md": {"results/reference.json": reference, "results/benchmark-*.json": speed},
    "docs/study-crdnd-plus.md": study.TABLES
    | {name: partial(compared, name, "methods") for name in ("cifar10", "fashion_mnist")},
    "weights/README.md": {"models": models},
}
"""What stands where."""


def filled(text: str, tables: dict[str, Callable[[], str]]) -> str:
    """A page with its tables made anew; the comment that opens each one says where."""
    for name, make in tables.items():
        start = START.format(name=name)
        if start not in text:
            raise SystemExit(f"no place for a table: add the lines {start.strip()!r} and {END!r} to its page")
        before, _, rest = text.partition(start)
        _, _, after = rest.partition(END)
        text = before + start + make() + END + after
    return text


def main() -> int:
    """Rewrite or check the pages."""
    stale = False
    for page, tables in TABLES.items():
        path = ROOT / page
        text = path.read_text(encoding="utf-8")
        new = filled(text, tables)
        stale |= new != text
        if "--check" not in sys.argv:
            path.write_text(new, encoding="utf-8")
    return int(stale and "--check" in sys.argv)


if __name__ == "__main__":
    sys.exit(main())
