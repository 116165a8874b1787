"""The report: one HTML file that holds all it needs and asks no network for anything."""

import base64
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined, Template
from markupsafe import Markup
from numpy.typing import NDArray
from PIL import Image

from crdnd.counts import Count
from crdnd.engine.history import Epoch
from crdnd.errors import InputError
from crdnd.evaluation import Example, Results
from crdnd.io import atomic_write_text
from crdnd.report import _charts
from crdnd.report._lines import Line, eps_in_words, lines_of
from crdnd.report.comparison import Comparison
from crdnd.report.leaderboard import leaderboard, passes, signed
from crdnd.report.leaderboard import notes as notes_of
from crdnd.report.leaderboard import title as title_of


def write_report(
    path: Path,
    *,
    title: str,
    results: Results,
    histories: Mapping[str, Sequence[Epoch]],
    gallery: Sequence[Example],
    notes: Sequence[str],
    command: str,
) -> None:
    """Write the report to `path`, completely or not at all.

    Args:
        path: the HTML file; its folder exists.
        title: the page's heading.
        results: what was measured, and how.
        histories: the epochs of each run by the name of its method; may lack runs, or have none.
        gallery: attacked images to show, grouped by sample on the page; may be empty.
        notes: findings, one sentence or more each; may be empty.
        command: what to type to make this file again.

    Raises:
        InputError: there are no results, or an image has other than 1 or 3 channels; no file is written.
    """
    from plotly.offline import get_plotlyjs

    if not results.rows:
        raise InputError("results: there is no row to report.")
    lines = lines_of(results)
    attacks = list(results.protocol.attacks)
    histories = {name: history for name, history in histories.items() if history}
    colours = _charts.colours_of(lines, [*histories, *(item.method for item in gallery)])
    cards: dict[int, list[_Card]] = {}
    for item in gallery:
        cards.setdefault(item.sample, []).append(_card(item))

    page = _template("report.html.j2").render(
        title=title,
        command=command,
        notes=notes,
        protocol=results.protocol,
        eps=eps_in_words,
        table=_table(lines, attacks),
        last=_table([Line(line.label, line.last, None) for line in lines if line.last], attacks),
        colours=colours,
        # Plotly's own code; nothing of the caller's is in it.
        plotly=Markup(get_plotlyjs()),  # noqa: S704
        tradeoff=_charts.clean_against_worst_case(lines, colours),
        per_attack=_charts.attacks_on_one_line(lines, attacks, colours),
        training=_charts.training_curves(histories, colours) if histories else None,
        gallery=cards,
    )
    atomic_write_text(path, page)


def write_comparison(path: Path, comparison: Comparison) -> None:
    """Write the report of a comparison to `path`: its leaderboard, a chart, and how it was made.

    Raises:
        InputError: nothing was measured; no file is written.
    """
    from plotly.offline import get_plotlyjs

    board = leaderboard(comparison)
    colours = _charts.colours_of_methods([entry.objective for entry in board.entries])
    page = _template("comparison.html.j2").render(
        title="Methods compared",
        comparison=comparison,
        board=board,
        heading=title_of(board),
        notes=notes_of(comparison),
        signed=signed,
        passes=passes,
        colours=colours,
        plotly=Markup(get_plotlyjs()),  # noqa: S704
        chart=_charts.clean_against_robust(board, colours),
    )
    atomic_write_text(path, page)


def _template(name: str) -> Template:
    return Environment(
        loader=PackageLoader("crdnd", "report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    ).get_template(name)


@dataclass(frozen=True)
class _Column:
    title: str
    note: str
    count: Callable[[Line], Count | None]
    ranked: bool
    """Whether more is better."""


@dataclass(frozen=True)
class _Cell:
    count: Count | None
    best: bool


@dataclass(frozen=True)
class _TableRow:
    line: Line
    cells: list[_Cell]


@dataclass(frozen=True)
class _Table:
    columns: list[_Column]
    rows: list[_TableRow]


def _table(lines: list[Line], attacks: list[str]) -> _Table:
    columns = [
        _Column("clean", "", lambda line: line.row.clean, ranked=True),
        *(_Column(name, "", lambda line, name=name: line.row.attacks[name], ranked=True) for name in attacks),
        _Column("worst case", "", lambda line: line.row.worst_case, ranked=True),
    ]
    if "pgd_sat" in attacks:
        columns.append(_Column("gap", "pgd_sat − worst case", _gap, ranked=False))  # noqa: RUF001
    if any(line.last for line in lines):
        columns.append(_Column("last checkpoint", "worst case", _last_worst_case, ranked=True))
    cells = [_cells(column, lines) for column in columns]
    return _Table(columns, [_TableRow(line, [column[i] for column in cells]) for i, line in enumerate(lines)])


def _cells(column: _Column, lines: list[Line]) -> list[_Cell]:
    counts = [column.count(line) for line in lines]
    students = [
        count.percent for count, line in zip(counts, lines, strict=True) if count and line.row.role == "student"
    ]
    # The best of one would say nothing.
    best = max(students) if column.ranked and len(students) > 1 else None
    return [
        _Cell(count, best=count is not None and line.row.role == "student" and count.percent == best)
        for count, line in zip(counts, lines, strict=True)
    ]


def _last_worst_case(line: Line) -> Count | None:
    return line.last.worst_case if line.last else None


def _gap(line: Line) -> Count:
    """The samples right under pgd_sat and not in the worst case, which is a subset: a proportion like the others."""
    pgd, worst = line.row.attacks["pgd_sat"], line.row.worst_case
    return Count(correct=pgd.correct - worst.correct, n=pgd.n)


@dataclass(frozen=True)
class _Card:
    item: Example
    natural: str
    perturbation: str
    adversarial: str
    scale: str
    """The perturbation that black and white stand for, such as '0.100'."""


def _card(item: Example) -> _Card:
    natural, adversarial = item.natural.astype(np.float64), item.adversarial.astype(np.float64)
    delta = adversarial - natural
    scale = float(np.abs(delta).max())
    return _Card(
        item=item,
        natural=_png(natural),
        perturbation=_png(0.5 + 0.5 * delta / (scale or 1.0)),
        adversarial=_png(adversarial),
        scale=f"{scale:#.3g}",
    )


def _png(image: NDArray[np.float64]) -> str:
    """A data URI. (C, H, W) in [0, 1], C = 1 or 3."""
    if image.ndim != 3 or image.shape[0] not in (1, 3):
        raise InputError(f"gallery: an image of shape {image.shape} cannot be shown; it must be (1 or 3, H, W).")
    pixels = (255 * image).round().clip(0, 255).astype(np.uint8)
    picture = Image.fromarray(pixels[0] if len(pixels) == 1 else pixels.transpose(1, 2, 0))
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
