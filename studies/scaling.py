"""What a training step costs: a model of its operations, fitted to times of this machine, and what it says of GPUs.

1. **Counted.** The step of a run (`engine/step.py`, its optimiser behind it) is run on tensors without numbers (torch's
   meta device), and every operation on the way is taken down: FLOPs of convolutions and products, forwards, for inputs'
   and for weights' gradients; bytes read and written; calls. Nothing is assumed of a method: its passes are those that
   its step makes.
2. **Measured.** The same steps with numbers: processor time of one thread, medians over rounds in turns. They are
   plain: without the levers of a run, so that what is computed is what is counted.
3. **Fitted.** Seconds = sum of counts x constants, by nonnegative least squares of relative errors. Some networks, some
   methods, their pairs and larger steps are kept apart: the model's errors are those on them.
4. **Predicted.** The same counts with constants of a GPU that are assumed, not measured, and a model of what processes
   send each other.

Writes `results/scaling.json`; `python docs/scaling.py` then writes docs/scaling.md. It takes about six minutes of one
quiet core; with `--predict` nothing is measured again.

    python studies/scaling.py
"""

import argparse
import dataclasses
import json
import math
import statistics
import sys
import time
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from scipy.optimize import nnls
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import conv_flop_count, flop_registry

from crdnd import ThreatModel, create_model
from crdnd.engine.step import Step, feature_size
from crdnd.engine.weights import moving_statistics
from crdnd.io import atomic_write_text
from crdnd.models import parse_spec
from crdnd.models._resnet import Bottleneck
from crdnd.models.resnet50 import ResNet50
from crdnd.objectives import Processes, Sizes, load_objective
from crdnd.provenance import commit, package_versions
from crdnd.random import Stream

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "benchmarks"))
from _pairs import machine, peak_memory  # noqa: E402

RESULTS = ROOT / "results" / "scaling.json"
SMALL, SMALL_CLASSES = (3, 32, 32), 10

# --- what a step does -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Work:
    """Counts of a step or of a part of it: FLOPs (two for each multiplication with its addition), bytes, calls."""

    forward: float = 0
    """FLOPs of convolutions and products, forwards."""
    input_gradient: float = 0
    """FLOPs of convolutions, for the gradients of what goes in."""
    weight_gradient: float = 0
    """FLOPs of convolutions, for the gradients of weights."""
    matrix_bytes: float = 0
    """Read and written by convolutions and products."""
    other_bytes: float = 0
    """Read and written by everything else: norms, activations, sums, losses, the attack's own sums."""
    update_bytes: float = 0
    """Read and written by the optimiser."""
    calls: float = 0
    """Operations that compute something, the optimiser's too; on a GPU about as many kernels."""

    def __add__(self, other: "Work") -> "Work":
        return Work(*(a + b for a, b in zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)))

    @property
    def flops(self) -> float:
        """All of them."""
        return self.forward + self.input_gradient + self.weight_gradient


PRODUCTS = {torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.bmm, torch.ops.aten.baddbmm}
MADE_OF_NOTHING = ("aten.empty", "aten.new_empty", "aten.detach", "aten._unsafe_view")


