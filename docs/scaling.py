"""Write docs/scaling.md, what a training costs here and on several GPUs, from results/scaling.json."""

import json
import math
from pathlib import Path
from typing import Any

from writing import table

ROOT = Path(__file__).resolve().parent.parent
RESULTS, PAGE = ROOT / "results" / "scaling.json", ROOT / "docs" / "scaling.md"
PREDICTIONS = "{title}: {images:,} images, {epochs} epochs, batch {batch}"
HEAD = """<!-- Written by docs/scaling.py from results/scaling.json: change that, then run it again. -->

# Beyond one machine, on paper

**No number on this page was measured on a GPU, and no training with several GPUs was run.** Measured are steps on one
core of a CPU; a cost model is fitted to some of them and its errors are those on the others. What is said of GPUs is
the same count of operations with *assumed* constants of an {gpu}: take it as arithmetic, not as experience. Words in
this page's headings say which is which: *counted*, *fitted*, *assumed*, *predicted*.

    python studies/scaling.py            # measures (about six minutes of a quiet core), fits, predicts
    python studies/scaling.py --predict  # fits and predicts again from the times in results/scaling.json
    python docs/scaling.py               # writes this page

## The model

    seconds of a step = c_f F + c_g G + c_w W + c_m M + c_e E + c_n N

| | counted in one step |
|---|---|
| F | FLOPs of convolutions and matrix products, forwards; a multiplication with its addition is two |
| G | FLOPs of convolutions for the gradients of their inputs |
| W | FLOPs of convolutions for the gradients of their weights |
| M | bytes that convolutions and products read and write |
| E | bytes that all else reads and writes: norms, activations, sums, losses, the attack's own sums, the optimiser |
| N | calls of operations |

The counts are not worked out by hand: the step of a run (`engine/step.py`) is run on tensors without numbers, and
every operation is taken down. So passes are those that the method makes, at any batch size. An attack step is F + G
of the student, a view that it learns from is F + G + W, a look of the teacher F. The terms are added, not the larger
one taken, because on a CPU one operation ends before the next begins.

## Constants of this machine (fitted)

{machine}, one thread, processor time, median of {rounds} rounds; float32, without the levers of a run (so that what
is computed is what is counted), nonnegative least squares of relative errors over {fitted} steps.

{constants}
The constants share the cost between them as the fit likes: a rate in this table is not what the hardware does in that
part alone. Used far from what was measured they err more than the next table says.

## Errors (measured)

Relative, of predicted against measured seconds of a step. Only the first row was fitted to. In `other networks` no
network, student or teacher, was in the fit, in `other methods` no method; `larger` are steps with {larger} attack
steps and wide networks.

{errors}
Over all {apart} steps that were not fitted: median {median}, largest {largest}. The worst is {worst}. The same step
took up to {spread} times as long in its slowest round as in its fastest: other programs shared the machine.

## What is sent (counted)

With p processes a step sends:

* **gradients and batch norms' statistics**, one message behind the backward pass, 4 bytes a number. In a ring,

      2 (p - 1) / p x bytes / bandwidth of the slowest link + 2 log2(p) x seconds of a message

  pass every GPU. Nothing is computed meanwhile.
* **pools of contrast**, where the method relates samples: (p - 1) x the bytes of a process's rows to gather them, and
  a ring sum of the gradients of all rows back. `crdnd` on CIFAR-100 with {pool_images} images a GPU: {pool_bytes} of
  rows.
* **two whole numbers from host to host** (whether to stop or to save), in which no GPU takes part.

**An attack sends nothing.** Its passes change no weight, so {attack_student} of the {student} passes of the student of
an `rslad` step, and all of the teacher's, are free of messages: the message of natural training stands beside
{ratio_pgd_at} times (`pgd_at`), {ratio_trades} times (`trades`) and with this teacher {ratio_rslad} times (`rslad`) its
FLOPs. An attack step has no gradients of weights, so ten of them cost {attack_flops} and not ten times the FLOPs of a
step of natural training. So, if its time goes with its FLOPs:

    share of messages = m / (m + r t), where natural training's is m / (m + t)

with m the message's time, t that of the rest of a natural step and r the ratio of the work.

{methods}
Work: FLOPs of a step over those of a step of `natural`; WRN-70-16 to ResNet-18, {method_images} images on every GPU,
bf16. Messages: their share of the step by the assumptions below (the slow to the fast end).

## What is assumed of GPUs

{assumed}
Device time is FLOPs / (share x peak) + bytes / (share x bandwidth); in bf16 bytes of convolutions, norms and
activations are halved, and every pass makes its copy of the weights. The host issues a call in the time given, while
the GPU computes: **step = max(device, host) + messages**. With `--compile` and CUDA graphs the host's part shrinks;
that is not in the numbers. Ranges go from the slow end of all assumptions to their fast end. Nothing is in them of
loading, augmentation, validation (an epoch's is two PGD-10 of the validation images), checkpoints or waiting for one
another.

## Predicted: the same batch over all GPUs

{strong}
`bound` is what takes longest in bf16 at the fast end: FLOPs, bytes, the host's calls or messages. **{few} images on a
GPU leave it idle**: a step costs its calls, {host_share} of it at {most} GPUs, whatever the batch. A GPU more helps
only while its share of the batch takes longer than that. The learning rate is that of the whole batch and stays
([processes.md](processes.md)). Batch norm normalises by its GPU's share: by {few} images there (`sync_batch_norm:
true` normalises by the joined batch, with messages in every layer of every pass in train mode, which are not in the
model).

## Predicted: the same batch on every GPU

{weak}
Efficiency: time of a step on one GPU over that on p, in bf16 at the slow and the fast end. The batch grows with the
GPUs; learning rate and warm-up are then to be scaled by hand, and whether {huge:,} images a step reach the same
accuracy is another question, which nobody has answered here. What is wanted of a cluster is often more runs, not a
quicker one: seeds, methods and trials of a comparison need no messages at all.

## Memory of a GPU (counted)

At least: 12 bytes a number of the student (weights, gradients, momentum), 4 of a teacher, in bf16 2 more of each for
a pass's copy, what is kept for a backward pass (the student's views together, or one step of the attack, which with
`adaad` holds the teacher's maps too), and the joined message twice. It is a lower bound: work space, gradients of
maps and fragments are not in it.

{memory}
Measured beside it on the CPU, in float32:

{memories}
**A teacher that does not fit.** `shard_teacher: true` (FSDP) is not needed for any teacher above. Beside the rest of
the `rslad` run with its whole batch on one GPU of {gpu_memory} there is room for a teacher of {largest_float} numbers
in float32 or {largest_bf16} in bf16, if it kept no more than this one does. Sharded over {most} GPUs a pass of this
WRN-70-16 would first have to gather its weights: {sharded} a pass, {sharded_rslad} for a step of `rslad`, which is
{sharded_share} of its whole step now. `adaad` gathers them in each of its {adaad} passes, and again on the way back.

## One core (predicted with fitted constants)

`rslad` on the core that was measured, without levers: {one_core}. Far outside of what the constants were fitted to.
"""


