"""What the scripts of this folder share: tables of Markdown, and numbers with their intervals."""

from collections.abc import Sequence

from crdnd.report.leaderboard import Estimate


def table(header: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """A table whose first columns are words and whose other columns are numbers."""
    lines = [f"| {' | '.join(header)} |", "|" + "---|" * left + "---:|" * (len(header) - left)]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)]) + "\n"


def spread(found: Estimate) -> str:
    """A mean and its standard deviation."""
    return f"{found.mean:.1f}" + (f" ± {found.sd:.1f}" if found.sd is not None else "")


def interval(found: Estimate, digits: int = 1) -> str:
    """A difference with its 95% interval."""
    low, high = found.low, found.high
    within = "" if low is None else f" [{low:+.{digits}f}, {high:+.{digits}f}]"
    return f"{found.mean:+.{digits}f}{within}"