class Counter(TorchDispatchMode):
    """Takes down what the body's operations do, from their shapes alone."""

    def __init__(self) -> None:
        super().__init__()
        self.work = Work()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Do it and take it down."""
        found = func(*args, **(kwargs or {}))
        if not func.is_view and not str(func).startswith(MADE_OF_NOTHING):
            self.work += _work(func, args, kwargs or {}, found)
        return found


def _work(func: Any, args: Any, kwargs: Any, found: Any) -> Work:
    moved = sum(one.nbytes for one in tree_leaves((args, kwargs, found)) if isinstance(one, Tensor))
    packet = func.overloadpacket
    if packet is torch.ops.aten.convolution_backward:
        slope, x, weight, transposed, mask = args[0], args[1], args[2], args[7], args[10]
        flops = conv_flop_count(x.shape, weight.shape, slope.shape, transposed)
        return Work(input_gradient=flops * mask[0], weight_gradient=flops * mask[1], matrix_bytes=moved, calls=1)
    if packet is torch.ops.aten.convolution or packet in PRODUCTS:
        flops = cast("Any", flop_registry[packet])(*args, **kwargs, out_val=found)
        return Work(forward=flops, matrix_bytes=moved, calls=1)
    return Work(other_bytes=moved, calls=1)


@dataclass(frozen=True)
class Run:
    """A run one of whose steps is looked at."""

    objective: str
    student: str
    teacher: str
    batch_size: int
    attack_steps: int = 10
    shape: tuple[int, int, int] = SMALL
    classes: int = SMALL_CLASSES
    samples: int = 50_000


class _Wide(Bottleneck):
    """The bottleneck of a WRN-50-2: twice as wide inside."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__(inputs, width, stride)
        inner = 2 * width
        self.conv1, self.bn1 = nn.Conv2d(inputs, inner, 1, bias=False), nn.BatchNorm2d(inner)
        self.conv2 = nn.Conv2d(inner, inner, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(inner)
        self.conv3 = nn.Conv2d(inner, 4 * width, 1, bias=False)


class WideResNet50(ResNet50):
    """Zagoruyko and Komodakis 2016, as torchvision has it: the robust teacher that is published for ImageNet."""

    block = _Wide


IMAGENET = {"imagenet_resnet50": ResNet50, "imagenet_wrn_50_2": WideResNet50}
"""Networks for large images, which the registry does not have."""


def network(spec: str, shape: tuple[int, int, int] = SMALL, classes: int = SMALL_CLASSES, seed: int = 0) -> nn.Module:
    """A network such as `wrn,depth=16,width=4`, or one of `IMAGENET`."""
    if spec in IMAGENET:
        kind = IMAGENET[spec]
        found = kind(shape[0], classes, kind.Settings())
        found.conv1 = nn.Conv2d(shape[0], 64, 7, stride=2, padding=3, bias=False)
        found.bn1 = cast("Any", nn.Sequential(nn.BatchNorm2d(64), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1)))
        return found
    name, settings = parse_spec(spec)
    return create_model(name, input_shape=shape, num_classes=classes, seed=seed, **settings)


class Heard(Processes):
    """One process that takes down what it would send the others: bytes of gathered rows, and those with gradients."""

    def __init__(self) -> None:
        self.gathered = self.returned = 0
        self.messages = 0

    def gather(self, z: Tensor) -> Tensor:
        """z, as one process has it."""
        self.gathered += z.nbytes
        self.returned += z.nbytes * z.requires_grad
        self.messages += 1 + z.requires_grad
        return z


class Looked:
    """The step of a run, on the device of the moment; `look` and `learn` are its two halves, then comes `update`."""

    def __init__(self, run: Run, device: str) -> None:
        with torch.device(device):
            self.student, self.teacher = (
                network(spec, run.shape, run.classes, seed) for seed, spec in enumerate((run.student, run.teacher))
            )
            self.x = torch.rand(run.batch_size, *run.shape)
            self.y, self.ids = (torch.arange(run.batch_size) % most for most in (run.classes, run.samples))
        self.teacher.eval().requires_grad_(False)
        sizes = Sizes(feature_size(self.student, self.x), feature_size(self.teacher, self.x), run.samples)
        objective = load_objective(run.objective)(run.classes, sizes=sizes).to(device)
        self.processes = objective.processes = Heard()
        attack = objective.attack
        if attack is not None:
            attack = attack.model_copy(update={"steps": run.attack_steps})
        self.step = Step(
            self.student.train(), self.teacher, objective, attack, ThreatModel(eps="8/255"),
            second_teacher=self.teacher,
        )  # fmt: skip
        # As a run has it, but for the fused kernel, which the meta device has not.
        weights = [*self.student.parameters(), *objective.parameters()]
        self.optimizer = torch.optim.SGD(weights, 0.01, 0.9, weight_decay=5e-4, nesterov=True, foreach=True)

    def look(self) -> Any:
        """The attack and the teachers."""
        return self.step.prepare(self.x, self.y, Stream.of("scaling", ids=self.ids), 0.5)

    def learn(self, batch: Any) -> None:
        """The student's views, the loss and the backward pass."""
        self.optimizer.zero_grad()
        self.step.backward(batch)

    def __call__(self) -> None:
        """All of it."""
        self.learn(self.look())
        self.optimizer.step()


