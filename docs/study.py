"""The tables of docs/study-crdnd-plus.md, which tables.py writes, and its figures, which this draws with matplotlib."""

import json
import statistics
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from comparisons import choices
from crdnd.report.comparison import CellResult, Comparison, load_comparison
from crdnd.report.leaderboard import WORST, Estimate, estimate, leaderboard, passes
from writing import interval, spread, table

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "results" / "crdnd-plus"
FIGURES = ROOT / "docs" / "figures"
OURS, REFERENCE = "crdnd_plus", "rslad"
WIDTHS = ("width-8", "width-4", "width-2")
Measure = Callable[[CellResult], float]


def load(part: str) -> Comparison:
    """A part's numbers."""
    return load_comparison(RESULTS / f"{part}.json")


def entries(name: str, key: str = "entries") -> list[dict[str, Any]]:
    """What a file of results/crdnd-plus lists that is no comparison."""
    found: list[dict[str, Any]] = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))[key]
    return found


def mains() -> list[Comparison]:
    """The widths that were run."""
    return [load(part) for part in WIDTHS if (RESULTS / f"{part}.json").exists()]


# --- numbers ----------------------------------------------------------------------------------------------------------


def reads(column: str) -> Measure:
    """Right under an attack, on natural images or in the worst case, percent."""

    def of(cell: CellResult) -> float:
        assert cell.row is not None  # noqa: S101
        return {"clean": cell.row.clean, **cell.row.attacks, WORST: cell.row.worst_case}[column].percent

    return of


def gap(cell: CellResult) -> float:
    """Points by which PGD_TRADES reads above AutoAttack."""
    return reads("pgd_trades")(cell) - reads("autoattack")(cell)


def validation(cell: CellResult) -> float:
    """Robust accuracy of the chosen epoch on validation data, percent."""
    assert cell.best is not None  # noqa: S101
    return cell.best.robust.percent


def overfit(cell: CellResult) -> float:
    """Points by which the last epoch lies below the best one, on validation data under attack."""
    return validation(cell) - (cell.last.robust.percent if cell.last else 0)


OVERFITTING: dict[str, Measure] = {"validation": validation, "lost at the end": overfit}
FLAW: dict[str, Measure] = {"PGD_TRADES": reads("pgd_trades"), "AutoAttack": reads("autoattack"), "gap": gap}


def cells_of(comparison: Comparison, objective: str, **where: str | None) -> dict[int, CellResult]:
    """A method's cells by seed, those of a student or teacher alone where one is named."""
    return {
        cell.seed: cell
        for cell in comparison.cells
        if cell.objective == objective
        and cell.row is not None
        and all(getattr(cell, key) == value for key, value in where.items())
    }


def mean(cells: Iterable[CellResult], of: Measure) -> Estimate:
    """Over seeds."""
    return estimate([of(cell) for cell in cells])


def paired(comparison: Comparison, objective: str, other: str, of: Measure, **where: str | None) -> Estimate:
    """One method minus another, seed by seed; those of a student or teacher alone where one is named."""
    ours, theirs = (cells_of(comparison, name, **where) for name in (objective, other))
    return estimate([of(ours[seed]) - of(theirs[seed]) for seed in ours if seed in theirs])


def best_rival(comparison: Comparison) -> str:
    """The method that is best on validation data, ours apart."""
    rivals = [name for name in comparison.spec["objectives"] if name != OURS]
    return max(rivals, key=lambda name: mean(cells_of(comparison, name).values(), validation).mean)


def student_of(comparison: Comparison) -> str:
    """The only student of a part."""
    (student,) = comparison.spec["students"]
    return str(student)


# --- text -------------------------------------------------------------------------------------------------------------


def targets() -> str:
    """Target A of the study, width by width."""

    def judged(found: Estimate, *, above: float | None = None, below: float | None = None) -> str:
        low, high = found.low or 0.0, found.high or 0.0
        met = low > above if above is not None else below is not None and high <= below
        return f"{interval(found, 2)}: {'met' if met else '**not met**'}"

    rows: list[list[str]] = []
    for comparison in mains():
        rival = best_rival(comparison)
        rows.append([
            student_of(comparison),
            f"`{rival}`",
            judged(paired(comparison, OURS, rival, reads(WORST)), above=0),
            judged(paired(comparison, OURS, REFERENCE, reads(WORST)), above=3),
            judged(paired(comparison, OURS, REFERENCE, reads("clean")), above=-0.5),
            judged(paired(comparison, OURS, REFERENCE, gap), below=0.5),
        ])  # fmt: skip
    over = f"minus `{REFERENCE}`"
    header = ["student", "best rival", "minus it, above 0", f"{over}, above +3"]
    return table([*header, f"natural, {over}, from -0.5", f"gap, {over}, to +0.5"], rows, left=2)


def lead(comparison: Comparison, other: str, **where: str | None) -> str:
    """The worst case of ours minus another's."""
    return "-" if other == OURS else interval(paired(comparison, OURS, other, reads(WORST), **where), 2)


