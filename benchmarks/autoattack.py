"""AutoAttack `standard` side by side: crdnd against pyautoattack, the official implementation, on one model.

Models: `cnn` (default) is trained for a minute by adversarial training on the digits, enlarged to 32x32 and in colour
(`--size 8` leaves them 8x8 and grey), so that a realistic share of the images stands. Other models, such as `--model
resnet18 --n 64`, have random weights, batch norms with statistics of images, random colour images of 32x32 and their
own predictions as labels; eps is searched so that about `--stand` of 16 images withstand APGD-T with 10 iterations.
Both tools start from the same images, in batches of the same size, in float32, and both verdicts are shown. They draw
differently, so they may differ in an image or two.

`ratio` is the official implementation's time over ours. The passes that each tool makes are counted in a run of their
own; `model only` is what ours would take if nothing but its passes through the plain model cost time. `--memory`
measures the peak of each in a process of its own. Printing is described in _pairs.py.
"""

import argparse
import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from _pairs import finish, interleaved, machine, parser, peak_memory, progress, ratio, table
from torch import Tensor, nn

from crdnd.attacks import attack_stream
from crdnd.data import ImageData, Splits, load_data
from crdnd.engine import train
from crdnd.evaluation import choose_attacks, evaluate
from crdnd.models import create_model
from crdnd.threat import ThreatModel

SHAPE, CLASSES = (3, 32, 32), 10
DIGITS_EPS = {8: {"linf": 0.1, "l2": 0.5}, 32: {"linf": 4 / 255, "l2": 0.5}}


class Counting(nn.Module):
    """Counts the images that pass through a model, with and without a graph."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.with_graph = self.without_graph = 0

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        if torch.is_grad_enabled() and x.requires_grad:
            self.with_graph += len(x)
        else:
            self.without_graph += len(x)
        return self.network(x)


def trained(options: argparse.Namespace) -> tuple[nn.Module, ImageData, float]:
    """A small network that adversarial training has made somewhat robust, and test images."""
    splits = load_data("digits")
    if splits.test is None:
        raise RuntimeError("the digits have a test split")
    parts = [sized(part, options.size) for part in (splits.train, splits.validation, splits.test)]
    eps = DIGITS_EPS[options.size][options.norm]
    settings = {"input_shape": parts[0].shape, "num_classes": CLASSES, "width": options.width or 8}
    with TemporaryDirectory() as folder:
        run = train(
            create_model("cnn", seed=options.seed, **settings),
            Splits(parts[0], parts[1]),
            objective="pgd_at",
            threat=ThreatModel(norm=options.norm, eps=eps),
            attack={"steps": 3, "step": 0.5},
            epochs=20,
            seed=options.seed,
            out=Path(folder) / "run",
        )
    return run.model.eval(), parts[2].subset(torch.arange(min(options.n, len(parts[2])))), eps


def sized(data: ImageData, size: int) -> ImageData:
    """The grey 8x8 digits as they are, or enlarged and in colour: ink of any hue on white."""
    if size == 8:
        return data
    x = torch.nn.functional.interpolate(data.x, size=(size, size), mode="bilinear", align_corners=False)
    ink = torch.rand(len(x), 3, 1, 1, generator=torch.Generator().manual_seed(0)) * 0.6
    return ImageData(1 - x * (1 - ink), data.y, data.num_classes, name=f"digits{size}")


def random_network(options: argparse.Namespace) -> tuple[nn.Module, ImageData, float]:
    """A network with random weights, random images, and an eps at which the given share of them stands."""
    settings = {} if options.width is None else {"width": options.width}
    model = create_model(options.model, input_shape=SHAPE, num_classes=CLASSES, seed=options.seed, **settings)
    draws = torch.Generator().manual_seed(options.seed)
    model.train()
    with torch.no_grad():
        for _ in range(20):
            model(torch.rand(16, *SHAPE, generator=draws))
    model.eval()
    x = torch.rand(options.n, *SHAPE, generator=draws)
    with torch.no_grad():
        y = torch.cat([model(part).argmax(1) for part in x.split(options.batch_size)])
    low, high = 0.0, {"linf": 0.2, "l2": 5.0}[options.norm]
    quick = choose_attacks({"apgd_t": {"iterations": 10}})["apgd_t"]
    ids = torch.arange(len(x))[:16]
    for _ in range(8):
        eps = (low + high) / 2
        x_adv = quick(model, x[ids], y[ids], ThreatModel(norm=options.norm, eps=eps), attack_stream(0, ids))
        with torch.no_grad():
            stand = (model(x_adv).argmax(1) == y[ids]).float().mean().item()
        low, high = (eps, high) if stand > options.stand else (low, eps)
    return model, ImageData(x, y, CLASSES, name="random"), high


def task(options: argparse.Namespace) -> tuple[nn.Module, ImageData, ThreatModel]:
    """What both tools attack; the same for the same seed."""
    torch.set_num_threads(options.threads)
    make = trained if options.model == "cnn" else random_network
    model, data, eps = make(options)
    return model.to(options.device), data.to(torch.device(options.device)), ThreatModel(norm=options.norm, eps=eps)


def crdnd(model: nn.Module, data: ImageData, threat: ThreatModel, batch_size: int) -> Callable[[], int]:
    """How many images stand under ours."""
    return lambda: (
        evaluate(model, data, threat=threat, attacks=["autoattack"], batch_size=batch_size).rows[0].worst_case.correct
    )


def official(model: nn.Module, data: ImageData, threat: ThreatModel, batch_size: int) -> Callable[[], int]:
    """How many images stand under the official implementation, called as its users call it."""
    from pyautoattack import AutoAttack

    norm = {"linf": "Linf", "l2": "L2"}[threat.norm]
    x, y = data.batch(torch.arange(len(data), device=data.x.device))

    def run() -> int:
        attack = AutoAttack(model, device=x.device, eps=threat.eps, norm=norm, seed=0, version="standard")
        x_adv, _ = attack.run_standard_evaluation(x, y, batch_size=batch_size)
        with torch.no_grad():
            parts = zip(x_adv.split(batch_size), y.split(batch_size), strict=True)
            return sum(int((model(part).argmax(1) == labels).sum()) for part, labels in parts)

    return run


TOOLS = {"crdnd": crdnd, "official": official}


def prepared(name: str, options: argparse.Namespace) -> Callable[[], int]:
    """One tool's job, for a process of its own."""
    return TOOLS[name](*task(options), options.batch_size)


