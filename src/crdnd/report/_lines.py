"""Which rows make a line of the report's tables and charts, and what lines, columns and eps are called."""

from collections import Counter, defaultdict
from dataclasses import dataclass

from rich.console import Group
from rich.table import Table
from rich.text import Text

from crdnd.evaluation.result import Results, Row


@dataclass(frozen=True)
class Line:
    """A model as the report shows it."""

    label: str
    """The method, with whatever else tells it apart from the other lines."""
    row: Row
    """The best checkpoint, or the only one there is."""
    last: Row | None
    """The last checkpoint of the same run, where `row` is another one."""


def lines_of(results: Results) -> list[Line]:
    """One line per model, teachers first, otherwise in the order of the results."""
    last: defaultdict[tuple[str, str, str, int | None], list[Row]] = defaultdict(list)
    for row in results.rows:
        if row.checkpoint == "last":
            last[_run(row)].append(row)
    # Two runs can agree in all that a row says of them; they are paired in the order in which they were measured.
    pairs = [(row, last[_run(row)]) for row in results.rows if row.checkpoint != "last"]
    chosen = [(row, rows.pop(0) if rows else None) for row, rows in pairs]
    # A run that was stopped early may have no best checkpoint; it is shown all the same.
    chosen += [(row, None) for rows in last.values() for row in rows]
    chosen.sort(key=lambda pair: pair[0].role != "teacher")
    labels = _labels([row for row, _ in chosen])
    return [Line(label, row, last_row) for label, (row, last_row) in zip(labels, chosen, strict=True)]


def _run(row: Row) -> tuple[str, str, str, int | None]:
    return row.role, row.method, row.model, row.seed


def _labels(rows: list[Row]) -> list[str]:
    labels = [_label(row, rows) for row in rows]
    times = Counter(labels)
    return [
        f"{label} #{row.model_sha256[:6]}" if times[label] > 1 else label
        for label, row in zip(labels, rows, strict=True)
    ]


def _label(row: Row, rows: list[Row]) -> str:
    """The method and, where others share it, the least that tells them apart."""
    details = ["teacher"] if row.role == "teacher" and row.method != "teacher" else []
    namesakes = [other for other in rows if (other.method, other.role) == (row.method, row.role)]
    for key, detail in (("model", row.model), ("seed", "no seed" if row.seed is None else f"seed {row.seed}")):
        alike = [other for other in namesakes if getattr(other, key) == getattr(row, key)]
        if len(alike) < len(namesakes):
            details.append(detail)
        namesakes = alike
    if row.checkpoint == "last":
        details.append("last checkpoint")
    return f"{row.method} ({', '.join(details)})" if details else row.method


def header(name: str) -> str:
    """Break a long attack name where a reader would, so that it does not widen its column."""
    return name if len(name) <= len("pgd_sat") else name.replace("_", "_\n")


def eps_in_words(eps: float) -> str:
    """As people write it, the shorter of both ways.

    >>> eps_in_words(8 / 255), eps_in_words(0.1), eps_in_words(0.2)
    ('8/255', '0.1', '0.2')
    """
    levels, decimal = round(255 * eps), f"{eps:g}"
    is_fraction = levels > 0 and abs(255 * eps - levels) < 1e-6
    return min(decimal, f"{levels}/255", key=len) if is_fraction else decimal


def titled(title: str, table: Table, caption: str) -> Group:
    """A table between its title and its caption, as lines of their own: rich breaks a table's own at its width."""
    return Group(Text(title, style="italic"), table, Text(caption, style="dim italic"))
