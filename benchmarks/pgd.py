"""PGD-10 side by side: crdnd against foolbox, ART and torchattacks, on the CIFAR ResNet-18.

The attack is linf with eps 8/255, ten steps of 2/255 on cross-entropy from the image itself. The network has random
weights and batch norms with statistics of images; images are random, labels the network's own predictions. Each tool
is called as its users call it, on a copy of the network of its own: foolbox ends with one more forward pass for its
verdict, ART converts from and to numpy and ends with two.

crdnd appears twice: `crdnd` runs in the frozen model, as evaluation does, and pays for freezing it at each call, where
an evaluation pays once for all its batches. Freezing gives up where it would change the result; the output says so, and
then the two rows are the same computation. `loop` is the bare loop on the model as it is, as a training step runs it.

`ratio` is the smaller of foolbox's and ART's time over `crdnd`'s (torchattacks' if neither is installed). Parity is the
share of pixels on which a tool agrees with `crdnd` after the whole attack, computed in float64. The share in float32 is
shown beside it and has no target: there the sign of a gradient near 0 is a matter of rounding for any two programs that
add in another order. Printing is described in _pairs.py.
"""

import argparse
import copy
import importlib.util
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from _pairs import Timing, finish, interleaved, machine, parser, peak_memory, progress, ratio, table
from torch import Tensor, nn

from crdnd.attacks import frozen, pgd
from crdnd.losses import cross_entropy
from crdnd.models import create_model
from crdnd.threat import ThreatModel

EPS, STEP, STEPS = 8 / 255, 2 / 255, 10
SHAPE, CLASSES = (3, 32, 32), 10

Attack = Callable[[], Tensor]
"""Runs the attack on images it was made for: () -> (B, C, H, W)."""


def loop(model: nn.Module, x: Tensor, y: Tensor) -> Attack:
    """The package's loop on the model as it is."""
    threat = ThreatModel(norm="linf", eps=EPS)
    return lambda: pgd(lambda z: cross_entropy(model(z), y), x, threat, steps=STEPS, step=STEP / EPS, start="none")


def crdnd(model: nn.Module, x: Tensor, y: Tensor) -> Attack:
    """The package's loop in the frozen model."""
    attack = loop(model, x, y)

    def run() -> Tensor:
        with frozen(model, x[:8]):
            return attack()

    return run


def foolbox(model: nn.Module, x: Tensor, y: Tensor) -> Attack:
    """LinfPGD of foolbox."""
    from foolbox import PyTorchModel
    from foolbox.attacks import LinfPGD

    wrapped = PyTorchModel(model, bounds=(0, 1), device=x.device)
    attack = LinfPGD(abs_stepsize=STEP, steps=STEPS, random_start=False)
    return lambda: attack(wrapped, x, y, epsilons=EPS)[1]


def art(model: nn.Module, x: Tensor, y: Tensor) -> Attack:
    """ProjectedGradientDescentPyTorch of the Adversarial Robustness Toolbox."""
    from art.attacks.evasion import ProjectedGradientDescentPyTorch
    from art.estimators.classification import PyTorchClassifier

    classifier = PyTorchClassifier(
        model,
        loss=nn.CrossEntropyLoss(),
        input_shape=tuple(x.shape[1:]),
        nb_classes=CLASSES,
        clip_values=(0.0, 1.0),
        device_type="gpu" if x.is_cuda else "cpu",
    )
    attack = ProjectedGradientDescentPyTorch(
        classifier, norm="inf", eps=EPS, eps_step=STEP, max_iter=STEPS, batch_size=len(x), verbose=False
    )
    images, labels = x.cpu().numpy(), y.cpu().numpy()
    return lambda: torch.from_numpy(attack.generate(images, labels)).to(x.device)


def torchattacks(model: nn.Module, x: Tensor, y: Tensor) -> Attack:
    """PGD of torchattacks."""
    import torchattacks as package

    attack = package.PGD(model, eps=EPS, alpha=STEP, steps=STEPS, random_start=False)
    return lambda: attack(x, y)