def page(found: dict[str, Any]) -> str:
    """The page's text."""
    measured, gpu = found["measured"], found["gpu"]
    return HEAD.format(**_fitted(found), **_sent(found), **_predicted(found), machine=measured["machine"]["device"],
        rounds=measured["rounds"], gpu=gpu["name"], assumed=_assumed(gpu), gpu_memory=f"{gpu['memory'] / 1e9:.0f} GB",
    )  # fmt: skip


def _fitted(found: dict[str, Any]) -> dict[str, Any]:
    """Constants and errors."""
    entries, constants, errors = found["measured"]["entries"], found["model"]["constants"], found["model"]["errors"]
    names = {
        "forward": ("F", "FLOP/s"), "input_gradient": ("G", "FLOP/s"), "weight_gradient": ("W", "FLOP/s"),
        "matrix_bytes": ("M", "B/s"), "other_bytes": ("E", "B/s"),
    }  # fmt: skip
    rows = [
        [sign, f"{1e-9 / constants[name]:.3g} G{unit}" if constants[name] else "free (the fit gives it 0)"]
        for name, (sign, unit) in names.items()
    ]
    rows.append(["N", f"{1e6 * constants['calls']:.3g} µs each"])
    groups = {group: error for group, error in errors.items() if group != "not fitted"}
    apart = errors["not fitted"]
    worst = max((one for one in entries if one["group"] != "fitted"), key=lambda one: abs(one["error"]))
    run = worst["run"]
    return {
        "constants": table(["of", "rate"], rows),
        "fitted": errors["fitted"]["steps"],
        "errors": table(
            ["steps", "number", "median", "largest", "mean, signed"],
            [
                [group, str(one["steps"]), _percent(one["median"]), _percent(one["max"]), f"{100 * one['mean']:+.1f}%"]
                for group, one in groups.items()
            ],
        ),
        "larger": max(one["run"]["attack_steps"] for one in entries),
        "apart": apart["steps"], "median": _percent(apart["median"]), "largest": _percent(apart["max"]),
        "worst": f"`{run['objective']}` of `{run['student']}` from `{run['teacher']}` ({100 * worst['error']:+.0f}%)",
        "spread": f"{max(max(one['runs']) / min(one['runs']) for one in entries):.2g}",
    }  # fmt: skip