@dataclass(frozen=True)
class Counted:
    """A step's work, its passes for each image, and what it keeps and sends. Bytes are those of float32."""

    work: Work
    student_passes: float
    teacher_passes: float
    student_parameters: int
    teacher_parameters: int
    statistics: int
    """Numbers in the student's batch norms that processes average."""
    kept_bytes: int
    """Kept for a backward pass, at most: of the student's views or of a step of the attack."""
    gathered_bytes: int
    """Of this process's rows that the method sends all others; and of those whose gradients come back."""
    returned_bytes: int
    gather_messages: int


def counted(run: Run) -> Counted:
    """What one step of a run does, by running it on tensors without numbers."""
    looked = Looked(run, "meta")
    with Counter() as counter:
        with _kept(looked) as by_attack:
            batch = looked.look()
        with _kept(looked) as by_views:
            looked.learn(batch)
    work = counter.work
    # The buffers of momentum are made in a first step; what counts is the second.
    looked.optimizer.step()
    with Counter() as counter:
        looked.optimizer.step()
    update = counter.work
    work += Work(update_bytes=update.other_bytes + update.matrix_bytes, calls=update.calls)
    attack_steps = looked.step.attack.steps if looked.step.attack is not None else 1
    return Counted(
        work=work,
        student_passes=looked.step.passes.student / run.batch_size,
        teacher_passes=looked.step.passes.teacher / run.batch_size,
        student_parameters=sum(one.numel() for one in looked.student.parameters()),
        teacher_parameters=sum(one.numel() for one in looked.teacher.parameters()) if looked.step.passes.teacher else 0,
        statistics=sum(one.numel() for one in moving_statistics(looked.student)),
        kept_bytes=max(sum(by_attack.values()) // attack_steps, sum(by_views.values())),
        gathered_bytes=looked.processes.gathered,
        returned_bytes=looked.processes.returned,
        gather_messages=looked.processes.messages,
    )


@contextmanager
def _kept(looked: Looked) -> Generator[dict[int, int]]:
    """Bytes of every storage that the body keeps for a backward pass, weights apart."""
    weights = [*looked.student.parameters(), *looked.teacher.parameters()]
    known = {weight.untyped_storage()._cdata for weight in weights}
    found: dict[int, int] = {}
    held: list[Tensor] = []  # a storage that is gone would give its place to another

    def keep(z: Tensor) -> Tensor:
        storage = z.untyped_storage()
        if storage._cdata not in known:
            found[storage._cdata] = storage.nbytes()
            held.append(z.detach())
        return z

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda z: z):
        yield found


# --- times of this machine --------------------------------------------------------------------------------------------

