"""How many of `--n` killed training runs end in the weights of a run that was left alone. All of them are wanted.

A student learns the digits by CRDND on the CPU in float32, and saves after every step, so that many of the kills
fall into a save. Each run is a process of its own that gets SIGKILL at a random moment of the run's length; the moments
are keyed by `--seed` and the kill's number. Then it goes on to its end, and the SHA-256 of both models that it leaves,
`best` and `last`, are compared with those of the run that nothing happened to. A run that was faster than its kill is
begun anew with the next moment.

`ratio` is the part of the kills with the same weights; below 1 the exit status is 1. Printing is described in
_pairs.py.
"""

import argparse
import multiprocessing
import signal
import sys
import tempfile
import time
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from _pairs import finish, machine, progress, table

from crdnd import ThreatModel, create_model, distill
from crdnd.data import load_data
from crdnd.engine.checkpoint import read_checkpoint
from crdnd.io import sha256
from crdnd.random import Stream

LINUX = sys.platform == "linux"
PROCESSES = multiprocessing.get_context("forkserver" if LINUX else "spawn")
MODELS = ("model.safetensors", "last/model.safetensors")
MORE = 4
"""Moments that are drawn for every kill wanted; some come too late."""


def run(out: Path, threads: int, began: Any = None) -> None:
    """The run that is killed: three epochs, every part of a checkpoint in use."""
    torch.set_num_threads(threads)
    student, teacher = (
        create_model("cnn", input_shape=(1, 8, 8), num_classes=10, width=width, seed=width) for width in (4, 8)
    )
    data = load_data("digits")  # before the run begins: no kill should be spent on imports
    if began is not None:
        began.set()
    distill(
        student,
        data,
        teacher=teacher,
        check_teacher=False,  # it was never trained; what counts here is that the weights are the same
        objective="crdnd",
        threat=ThreatModel(norm="linf", eps=0.1),
        augmentation="shift",
        epochs=3,
        batch_size=64,
        ema=0.9,
        save_every_steps=1,
        out=out,
    )


@dataclass(frozen=True)
class Kill:
    """One kill: when, what stood in the folder, and whether the run ended in the same weights."""

    moment: float
    """As a part of the run's length."""
    step: int
    """That was saved."""
    in_a_save: bool
    """Whether files of an unfinished save were there."""
    equal: bool


def digests(out: Path) -> list[str]:
    """Of the models that a finished run left."""
    return [sha256((out / name).read_bytes()) for name in MODELS]


def started(out: Path, threads: int) -> tuple[Any, float]:
    """A process that has begun with the run, and when it did."""
    began = PROCESSES.Event()
    process = PROCESSES.Process(target=run, args=(out, threads, began))
    process.start()
    while not began.wait(1):
        if not process.is_alive():
            raise RuntimeError("the run died before it began; its error is above.")
    return process, time.monotonic()


def killed(out: Path, threads: int, moment: float, length: float) -> bool:
    """Begin a run and kill it at that moment; False if it was over by then."""
    process, begin = started(out, threads)
    process.join(max(0.0, begin + moment * length - time.monotonic()))
    process.kill()
    process.join()
    return process.exitcode == -signal.SIGKILL


def in_a_save(out: Path) -> bool:
    """Whether a write was torn, or tensors were written to which nothing points yet (or still)."""
    saved = read_checkpoint(out) if out.exists() else None
    written = {path.name for path in out.glob("checkpoint-*.safetensors")}
    return any(out.glob("**/.*.tmp")) or written != ({saved.file} if saved else set())


def one(out: Path, threads: int, moment: float, length: float, expected: list[str]) -> Kill | None:
    """Kill a run, let it go on, and look at what it ends in."""
    if not killed(out, threads, moment, length):
        return None
    saved, torn = (read_checkpoint(out) if out.exists() else None), in_a_save(out)
    process, _ = started(out, threads)
    process.join()
    equal = process.exitcode == 0 and digests(out) == expected
    return Kill(moment=moment, step=saved.step if saved else 0, in_a_save=torn, equal=equal)


def main() -> None:
    """Kill, go on, compare."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--n", type=int, default=100, help="kills (default %(default)s)")
    arguments.add_argument("--seed", type=int, default=0, help="of the moments (default %(default)s)")
    arguments.add_argument("--threads", type=int, default=1, help="torch's (default %(default)s)")
    arguments.add_argument("--json", action="store_true", help="one JSON document on stdout, everything else on stderr")
    chosen = arguments.parse_args()
    torch.set_num_threads(chosen.threads)
    if LINUX:
        PROCESSES.set_forkserver_preload(["crdnd.recipe", "crdnd.evaluation", "torch._dynamo"])
    kills: list[Kill] = []
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        process, begin = started(root / "alone", chosen.threads)
        process.join()
        length, expected = time.monotonic() - begin, digests(root / "alone")
        moments = Stream.of("kills", chosen.seed, ids=torch.arange(MORE * chosen.n)).uniform((1,)).flatten().tolist()
        for number, moment in enumerate(moments):
            kill = one(root / str(number), chosen.threads, moment, length, expected)
            if kill is None:
                continue
            kills.append(kill)
            progress(f"kill {len(kills)} of {chosen.n}: {'same' if kill.equal else 'OTHER'} weights, step {kill.step}")
            if len(kills) == chosen.n:
                break
    equal, torn = sum(kill.equal for kill in kills), sum(kill.in_a_save for kill in kills)
    steps = Counter(kill.step for kill in kills)
    rows = [
        ("kills", len(kills)),
        ("in a save", torn),
        ("saved steps they found", f"{min(steps)} to {max(steps)}, {len(steps)} different"),
        ("seconds of the run", f"{length:.1f}"),
        ("same weights", f"{equal} of {len(kills)}"),
    ]
    document = {
        "n": len(kills),
        "equal": equal,
        "in_a_save": torn,
        "sha256": dict(zip(MODELS, expected, strict=True)),
        "length_seconds": length,
        "kills": [asdict(kill) for kill in kills],
        "machine": machine("cpu"),
    }
    finish(document, table(rows), equal / len(kills), as_json=chosen.json)
    sys.exit(equal != len(kills) or len(kills) < chosen.n)


if __name__ == "__main__":
    main()
