"""The results as a table for the terminal."""

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from crdnd.counts import Count
from crdnd.evaluation.result import Results
from crdnd.report._lines import Line, eps_in_words, header, lines_of, titled


def results_table(results: Results) -> Group:
    """One line per model: accuracies in percent with their counts, on clean images, under each attack and under all.

    Names, percentages, counts and intervals stand below each other, because side by side four attacks would not fit
    into 100 columns, and a number that the terminal cuts is worse than a taller table.
    """
    protocol = results.protocol
    lines = lines_of(results)
    with_last = any(line.last for line in lines)

    table = Table(box=box.SIMPLE, padding=0, pad_edge=False, show_edge=False)
    table.add_column(Text("method\nmodel\nparams"), overflow="fold")
    for name in ("clean", *protocol.attacks, "worst\ncase"):
        table.add_column(Text(header(name)), justify="right", overflow="fold")
    if with_last:
        table.add_column(Text("last\nckpt"), justify="right", overflow="fold")

    for line, following in zip(lines, [*lines[1:], None], strict=True):
        row = line.row
        low, high = row.worst_case.interval()
        table.add_row(
            _name(line),
            _cell(row.clean),
            *(_cell(row.attacks[name]) for name in protocol.attacks),
            _cell(row.worst_case).append(f"\n[{low:.1f}, {high:.1f}]", style="dim"),
            *([_last(line)] if with_last else []),
            end_section=following is not None and row.role != following.row.role,
        )
    return titled(
        f"Accuracy in percent on {protocol.data}, {protocol.split} split, n = {protocol.n}; "
        f"{protocol.norm}, eps = {eps_in_words(protocol.eps)}",
        table,
        f"Intervals are 95% Wilson. {'Last checkpoint: its worst case. ' if with_last else ''}"
        f"Protocol {protocol.fingerprint}.",
    )


def _name(line: Line) -> Text:
    params = f"{line.row.params:,}" if line.row.params else "-"  # an ONNX file has none that could be counted
    return Text(line.label, style="bold").append(f"\n{line.row.model}\n{params}", style="not bold dim")


def _cell(count: Count) -> Text:
    return Text(f"{count.percent:.1f}").append(f"\n({count.correct}/{count.n})", style="dim")


def _last(line: Line) -> Text:
    return Text(f"{line.last.worst_case.percent:.1f}" if line.last else "-")