FITTED_NETWORKS = {
    "cnn,width=16": "cnn,width=32",
    "cnn,width=48": "cnn,width=16",
    "cifar_resnet,depth=8": "cifar_resnet,depth=14",
    "cifar_resnet,depth=14": "cnn,width=32",
    "wrn,depth=10,width=2": "cifar_resnet,depth=8",
    "wrn,depth=10,width=4": "wrn,depth=10,width=2",
    "resnet18,width=16": "wrn,depth=10,width=4",
}
"""Students and their teachers."""
OTHER_NETWORKS = {
    "cifar_resnet,depth=20": "resnet34,width=8",
    "wrn,depth=16,width=2": "preact_resnet18,width=16",
    "resnet18,width=32": "wrn,depth=16,width=2",
    "mobilenet_v2": "resnet18,width=32",
}
FITTED_METHODS = ("natural", "kd", "pgd_at", "rslad", "adaad")
OTHER_METHODS = ("trades", "ard", "crdnd", "saad")
BATCH_SIZES = (16, 32, 64)
FEW_STEPS = 3
"""Of the attack, in most of the measured steps: steps are counted, so nothing hangs on their number, and it is
quicker."""


def measured_runs() -> dict[str, list[Run]]:
    """What is measured: what the model is fitted to, and what it is not."""

    def runs(networks: dict[str, str], methods: tuple[str, ...], batches: tuple[int, ...]) -> list[Run]:
        pairs = [(student, teacher, method) for student, teacher in networks.items() for method in methods]
        return [
            Run(method, student, teacher, batches[place % len(batches)], FEW_STEPS)
            for place, (student, teacher, method) in enumerate(pairs)
        ]

    some = dict(list(FITTED_NETWORKS.items())[::2])
    return {
        "fitted": runs(FITTED_NETWORKS, FITTED_METHODS, BATCH_SIZES),
        "other networks": runs(OTHER_NETWORKS, ("pgd_at", "rslad"), (32, 16, 64)),
        "other methods": runs(some, OTHER_METHODS, (32, 64, 16)),
        "other networks and methods": runs(OTHER_NETWORKS, ("ard", "crdnd"), (32, 16, 64)),
        "larger": [
            Run("rslad", "wrn,depth=10,width=4", "wrn,depth=16,width=4", 64),
            Run("rslad", "resnet18", "wrn,depth=16,width=4", 16),
        ],
    }


MEMORY_RUNS = (
    Run("rslad", "resnet18", "wrn,depth=16,width=4", 16),
    Run("rslad", "wrn,depth=10,width=4", "wrn,depth=16,width=4", 64),
    Run("adaad", "wrn,depth=10,width=4", "wrn,depth=16,width=4", 64),
)
"""Whose peak memory is measured."""


def measured(runs: list[Run], rounds: int) -> list[list[float]]:
    """Seconds of processor time of each run's step, round by round, all in turns; a first round does not count."""
    steps = [Looked(run, "cpu") for run in runs]
    found: list[list[float]] = [[] for _ in runs]
    for turn in range(-1, rounds):
        print(f"round {turn + 1} of {rounds}" if turn >= 0 else "warm-up", file=sys.stderr, flush=True)
        for step, times in zip(steps, found, strict=True):
            began = time.process_time()
            step()
            if turn >= 0:
                times.append(time.process_time() - began)
    return found


# --- the fit ----------------------------------------------------------------------------------------------------------

CONSTANTS: dict[str, tuple[str, ...]] = {
    "forward": ("forward",),
    "input_gradient": ("input_gradient",),
    "weight_gradient": ("weight_gradient",),
    "matrix_bytes": ("matrix_bytes",),
    "other_bytes": ("other_bytes", "update_bytes"),
    "calls": ("calls",),
}
"""What one constant each multiplies: seconds for a FLOP, a byte, a call."""


def features(work: dict[str, float]) -> list[float]:
    """What the constants multiply."""
    return [sum(work[part] for part in parts) for parts in CONSTANTS.values()]


def fit(entries: list[dict[str, Any]]) -> dict[str, float]:
    """Constants >= 0 with the least sum of squared relative errors."""
    seconds = np.array([entry["seconds"] for entry in entries])
    counts = np.array([features(entry["work"]) for entry in entries])
    scale = counts.max(axis=0)
    found, _ = nnls(counts / scale / seconds[:, None], np.ones(len(entries)))
    return dict(zip(CONSTANTS, (found / scale).tolist(), strict=True))