def main_table(part: str) -> str:
    """All methods at one width."""
    comparison = load(part)
    rows: list[list[str]] = []
    for entry in leaderboard(comparison).entries:
        name, total = entry.objective, entry.columns[WORST]
        rows.append([
            f"[`{name}`](methods/{name}.md)",
            *(spread(entry.columns[column]) for column in ("clean", "pgd_trades", "autoattack")),
            f"**{total.mean:.1f}** [{total.low:.1f}, {total.high:.1f}]",
            lead(comparison, name),
            spread(entry.gap) if entry.gap else "-",
            f"{entry.seconds:.0f} ({passes(entry)})",
        ])  # fmt: skip
    names = ["method", "clean", "PGD_TRADES", "AutoAttack", "worst case", f"`{OURS}` minus it", "gap"]
    return table([*names, "seconds (passes)"], rows)


def part_table(part: str, **extra: Measure) -> str:
    """Every entry of a part beside its baseline, and ours beside it where ours is in the part and not the baseline."""
    comparison = load(part)
    several = {key: len(comparison.spec[f"{key}s"]) > 1 for key in ("student", "teacher")}
    board = leaderboard(comparison)
    leads = OURS in comparison.spec["objectives"] and board.baseline != OURS
    rows: list[list[str]] = []
    for entry in board.entries:
        # Ours has a teacher; a method without one stands beside it all the same.
        where = {"student": entry.student, **({"teacher": entry.teacher} if entry.teacher else {})}
        own = cells_of(comparison, entry.objective, **where).values()
        rows.append([
            f"`{entry.objective}`",
            *(str(getattr(entry, key)) for key, shown in several.items() if shown),
            spread(entry.columns["clean"]),
            f"**{entry.columns[WORST].mean:.1f}** ± {entry.columns[WORST].sd:.1f}",
            "; ".join(interval(pair.columns[WORST], 2) for pair in entry.differences) or "-",
            *([lead(comparison, entry.objective, **where)] if leads else []),
            *(spread(mean(own, of)) for of in extra.values()),
        ])  # fmt: skip
    names = ["method", *(key for key, shown in several.items() if shown), "clean", "worst case"]
    header = [*names, f"minus `{board.baseline}`", *([f"`{OURS}` minus it"] if leads else []), *extra]
    return table(header, rows, left=1 + sum(several.values()))


def trials(part: str) -> str:
    """The settings that the methods chose from."""
    return choices(load(part))


def summary() -> str:
    """The worst case of every method at each width that was run."""
    parts = mains()
    rows: list[list[str]] = []
    for entry in leaderboard(parts[0]).entries:
        name = entry.objective
        row = [f"[`{name}`](docs/methods/{name}.md)"]
        for comparison in parts:
            row.append(f"**{mean(cells_of(comparison, name).values(), reads(WORST)).mean:.1f}**")
            row.append(lead(comparison, name))
        rows.append(row)
    return table(["method", *(text for part in parts for text in (student_of(part), f"`{OURS}` minus it"))], rows)


def acm_table() -> str:
    """What compensation does: by class its range, by sample who stands."""
    found = entries("acm")
    rows: list[list[str]] = []
    for teacher in dict.fromkeys(entry["teacher"] for entry in found):
        own = [entry for entry in found if entry["teacher"] == teacher]

        def over(key: str, own: Sequence[dict[str, Any]] = own) -> str:
            values = [value for entry in own for value in entry[key]]
            return f"{min(values):.2f} to {max(values):.2f}"

        stands = []
        for group in ("teacher_right", "teacher_wrong"):
            n, *sides = (sum(entry[group][key] for entry in own) for key in ("n", "with", "without"))
            stands.append(f"{sides[0]} and {sides[1]} of {n}")
        turned = f"{statistics.fmean(value for entry in own for value in entry['degrees']):.1f}"
        over_turned = str(sum(entry["turned_over"] for entry in own))
        rows.append([teacher, over("accuracy_natural"), over("accuracy_adversarial"), turned, over_turned, *stands])
    names = ["teacher", "a_i on x", "a_i on x'", "degrees that M turns", "predictions turned over"]
    return table([*names, "stand with and without, teacher right", "teacher wrong"], rows)


def search_table() -> str:
    """What was tried before the study, on validation data."""
    rows: list[list[str]] = []
    for entry in entries("search"):
        half = "" if entry["half"] is None else f" ± {entry['half']:.2f}"
        rows.append([entry["what"], entry["student"], str(entry["seeds"] or "-"), f"{entry['difference']:+.2f}{half}"])
    return table(["on top of tuned `trades`", "student", "seeds", "difference, points"], rows, left=2)


def attack_table() -> str:
    """What another training attack did for crdnd_plus on validation data of the digits."""
    runs = {(entry["beta"], entry["attack"], entry["seed"]): entry for entry in entries("attack", "digits")}
    rows: list[list[str]] = []
    for beta in sorted({beta for beta, _, _ in runs}):
        pairs = [
            (run, runs[beta, "trades", seed])
            for (own, attack, seed), run in runs.items()
            if (own, attack) == (beta, "ce")
        ]
        found = [estimate([ce[key] - trades[key] for ce, trades in pairs]) for key in ("robust", "clean")]
        rows.append([str(beta), str(len(pairs)), *(interval(one, 2) for one in found)])
    return table(["beta", "seeds", "robust, points", "natural, points"], rows)


