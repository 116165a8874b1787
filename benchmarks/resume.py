"""From the start of a resumed run's process to its first step, and how long a checkpoint keeps a run from learning.

Two runs are begun, saved and stopped: RSLAD on the digits with the small CNN, and a ResNet-18 from a WRN-16-4 on 5,000
made-up images of CIFAR-10's shape in an .npz. Then `crdnd distill` is called again in processes of their own, and the
seconds until its first step begins and ends are measured, part by part; a part does not contain another. Nothing is
compiled. Below 5 s is wanted until the step begins. The processor's time until then is what it would take on a core
that nobody shares, where files are in memory.

Then the run goes on for some steps and saves. The stall is the median seconds of a save, as a part of an epoch at the
median seconds of a step, with the saves that the default interval allows. Below 1% is wanted.

`ratio` is 5 s over the slower of the two starts. Printing is described in _pairs.py.
"""

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

WANTED = 5.0
STALL = 0.01
SAVES = 5
IMAGES = 5000
RUNS: dict[str, dict[str, Any]] = {
    "digits": {
        "model": {"name": "cnn", "width": 8}, "teacher": ("cnn", {"width": 32}), "threat": {"eps": 0.1},
        "augmentation": "shift", "batch_size": 128,
    },
    "resnet18": {
        "model": "resnet18", "teacher": ("wrn", {"depth": 16, "width": 4}), "threat": {"eps": "8/255"},
        "augmentation": "crop_flip", "batch_size": 16,
    },
}  # fmt: skip
PARTS = {
    "data": [("crdnd.recipe", "load_data"), ("crdnd.data", "Splits.sha256")],
    "student": [("crdnd.recipe", "Recipe.build_model")],
    "teacher": [("crdnd.engine.run", "resolve_model"), ("crdnd.engine.run", "weights_sha256")],
    "probes of levers": [("crdnd.engine.loop", "student_folding"), ("crdnd.engine.levers", "frozen")],
    "checkpoint": [("crdnd.engine.loop", "load_checkpoint"), ("crdnd.engine.loop", "Trainer._restore")],
    "room on the disk": [("crdnd.engine.loop", "check_room")],
    "first step": [("crdnd.engine.loop", "Trainer._one_step")],
}
"""What is timed of a start, and where it is found."""


# In a process of its own: what a start is made of