def seconds_of(work: dict[str, float], constants: dict[str, float]) -> float:
    """The model."""
    return sum(count * constant for count, constant in zip(features(work), constants.values(), strict=True))


def errors(entries: list[dict[str, Any]]) -> dict[str, Any]:
    """Of the steps' relative errors: median and maximum of their size, and their mean with its sign."""
    found = [entry["error"] for entry in entries]
    sizes = [abs(error) for error in found]
    return {"steps": len(found), "median": statistics.median(sizes), "max": max(sizes), "mean": statistics.mean(found)}


# --- other machines ---------------------------------------------------------------------------------------------------

GPU: dict[str, Any] = {
    "name": "H100 SXM",
    "flops": {"float32": 67e12, "tf32": 494e12, "bf16": 989e12},
    "achieved_flops": [0.3, 0.5],
    "bandwidth": 3.35e12,
    "achieved_bandwidth": [0.6, 0.8],
    "memory": 80e9,
    "call_seconds": [10e-6, 5e-6],
    "node": 8,
    "link": 450e9,
    "network": 50e9,
    "achieved_link": [0.5, 0.8],
    "message_seconds": [20e-6, 10e-6],
    "agree_seconds": [100e-6, 50e-6],
}
"""Assumed: nothing has been measured on one. Peaks are the maker's, dense, in FLOP/s and bytes/s; pairs are the slow
and the fast end of what is assumed to be achieved. `link` joins the GPUs of a node in one direction, `network` is the
one that leaves a node; `message_seconds` and `agree_seconds` are those of a message between two GPUs and two hosts."""
PRECISIONS = tuple(GPU["flops"])
TEACHER_BYTES = {"float32": 4, "tf32": 4, "bf16": 6}
"""Of a number of a frozen teacher."""
COUNTS = (1, 8, 64)
"""Of GPUs."""


@dataclass(frozen=True)
class Workload:
    """A whole training."""

    title: str
    run: Run
    images: int
    epochs: int


WORKLOADS = {
    "cifar100": Workload(
        "WRN-70-16 to ResNet-18, CIFAR-100",
        Run("rslad", "resnet18", "wrn,depth=70,width=16,activation=silu,padding=same", 128, classes=100),
        50_000,
        300,
    ),
    "imagenet": Workload(
        "WRN-50-2 to ResNet-50, ImageNet at 224",
        Run("rslad", "imagenet_resnet50", "imagenet_wrn_50_2", 256, shape=(3, 224, 224), classes=1000),
        1_281_167,
        90,
    ),
}
PREDICTED_METHODS = ("rslad", "crdnd")
COMPARED_METHODS = ("natural", "pgd_at", "trades", "ard", "rslad", "crdnd", "saad", "adaad")


def message_bytes(found: dict[str, Any]) -> int:
    """Of what processes average after the backward pass: gradients and batch norms' statistics, in float32."""
    return 4 * (found["student_parameters"] + found["statistics"])


def link(gpus: int, end: int) -> float:
    """Bytes/s of the slowest link in a ring."""
    return GPU["achieved_link"][end] * (GPU["link"] if gpus <= GPU["node"] else GPU["network"])


def exchange(found: dict[str, Any], gpus: int, end: int) -> dict[str, float]:
    """Seconds that a step of several processes spends in messages between GPUs, by kind.

    A ring moves 2 (p - 1) / p of a message's bytes past every GPU to sum it up, and (p - 1) times a share to gather it;
    its slowest link counts. What a message costs whatever its size is paid 2 log2(p) times, as in a tree.
    """
    speed = link(gpus, end)
    each = 2 * math.log2(gpus) * GPU["message_seconds"][end]
    ring = 2 * (gpus - 1) / gpus
    gathered = (gpus - 1) * found["gathered_bytes"] + ring * gpus * found["returned_bytes"]
    return {
        "gradients": ring * message_bytes(found) / speed + each,
        "pools": gathered / speed + found["gather_messages"] * each,
    }


