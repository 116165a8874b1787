"""Write the pages of comparisons, docs/<name>.md, from results/<name>/compare.json."""

import json
from pathlib import Path

from crdnd import registry
from crdnd.evaluation import Row, paired_difference
from crdnd.report.comparison import Comparison, Trial, load_comparison
from crdnd.report.leaderboard import WORST, Entry, Estimate, leaderboard, passes
from writing import interval, spread, table

ROOT = Path(__file__).resolve().parent.parent
HEAD = """<!-- Written by docs/comparisons.py from results/{name}/compare.json: change that, then run it again. -->

# {title}

    {command}

{about} Threat model: {threat}.
"""
END = """
Accuracies are percent. With several seeds they are means ± their standard deviation, with 95% t intervals in brackets,
and differences are paired by seed; an interval that holds 0 decides nothing. One seed has no such interval: in brackets
stands the 95% Wilson interval of its images, and that of a difference is paired by image (Agresti and Min 2005): both
say what other images would give, not what other seeds would.
"""
PAGES = {
    "fashion_mnist": (
        "Data that no setting was chosen on: Fashion-MNIST",
        """{seeds} seeds, all 54,000 training images, the first {n} test images. Every method has the settings that it
has by default (`ard` at temperature 1), so that nothing was chosen on these data; the recipe was written before the run
(studies/fashion_mnist.yaml). It planned five seeds; time ended the run when three were complete, before any number was
looked at. Another seed was looked at once before, on 300 images. The teacher is a `cnn` of width 16 by `trades`,
students a `cnn` of width 8, all trained for 3 epochs with 5 attack steps; `trades-ce` is `trades` on images that fool
the cross-entropy, what `crdnd_plus` is without its teacher. All seeds share split and teacher: their intervals say what
other initial weights, orders and starts would give, not other teachers.
Every test image was attacked once, by `rslad-table`: worst case means that all of its attacks failed.""",
    ),
    "digits": (
        "All published methods on the digits",
        """{seeds} seeds, each with its own split (1,147 images for training, 200 for validation, 450 for the test) and
its own teachers, a `cnn` of width 32 each, the robust one by `trades`; students are a `cnn` of width 8.
Every method has the same data, augmentation, epochs, optimiser, schedule and attack steps, and three settings to choose
from (studies/digits.yaml), judged on the validation data of one seed by the worst case of PGD on cross-entropy and on
the margin; the best checkpoint of each run was chosen there too. Every test image was attacked once, by `rslad-table`:
worst case means that FGSM, PGD_SAT, PGD_TRADES, CW-inf and AutoAttack all failed on it.""",
    ),
    "cifar10": (
        "Seven ways to train a small network on real CIFAR-10, on two processor cores",
        """One seed, all 45,000 training images, the first {n} test images. The teacher is a WRN-10-2 by `trades`,
8 epochs ([weights](../weights/wrn-10-2-trades-cifar10/README.md)); students are a `cnn` of width 16, 10 epochs,
attacked with 3 steps in training, two settings each to choose from on validation data. `trades-ce` is `trades` on
images that fool the cross-entropy, what `crdnd_plus` is without its teacher (studies/cifar10.yaml says what else was
left out to fit two cores). It does not rank methods: one seed, small networks, a weak teacher, runs far shorter than
the papers' 300 epochs.
Every test image was attacked once, by `rslad-table`: worst case means that all of its attacks failed.""",
    ),
}


def page(name: str) -> str:
    """The page's text."""
    comparison = load_comparison(results(name))
    protocol = comparison.protocols[0]
    title, about = PAGES[name]
    text = HEAD.format(
        name=name,
        title=title,
        command=f"crdnd compare {comparison.command.partition('compare ')[2]}",
        about=about.format(seeds=len(comparison.spec["seeds"]), n=protocol.n),
        threat=f"{protocol.norm}, eps {protocol.eps:g}",
    )
    text += f"{END}\n{standings(comparison)}"
    text += (
        "\nGap: points by which PGD_TRADES reads above AutoAttack. Passes: evaluations of student + teachers for each\n"
    )
    text += "training image over the whole run.\n"
    if comparison.choices:
        text += f"\n## The settings that were chosen\n\n{choices(comparison)}"
    return text + f"\nCommit {comparison.commit}, torch {comparison.versions.get('torch', '?')}.\n"


def standings(comparison: Comparison, methods: str = "methods") -> str:
    """All methods of a comparison, best first; `methods` is the folder of their pages as seen from the text's."""
    board = leaderboard(comparison)
    names = ["method", "clean", "PGD_SAT", "AutoAttack", "worst case", f"minus `{board.baseline}`", "gap"]
    rows = [
        [
            _linked(entry.objective, methods),
            *(spread(entry.columns[name]) for name in ("clean", "pgd_sat", "autoattack")),
            f"**{entry.columns[WORST].mean:.1f}** {_within(comparison, entry)}",
            _minus(comparison, entry, board.baseline),
            spread(entry.gap) if entry.gap else "-",
            f"{entry.seconds:.0f} ({passes(entry)})",
        ]
        for entry in board.entries
    ]
    return table([*names, "seconds (passes)"], rows)


def results(name: str) -> Path:
    """The comparison that a page tells."""
    return ROOT / "results" / name / "compare.json"


def target(name: str) -> Path:
    """Where a page is written."""
    return ROOT / "docs" / f"{name}.md"


def choices(comparison: Comparison) -> str:
    """The settings that were tried, and the one that was chosen."""
    found = []
    for choice in comparison.choices:
        tried = [f"{json.dumps(trial.settings)}: {_judged(trial)}" for trial in choice.trials]
        if choice.chosen is not None:
            tried[choice.chosen - 1] = f"**{tried[choice.chosen - 1]}**"
        found.append([f"`{choice.objective}`", "; ".join(tried)])
    return table(["method", "trials: natural / robust accuracy on validation data"], found, left=2)


def _judged(trial: Trial) -> str:
    """What a trial reached on validation data."""
    found = trial.validation
    return f"{found.clean.percent:.1f} / {found.robust.percent:.1f}" if found else "diverged"


def _linked(objective: str, methods: str) -> str:
    """The entry's name, with the page of the method that is called so."""
    known = objective in registry.names("objectives")
    return f"[`{objective}`]({methods}/{objective}.md)" if known else f"`{objective}`"


def _minus(comparison: Comparison, entry: Entry, baseline: str | None) -> str:
    """The worst case of a method minus the baseline's; with one seed alone the interval is paired by image."""
    if baseline is not None and entry.objective != baseline and len(comparison.spec["seeds"]) == 1:
        ours, theirs = (_row(comparison, name).stands() for name in (entry.objective, baseline))
        found = paired_difference(ours, theirs)
        return interval(Estimate(len(ours), found.points, None, found.low, found.high))
    return "; ".join(interval(pair.columns[WORST]) for pair in entry.differences) or "-"


def _within(comparison: Comparison, entry: Entry) -> str:
    found = entry.columns[WORST]
    low, high = found.low, found.high
    if low is None or high is None:
        low, high = _row(comparison, entry.objective).worst_case.interval()
    return f"[{low:.1f}, {high:.1f}]"


def _row(comparison: Comparison, objective: str) -> Row:
    """What was measured of a method with the only student, teacher and seed."""
    (row,) = (cell.row for cell in comparison.cells if cell.objective == objective and cell.row)
    return row


if __name__ == "__main__":
    for name in PAGES:
        target(name).write_text(page(name), encoding="utf-8")