def seconds_per_image(model: nn.Module, data: ImageData, batch_size: int) -> tuple[float, float]:
    """What a pass with input gradient costs, and one without, in the plain model."""
    x = data.batch(torch.arange(min(batch_size, len(data)), device=data.x.device))[0]

    def with_graph() -> None:
        leaf = x.detach().requires_grad_(True)
        torch.autograd.grad(model(leaf).sum(), leaf)

    def without() -> None:
        with torch.no_grad():
            model(x)

    timings = interleaved({"with": with_graph, "without": without}, repeats=10, device=x.device)
    return timings["with"].median / len(x), timings["without"].median / len(x)


def main() -> None:
    """Measure, then print."""
    logging.disable(logging.WARNING)
    options = arguments()
    progress("preparing the model")
    model, data, threat = task(options)
    found: dict[str, int] = {}
    jobs = {
        name: partial(_keep, found, name, tool(model, data, threat, options.batch_size)) for name, tool in TOOLS.items()
    }
    timings = interleaved(jobs, repeats=options.repeats, warm_up=options.warm_up, device=options.device)
    counts: dict[str, dict[str, int]] = {}
    for name in jobs if options.count else ():
        progress(f"counting the passes of {name}")
        counting = Counting(model)
        TOOLS[name](counting, data, threat, options.batch_size)()
        counts[name] = {"with_graph": counting.with_graph, "without_graph": counting.without_graph}
    memory = {name: peak_memory(partial(prepared, name, options), options.device) for name in jobs if options.memory}
    value = ratio(timings["official"], timings["crdnd"])
    document: dict[str, Any] = {
        "benchmark": "autoattack",
        "machine": machine(options.device),
        "model": options.model,
        "image_shape": data.shape,
        "n": len(data),
        "norm": threat.norm,
        "eps": threat.eps,
        "batch_size": options.batch_size,
        "stand": found,
        "passes": counts,
        "memory": memory,
        "timings": timings,
        "target": {"cnn": 2.0, "resnet18": 1.3}.get(options.model),
    }
    rows = [["", "stand", "time", "passes with gradient", "without", "peak memory"]]
    for name, timing in timings.items():
        passes = counts.get(name, {})
        peak = memory.get(name)
        shown = "-" if peak is None else f"{peak / 2**20:.0f} MiB"
        rows.append(
            [name, f"{found[name]}/{len(data)}", str(timing), f"{passes.get('with_graph', '-')}",
             f"{passes.get('without_graph', '-')}", shown]
        )  # fmt: skip
    lines = [
        f"AutoAttack standard on {options.model}, images {data.shape}, {threat}, batches of {options.batch_size}",
        *table(rows),
    ]
    if counts:
        slow, fast = seconds_per_image(model, data, options.batch_size)
        own = counts["crdnd"]
        estimate = slow * own["with_graph"] + fast * own["without_graph"]
        document["model_only"] = estimate
        document["over_model_only"] = timings["crdnd"].median / estimate
        lines.append(f"model only {estimate:.1f} s; ours takes {timings['crdnd'].median / estimate:.2f} times that")
    finish(document, lines, value, as_json=options.json)


def _keep(found: dict[str, int], name: str, job: Callable[[], int]) -> None:
    found[name] = job()


def arguments() -> argparse.Namespace:
    """The options."""
    result = parser(__doc__, repeats=3)
    result.add_argument("--model", default="cnn", help="cnn (trained) or another architecture (default %(default)s)")
    result.add_argument("--width", type=int, help="channels of its first layer")
    result.add_argument("--size", type=int, default=32, choices=(8, 32), help="of the digits (default %(default)s)")
    result.add_argument("--n", type=int, default=256, help="images (default %(default)s)")
    result.add_argument("--norm", default="linf", choices=("linf", "l2"))
    result.add_argument("--batch-size", type=int, default=256, help="images at once (default %(default)s)")
    result.add_argument("--stand", type=float, default=0.3, help="share that stands, for random weights")
    result.add_argument("--seed", type=int, default=0)
    result.add_argument("--memory", action="store_true", help="measure peak memory too")
    result.add_argument("--count", action=argparse.BooleanOptionalAction, default=True, help="count the passes")
    return result.parse_args()


if __name__ == "__main__":
    main()