def gpu_step(found: dict[str, Any], gpus: int, precision: str, end: int) -> dict[str, float]:
    """Seconds of a step on GPUs at the slow (0) or fast (1) end of what is assumed: its parts and the whole.

    The host issues calls while the GPU computes, so the longer of the two counts; messages come behind the backward
    pass and are waited for.
    """
    work = found["work"]
    flops = work["forward"] + work["input_gradient"] + work["weight_gradient"]
    moved = work["matrix_bytes"] + work["other_bytes"]
    if precision == "bf16":  # half the bytes, and every pass makes its copy of the weights: reads 4 bytes, writes 2
        casts = sum(found[f"{who}_passes"] * found[f"{who}_parameters"] for who in ("student", "teacher"))
        moved = moved / 2 + 6 * casts
    moved += work["update_bytes"]
    flops_seconds = flops / (GPU["achieved_flops"][end] * GPU["flops"][precision])
    bytes_seconds = moved / (GPU["achieved_bandwidth"][end] * GPU["bandwidth"])
    host = work["calls"] * GPU["call_seconds"][end] + 2 * math.log2(gpus) * GPU["agree_seconds"][end]
    messages = sum(exchange(found, gpus, end).values())
    whole = max(flops_seconds + bytes_seconds, host) + messages
    return {"flops": flops_seconds, "bytes": bytes_seconds, "host": host, "messages": messages, "step": whole}


def sharded_pass(found: dict[str, Any], gpus: int, end: int) -> float:
    """Seconds in which the weights of a sharded teacher come together for one pass forwards (FSDP, float32)."""
    return (gpus - 1) / gpus * 4 * found["teacher_parameters"] / link(gpus, end)


def memory(found: dict[str, Any], gpus: int, precision: str) -> float:
    """Bytes that a GPU needs at least: weights, gradients, momentum, teacher, what is kept, the message."""
    half = precision == "bf16"  # a pass has its copy of the weights then
    student, teacher = 12 + 2 * half, TEACHER_BYTES[precision]
    state = student * found["student_parameters"] + teacher * found["teacher_parameters"]
    return state + found["kept_bytes"] / (2 if half else 1) + (2 * message_bytes(found) if gpus > 1 else 0)


def largest_teacher(found: dict[str, Any], gpus: int, precision: str) -> float:
    """Parameters of a teacher that still fits beside the rest, if what is kept stays the same."""
    rest = memory(found, gpus, precision) - TEACHER_BYTES[precision] * found["teacher_parameters"]
    return (GPU["memory"] - rest) / TEACHER_BYTES[precision]


