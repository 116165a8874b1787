"""A training step of RSLAD beside a plain loop that follows its published description (Zi et al., arXiv 2108.07969).

A step is: the teacher's predictions on x, 10 attack steps from x + 0.001 N(0, 1) on KL(T(x) || S(x')) with the student
in eval mode, its loss in train mode on x and on x', the backward pass, and SGD. The reference is written as the paper
describes it: float32, eager, standard layout, plain modules, input gradients alone in the attack, data already on the
device. Ours is the step of a run, with the levers of a run. Both train their own copy of one student.

`ratio` is the reference's time over ours; `--precision bf16` changes ours alone. At least 1.3 in float32 and 1.6 in
bf16 (where the processor has it) are wanted on two cores of a CPU, 3 on a GPU with `--teacher wrn,depth=34,width=10`.
The batch is the published one; smaller batches win less. Printing is described in _pairs.py.
"""

import argparse
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from _pairs import Timing, finish, interleaved, machine, parser, peak_memory, ratio, table
from torch import Tensor, nn

from crdnd import ThreatModel, create_model
from crdnd.attacks import PROBE
from crdnd.engine.levers import Levers, arithmetic, caller, make_optimizer, student_folding, teaching
from crdnd.engine.settings import LeverSettings, Named, OptimizerSettings, TrainSettings
from crdnd.engine.step import Step
from crdnd.objectives import load_objective
from crdnd.random import Stream

CLASSES = 10
EPS, STEPS, ALPHA = 8 / 255, 10, 5 / 6
LEARNING_RATE, MOMENTUM, WEIGHT_DECAY = 0.1, 0.9, 2e-4
TARGETS = {"fp32": 1.3, "bf16": 1.6}
KEPT = ExitStack()
"""The teachers' contexts, which live as long as the process: one that nobody holds ends at once."""
FOUND: dict[str, str] = {}
"""What became of the levers."""


def divergence(target: Tensor, logits: Tensor) -> Tensor:
    """KL(p || softmax(logits)), summed over classes and samples."""
    return F.kl_div(F.log_softmax(logits, dim=1), target, reduction="sum")


def reference(student: nn.Module, teacher: nn.Module, x: Tensor, y: Tensor, options: argparse.Namespace) -> Callable:
    """The published loop's step; labels play no part in it."""
    student.train()
    teacher.eval()
    optimizer = torch.optim.SGD(student.parameters(), LEARNING_RATE, MOMENTUM, weight_decay=WEIGHT_DECAY)

    def attack(target: Tensor) -> Tensor:
        student.eval()
        x_adv = (x + 0.001 * torch.randn_like(x)).clamp(0, 1)
        for _ in range(STEPS):
            x_adv.requires_grad_(True)
            (gradient,) = torch.autograd.grad(divergence(target, student(x_adv)), x_adv)
            x_adv = x_adv.detach() + EPS / 4 * gradient.sign()
            x_adv = torch.min(torch.max(x_adv, x - EPS), x + EPS).clamp(0, 1)
        student.train()
        return x_adv

    def step() -> None:
        with torch.no_grad():
            target = teacher(x).softmax(dim=1)
        x_adv = attack(target)
        optimizer.zero_grad()
        loss = ALPHA * divergence(target, student(x_adv)) + (1 - ALPHA) * divergence(target, student(x))
        (loss / len(x)).backward()
        optimizer.step()

    return step


def ours(student: nn.Module, teacher: nn.Module, x: Tensor, y: Tensor, options: argparse.Namespace) -> Callable:
    """The step of a run of `options.objective`."""
    values = {"name": "sgd", "learning_rate": LEARNING_RATE, "momentum": MOMENTUM, "nesterov": False}
    settings = TrainSettings(
        objective=Named(name=options.objective), threat=ThreatModel(norm="linf", eps=EPS), precision=options.precision,
        optimizer=OptimizerSettings(**values, weight_decay=WEIGHT_DECAY), tf32=options.tf32,
        levers=LeverSettings(compile=options.compile),
    )  # fmt: skip
    levers = Levers()
    KEPT.enter_context(teaching([teacher], x[:PROBE], settings))
    objective = load_objective(options.objective)(CLASSES)

    def precision() -> AbstractContextManager[object]:
        return torch.autocast(x.device.type, torch.bfloat16) if options.precision == "bf16" else nullcontext()

    run = Step(
        student.train(), teacher, objective, objective.attack, settings.threat, precision,
        folding=student_folding(student, x[:PROBE], settings, levers), call=caller(settings, x.device, levers),
    )  # fmt: skip
    weights = list(student.parameters())
    optimizer = make_optimizer(weights, settings.optimizer, x.device, settings.levers.fused_optimizer, levers)
    FOUND.update(levers.found)
    ids = torch.arange(len(x), device=x.device)

    def step() -> None:
        with arithmetic(settings, x.device):  # not of the reference
            terms, _ = run(x, y, Stream.of("benchmark", ids=ids), 0.5)
            optimizer.zero_grad()
            terms.total.backward()
            optimizer.step()

    return step