OURS = {"crdnd": crdnd, "loop": loop}
RIVALS = {"foolbox": foolbox, "art": art, "torchattacks": torchattacks}
TARGETS = {"foolbox": 1.3, "art": 1.3, "torchattacks": 1.0}
"""By how much ours should be faster."""
INSTALL = {
    "foolbox": "pip install foolbox",
    "art": "pip install adversarial-robustness-toolbox packaging",
    "torchattacks": "pip install --no-deps torchattacks; pip install requests scipy tqdm",  # torchvision is not needed
}
PARITY = 0.999


class InFloat64(nn.Module):
    """A float64 network for float32 images (B, C, H, W): logits (B, K) in float64."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        return self.network(x.double())


def task(options: argparse.Namespace, dtype: torch.dtype, batch: int) -> tuple[nn.Module, Tensor, Tensor]:
    """The network in eval mode, images (B, 3, 32, 32) in [0, 1] and labels (B,); the same for the same seed."""
    settings = {} if options.width is None else {"width": options.width}
    model = create_model(options.model, input_shape=SHAPE, num_classes=CLASSES, seed=options.seed, **settings)
    draws = torch.Generator().manual_seed(options.seed)
    model = model.to(options.device).train()
    with torch.no_grad():
        # A new network's batch norms believe in mean 0 and variance 1; under them the logits hardly depend on the
        # image. Momentum 0.1 leaves 12% of that after 20 batches.
        for _ in range(20):
            model(torch.rand(16, *SHAPE, generator=draws).to(options.device))
    model = model.to(dtype).eval()
    x = torch.rand(batch, *SHAPE, generator=draws).to(options.device, dtype)
    with torch.no_grad():
        return model, x, model(x).argmax(1)


def prepared(name: str, options: argparse.Namespace) -> Attack:
    """One tool's attack, for a process of its own."""
    model, x, y = task(options, torch.float32, options.batch_size)
    return (OURS | RIVALS)[name](model, x, y)


