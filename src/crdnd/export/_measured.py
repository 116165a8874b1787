"""What an exported file is measured by: equality, verdicts under attack, milliseconds."""

import functools
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, nn

from crdnd.attacks import Attack, Classifier, Round, true_float32
from crdnd.data import ImageData
from crdnd.errors import InputError, first_line
from crdnd.evaluation import Listener, Row, evaluate
from crdnd.evaluation.result import RIGHT, WRONG
from crdnd.export._program import Shape
from crdnd.export.document import Latency, Measured, Share
from crdnd.models import evaluating, fitted
from crdnd.random import Stream
from crdnd.threat import ThreatModel

INPUTS = 1000
PART = 64
LATENCY_BATCHES = (1, 64)
SECONDS, FEWEST_RUNS = 0.5, 7
"""How long a latency is measured, and at least how often."""

# --- equality ---------------------------------------------------------------------------------------------------------


def probe(data: ImageData, shape: Shape, seed: int) -> Tensor:
    """1,000 images (N, *shape): up to half of them of the data, evenly spread, the others uniform noise."""
    ids = torch.linspace(0, len(data) - 1, min(len(data), INPUTS // 2)).long()
    natural = fitted(data.batch(ids)[0].cpu().float(), shape)
    noise = Stream.of("export", seed, ids=torch.arange(INPUTS - len(ids))).uniform(shape)
    return torch.cat([natural, noise])


def largest_difference(model: nn.Module, file: nn.Module, x: Tensor, *, any_size: bool = True) -> float:
    """The largest difference of a logit between a model and its file; batches of 1, 2, 61 and 64 are asked for.

    Args:
        model: images of its own shape -> logits.
        file: likewise, or of any size.
        x: images (N, C, H, W) of the model's shape.
        any_size: whether a few images of other sizes are compared too.

    Raises:
        InputError: the file cannot process a batch, or answers with another shape.
    """
    shape = (x.shape[1], x.shape[2], x.shape[3])
    sizes = [1, 2, PART - 3, *[PART] * (len(x) // PART)]
    parts = [part for part in x.split([*sizes[:-1], len(x) - sum(sizes[:-1])]) if len(part)]
    if any_size:
        height, width = shape[1:]
        parts += [fitted(x[:PART], (shape[0], *size)) for size in ((height + 5, 2 * width), (2 * height + 1, width))]
    largest = 0.0
    with true_float32(), evaluating(model), torch.no_grad():
        for part in parts:
            expected = model(fitted(part, shape))
            try:
                found = file(part)
            except (RuntimeError, ValueError) as error:  # what torch and OnnxModel raise
                raise InputError(f"the file cannot process {len(part)} images: {first_line(error)}") from None
            if found.shape != expected.shape:
                raise InputError(
                    f"the file answers {len(part)} images with shape {tuple(found.shape)} in place of "
                    f"{tuple(expected.shape)}."
                )
            difference = float((found - expected).abs().max())
            largest = max(largest, difference if difference == difference else float("inf"))  # NaN is as far as can be
    return largest


# --- verdicts ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _Shown(Attack):
    """An attack on one model whose images are shown to another one."""

    attack: Attack
    see: Callable[[Tensor, Tensor, Tensor], None]
    """Sample ids (B,), images (B, C, H, W), labels (B,)."""

    def rounds(self, num_classes: int) -> list[Round]:
        """Those of the attack."""
        return [
            replace(
                part,
                search=functools.partial(self._search, part.search),
                go_on=None if part.go_on is None else functools.partial(self._search, part.go_on),
            )
            for part in self.attack.rounds(num_classes)
        ]

    def notes(self, num_classes: int) -> list[str]:
        """Those of the attack."""
        return self.attack.notes(num_classes)

    def settings(self) -> dict[str, str | int | float]:
        """Those of the attack: the protocol is the same."""
        return self.attack.settings()

    def _search(
        self, search: Callable[..., Tensor], model: Classifier, x: Tensor, y: Tensor, threat: ThreatModel,
        stream: Stream, *last: Tensor,
    ) -> Tensor:  # fmt: skip
        found = search(model, x, y, threat, stream, *last)
        self.see(stream.ids, found, y)
        return found


class _ShownOnAll(_Shown):
    """The same for an attack that is judged on all images."""

    judged_on_all: ClassVar[bool] = True


class Differentiable(nn.Module):
    """The logits of a file with the gradients of its twin: what an attack sees of a file that has none of its own.

    An attack on the twin alone would stop where the twin is fooled, a rounding short of the file.
    """

    def __init__(self, file: nn.Module, twin: nn.Module) -> None:
        super().__init__()
        self.twin, self.file = twin, [file]  # a list: its part without gradients is not to be found

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        logits = self.twin(x)
        return logits + (self.file[0](x) - logits).detach()


class Verdicts:
    """Which images a file gets right: the natural ones, those made on the model, and those made on the file itself.

    Args:
        file: images -> logits.
        data: what is measured.
    """

    def __init__(self, file: nn.Module, data: ImageData) -> None:
        self.file, self.data = file, data
        self.columns: dict[str, Tensor] = {}
        """Bool (N,), by `model:` or `twin:` and the attack's name, or `square`; and `clean`."""

    def shown(self, attacks: Mapping[str, Attack]) -> dict[str, Attack]:
        """The attacks such that whatever they find on the model is tried on the file."""
        found: dict[str, Attack] = {}
        for name, attack in attacks.items():
            stands = torch.ones(len(self.data), dtype=torch.bool, device=self.data.device)
            self.columns[f"model:{name}"] = stands
            kind = _ShownOnAll if attack.judged_on_all else _Shown
            see = functools.partial(self._see, stands)
            found[name] = kind(name=name, summary=attack.summary, paper=attack.paper, attack=attack, see=see)
        return found

    def _see(self, stands: Tensor, ids: Tensor, images: Tensor, y: Tensor) -> None:
        with torch.no_grad():
            stands[ids] &= self.file(images).argmax(1) == y

    def attacked(
        self, threat: ThreatModel, square: Attack, attacks: Mapping[str, Attack], twin: nn.Module | None, seed: int,
        listener: Listener | None,
    ) -> None:  # fmt: skip
        """Natural images, Square on the file itself, and with a twin the attacks that need gradients."""
        victim = self.file if twin is None else Differentiable(self.file, twin)
        chosen = {"square": square, **({} if twin is None else {f"twin:{name}": a for name, a in attacks.items()})}
        (row,) = evaluate(victim, self.data, threat=threat, attacks=chosen, seed=seed, listener=listener).rows
        self.columns |= {name: _right(row.verdicts[name]).to(self.data.device) for name in ("clean", *chosen)}

    def text(self, name: str) -> str:
        """A column as a character an image."""
        return "".join(RIGHT if right else WRONG for right in self._column(name).tolist())

    def _column(self, name: str) -> Tensor:
        if name == "worst_case":
            return torch.stack(list(self.columns.values())).all(dim=0)
        return self.columns["clean"] & self.columns[name]

    def measured(self) -> Measured:
        """The counts."""

        def share(name: str) -> Share:
            column = self._column(name)
            return Share.of(int(column.sum()), len(column))

        attacks = {name: share(name) for name in self.columns if name != "clean"}
        return Measured(clean=share("clean"), attacks=attacks, worst_case=share("worst_case"))


def measured_of(row: Row) -> Measured:
    """The counts of a row of results."""

    def share(name: str) -> Share:
        count = row.attacks[name]
        return Share.of(count.correct, count.n)

    clean, worst = (Share.of(count.correct, count.n) for count in (row.clean, row.worst_case))
    return Measured(clean=clean, attacks={name: share(name) for name in row.attacks}, worst_case=worst)


def _right(verdicts: str) -> Tensor:
    return torch.tensor([character == RIGHT for character in verdicts])


# --- milliseconds -----------------------------------------------------------------------------------------------------


def latencies(model: nn.Module, file: nn.Module, x: Tensor) -> list[Latency]:
    """Model and file in turns on this CPU, at the batches of `LATENCY_BATCHES`; x (N, C, H, W) is repeated to fill."""
    found: list[Latency] = []
    with evaluating(model), torch.no_grad():
        for batch in LATENCY_BATCHES:
            part = x.repeat(-(-batch // len(x)), 1, 1, 1)[:batch].contiguous()
            for job in (model, file):
                job(part)
            seconds: dict[str, list[float]] = {"file": [], "model": []}
            end = time.perf_counter() + SECONDS
            while len(seconds["file"]) < FEWEST_RUNS or time.perf_counter() < end:
                for name, job in (("file", file), ("model", model)):
                    begin = time.perf_counter()
                    job(part)
                    seconds[name].append(time.perf_counter() - begin)
            median = {name: 1000 * statistics.median(runs) / batch for name, runs in seconds.items()}
            found.append(
                Latency(
                    batch=batch, file=median["file"], model=median["model"], runs=len(seconds["file"]),
                    threads=torch.get_num_threads(), processor=_processor(),
                )
            )  # fmt: skip
    return found


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