def _sent(found: dict[str, Any]) -> dict[str, Any]:
    """What is sent, and how little it is beside the work."""
    methods = {one["method"]: one for one in found["methods"]}
    run = found["workloads"]["cifar100"]["run"]
    natural, steps = methods["natural"]["counted"], run["attack_steps"]
    looks = _flops(methods["pgd_at"]["counted"]) - _flops(natural)
    rows = [
        [
            f"`{name}`", f"{one['counted']['student_passes']:.0f} + {one['counted']['teacher_passes']:.0f}",
            f"{_flops(one['counted']) / run['batch_size'] / 1e9:.1f} G", f"{_ratio(one, methods):.1f}",
            *(_range(one["seconds"][gpus], "messages", of="step") for gpus in ("8", "64")),
        ]
        for name, one in methods.items()
    ]  # fmt: skip
    header = ["method", "passes, student + teacher", "FLOPs an image", "work", "messages, 8 GPUs", "64 GPUs"]
    return {
        "pool_images": run["batch_size"], "pool_bytes": _bytes(methods["crdnd"]["counted"]["gathered_bytes"]),
        "attack_student": steps, "student": f"{methods['rslad']['counted']['student_passes']:.0f}",
        "attack_flops": f"{looks / _flops(natural):.1f} times", "methods": table(header, rows),
        "method_images": run["batch_size"], "adaad": f"{methods['adaad']['counted']['teacher_passes']:.0f}",
        **{f"ratio_{name}": f"{_ratio(methods[name], methods):.1f}" for name in ("pgd_at", "trades", "rslad")},
    }  # fmt: skip


def _assumed(gpu: dict[str, Any]) -> str:
    rows = [
        *([f"peak, {name}", f"{peak / 1e12:g} TFLOP/s"] for name, peak in gpu["flops"].items()),
        ["achieved of it", _pair(gpu["achieved_flops"], 100, "%")],
        ["memory's bandwidth", f"{gpu['bandwidth'] / 1e12:g} TB/s"],
        ["achieved of it", _pair(gpu["achieved_bandwidth"], 100, "%")],
        ["issuing a call", _pair(gpu["call_seconds"], 1e6, " µs")],
        [f"link of the {gpu['node']} GPUs of a node, one direction", f"{gpu['link'] / 1e9:g} GB/s"],
        ["link between nodes", f"{gpu['network'] / 1e9:g} GB/s ({8 * gpu['network'] / 1e9:g} Gb/s)"],
        ["achieved of either", _pair(gpu["achieved_link"], 100, "%")],
        ["a message between GPUs, each of 2 log2(p)", _pair(gpu["message_seconds"], 1e6, " µs")],
        ["a message between hosts, each of 2 log2(p)", _pair(gpu["agree_seconds"], 1e6, " µs")],
    ]
    return table([gpu["name"], "assumed: slow to fast end"], rows)


def _predicted(found: dict[str, Any]) -> dict[str, Any]:
    """Trainings on GPUs."""
    entries, loads = found["predictions"], found["workloads"]
    alone = {(one["workload"], one["method"]): one for one in entries if one["gpus"] == 1}
    strong = [one for one in entries if one["scaling"] == "strong"]
    weak = [one for one in entries if one["scaling"] == "weak"]
    crowded = max(strong, key=lambda one: one["gpus"] / one["images_per_gpu"])
    fast = crowded["seconds"]["bf16"][1]
    rslad = alone["cifar100", "rslad"]
    spread = next(one for one in weak if one["workload"] == "cifar100" and one["gpus"] == crowded["gpus"])
    asked = spread["counted"]["teacher_passes"]
    text: dict[str, Any] = {
        "strong": _by_load(strong, loads, ["GPUs", "images a GPU", "float32", "TF32", "bf16", "bound"], _strong_row),
        "weak": _by_load(weak, loads, ["GPUs", "batch", "bf16", "efficiency"], lambda one: _weak_row(one, alone)),
        "few": crowded["images_per_gpu"], "most": crowded["gpus"],
        "host_share": _percent(fast["host"] / fast["step"], 0),
        "huge": max(one["images_per_gpu"] * one["gpus"] for one in weak),
        "largest_float": _count(rslad["largest_teacher"]["float32"]),
        "largest_bf16": _count(rslad["largest_teacher"]["bf16"]),
        "sharded": _seconds(spread["sharded_pass"]),
        "sharded_rslad": _seconds([asked * one for one in spread["sharded_pass"]]),
        "sharded_share": " to ".join(
            sorted(
                _percent(asked * one / step["step"], 0)
                for one, step in zip(spread["sharded_pass"], spread["seconds"]["bf16"], strict=True)
            )
        ),
        "one_core": "; ".join(
            f"{loads[name]['title']}, {seconds / 86400 / 365.25:.2g} years"
            for name, seconds in found["one_core"].items()
        ),
    }  # fmt: skip
    rows = [
        [
            loads[one["workload"]]["title"], f"`{one['method']}`", str(one["gpus"]), str(one["images_per_gpu"]),
            *(f"{one['memory'][name] / 1e9:.1f} GB" for name in ("float32", "bf16")),
        ]
        for one in strong if one["method"] == "rslad"
    ]  # fmt: skip
    text["memory"] = table(["training", "method", "GPUs", "images a GPU", "float32", "bf16"], rows, left=2)
    rows = [
        [
            f"`{one['run']['objective']}`, `{one['run']['student']}` from `{one['run']['teacher']}`, batch "
            f"{one['run']['batch_size']}",
            _bytes(one["counted"]["kept_bytes"] + 8 * one["counted"]["student_parameters"]), _bytes(one["bytes"]),
        ]
        for one in found["measured"]["memories"]
    ]  # fmt: skip
    text["memories"] = table(["a step: kept maps, gradients, momentum", "counted", "growth at the peak"], rows)
    return text