class Clock:
    """Seconds of parts, without what other parts inside of them took."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._inner: list[float] = []

    def time(self, part: str, work: Callable[[], Any]) -> Any:
        """Do it, and add its seconds to the part."""
        began = time.monotonic()
        self._inner.append(0.0)
        try:
            return work()
        finally:
            whole = time.monotonic() - began
            self.seconds[part] = self.seconds.get(part, 0.0) + whole - self._inner.pop()
            if self._inner:
                self._inner[-1] += whole

    def wrap(self, part: str, module: str, name: str) -> None:
        """Time every call of a function, a method or a cached property."""
        owner: Any = sys.modules[module]
        *path, last = name.split(".")
        for one in path:
            owner = getattr(owner, one)
        found = vars(owner)[last]
        if hasattr(found, "func"):  # a cached property keeps what it found
            inner = found.func
            found.func = lambda *given: self.time(part, lambda: inner(*given))
        elif hasattr(found, "__wrapped__"):  # a context manager: its entrance counts
            setattr(owner, last, lambda *given, **named: _Entered(self, part, found(*given, **named)))
        else:
            setattr(owner, last, lambda *given, **named: self.time(part, lambda: found(*given, **named)))


class _Entered:
    def __init__(self, clock: Clock, part: str, context: Any) -> None:
        self.clock, self.part, self.context = clock, part, context

    def __enter__(self) -> Any:
        return self.clock.time(self.part, self.context.__enter__)

    def __exit__(self, *error: Any) -> Any:
        return self.context.__exit__(*error)


def resumed(recipe: Path, started: float) -> None:
    """Go on with a run as the command line does, and end with its first step; prints its parts as JSON."""
    import torch

    threads = int(os.environ["OMP_NUM_THREADS"])
    torch.set_num_threads(threads)
    import crdnd.recipe  # noqa: F401
    from crdnd.cli import main
    from crdnd.engine.loop import Trainer

    clock = Clock()
    clock.seconds["imports"] = time.monotonic() - started
    for part, places in PARTS.items():
        for module, name in places:
            clock.wrap(part, module, name)

    used, step = list[float](), Trainer._one_step  # pyright: ignore[reportPrivateUsage]

    def first(trainer: Trainer) -> None:
        used.append(time.process_time())
        step(trainer)

    def end(trainer: Trainer, *_: Any) -> None:
        whole = time.monotonic() - started
        parts = clock.seconds | {"the rest": whole - sum(clock.seconds.values())}
        print(json.dumps({"step": trainer.step, "parts": parts, "whole": whole, "processor": used[0]}), flush=True)
        os._exit(0)

    Trainer._one_step = first  # pyright: ignore[reportPrivateUsage]
    Trainer._tell = end  # pyright: ignore[reportPrivateUsage]
    main(["distill", "--recipe", str(recipe)])


def begun(recipe: Path) -> None:
    """Begin a run and end it after a save and a step more; then what a step and a save take, as JSON."""
    import torch

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    from crdnd.engine import Progress
    from crdnd.engine.loop import Trainer
    from crdnd.recipe import make_recipe, read_recipe

    class Enough(Exception):  # noqa: N818
        pass

    clock, steps, saves = Clock(), list[float](), list[float]()
    per_epoch = list[int]()
    for part, name, kept in (("step", "_one_step", steps), ("save", "_save", saves)):
        inner = getattr(Trainer, name)

        def timed(trainer: Trainer, part: str = part, inner: Any = inner, kept: list[float] = kept) -> None:
            before = clock.seconds.get(part, 0.0)
            clock.time(part, lambda: inner(trainer))
            kept.append(clock.seconds[part] - before)
            per_epoch[:] = [trainer.steps_per_epoch]
            # As after a validation, which is too long to wait for: the best weights are a third of a checkpoint.
            trainer.best = trainer.best or {k: v.clone() for k, v in trainer.student.state_dict().items()}

        setattr(Trainer, name, timed)

    def listen(progress: Progress) -> None:
        if progress.step == 2 * SAVES + 1:
            raise Enough

    values = read_recipe(recipe) | {"save_every_steps": 2}
    with contextlib.suppress(Enough):
        make_recipe(values).run(listener=listen)
    seconds = {"step": statistics.median(steps[1:]), "save": statistics.median(saves), "saves": saves}
    size = sum(file.stat().st_size for file in Path(values["out"]).glob("checkpoint-*.safetensors"))
    print(json.dumps(seconds | {"steps_per_epoch": per_epoch[0], "bytes": size}), flush=True)


# Here


def prepare(name: str, folder: Path) -> Path:
    """The recipe of a run, with its data and its teacher beside it."""
    import numpy as np
    import torch
    import yaml

    from crdnd import ThreatModel, create_model, provenance
    from crdnd.models import ModelCard, save_model
    from crdnd.random import Stream

    settings = dict(RUNS[name])
    architecture, its = settings.pop("teacher")
    shape, data = (1, 8, 8), "digits"
    if name != "digits":
        shape, data = (3, 32, 32), str(folder / "images.npz")
        ids = torch.arange(IMAGES)
        pixels = Stream.of("benchmark", ids=ids).integers(0, 256, (32, 32, 3)).to(torch.uint8)
        half = {"x_train": pixels.numpy(), "y_train": (ids % 10).numpy()}
        np.savez(data, **half)
    threat = ThreatModel(norm="linf", eps=0.1)
    teacher = create_model(architecture, input_shape=shape, num_classes=10, seed=1, **its)
    card = ModelCard(
        schema="crdnd.model/1", method="pgd_at", role="teacher", seed=1, checkpoint="last", data=name, split_seed=0,
        class_names=tuple("0123456789"), threat=threat, teacher_sha256=None, command="", commit=None,
        versions=provenance.package_versions(),
    )  # fmt: skip
    save_model(folder / "teacher", teacher, card)
    recipe = {
        "schema": "crdnd.recipe/1", "objective": "rslad", "epochs": 100, "data": data, "check_teacher": False,
        "teacher": str(folder / "teacher"), "out": str(folder / "run"), "validate_every": 100, **settings,
    }  # fmt: skip
    recipe["threat"] = {"norm": "linf", **settings["threat"]}
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


def child(job: str, recipe: Path, threads: int) -> dict[str, Any]:
    """What a process of this script prints."""
    arguments = [sys.executable, __file__, "--job", job, "--recipe", str(recipe), "--started", repr(time.monotonic())]
    found = subprocess.run(  # noqa: S603
        arguments, env=os.environ | {"OMP_NUM_THREADS": str(threads)}, stdout=subprocess.PIPE, check=True, text=True
    )
    return json.loads(found.stdout.splitlines()[-1])


def main(options: argparse.Namespace) -> None:
    """Begin, go on, print."""
    from _pairs import finish, machine, progress, table

    found: dict[str, dict[str, Any]] = {}
    for name in RUNS:
        with tempfile.TemporaryDirectory() as folder:
            recipe = prepare(name, Path(folder))
            progress(f"{name}: begun, saved and stopped")
            stall = child("begun", recipe, options.threads)
            starts: list[dict[str, Any]] = []
            for turn in range(-options.warm_up, options.repeats):
                progress(f"{name}: start {turn + 1} of {options.repeats}" if turn >= 0 else f"{name}: warm-up")
                start = child("resumed", recipe, options.threads)
                starts += [start] if turn >= 0 else []
        found[name] = summary(starts, stall)
    rows: list[tuple[object, ...]] = [("seconds (median)", *found)]
    parts = ["imports", *PARTS, "the rest"]
    rows += [(part, *(f"{one['parts'].get(part, 0.0):.2f}" for one in found.values())) for part in parts]
    rows += [
        ("until the first step", *(f"{one['start']:.2f}" for one in found.values())),
        ("of a processor's time", *(f"{one['processor']:.2f}" for one in found.values())),
        ("a step", *(f"{one['step']:.3f}" for one in found.values())),
        ("a save", *(f"{one['save']:.3f}" for one in found.values())),
        ("MiB of a checkpoint", *(f"{one['bytes'] / 2**20:.1f}" for one in found.values())),
        ("seconds of an epoch", *(f"{one['epoch']:.2f}" for one in found.values())),
        ("saves' part of the run", *(f"{one['stall']:.2%}" for one in found.values())),
    ]
    slowest = max(one["start"] for one in found.values())
    most = max(one["stall"] for one in found.values())
    lines = [
        *table(rows),
        f"a start below {WANTED:g} s: {'met' if slowest < WANTED else 'missed'}; "
        f"stalls below {STALL:.0%}: {'met' if most < STALL else 'missed'}",
    ]
    finish({"machine": machine("cpu"), "runs": found}, lines, WANTED / slowest, as_json=options.json)


def summary(starts: list[dict[str, Any]], stall: dict[str, Any]) -> dict[str, Any]:
    """Medians of the starts, and the part of the run that saves take at the default interval."""
    from crdnd.engine.loop import seconds_between_saves

    names = {name for start in starts for name in start["parts"]}
    parts = {name: statistics.median(start["parts"].get(name, 0.0) for start in starts) for name in names}
    epoch = stall["step"] * stall["steps_per_epoch"]
    # At the end of an epoch, once that many seconds are over.
    epochs = int(seconds_between_saves(stall["save"]) // epoch) + 1
    return {
        "start": statistics.median(start["whole"] - start["parts"]["first step"] for start in starts),
        "processor": statistics.median(start["processor"] for start in starts),
        "starts": starts, "parts": parts, "epoch": epoch, "epochs_between_saves": epochs,
        "stall": stall["save"] / (epochs * epoch), **stall,
    }  # fmt: skip


def arguments() -> argparse.Namespace:
    """The options; the last three are for the processes that this one starts."""
    result = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    result.add_argument("--repeats", type=int, default=5, help="starts that count (default %(default)s)")
    result.add_argument("--warm-up", type=int, default=1, help="starts before them (default %(default)s)")
    result.add_argument("--threads", type=int, default=1, help="torch's (default %(default)s)")
    result.add_argument("--json", action="store_true", help="one JSON document on stdout, everything else on stderr")
    result.add_argument("--job", choices=["begun", "resumed"], help=argparse.SUPPRESS)
    result.add_argument("--recipe", type=Path, help=argparse.SUPPRESS)
    result.add_argument("--started", type=float, help=argparse.SUPPRESS)
    return result.parse_args()


if __name__ == "__main__":
    chosen = arguments()
    if chosen.job == "begun":
        begun(chosen.recipe)
    elif chosen.job == "resumed":
        resumed(chosen.recipe, chosen.started)
    else:
        main(chosen)