LOOPS = {"reference": reference, "ours": ours}


def prepared(name: str, options: argparse.Namespace) -> Callable[[], None]:
    """A few steps of one of the loops, on networks of its own."""
    device = torch.device(options.device)
    draws = torch.Generator().manual_seed(0)
    x = torch.rand(options.batch_size, 3, 32, 32, generator=draws).to(device)
    y = (torch.arange(options.batch_size) % CLASSES).to(device)
    student, teacher = (network(spec, seed).to(device) for seed, spec in enumerate((options.student, options.teacher)))
    step = LOOPS[name](student, teacher, x, y, options)

    def steps() -> None:
        for _ in range(options.steps):
            step()

    return steps


def network(spec: str, seed: int) -> nn.Module:
    """A network such as `wrn,depth=16,width=4`."""
    name, *settings = spec.split(",")
    values = {
        key: int(value) if value.isdigit() else value for key, _, value in (one.partition("=") for one in settings)
    }
    return create_model(name, input_shape=(3, 32, 32), num_classes=CLASSES, seed=seed, **values)


def main() -> None:
    """Measure, then print."""
    options = arguments()
    torch.set_num_threads(options.threads)
    jobs = {name: prepared(name, options) for name in LOOPS}
    timings = interleaved(jobs, repeats=options.repeats, warm_up=options.warm_up, device=options.device)
    memory = {name: peak_memory(partial(prepared, name, options), options.device) for name in LOOPS}
    value = ratio(timings["reference"], timings["ours"])
    finish(*result(options, timings, memory, value), value, as_json=options.json)


def result(
    options: argparse.Namespace, timings: dict[str, Timing], memory: dict[str, int | None], value: float
) -> tuple[dict[str, Any], list[str]]:
    """The document and the lines."""
    facts = machine(options.device)
    target = TARGETS[options.precision]
    document = {
        "benchmark": "step",
        "machine": facts,
        "settings": {key: v for key, v in vars(options).items() if key not in ("json", "device", "threads")},
        "seconds": timings,
        "target": target,
        "met": value >= target,
        "peak_memory_bytes": memory,
        "levers": FOUND,
    }
    rows: list[tuple[object, ...]] = [("loop", f"{options.steps} step(s), median (min to max)", "peak memory")]
    for name, timing in timings.items():
        used = memory[name]
        rows.append((name, timing, "unknown" if used is None else f"{used / 2**20:.0f} MiB"))
    lines = [
        f"RSLAD, {options.student} from {options.teacher}, batch {options.batch_size}, {STEPS} attack steps; reference "
        f"float32, ours {options.precision}; " + ", ".join(f"{key} {fact}" for key, fact in facts.items()),
        *table(rows),
        *(f"{name} {what}" for name, what in FOUND.items()),
        f"target {target} {'met' if value >= target else 'missed'}",
    ]
    return document, lines


def arguments() -> argparse.Namespace:
    """The options."""
    result = loop_parser(__doc__, repeats=7)
    result.set_defaults(objective="rslad")  # what the plain loop does
    result.add_argument("--steps", type=int, default=1, help="steps a round (default %(default)s)")
    return result.parse_args()


def loop_parser(description: str | None, *, repeats: int) -> argparse.ArgumentParser:
    """The options of both loops."""
    result = parser(description, repeats=repeats)
    result.set_defaults(threads=2)
    result.add_argument("--student", default="resnet18", help="architecture[,setting=value...] (default %(default)s)")
    result.add_argument("--teacher", default="wrn,depth=16,width=4", help="likewise (default %(default)s)")
    result.add_argument("--batch-size", type=int, default=128, help="images (default %(default)s)")
    result.add_argument("--precision", choices=list(TARGETS), default="fp32", help="of ours (default %(default)s)")
    result.add_argument("--tf32", action="store_true", help="TF32 in ours, on a GPU")
    result.add_argument("--compile", action="store_true", help="torch.compile in ours")
    return result


if __name__ == "__main__":
    main()
