"""Seconds of an epoch, extrapolated from at least 20 steps: the published loop of step.py, and ours, method by method.

No epoch is run. One step of the plain loop (RSLAD as its paper describes it) and one of each method as a run takes it
are timed in turns; an epoch is their median times the steps that `--images` and `--batch-size` give. The spread is
that of an epoch all of whose steps were as quick as the quickest tenth of them, or as slow as the slowest. Loading and
augmenting are not in it (data.py tells what they cost), nor are validations and saves.

`ratio` is the plain loop's epoch over ours of the first method. Printing is described in _pairs.py.
"""

import argparse
import statistics
from typing import Any

import torch
from _pairs import Timing, finish, interleaved, machine, ratio, table
from step import FOUND, STEPS, loop_parser, prepared

FEWEST = 20
REFERENCE = "reference"


def main() -> None:
    """Measure steps, extrapolate, print."""
    options = arguments()
    torch.set_num_threads(options.threads)
    jobs = {REFERENCE: prepared("reference", _with(options, "rslad"))}
    jobs |= {name: prepared("ours", _with(options, name)) for name in options.objectives}
    timings = interleaved(jobs, repeats=options.repeats, warm_up=options.warm_up, device=options.device)
    value = ratio(timings[REFERENCE], timings[options.objectives[0]])
    finish(*result(options, timings, value), value, as_json=options.json)


def _with(options: argparse.Namespace, objective: str) -> argparse.Namespace:
    return argparse.Namespace(**vars(options), objective=objective, steps=1)


def extrapolated(timing: Timing, steps: int) -> dict[str, float]:
    """Seconds of so many steps, and of as many quick and slow ones."""
    tenths = statistics.quantiles(timing.runs, n=10, method="inclusive")
    return {"seconds": steps * timing.median, "quick": steps * tenths[0], "slow": steps * tenths[-1]}


def result(options: argparse.Namespace, timings: dict[str, Timing], value: float) -> tuple[dict[str, Any], list[str]]:
    """The document and the lines."""
    facts, steps = machine(options.device), options.images // options.batch_size
    epochs = {name: extrapolated(timing, steps) for name, timing in timings.items()}
    document = {
        "benchmark": "epoch",
        "extrapolated": True,
        "steps_measured": options.repeats,
        "steps_of_an_epoch": steps,
        "machine": facts,
        "settings": {key: v for key, v in vars(options).items() if key not in ("json", "device", "threads")},
        "epoch": epochs,
        "step": timings,
        "ratios": {name: ratio(timings[REFERENCE], timings[name]) for name in options.objectives},
        "levers": FOUND,
    }
    rows: list[tuple[object, ...]] = [
        ("loop", "epoch (quick to slow)", "step, median (min to max)", "reference over it")
    ]
    for name, epoch in epochs.items():
        spread = f"{epoch['seconds']:.0f} s ({epoch['quick']:.0f} to {epoch['slow']:.0f})"
        rows.append((name, spread, timings[name], f"{ratio(timings[REFERENCE], timings[name]):.2f}"))
    lines = [
        f"{options.student} from {options.teacher}, batch {options.batch_size}, {STEPS} attack steps, ours "
        f"{options.precision}; " + ", ".join(f"{key} {fact}" for key, fact in facts.items()),
        f"extrapolated from {options.repeats} steps of each to the {steps} of an epoch of {options.images:,} images: "
        "no epoch was run",
        *table(rows),
    ]
    return document, lines


def arguments() -> argparse.Namespace:
    """The options."""
    result = loop_parser(__doc__, repeats=FEWEST)
    result.add_argument(
        "--objectives", nargs="+", default=["rslad", "crdnd"], help="of at most one teacher (default rslad crdnd)"
    )
    result.add_argument("--images", type=int, default=50_000, help="of the training set (default %(default)s)")
    result.set_defaults(batch_size=32)  # the published 128 take an hour
    options = result.parse_args()
    if options.repeats < FEWEST:
        result.error(f"--repeats {options.repeats}: an epoch is extrapolated from at least {FEWEST} steps.")
    if options.images < options.batch_size:
        result.error(f"--images {options.images}: an epoch has at least one batch of {options.batch_size}.")
    return options


if __name__ == "__main__":
    main()