def parity(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """How far a tool's adversarial images agree with `crdnd`'s, in float64."""
    model, x, y = task(options, torch.float64, min(options.batch_size, options.parity_batch))
    tolerance = 1e-9
    if name == "art":
        # It casts images to float32 whatever it is given. So both get float32 images and a network that computes in
        # float64: the gradients' signs are exact, and pixels are compared as far as float32 goes.
        model, x, tolerance = InFloat64(model).eval(), x.float(), 1e-6
    theirs = (OURS | RIVALS)[name](copy.deepcopy(model), x, y)()
    mine = crdnd(model, x, y)()
    share = agreement(mine, theirs, tolerance)
    return {
        "share": share,
        "tolerance": tolerance,
        "images": str(x.dtype).removeprefix("torch."),
        "moved": (mine != x).double().mean().item(),
        "met": share >= PARITY,
    }


def takes_effect(model: nn.Module, x: Tensor) -> bool:
    """Whether freezing this model speeds anything up, or was given up because the result would not be the same."""
    with frozen(model, x[:8]):
        return any("forward" in vars(module) for module in model.modules())


def agreement(a: Tensor, b: Tensor, tolerance: float) -> float:
    """The share of pixels that are the same up to the tolerance."""
    return ((a - b).abs() <= tolerance).double().mean().item()


def main() -> None:
    """Measure, then print."""
    options = arguments()
    torch.set_num_threads(options.threads)
    missing = [name for name in options.rival if importlib.util.find_spec(name) is None]
    rivals = [name for name in options.rival if name not in missing]
    for name in missing:
        progress(f"{name} is not installed: {INSTALL[name]}")
    if not rivals:
        sys.exit("nothing to compare with: install one of the above.")

    parities: dict[str, dict[str, Any]] = {}
    for name in ("loop", *rivals):
        progress(f"parity with {name}")
        parities[name] = parity(name, options)

    model, x, y = task(options, torch.float32, options.batch_size)
    copies = {name: copy.deepcopy(model) for name in (*OURS, *rivals)}
    attacks = {name: (OURS | RIVALS)[name](copies[name], x, y) for name in copies}
    found: dict[str, Tensor] = {}
    jobs = {name: partial(_keep, found, name, attack) for name, attack in attacks.items()}
    timings = interleaved(jobs, repeats=options.repeats, warm_up=options.warm_up, device=options.device)
    for name in parities:
        parities[name]["share_float32"] = agreement(found["crdnd"], found[name], 1e-6)
    litter = {name: any(p.grad is not None for p in network.parameters()) for name, network in copies.items()}
    memory = {name: peak_memory(partial(prepared, name, options), options.device) for name in copies if options.memory}
    fast = takes_effect(copies["crdnd"], x)
    finish(*result(options, timings, parities, litter, memory, missing, fast), as_json=options.json)


def _keep(found: dict[str, Tensor], name: str, attack: Attack) -> None:
    found[name] = attack()


def result(
    options: argparse.Namespace,
    timings: dict[str, Timing],
    parities: dict[str, dict[str, Any]],
    litter: dict[str, bool],
    memory: dict[str, int | None],
    missing: list[str],
    fast: bool,
) -> tuple[dict[str, Any], list[str], float]:
    """The document, the lines and the ratio."""
    ratios = {name: ratio(timings[name], timings["crdnd"]) for name in timings if name != "crdnd"}
    judged = [name for name in ("foolbox", "art") if name in ratios] or ["torchattacks"]
    value = min(ratios[name] for name in judged)
    facts = machine(options.device)
    document = {
        "benchmark": "pgd",
        "machine": facts,
        "settings": {key: v for key, v in vars(options).items() if key not in ("json", "device", "threads")},
        "frozen_takes_effect": fast,
        "seconds": timings,
        "ratios": {
            name: {"ratio": ratios[name], "target": target, "met": ratios[name] >= target}
            for name, target in TARGETS.items()
            if name in ratios
        },
        "ratios_of_the_loop": {name: ratio(timings[name], timings["loop"]) for name in ratios if name != "loop"},
        "parity": parities,
        "leaves_parameter_gradients": litter,
        "peak_memory_bytes": memory,
        "missing": {name: INSTALL[name] for name in missing},
    }
    rows: list[tuple[object, ...]] = [
        ("tool", "median (min to max)", "over crdnd", "over loop", "target", "parameter gradients")
    ]
    for name, timing in timings.items():
        target = TARGETS.get(name)
        verdict = "" if target is None else f"{target} {'met' if ratios[name] >= target else 'missed'}"
        over = (f"{ratio(timing, timings[one]):.2f}" for one in OURS)
        rows.append((name, timing, *over, verdict, "left behind" if litter[name] else "none"))
    lines = [
        f"PGD-{STEPS}, {options.model}, batch {options.batch_size}, float32; "
        + ", ".join(f"{key} {fact}" for key, fact in facts.items()),
        *table(rows),
        "freezing takes effect" if fast else "freezing was given up on this model: crdnd and loop are the same here",
        *(
            f"parity with {name}: {found['share']:.4%} of pixels within {found['tolerance']:g} ({found['images']} "
            f"images, float64 network), target {PARITY:.1%} {'met' if found['met'] else 'missed'}; "
            f"{found['share_float32']:.4%} in float32"
            for name, found in parities.items()
        ),
        *(f"peak memory of {name}: {used / 2**20:.0f} MiB" for name, used in memory.items() if used is not None),
        *(f"{name} is not installed: {INSTALL[name]}" for name in missing),
    ]
    return document, lines, value


def arguments() -> argparse.Namespace:
    """What the command line says."""
    result = parser(__doc__, repeats=5)
    result.add_argument("--model", default="resnet18", help="an architecture of crdnd (default %(default)s)")
    result.add_argument("--width", type=int, help="its width (default: its own)")
    result.add_argument("--batch-size", type=int, default=64, help="images (default %(default)s)")
    result.add_argument("--parity-batch", type=int, default=16, help="images of the parity check (default %(default)s)")
    result.add_argument("--seed", type=int, default=0, help="of weights and images (default %(default)s)")
    result.add_argument("--rival", nargs="+", choices=list(RIVALS), default=list(RIVALS), help="default: all")
    result.add_argument("--memory", action="store_true", help="measure peak memory too, each tool in its own process")
    return result.parse_args()


if __name__ == "__main__":
    main()
