"""Write docs/digits.md, the table of all methods on the digits, from results/digits/compare.json."""

import json
from pathlib import Path

from crdnd.report.comparison import Comparison, load_comparison
from crdnd.report.leaderboard import WORST, Entry, Estimate, leaderboard, passes

ROOT = Path(__file__).resolve().parent.parent
RESULTS, PAGE = ROOT / "results" / "digits" / "compare.json", ROOT / "docs" / "digits.md"
HEAD = """<!-- Written by docs/digits.py from results/digits/compare.json: change that, then run it again. -->

# All methods on the digits

    {command}

{seeds} seeds, each with its own split (1,147 images for training, 200 for validation, 450 for the test) and its own
teachers, a `cnn` of width 32 each, the robust one by `trades`; students are a `cnn` of width 8. Threat model: {threat}.
Every method has the same data, augmentation, epochs, optimiser, schedule and attack steps, and three settings to choose
from (studies/digits.yaml), judged on the validation data of one seed by the worst case of PGD on cross-entropy and on
the margin; the best checkpoint of each run was chosen there too. Every test image was attacked once, by `rslad-table`:
worst case means that FGSM, PGD_SAT, PGD_TRADES, CW-inf and AutoAttack all failed on it.

Accuracies are percent, means over seeds ± their standard deviation, with 95% t intervals in brackets; differences are
paired by seed. An interval that holds 0 decides nothing.
"""


def page(comparison: Comparison) -> str:
    """The page's text."""
    board = leaderboard(comparison)
    protocol = board.protocols[0]
    text = HEAD.format(
        command=f"crdnd compare {comparison.command.partition(' compare ')[2]}".strip(),
        seeds=len(comparison.spec["seeds"]),
        threat=f"{protocol.norm}, eps {protocol.eps:g}",
    )
    names = ["method", "clean", "PGD_SAT", "AutoAttack", "worst case", f"minus {board.baseline}", "gap", "seconds"]
    rows = [
        [
            f"[`{entry.objective}`](methods/{entry.objective}.md)",
            *(_spread(entry.columns[name]) for name in ("clean", "pgd_sat", "autoattack")),
            f"**{entry.columns[WORST].mean:.1f}** {_interval(entry.columns[WORST])}",
            _difference(entry),
            _spread(entry.gap) if entry.gap else "-",
            f"{entry.seconds:.0f} ({passes(entry)})",
        ]
        for entry in board.entries
    ]
    text += f"\n{_table([*names[:-1], 'seconds (passes)'], rows)}"
    text += (
        "\nGap: points by which PGD_TRADES reads above AutoAttack. Passes: evaluations of student + teachers for each\n"
    )
    text += "training image over the whole run.\n\n## The settings that were chosen\n\n"
    choices = []
    for choice in comparison.choices:
        tried = [
            f"{json.dumps(trial.settings)}: {trial.validation.robust.percent:.1f}" if trial.validation else "diverged"
            for trial in choice.trials
        ]
        if choice.chosen is not None:
            tried[choice.chosen - 1] = f"**{tried[choice.chosen - 1]}**"
        choices.append([f"`{choice.objective}`", "; ".join(tried)])
    text += _table(["method", "trials: robust accuracy on validation data"], choices)
    return text + f"\nCommit {comparison.commit}, torch {comparison.versions.get('torch', '?')}.\n"


def _table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def _spread(found: Estimate) -> str:
    return f"{found.mean:.1f}" + (f" ± {found.sd:.1f}" if found.sd is not None else "")


def _interval(found: Estimate) -> str:
    return "" if found.low is None else f"[{found.low:.1f}, {found.high:.1f}]"


def _difference(entry: Entry) -> str:
    found = [pair.columns[WORST] for pair in entry.differences]
    return (
        "; ".join(
            f"{one.mean:+.1f}" + ("" if one.low is None else f" [{one.low:+.1f}, {one.high:+.1f}]") for one in found
        )
        or "-"
    )


if __name__ == "__main__":
    PAGE.write_text(page(load_comparison(RESULTS)), encoding="utf-8")
