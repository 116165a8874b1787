"""What the numbers of a table say, in sentences that are worked out from them."""

from collections.abc import Sequence

from crdnd.evaluation.result import Results, Row

GAP_ATTACK = "pgd_sat"


def findings(results: Results) -> list[str]:
    """The best student, the control, and where PGD flatters a model; nothing that the rows do not show."""
    rows = [row for row in results.rows if row.role == "student" and row.checkpoint in ("best", None)]
    found: list[str] = []
    attacked = [row for row in rows if row.method != "natural"]
    if attacked:
        best = max(attacked, key=lambda row: row.worst_case.percent)
        low, high = best.worst_case.interval()
        found.append(
            f"{best.method} stands best: {best.worst_case.percent:.1f}% of {best.n} test images survive every attack "
            f"(95% interval {low:.1f} to {high:.1f}; one seed, so methods whose intervals overlap are not ranked)."
        )
    found += [
        f"{row.method}, the control, is right on {row.clean.percent:.1f}% of natural images and on "
        f"{row.worst_case.percent:.1f}% under attack."
        for row in rows
        if row.method == "natural"
    ]
    return found + _gaps(attacked)


def _gaps(rows: Sequence[Row]) -> list[str]:
    """Where PGD on cross-entropy reads far above the worst case, compared with the other methods."""
    gaps = {row.method: gap(row) for row in rows if GAP_ATTACK in row.attacks}
    if len(gaps) < 3:
        return []
    method, widest = max(gaps.items(), key=lambda item: item[1])
    others = [value for name, value in gaps.items() if name != method]
    if widest < 1.5 * max(others):
        return []
    return [
        f"{method} looks better under {GAP_ATTACK} than it is: its worst case lies {widest:.1f} points lower, that of "
        f"the others {min(others):.1f} to {max(others):.1f}. Cross-entropy attacks are blunt against small logits, "
        "attacks on the margin are not; believe the worst case."
    ]


def gap(row: Row) -> float:
    """Points by which pgd_sat reads above the worst case."""
    return row.attacks[GAP_ATTACK].percent - row.worst_case.percent
