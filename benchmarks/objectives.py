"""What a training step of each method costs beside RSLAD's, on the digits' networks and at an equal training attack.

A step is attack, views, terms and the backward pass, on a batch of digits: student `cnn` of width 8, teachers of width
32, 10 attack steps on KL(T(x) || S(x')) for every method that attacks at all (a method's own attack may cost more:
`--own-attacks`). `--student` also trains one RSLAD student of 60 epochs and says how long that took.

`ratio` is CRDND's step over RSLAD's; at most 1.10 is wanted. Printing is described in _pairs.py.
"""

import argparse
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from _pairs import finish, interleaved, machine, parser, progress, ratio, table

from crdnd import ThreatModel, create_model, distill, load_data
from crdnd.attacks import PROBE, Folding, frozen
from crdnd.engine.step import Step, feature_size
from crdnd.models import evaluating
from crdnd.objectives import Sizes, TrainingAttack, load_objective, objective_names
from crdnd.random import Stream

THREAT = ThreatModel(norm="linf", eps=0.1)
SHARED = TrainingAttack(loss="kl_teacher", start="gaussian", mode="eval")
FROZEN = ExitStack()
"""The teachers' contexts, which live as long as the process: one that nobody holds ends at once."""
EPOCHS, SECONDS = 60, 8.0
"""Of a student, and how long it may take on one core."""


def jobs(options: argparse.Namespace, names: list[str]) -> dict[str, Callable[[], None]]:
    """A batch's step for each method, each with a student of its own."""
    splits = load_data("digits")
    device = torch.device(options.device)
    shape, classes = splits.train.shape, splits.train.num_classes
    ids = torch.arange(options.batch_size, device=device)
    x, y = splits.train.to(device).batch(ids)

    def network(width: int, seed: int) -> torch.nn.Module:
        return create_model("cnn", input_shape=shape, num_classes=classes, width=width, seed=seed).to(device)

    teacher, second = (network(32, seed).eval() for seed in (1, 2))
    FROZEN.enter_context(frozen(teacher, x[:PROBE]))
    FROZEN.enter_context(frozen(second, x[:PROBE]))
    found: dict[str, Callable[[], None]] = {}
    for name in names:
        student = network(options.width, 0).train()
        sizes = Sizes(feature_size(student, x), feature_size(teacher, x), len(splits.train))
        objective = load_objective(name)(classes, sizes=sizes).to(device)
        attack = objective.attack if options.own_attacks or objective.attack is None else SHARED
        with evaluating(student):
            folding = Folding(student, x[:PROBE])
        step = Step(student, teacher, objective, attack, THREAT, second_teacher=second, folding=folding)

        def job(step: Step = step) -> None:
            for turn in range(options.steps):
                terms, views = step(x, y, Stream.of("benchmark", turn, ids=ids), 0.5)
                terms.total.backward()
                with torch.no_grad():
                    step.objective.observe(views)

        found[name] = job
    return found


def student_seconds(options: argparse.Namespace) -> float:
    """How long one RSLAD student of the digits trains, validations and saves left out."""
    splits = load_data("digits")
    settings: dict[str, Any] = {"input_shape": splits.train.shape, "num_classes": splits.train.num_classes}
    with TemporaryDirectory() as folder:
        run = distill(
            create_model("cnn", width=options.width, seed=0, **settings),
            splits,
            teacher=create_model("cnn", width=32, seed=1, **settings),
            objective="rslad",
            threat=THREAT,
            epochs=EPOCHS,
            augmentation="shift",
            validate_every=5,
            check_teacher=False,  # its weights are random; what it costs is the same
            out=Path(folder) / "run",
        )
    return sum(epoch.seconds for epoch in run.history)


def main() -> None:
    """Measure, then print."""
    options = arguments()
    torch.set_num_threads(options.threads)
    names = options.method or objective_names()
    names = names if "rslad" in names else [*names, "rslad"]
    timings = interleaved(jobs(options, names), repeats=options.repeats, warm_up=options.warm_up, device=options.device)
    over = {name: ratio(timings[name], timings["rslad"]) for name in names}
    value = over.get("crdnd", 1.0)
    document: dict[str, Any] = {
        "benchmark": "objectives",
        "machine": machine(options.device),
        "settings": {key: v for key, v in vars(options).items() if key not in ("json", "device", "threads")},
        "milliseconds": {name: 1000 * timings[name].median / options.steps for name in names},
        "over_rslad": over,
        "target": 1.10,
    }
    rows: list[tuple[object, ...]] = [("method", "a step", "over RSLAD")]
    rows += [(name, f"{document['milliseconds'][name]:.1f} ms", f"{over[name]:.2f}") for name in names]
    attacks = "each method's own" if options.own_attacks else "the same for all"
    lines = [f"Training steps on batches of {options.batch_size} digits; training attacks: {attacks}", *table(rows)]
    if options.student:
        progress(f"training a student of {EPOCHS} epochs")
        document["student_seconds"] = student_seconds(options)
        document["student_target"] = SECONDS
        lines.append(f"an RSLAD student of {EPOCHS} epochs: {document['student_seconds']:.1f} s (target {SECONDS:g} s)")
    finish(document, lines, value, as_json=options.json)


def arguments() -> argparse.Namespace:
    """The options."""
    result = parser(__doc__, repeats=7)
    result.add_argument("--method", nargs="+", help="methods to measure (default: all)")
    result.add_argument("--own-attacks", action="store_true", help="each method against the attack of its paper")
    result.add_argument("--student", action="store_true", help="train a whole student too")
    result.add_argument("--width", type=int, default=8, help="of the student (default %(default)s)")
    result.add_argument("--batch-size", type=int, default=128, help="images (default %(default)s)")
    result.add_argument("--steps", type=int, default=5, help="steps a round (default %(default)s)")
    return result.parse_args()


if __name__ == "__main__":
    main()
