"""Checks for false security. docs/checks.md states what each one means; the thresholds here are the ones stated there.

A check sees the model, the samples, and the verdicts of the attacks that ran. It answers with a number, or with None
when what it needs was not run.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from crdnd.attacks import Attack, TableAttack, input_gradient, load_attack, true_float32
from crdnd.attacks import Sequence as AttackSequence
from crdnd.counts import Count
from crdnd.data import ImageData
from crdnd.engine.memory import out_of_memory
from crdnd.evaluation._plan import Column
from crdnd.evaluation._runner import FELL, STANDS
from crdnd.evaluation.result import Check
from crdnd.losses import cross_entropy, margin
from crdnd.models import evaluating, normalizes
from crdnd.random import Stream
from crdnd.threat import ThreatModel

SCALES = (3, 10, 30, 100)
LARGE_EPS = 0.5
FEWEST = 3
"""A difference between attacks of fewer images than this raises no alarm."""
AUTOATTACK = "autoattack"
LARGEST_SHARE, LARGEST_GAP = 28.0, 7.0
"""Of the images that can be broken (percent), and of all (points): what cross-entropy may miss on an honest model."""
LOOKED_AT = 256
"""Images on which the checks of outputs and gradients look."""

GRADIENT_ATTACKS = (
    "fgsm", "pgd_sat", "pgd_trades", "cw_inf", "cw_l2", "apgd_ce", "apgd_dlr", "check:apgd_dlr", "apgd_t", "fab_t",
)  # fmt: skip


@dataclass(frozen=True)
class Evidence:
    """What the checks look at."""

    model: nn.Module
    data: ImageData
    threat: ThreatModel
    seed: int
    batch_size: int
    verdicts: Mapping[str, Tensor]
    """For 'clean', attacks, their parts and the columns of `check_columns`: int8 (N,)."""
    gradients: bool
    """Whether the model has any to look at."""

    @property
    def n(self) -> int:
        return len(self.data)

    def points(self, images: float) -> float:
        """Images as percent of all."""
        return 100 * images / self.n

    def stands(self, name: str) -> Tensor:
        """Which samples were right, bool (N,); those that were not attacked because they had fallen were not."""
        return self._of(name) == STANDS

    def fell(self, name: str) -> Tensor:
        """Which samples an attack broke, bool (N,)."""
        return self.stands("clean") & (self._of(name) == FELL)

    def ran(self, *names: str) -> bool:
        """Whether all of these did, by themselves or as a part of AutoAttack."""
        return all(name in self.verdicts or f"{AUTOATTACK}/{name}" in self.verdicts for name in names)

    def _of(self, name: str) -> Tensor:
        return self.verdicts[name if name in self.verdicts else f"{AUTOATTACK}/{name}"]

    def some(self) -> tuple[Tensor, Tensor, Tensor]:
        """Images, labels and ids of some samples that are right, for checks that look at outputs and gradients."""
        ids = self.stands("clean").nonzero()[:, 0][:LOOKED_AT]
        return *self.data.batch(ids), ids


def check_columns(threat: ThreatModel, shape: tuple[int, ...], surrogate: Attack | None) -> list[Column]:
    """What all checks need besides the attacks of the preset `full`."""
    everything, right = (), ("clean",)
    columns = [
        Column("check:uniform_noise", load_attack("uniform_noise"), threat, right),
        *(Column(f"check:pgd_sat_x{scale}", _scaled(scale), threat, everything) for scale in SCALES),
        Column("check:apgd_dlr", load_attack("apgd_dlr"), threat, right),
        Column(
            "check:apgd_ce_1000", _with(load_attack("apgd_ce"), iterations=1000), threat, (f"{AUTOATTACK}/apgd_ce",)
        ),
        Column("check:unbounded", _strong(), _large(threat, shape), right),
    ]
    if surrogate is not None:
        columns.append(Column("check:transfer", surrogate, threat, right))
    return columns


def _with(attack: Attack, **changes: object) -> Attack:
    return dataclasses.replace(attack, **changes)  # pyright: ignore[reportArgumentType]


def _scaled(scale: int) -> Attack:
    def scaled_cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
        return cross_entropy(scale * logits, y)

    # The name is that of the plain attack, so that both begin at the same points.
    return _with(cast("TableAttack", load_attack("pgd_sat")), loss=scaled_cross_entropy)


def _strong() -> Attack:
    parts = (load_attack("apgd_ce"), _with(load_attack("apgd_t"), iterations=20))
    return AttackSequence(name="unbounded", summary="", paper="", parts=parts)


def _large(threat: ThreatModel, shape: tuple[int, ...]) -> ThreatModel:
    """Half of the pixel range in every pixel, or the l2 ball that holds it: every image can be made grey."""
    return ThreatModel(norm=threat.norm, eps=LARGE_EPS * (1 if threat.norm == "linf" else math.sqrt(math.prod(shape))))


def run_checks(evidence: Evidence) -> list[Check]:
    """Every check that has what it needs, in the order of docs/checks.md."""
    looks = _CHECKS if bool(evidence.stands("clean").any()) else (_normalisation,)  # it may be why none is
    with true_float32(), evaluating(evidence.model):
        return [check for look in looks if (check := look(evidence)) is not None]


def verdict(checks: list[Check], *, gradients: bool = True, any_right: bool = True) -> str:
    """'consistent', or 'suspicious because ...' with the numbers that say so, or that nothing is right."""
    alarms = [f"{check.name}: {check.says}" for check in checks if check.suspicious]
    if alarms:
        return f"suspicious because {'; '.join(alarms)}"
    if not any_right:
        return "no image is right, so its robustness was not checked"
    bound = "" if gradients else ", but an upper bound: attacks that need gradients could not run"
    return f"consistent ({len(checks)} checks){bound}"


# --- outputs and gradients --------------------------------------------------------------------------------------------


def _probabilities(evidence: Evidence) -> Check:
    logits = _logits(evidence.model, evidence.some()[0])
    sums = (logits.sum(1) - 1).abs().amax().item()
    found = bool((logits >= 0).all()) and sums < 1e-3
    return Check(
        name="probabilities",
        number=float(found),
        threshold=0.0,
        suspicious=found,
        says="the outputs are probabilities" if found else "the outputs are logits",
        advice="return logits: softmax saturates, and losses lose their gradients",
    )


def _random_outputs(evidence: Evidence) -> Check:
    x, _, _ = evidence.some()
    first, second = _logits(evidence.model, x), _logits(evidence.model, x)
    number = ((first - second).norm() / first.norm().clamp(min=1e-30)).item()
    return _above(
        "random_outputs", number, 1e-4, f"two passes differ by {number:.2g} of the outputs",
        "attack with autoattack_rand, or fix the randomness",
    )  # fmt: skip


def _missing_gradients(evidence: Evidence) -> Check | None:
    if not evidence.gradients:
        return None
    x, y, _ = evidence.some()
    missing = torch.zeros(len(x), dtype=torch.bool, device=x.device)
    for loss in (cross_entropy, margin):
        gradient = _gradient(evidence, loss, x, y).flatten(1)
        missing |= (gradient == 0).all(1) | gradient.isnan().any(1)
    number = 100 * missing.float().mean().item()
    return _above(
        "missing_gradients", number, 1.0, f"{number:.1f}% of the images have an input gradient that is zero or NaN",
        "look for saturation, quantisation or a step without a derivative; attack a differentiable stand-in",
    )  # fmt: skip


def _wrong_gradients(evidence: Evidence) -> Check | None:
    if not evidence.gradients:
        return None
    x, y, ids = evidence.some()
    # Away from the faces of the box, so that both differences stay inside; a little off the images, which may lie on
    # kinks of the network (a row of zeros behind a ReLU).
    step, directions = 1e-3, 4
    x = (0.01 + 0.98 * x).clamp(0.01, 0.99)
    gradient = _gradient(evidence, margin, x, y).nan_to_num(0.0, 0.0, 0.0)
    stream = Stream.of("checks", evidence.seed, ids=ids)
    wrong, total = 0.0, 0.0
    for number in range(directions):
        signs = 2.0 * stream.child("direction", number).integers(0, 2, tuple(x.shape[1:])).to(x.dtype) - 1
        above, below = (margin(_logits(evidence.model, x + way * step * signs), y) for way in (1, -1))
        difference = (above - below) / (2 * step)
        wrong += (difference - (gradient * signs).flatten(1).sum(1)).square().sum().item()
        total += difference.square().sum().item()
    ratio = math.sqrt(wrong / total) if total > 0 else (math.inf if wrong > 0 else 0.0)
    number = min(ratio, 10.0)  # where nothing differs, any gradient is infinitely wrong
    least = "at least " if number < ratio else ""
    return _above(
        "wrong_gradients", number, 0.5, f"gradients miss differences of the margin by {least}{100 * number:.0f}%",
        "look for a detached branch or a made-up derivative; attack a differentiable stand-in",
    )  # fmt: skip


def _normalisation(evidence: Evidence) -> Check:
    parts = torch.arange(evidence.n, device=evidence.data.device).split(evidence.batch_size)
    channels = evidence.data.shape[0]
    total, squares = torch.zeros(2, channels, 1, 1, dtype=torch.float64)
    for ids in parts:  # twice through the images, because all of them may not fit into memory
        x = evidence.data.batch(ids)[0].float()
        total += x.mean((2, 3), keepdim=True).cpu().double().sum(0)
        squares += x.square().mean((2, 3), keepdim=True).cpu().double().sum(0)
    mean = total / evidence.n
    std = (squares / evidence.n - mean.square()).clamp(min=1e-6).sqrt()
    ways: list[Callable[[Tensor], Tensor]] = [
        lambda x: (x - mean.to(x)) / std.to(x),
        lambda x: 2 * x - 1,
        lambda x: 255 * x,
    ]
    natural = int(evidence.stands("clean").sum())
    right = [0] * len(ways)
    for ids in parts:
        x, y = evidence.data.batch(ids)
        for number, way in enumerate(ways):
            right[number] += int((_logits(evidence.model, way(x)).argmax(1) == y).sum())
    gained = max(right) - natural
    number = evidence.points(gained)
    found = _above(
        "normalisation", number, 5.0,
        f"natural accuracy changes by {number:+.1f} points when the images are normalised first",
        "put the normalisation into the model, so that eps means pixels in [0, 1]", images=gained,
    )  # fmt: skip
    # Any change of the images makes a few that were wrong right; and where the model has its normalisation, another
    # one is not what it lacks.
    noise = Count(correct=max(right), n=evidence.n).interval(z=3)[0] <= 100 * natural / evidence.n
    return found.model_copy(update={"suspicious": found.suspicious and not noise and not normalizes(evidence.model)})


# --- attacks against each other ---------------------------------------------------------------------------------------


def _noise(evidence: Evidence) -> Check | None:
    if not evidence.ran("check:uniform_noise", "pgd_sat"):
        return None
    noise, gradient = (int(evidence.fell(name).sum()) for name in ("check:uniform_noise", "pgd_sat"))
    number = evidence.points(noise)
    return Check(
        name="noise",
        number=number,
        threshold=max(1.0, evidence.points(gradient)),
        suspicious=noise >= max(FEWEST, gradient) and number >= 1.0,
        says=f"noise breaks {noise} images, pgd_sat {gradient}",
        advice="gradients are no better than chance; look at missing_gradients and wrong_gradients",
    )


def _one_step_beats_many(evidence: Evidence) -> Check | None:
    if not evidence.ran("fgsm", "pgd_sat"):
        return None
    one, many = evidence.fell("fgsm"), evidence.fell("pgd_sat")
    images = int((one & ~many).sum()) - int((many & ~one).sum())
    number = evidence.points(images)
    return _above(
        "one_step_beats_many", number, 1.0, f"fgsm breaks {images:+d} images more than pgd_sat",
        "use more and smaller steps, and other losses", images=images,
    )  # fmt: skip


def _ce_against_margin(evidence: Evidence) -> Check | None:
    others = [name for name in ("cw_inf", "apgd_dlr", "check:apgd_dlr", "apgd_t") if evidence.ran(name)]
    if not others or not evidence.ran("pgd_sat"):
        return None
    missed = _ce_gap(evidence, others)
    broken = functools.reduce(torch.logical_or, [evidence.fell(name) for name in ("pgd_sat", *others)])
    return _missed_share(
        evidence, "ce_against_margin", missed, int(broken.sum()),
        "it, margin and targeted attacks break",
        "believe margin and targeted attacks: cross-entropy is blunt on this model",
    )  # fmt: skip


def _missed_share(
    evidence: Evidence, name: str, missed: int, broken: int, what: str, advice: str, more: str = ""
) -> Check:
    """Of the images that can be broken, the share that `pgd_sat` misses: free of how many lie near the boundary."""
    share, points = 100 * missed / max(broken, 1), evidence.points(missed)
    return Check(
        name=name,
        number=share,
        threshold=LARGEST_SHARE,
        suspicious=share > LARGEST_SHARE and points > LARGEST_GAP and missed >= FEWEST,
        says=f"cross-entropy (pgd_sat) misses {share:.0f}% of the images that {what} ({points:.1f} points){more}",
        advice=advice,
    )


def _ce_gap(evidence: Evidence, others: list[str]) -> int:
    broken = functools.reduce(torch.logical_or, [evidence.fell(name) for name in others])
    return int((evidence.stands("pgd_sat") & broken).sum())


def _logit_scale(evidence: Evidence) -> Check | None:
    names = [f"check:pgd_sat_x{scale}" for scale in SCALES]
    if not evidence.ran("pgd_sat", *names):
        return None
    plain = int(evidence.stands("pgd_sat").sum())
    scale, lowest = min(
        ((scale, int(evidence.stands(name).sum())) for scale, name in zip(SCALES, names, strict=True)),
        key=lambda pair: pair[1],
    )
    gain = plain - lowest
    others = [name for name in ("cw_inf", "check:apgd_dlr", "apgd_t") if evidence.ran(name)]
    gap = _ce_gap(evidence, others) if others else 0
    more = f", {100 * gain / gap:.0f}% of its distance to margin and targeted attacks" if gap >= FEWEST else ""
    broken = int(evidence.stands("clean").sum()) - lowest
    return _missed_share(
        evidence, "logit_scale", gain, broken, f"it breaks on logits times {scale}",
        "believe losses without a scale, such as DLR or the margin", more,
    )  # fmt: skip


def _not_converged(evidence: Evidence) -> Check | None:
    return _falls_to(
        evidence, "not_converged", "check:apgd_ce_1000", ["apgd_ce"], 1.0,
        "fall between 100 and 1,000 iterations of apgd_ce", "use more iterations and restarts",
    )  # fmt: skip


def _unbounded(evidence: Evidence) -> Check | None:
    if not evidence.ran("check:unbounded"):
        return None
    images = int(evidence.stands("check:unbounded").sum())
    number = evidence.points(images)
    return _above(
        "unbounded", number, 0.5, f"{images} images stand where every image can be made grey",
        "look at missing_gradients and wrong_gradients: no attack can fail there unless its gradients do",
        images=images,
    )  # fmt: skip


def _square_beats_gradients(evidence: Evidence) -> Check | None:
    return _falls_to(
        evidence, "square_beats_gradients", "square", GRADIENT_ATTACKS, 1.0,
        "stand under every gradient attack and fall to Square", "believe the worst case; give Square more queries",
    )  # fmt: skip


def _transfer_beats_gradients(evidence: Evidence) -> Check | None:
    name = "check:transfer" if evidence.ran("check:transfer") else "transfer"
    return _falls_to(
        evidence, "transfer_beats_gradients", name, GRADIENT_ATTACKS, 1.0,
        "stand under every gradient attack and fall to another model's images",
        "believe the worst case; look for a better surrogate",
    )  # fmt: skip


def _falls_to(
    evidence: Evidence,
    name: str,
    attack: str,
    after: tuple[str, ...] | list[str],
    threshold: float,
    what: str,
    advice: str,
) -> Check | None:
    """Images that stand under all of `after` that ran, and fall to `attack`."""
    before = [other for other in after if evidence.ran(other)]
    if not before or not evidence.ran(attack):
        return None
    standing = functools.reduce(torch.logical_and, [~evidence.fell(other) for other in before])
    images = int((standing & evidence.fell(attack)).sum())
    number = evidence.points(images)
    return _above(name, number, threshold, f"{images} images {what}", advice, images=images)


_CHECKS: tuple[Callable[[Evidence], Check | None], ...] = (
    _probabilities,
    _random_outputs,
    _missing_gradients,
    _wrong_gradients,
    _normalisation,
    _noise,
    _one_step_beats_many,
    _ce_against_margin,
    _logit_scale,
    _not_converged,
    _unbounded,
    _square_beats_gradients,
    _transfer_beats_gradients,
)


def _above(name: str, number: float, threshold: float, says: str, advice: str, images: int | None = None) -> Check:
    """A check whose number is suspicious above its threshold, and where it counts images if they are enough."""
    suspicious = number > threshold and (images is None or images >= FEWEST)
    return Check(name=name, number=number, threshold=threshold, suspicious=suspicious, says=says, advice=advice)


def _logits(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return _within_memory(model, x)


def _gradient(evidence: Evidence, loss: Callable[[Tensor, Tensor], Tensor], x: Tensor, y: Tensor) -> Tensor:
    def gradient(rows: Tensor) -> Tensor:
        leaf = x[rows].requires_grad_(True)
        with torch.enable_grad():
            return input_gradient(loss(evidence.model(leaf), y[rows]).sum(), leaf)

    parts = torch.arange(len(x), device=x.device).split(evidence.batch_size)
    return torch.cat([_within_memory(gradient, part) for part in parts])


def _within_memory(look: Callable[[Tensor], Tensor], rows: Tensor) -> Tensor:
    """What there is to see at these rows; half of them at a time where all need more memory than there is."""
    try:
        return look(rows)
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error) or len(rows) == 1:
            raise
    # Here and not above, where the error still holds its tensors.
    return torch.cat([_within_memory(look, part) for part in rows.chunk(2)])