def _by_load(entries: list[dict[str, Any]], loads: dict[str, Any], header: list[str], row: Any) -> str:
    """A table for each training."""
    text = ""
    for name, load in loads.items():
        title = PREDICTIONS.format(**load, batch=load["run"]["batch_size"])
        rows = [[f"`{one['method']}`", *row(one)] for one in entries if one["workload"] == name]
        text += f"**{title}**\n\n{table(['method', *header], rows)}\n"
    return text.removesuffix("\n")


def _strong_row(one: dict[str, Any]) -> list[str]:
    fast = one["seconds"]["bf16"][1]
    device = fast["flops"] + fast["bytes"]
    parts = {"calls": fast["host"]} if fast["host"] > device else {name: fast[name] for name in ("flops", "bytes")}
    parts |= {"messages": fast["messages"]}
    bound = max(parts, key=lambda name: parts[name])
    times = (_time([one["steps"] * end["step"] for end in ends]) for ends in one["seconds"].values())
    return [str(one["gpus"]), str(one["images_per_gpu"]), *times, "FLOPs" if bound == "flops" else bound]


def _weak_row(one: dict[str, Any], alone: dict[Any, dict[str, Any]]) -> list[str]:
    ends, single = one["seconds"]["bf16"], alone[one["workload"], one["method"]]["seconds"]["bf16"]
    shares = sorted(a["step"] / b["step"] for a, b in zip(single, ends, strict=True))
    return [
        str(one["gpus"]), f"{one['gpus'] * one['images_per_gpu']:,}",
        _time([one["steps"] * end["step"] for end in ends]), _pair(shares, 100, "%"),
    ]  # fmt: skip


def _flops(counted: dict[str, Any]) -> float:
    work = counted["work"]
    return work["forward"] + work["input_gradient"] + work["weight_gradient"]


def _ratio(one: dict[str, Any], methods: dict[str, Any]) -> float:
    return _flops(one["counted"]) / _flops(methods["natural"]["counted"])


def _percent(value: float, digits: int = 1) -> str:
    return f"{100 * value:.{digits}f}%"


def _range(ends: list[dict[str, float]], part: str, *, of: str) -> str:
    return _pair(sorted(end[part] / end[of] for end in ends), 100, "%")


def _pair(ends: list[float], scale: float, unit: str) -> str:
    low, high = (f"{scale * end:.3g}" for end in ends)
    return f"{low}{unit}" if low == high else f"{low} to {high}{unit}"


def _time(ends: list[float]) -> str:
    """Hours, or days above three of them."""
    unit, name = (86400, "d") if min(ends) > 3 * 86400 else (3600, "h") if min(ends) > 3600 else (60, "min")
    return _pair(sorted(end / unit for end in ends), 1, f" {name}")


def _seconds(ends: list[float]) -> str:
    return _pair(sorted(ends), 1e3, " ms")


def _bytes(value: float) -> str:
    unit, name = (2**20, "MiB") if value >= 2**20 else (2**10, "KiB")
    return f"{value / unit:.0f} {name}"


def _count(value: float) -> str:
    return f"{value / 10 ** (9 if math.log10(value) >= 9 else 6):.3g} {'billion' if value >= 1e9 else 'million'}"


if __name__ == "__main__":
    PAGE.write_text(page(json.loads(RESULTS.read_text(encoding="utf-8"))), encoding="utf-8")