def predictions() -> list[dict[str, Any]]:
    """Trainings on 1, 8 and 64 GPUs: with the same batch over all of them, and with the same batch on each."""
    entries: list[dict[str, Any]] = []
    for name, load in WORKLOADS.items():
        for method in PREDICTED_METHODS:
            for gpus, scaling in [(1, "strong"), *((p, kind) for kind in ("strong", "weak") for p in COUNTS[1:])]:
                share = load.run.batch_size // gpus if scaling == "strong" else load.run.batch_size
                found = _as_json(counted(dataclasses.replace(load.run, objective=method, batch_size=share)))
                steps = load.epochs * (load.images // (share * gpus))
                entries.append(
                    {
                        "workload": name, "method": method, "gpus": gpus, "scaling": scaling, "images_per_gpu": share,
                        "steps": steps, "counted": found,
                        "memory": {precision: memory(found, gpus, precision) for precision in PRECISIONS},
                        "largest_teacher": {one: largest_teacher(found, gpus, one) for one in PRECISIONS},
                        "sharded_pass": [sharded_pass(found, gpus, end) for end in (0, 1)],
                        "seconds": {
                            precision: [gpu_step(found, gpus, precision, end) for end in (0, 1)]
                            for precision in PRECISIONS
                        },
                    }
                )  # fmt: skip
    return entries


def methods() -> list[dict[str, Any]]:
    """What a step of each method does for the first workload, the whole batch on each GPU, and its seconds in bf16."""
    run, entries = WORKLOADS["cifar100"].run, list[dict[str, Any]]()
    for name in COMPARED_METHODS:
        found = _as_json(counted(dataclasses.replace(run, objective=name)))
        seconds = {str(gpus): [gpu_step(found, gpus, "bf16", end) for end in (0, 1)] for gpus in COUNTS}
        entries.append({"method": name, "counted": found, "seconds": seconds})
    return entries


def one_core(entries: list[dict[str, Any]], constants: dict[str, float]) -> dict[str, float]:
    """Seconds of each whole training by RSLAD on the core that was measured, by the fitted constants."""
    alone = [one for one in entries if one["gpus"] == 1 and one["method"] == "rslad"]
    return {one["workload"]: one["steps"] * seconds_of(one["counted"]["work"], constants) for one in alone}


# --- all of it --------------------------------------------------------------------------------------------------------


def _as_json(value: Any) -> dict[str, Any]:
    """What comes back from a file: plain lists and numbers."""
    return json.loads(json.dumps(dataclasses.asdict(value)))


def measurements(rounds: int) -> dict[str, Any]:
    """Counts and times of all steps, and peak memory of some."""
    groups = measured_runs()
    flat = [(group, run) for group, runs in groups.items() for run in runs]
    entries = [
        {
            "group": group, "run": _as_json(run), "work": _as_json(counted(run).work), "runs": times,
            "seconds": statistics.median(times),
        }
        for (group, run), times in zip(flat, measured([run for _, run in flat], rounds), strict=True)
    ]  # fmt: skip
    memories = [
        {"run": _as_json(run), "counted": _as_json(counted(run)), "bytes": peak_memory(partial(Looked, run, "cpu"))}
        for run in MEMORY_RUNS
    ]
    return {
        "command": f"python studies/scaling.py --rounds {rounds}", "machine": machine("cpu"), "rounds": rounds,
        "versions": package_versions(), "commit": commit(), "seeds": {"student": 0, "teacher": 1},
        "entries": entries, "memories": memories,
    }  # fmt: skip


def model(entries: list[dict[str, Any]]) -> dict[str, Any]:
    """The constants, and the errors by group; every entry learns its own, predicted over measured minus one."""
    groups = {group: [one for one in entries if one["group"] == group] for group in measured_runs()}
    constants = fit(groups["fitted"])
    for one in entries:
        one["error"] = seconds_of(one["work"], constants) / one["seconds"] - 1
    kept_apart = [one for one in entries if one["group"] != "fitted"]
    found = {group: errors(members) for group, members in groups.items()}
    return {"constants": constants, "errors": found | {"not fitted": errors(kept_apart)}}


def main() -> None:
    """Measure, fit, predict, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="steps of every run that count (default %(default)s)")
    parser.add_argument("--predict", action="store_true", help="measure nothing: take the times in the results' file")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = json.loads(options.results.read_text())["measured"] if options.predict else measurements(options.rounds)
    fitted, predicted = model(found["entries"]), predictions()
    document = {
        "schema": "crdnd.study/1", "study": "scaling", "measured": found, "model": fitted, "gpu": GPU,
        "workloads": {name: _as_json(load) for name, load in WORKLOADS.items()}, "predictions": predicted,
        "methods": methods(), "one_core": one_core(predicted, fitted["constants"]),
    }  # fmt: skip
    atomic_write_text(options.results, json.dumps(document, indent=1) + "\n")
    for group, error in fitted["errors"].items():
        print(f"{group}: {error['steps']} steps, median {error['median']:.1%}, largest {error['max']:.1%}")


if __name__ == "__main__":
    main()
