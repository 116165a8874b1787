"""The leaderboard of a comparison: means over seeds with their intervals, and differences to the baseline by seed.

Everything here is worked out from the document alone. Accuracies are in percent and differences in points. Intervals
are 95% t intervals of the mean over seeds (Student 1908); with one seed there are none, nor where all seeds are equal.
"""

import csv
import io
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from crdnd.errors import InputError
from crdnd.evaluation import Protocol, Row
from crdnd.report._lines import eps_in_words, header, titled
from crdnd.report.comparison import CellResult, Comparison

GAP = ("pgd_trades", "autoattack")
"""The attack that flatters and the one that is believed."""
WORST = "worst_case"
ROUNDING = 1e-9
"""Points by which equal differences of percentages may differ."""


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds."""

    n: int
    mean: float
    sd: float | None = None
    """Standard deviation over seeds, divided by n - 1; None for one seed."""
    low: float | None = None
    """Of the interval; None for one seed, and where all are equal: a spread that was not seen is not one of zero."""
    high: float | None = None


@dataclass(frozen=True)
class Paired:
    """An entry minus the baseline with the same student, seed by seed."""

    baseline_teacher: str | None
    columns: dict[str, Estimate]


@dataclass(frozen=True)
class Entry:
    """A method with one student and one teacher."""

    objective: str
    student: str
    teacher: str | None
    model: str
    params: int
    seeds: tuple[int, ...]
    """Those with numbers."""
    failed: int
    """How many have none."""
    suspicious: int
    """How many were found suspicious by the checks for false security."""
    trials: int
    """How many settings were tried; 1 where there was nothing to choose."""
    columns: dict[str, Estimate]
    """clean, every attack, worst_case; empty without a seed."""
    differences: tuple[Paired, ...]
    """Empty for the baseline itself. A method without a teacher has one for every teacher of the baseline."""
    gap: Estimate | None
    """Points by which pgd_trades reads above autoattack."""
    seconds: float
    """Of one training, the mean over seeds."""
    student_passes: float
    teacher_passes: float


@dataclass(frozen=True)
class Leaderboard:
    """All entries: students in their order, within each the best worst case first."""

    protocols: tuple[Protocol, ...]
    baseline: str | None
    columns: tuple[str, ...]
    entries: tuple[Entry, ...]


def estimate(values: Sequence[float]) -> Estimate:
    """Mean, standard deviation and 95% t interval of independent values.

    >>> found = estimate([1.0, 2.0, 3.0])
    >>> found.mean, found.sd, round(found.low, 3), round(found.high, 3)
    (2.0, 1.0, -0.484, 4.484)
    """
    mean, n = statistics.fmean(values), len(values)
    if n == 1:
        return Estimate(n, mean)
    sd = statistics.stdev(values)
    if sd < ROUNDING:
        return Estimate(n, mean, 0.0)
    from scipy.stats import t  # slow to import

    half = float(t.ppf(0.975, n - 1)) * sd / math.sqrt(n)
    return Estimate(n, mean, sd, mean - half, mean + half)


def leaderboard(comparison: Comparison) -> Leaderboard:
    """The leaderboard of a document.

    Raises:
        InputError: nothing was measured, or cells of one seed were measured under different protocols.
    """
    measured = [cell for cell in comparison.cells if cell.row is not None]
    if not measured:
        raise InputError("cells: none has numbers; there is no leaderboard.")
    under: dict[int, str] = {}
    for cell in measured:
        if under.setdefault(cell.seed, cell.protocol) != cell.protocol:
            raise InputError(f"cells of seed {cell.seed} were measured under different protocols.")
    columns = ("clean", *comparison.protocols[0].attacks, WORST)
    groups: dict[tuple[str, str, str | None], list[CellResult]] = {}
    for cell in comparison.cells:
        groups.setdefault((cell.student, cell.objective, cell.teacher), []).append(cell)
    baselines = [
        cells for (_, objective, _), cells in groups.items() if objective == comparison.baseline and _rows(cells)
    ]
    tried = {(found.student, found.objective, found.teacher): len(found.trials) for found in comparison.choices}
    entries = [_entry(cells, columns, baselines, tried.get(key, 1)) for key, cells in groups.items()]
    students = list(dict.fromkeys(cell.student for cell in comparison.cells))
    entries.sort(key=lambda entry: (students.index(entry.student), -entry.columns[WORST].mean if entry.columns else 1))
    return Leaderboard(tuple(comparison.protocols), comparison.baseline, columns, tuple(entries))


def _entry(
    cells: Sequence[CellResult], columns: Sequence[str], baselines: Sequence[Sequence[CellResult]], trials: int
) -> Entry:
    first, rows = cells[0], _rows(cells)
    measured = [cell for cell in cells if cell.row is not None]
    row = next(iter(rows.values()), None)
    others = [
        other
        for other in baselines
        if other[0].student == first.student
        and other[0].objective != first.objective
        and (other[0].teacher == first.teacher or None in (other[0].teacher, first.teacher))
    ]
    gap = set(GAP) <= set(columns)
    return Entry(
        objective=first.objective,
        student=first.student,
        teacher=first.teacher,
        model=row.model if row else "",
        params=row.params if row else 0,
        seeds=tuple(rows),
        failed=sum(bool(cell.failed) for cell in cells),
        suspicious=sum(row.verdict.startswith("suspicious") for row in rows.values()),
        trials=trials,
        columns={name: estimate([_percent(row, name) for row in rows.values()]) for name in columns} if rows else {},
        differences=tuple(pair for other in others if (pair := _paired(rows, other, columns)) is not None),
        gap=estimate([_percent(row, GAP[0]) - _percent(row, GAP[1]) for row in rows.values()])
        if gap and rows
        else None,
        seconds=_mean([cell.seconds for cell in measured]),
        student_passes=_mean([cell.student_passes for cell in measured]),
        teacher_passes=_mean([cell.teacher_passes for cell in measured]),
    )


def _paired(rows: Mapping[int, Row], baseline: Sequence[CellResult], columns: Sequence[str]) -> Paired | None:
    """Differences by seed; None where the two have no seed in common."""
    others = _rows(baseline)
    seeds = [seed for seed in rows if seed in others]
    if not seeds:
        return None
    found = {
        name: estimate([_percent(rows[seed], name) - _percent(others[seed], name) for seed in seeds])
        for name in columns
    }
    return Paired(baseline[0].teacher, found)


def _rows(cells: Sequence[CellResult]) -> dict[int, Row]:
    return {cell.seed: cell.row for cell in cells if cell.row is not None}


def _percent(row: Row, column: str) -> float:
    return {"clean": row.clean, **row.attacks, WORST: row.worst_case}[column].percent


def _mean(values: Sequence[float]) -> float:
    return statistics.fmean(values) if values else 0.0


def notes(comparison: Comparison) -> list[str]:
    """What a reader of the leaderboard must know: which settings were chosen, what failed, what is suspicious."""
    found: list[str] = []
    for choice in comparison.choices:
        name = _title_of(choice.objective, choice.student, choice.teacher)
        if choice.chosen is None:
            found.append(f"{name}: all {len(choice.trials)} trials diverged.")
            continue
        trial = choice.trials[choice.chosen - 1]
        assert trial.validation is not None, "a trial that diverged is never chosen"  # noqa: S101
        diverged = sum(bool(other.failed) for other in choice.trials)
        found.append(
            f"{name}: trial {choice.chosen} of {len(choice.trials)}, {json.dumps(trial.settings)}, was chosen with "
            f"{trial.validation.robust.percent:.1f}% robust accuracy on validation data"
            + (f"; {diverged} diverged." if diverged else ".")
        )
    for cell in comparison.cells:
        name = f"{_title_of(cell.objective, cell.student, cell.teacher)}, seed {cell.seed}"
        if cell.failed:
            found.append(f"{name}: failed, {cell.failed}")
        elif cell.row is not None and cell.row.verdict.startswith("suspicious"):
            found.append(f"{name}: {cell.row.verdict}")
        found += [f"{name}: changed by its run, {change}" for change in cell.changes]
    return found


def _title_of(objective: str, student: str, teacher: str | None) -> str:
    return f"{objective} with student {student}" + (f" and teacher {teacher}" if teacher else "")


def title(board: Leaderboard) -> str:
    """What was measured, in one line."""
    protocol = board.protocols[0]
    splits = f", {len(board.protocols)} splits" if len(board.protocols) > 1 else ""
    return (
        f"Accuracy in percent on {protocol.data}, {protocol.split} split, n = {protocol.n}{splits}; "
        f"{protocol.norm}, eps = {eps_in_words(protocol.eps)}"
    )


def tables(board: Leaderboard) -> list[Group]:
    """For the terminal: accuracies; then differences to the baseline and what a training costs. 100 columns at most."""
    return [_accuracies(board), _differences(board)]


def _accuracies(board: Leaderboard) -> Group:
    table = _table()
    table.add_column(Text("method\nstudent\nteacher"), overflow="fold", max_width=28)
    table.add_column("seeds", justify="right")
    for name in board.columns:
        table.add_column(Text("worst\ncase" if name == WORST else header(name)), justify="right", overflow="fold")
    for entry, last in _sections(board):
        seeds = Text(str(len(entry.seeds))).append(f"\n{entry.failed} failed" if entry.failed else "", style="dim")
        cells = [_mean_sd(entry.columns.get(name), interval=name == WORST) for name in board.columns]
        table.add_row(_name(entry), seeds, *cells, end_section=last)
    caption = "Mean over seeds, ± their standard deviation, [95% t interval of the mean]."
    return titled(title(board), table, caption)


def _differences(board: Leaderboard) -> Group:
    caption = "Cost of one training: passes are evaluations of student + teacher per training image."
    if board.baseline is not None:
        caption = f"Differences are to {board.baseline}, paired by seed, in points, [95% t interval]. {caption}"
    table = _table()
    table.add_column(Text("method\nstudent\nteacher"), overflow="fold", max_width=28)
    with_difference = any(entry.differences for entry in board.entries)
    with_gap = any(entry.gap for entry in board.entries)
    if with_difference:
        for name in ("clean", "worst\ncase"):
            table.add_column(Text(f"{name}\n- baseline"), justify="right")
    if with_gap:
        table.add_column(Text("pgd_trades -\nautoattack"), justify="right")
    for name in ("trials", "seconds", "passes"):
        table.add_column(name, justify="right")
    for entry, last in _sections(board):
        cells = [_plain(_differences_of(entry, name)) for name in ("clean", WORST)] if with_difference else []
        if with_gap:
            cells.append(Text(signed(entry.gap)))
        cost = [Text(str(entry.trials)), Text(f"{entry.seconds:,.1f}"), Text(passes(entry))]
        table.add_row(_name(entry), *cells, *cost, end_section=last)
    return titled("Differences and cost", table, caption)


def _differences_of(entry: Entry, column: str) -> list[str]:
    """One line, or with several teachers of the baseline a line for each, with its name."""
    return [
        (f"{pair.baseline_teacher or 'no teacher'}:\n" if len(entry.differences) > 1 else "")
        + signed(pair.columns[column])
        for pair in entry.differences
    ]


def _plain(lines: Sequence[str]) -> Text:
    return Text("\n".join(lines) or "-")


def signed(found: Estimate | None) -> str:
    """A difference with its interval, which stands below it."""
    if found is None:
        return "-"
    return f"{found.mean:+.1f}" + ("" if found.low is None else f"\n[{found.low:+.1f}, {found.high:+.1f}]")


def passes(entry: Entry) -> str:
    """Of student and teacher; "-" where they were not counted."""
    return f"{entry.student_passes:,.0f} + {entry.teacher_passes:,.0f}" if entry.student_passes else "-"


def _table() -> Table:
    return Table(box=box.SIMPLE, padding=0, pad_edge=False, show_edge=False)


def _sections(board: Leaderboard) -> list[tuple[Entry, bool]]:
    """Entries, and whether the next one is of another student."""
    following = [*board.entries[1:], None]
    return [
        (entry, after is not None and after.student != entry.student)
        for entry, after in zip(board.entries, following, strict=True)
    ]


def _name(entry: Entry) -> Text:
    return Text(entry.objective, style="bold").append(f"\n{entry.student}\n{entry.teacher or '-'}", "not bold dim")


def _mean_sd(found: Estimate | None, *, interval: bool) -> Text:
    if found is None:
        return Text("-")
    cell = Text(f"{found.mean:.1f}")
    if found.sd is not None:
        cell.append(f"\n±{found.sd:.1f}", style="dim")
        if interval and found.low is not None:
            cell.append(f"\n[{found.low:.1f}, {found.high:.1f}]", style="dim")
    return cell


def to_csv(board: Leaderboard) -> str:
    """A line per entry; one that pairs with several rows of the baseline has a line for each, alike but for these."""
    names = [f"{column}_{part}" for column in board.columns for part in PARTS]
    differences = [f"difference_{column}_{part}" for column in board.columns for part in PARTS]
    gap = [f"gap_{part}" for part in PARTS]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    head = ("objective", "student", "teacher", "params", "seeds", "failed", "suspicious", "trials")
    cost = ("seconds", "student_passes", "teacher_passes")
    writer.writerow([*head, *names, *gap, *cost, "baseline", "baseline_teacher", *differences])
    for entry in board.entries:
        for pair in entry.differences or (None,):
            row: list[object] = [entry.objective, entry.student, entry.teacher or "", entry.params, len(entry.seeds)]
            row += [entry.failed, entry.suspicious, entry.trials]
            row += [number for name in board.columns for number in _numbers(entry.columns.get(name))]
            row += [*_numbers(entry.gap), entry.seconds, entry.student_passes, entry.teacher_passes]
            row += [board.baseline or "", pair.baseline_teacher or ""] if pair else ["", ""]
            row += [number for name in board.columns for number in _numbers(pair.columns[name] if pair else None)]
            writer.writerow(row)
    return text.getvalue()


PARTS = ("mean", "sd", "low", "high")


def _numbers(found: Estimate | None) -> list[object]:
    return ["" if found is None or (value := getattr(found, part)) is None else value for part in PARTS]


def to_latex(board: Leaderboard) -> str:
    """A tabular of booktabs: accuracies with their standard deviations, and the paired difference of the worst case."""
    columns = ["method", "student", "teacher", "seeds", *(name.replace("_", " ") for name in board.columns)]
    with_difference = any(entry.differences for entry in board.entries)
    if with_difference:
        columns.append(f"worst case vs. {board.baseline}")
    lines = [
        f"% {title(board)}. Mean over seeds and standard deviation; differences with 95% t intervals, paired by seed.",
        rf"\begin{{tabular}}{{lll{'r' * (len(columns) - 3)}}}",
        r"\toprule",
        " & ".join(escaped(name) for name in columns) + r" \\",
        r"\midrule",
    ]
    for entry, last in _sections(board):
        cells = [
            escaped(entry.objective),
            escaped(entry.student),
            escaped(entry.teacher or "--"),
            str(len(entry.seeds)),
        ]
        cells += [_latex(entry.columns.get(name)) for name in board.columns]
        if with_difference:
            cells.append("; ".join(_latex_difference(pair, entry) for pair in entry.differences) or "--")
        lines.append(" & ".join(cells) + r" \\")
        if last:
            lines.append(r"\midrule")
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}"]) + "\n"


def _latex(found: Estimate | None) -> str:
    if found is None:
        return "--"
    return f"${found.mean:.1f}$" if found.sd is None else rf"${found.mean:.1f} \pm {found.sd:.1f}$"


def _latex_difference(pair: Paired, entry: Entry) -> str:
    found = pair.columns[WORST]
    text = f"{found.mean:+.1f}" if found.low is None else f"{found.mean:+.1f}\\ [{found.low:+.1f}, {found.high:+.1f}]"
    name = f" ({escaped(pair.baseline_teacher or 'no teacher')})" if len(entry.differences) > 1 else ""
    return f"${text}${name}"


SPECIAL = {
    "\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}",
    **{character: f"\\{character}" for character in "&%$#_{}"},
}  # fmt: skip


def escaped(text: str) -> str:
    r"""A name as LaTeX prints it letter by letter.

    >>> print(escaped("pgd_at 50%"))
    pgd\_at 50\%
    """
    return "".join(SPECIAL.get(character, character) for character in text)