def attack_on_images_table() -> str:
    """The same question on real images, one seed."""
    found = sorted(entries("attack", "cifar10"), key=lambda entry: -entry["robust"])
    rows = [[entry["what"], f"{entry['clean']:.1f}", f"{entry['robust']:.1f}"] for entry in found]
    return table(["trained by", "natural", "robust"], rows)


ALL: dict[str, tuple[str, Callable[[], str]]] = {
    **{part: (part, partial(main_table, part)) for part in WIDTHS},
    **{f"{part}, trials": (part, partial(trials, part)) for part in WIDTHS},
    "flaw": ("flaw", partial(part_table, "flaw", **FLAW)),
    **{part: (part, partial(part_table, part)) for part in ("ablation", "sensitivity", "spoiled", "sizes")},
    "overfitting": ("overfitting", partial(part_table, "overfitting", **OVERFITTING)),
    "acm": ("acm", acm_table),
    "search": ("search", search_table),
    "attack": ("attack", attack_table),
    "attack, real images": ("attack", attack_on_images_table),
}
"""What stands on the page, by the name of the place: the file that it comes from, and how it is made."""

TABLES = {"targets": targets} | {
    name: make for name, (file, make) in ALL.items() if (RESULTS / f"{file}.json").exists()
}
"""The targets of all widths that were run, and the tables whose numbers are there."""


# --- figures ----------------------------------------------------------------------------------------------------------


def against_all() -> Any:
    """Ours minus every other method, at each width."""
    from matplotlib.figure import Figure

    parts = mains()
    figure = Figure(figsize=(3.4 * len(parts), 4), layout="constrained")
    panels = figure.subplots(1, len(parts), sharey=True, squeeze=False)[0]
    names = [entry.objective for entry in reversed(leaderboard(parts[0]).entries) if entry.objective != OURS]
    for panel, comparison in zip(panels, parts, strict=True):
        found = [paired(comparison, OURS, name, reads(WORST)) for name in names]
        half = [one.mean - (one.low or one.mean) for one in found]
        panel.errorbar([one.mean for one in found], names, xerr=half, fmt="o", color="#1f5fa8", capsize=3)
        panel.axvline(0, color="#888888", linewidth=1)
        panel.set(title=student_of(comparison), xscale="symlog", xlabel=f"{OURS} minus it, points")
        marks = (-3, -1, 0, 1, 3, 10, 50)
        panel.set_xticks(marks, [str(place) for place in marks])
        panel.grid(axis="x", color="#dddddd")
    return figure


def believed() -> Any:
    """PGD_TRADES beside AutoAttack, without the methods that lie far below all others."""
    from matplotlib.figure import Figure

    comparison = mains()[0]
    figure = Figure(figsize=(5, 4.5), layout="constrained")
    panel = figure.subplots()
    entries = leaderboard(comparison).entries
    for entry in entries:
        x, y = (entry.columns[name].mean for name in ("pgd_trades", "autoattack"))
        if y > entries[0].columns["autoattack"].mean - 10:
            panel.plot(x, y, "o", color="#c0392b" if "crdnd" in entry.objective else "#1f5fa8")
            panel.annotate(entry.objective, (x, y), xytext=(4, -4), textcoords="offset points", fontsize=8)
    panel.set(xlabel="right under PGD_TRADES, %", ylabel="right under AutoAttack, %", title=student_of(comparison))
    panel.margins(x=0.2)
    panel.grid(color="#dddddd")
    return figure


def worth_of_a_teacher() -> Any:
    """The worst case over the share of the teacher's labels that was changed."""
    from matplotlib.figure import Figure

    comparison = load("spoiled")
    figure = Figure(figsize=(6.5, 4), layout="constrained")
    panel = figure.subplots()
    teachers = list(comparison.spec["teachers"])
    changed = [100 * comparison.spec["teachers"][name].get("label_noise", 0) for name in teachers]
    for place, name in enumerate(comparison.spec["objectives"]):
        found = [mean(cells_of(comparison, name, teacher=teacher).values(), reads(WORST)) for teacher in teachers]
        panel.plot(changed, [one.mean for one in found], "o-", color=f"C{place}", label=name)
    panel.set(xlabel="labels of the teacher's training data that were changed, %", ylabel="worst case, %")
    panel.grid(color="#dddddd")
    figure.legend(loc="outside right upper", fontsize=8)
    return figure


def main() -> None:
    """Draw all figures whose numbers are there."""
    import matplotlib

    matplotlib.rcParams |= {"svg.hashsalt": "crdnd", "svg.fonttype": "none", "font.size": 9}
    drawn = {"against-all": against_all, "believed": believed}
    if (RESULTS / "spoiled.json").exists():
        drawn["worth-of-a-teacher"] = worth_of_a_teacher
    FIGURES.mkdir(exist_ok=True)
    for name, draw in drawn.items():
        draw().savefig(FIGURES / f"study-{name}.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
