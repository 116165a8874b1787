"""A teacher is measured before hours are spent on what it says; one that knows nothing of the data is refused."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from crdnd.attacks import true_float32
from crdnd.config import Frozen
from crdnd.counts import Count
from crdnd.data import ImageData, stratified
from crdnd.errors import InputError
from crdnd.models import NORMALIZATION, Adapted, device_of, evaluating, normalizes

IMAGES = 1000
"""At most so many validation images are looked at."""
TRIED_ON = 250
"""At most so many of them when causes are tried."""
GAIN = 10.0
"""Points of accuracy that a cause has to bring before it is named."""
ENOUGH = 50
"""Fewer images prove nothing: a teacher that looks as if at chance is warned of, and not refused."""
EXPLAINS = 0.25
"""A cause of accuracy at chance has to bring this part of the way from chance to 100%; on easy data, inputs that are
wrong in another way bring a little too."""
BATCH = 250

Role = Literal["teacher", "second teacher"]
Change = Callable[[Tensor], Tensor]

NORMALISATIONS: dict[str, tuple[tuple[float, ...], tuple[float, ...]]] = {
    **{name: found for name, found in NORMALIZATION.items() if name != "none"},
    "[-1, 1]": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    "[-1, 1] in grey": ((0.5,), (0.5,)),
}
"""Mean and std per channel that weights of others may expect their inputs to be normalised with."""


class TeacherCheck(Frozen):
    """What a run knows of a teacher before its first step."""

    role: Role
    natural: Count | None = None
    """Natural accuracy on validation images; None where `check_teacher` is off."""
    chance: float | None = None
    """The share of the largest class among these images, in [0, 1]."""
    input: tuple[int, int, int] | None = None
    """(C, H, W) that its images are changed to; None where they fit."""
    warning: str = ""
    """What would make it much better, in words; empty where nothing does."""

    def __str__(self) -> str:
        """A line for the log."""
        measured = f"natural accuracy {self.natural} on validation images" if self.natural else "not measured"
        return f"{self.role}: {measured}" + (f", seen as {list(self.input)}" if self.input else "")


@dataclass(frozen=True)
class _Cause:
    """A way in which a teacher may have been made for other inputs than those in [0, 1] that it is given."""

    says: str
    fix: str
    change: Change


def measure_teacher(teacher: nn.Module, data: ImageData, role: Role = "teacher") -> TeacherCheck:
    """Natural accuracy of a teacher on at most 1,000 validation images, always the same, classes as in the whole.

    It is at chance where the 95% interval of its accuracy reaches down to the share of the largest class, and that of
    three standard deviations not up to half the way from there to 100% (few images tell nothing), and the mean of the
    classes' accuracies is no better than that of a guess either (with classes of very different sizes, a good teacher
    can lie below the largest share). With fewer than 50 images that is a warning. Causes are then found by trying: the
    inputs that published weights expect, and other orders of channels and classes.

    Args:
        teacher: images -> logits, `Adapted` where it sees images of another shape; its modes are left alone.
        data: validation images.
        role: what messages call it.

    Raises:
        InputError: it is at chance; the message says why, as far as that can be found, and what to do.
    """
    found = TeacherCheck(role=role, input=teacher.wanted if isinstance(teacher, Adapted) else None)
    ids = some_images(data, IMAGES)
    y = data.y[ids].cpu()
    predicted = _predictions(teacher, data, ids)
    natural = Count(correct=int((predicted == y).sum()), n=len(y))
    chance = int(y.bincount().max()) / len(y)
    found = found.model_copy(update={"natural": natural, "chance": chance})
    guesses = _at_chance(predicted, y, natural, chance)
    if not guesses and natural.percent >= 100 - GAIN:
        return found
    least = chance + EXPLAINS * (1 - chance) if guesses else 0.0
    cause = _cause(teacher, data, ids, predicted, y, least)
    if guesses:
        said = f"{role}: natural accuracy {natural} on validation images is no better than chance ({100 * chance:.1f}%)"
        said += f": {cause or _no_cause(predicted)}"
        if natural.n >= ENOUGH:
            raise InputError(f"{said}; a spoiled teacher on purpose needs check_teacher=false.")
        return found.model_copy(update={"warning": f"{said}; {natural.n} images are too few to refuse it"})
    if cause:
        return found.model_copy(update={"warning": f"{role}: natural accuracy is {natural.percent:.1f}%, but {cause}"})
    return found


def some_images(data: ImageData, size: int) -> Tensor:
    """Ids of so many images, or of all: the same in every call, with the classes in the proportions of the whole."""
    return _some(data.y, size).to(data.y.device)


def _some(y: Tensor, size: int) -> Tensor:
    return stratified(y, (size, len(y) - size), "teacher")[0] if size < len(y) else torch.arange(len(y))


def _predictions(teacher: nn.Module, data: ImageData, ids: Tensor, change: Change | None = None) -> Tensor:
    """The predicted classes (N,) on the CPU; `change` is made to the images as the teacher itself sees them."""
    device = device_of(teacher)
    predicted: list[Tensor] = []
    with true_float32(), evaluating(teacher), torch.no_grad():
        for part in ids.split(BATCH):
            x = data.batch(part)[0].to(device)
            if change is None:
                logits = teacher(x)
            elif isinstance(teacher, Adapted):
                logits = teacher.model(change(teacher.adapt(x)))
            else:
                logits = teacher(change(x))
            predicted.append(logits.argmax(1).cpu())
    return torch.cat(predicted)


def _at_chance(predicted: Tensor, y: Tensor, natural: Count, chance: float) -> bool:
    if natural.interval()[0] > 100 * chance or natural.interval(z=3)[1] >= 50 * (1 + chance):
        return False
    accuracies: list[float] = []
    variance = 0.0
    for label in y.unique():
        right = predicted[y == label] == label
        accuracies.append(float(right.float().mean()))
        smooth = (int(right.sum()) + 1) / (len(right) + 2)  # a class of few images is never certain
        variance += smooth * (1 - smooth) / len(right)
    classes = len(accuracies)
    return sum(accuracies) / classes - 1.96 * variance**0.5 / classes <= 1 / classes


def _cause(teacher: nn.Module, data: ImageData, ids: Tensor, predicted: Tensor, y: Tensor, least: float) -> str:
    """What the teacher was made for, if that makes it much better, and right as often as `least`; else empty."""
    few = _some(y, TRIED_ON)
    tried = ids[few.to(ids.device)]
    before = int((predicted[few] == y[few]).sum())
    right: list[tuple[int, _Cause]] = []
    for cause in _causes(teacher, data, tried):
        try:
            now = _predictions(teacher, data, tried, cause.change)
        except (RuntimeError, ValueError):  # a teacher may refuse inputs outside [0, 1], and then is not made for them
            continue
        right.append((int((now == y[few]).sum()), cause))
    best = max(correct for correct, _ in right) if right else 0
    order_is_right, order = _class_order(predicted, y)
    if not _is_gain(best, before, len(few)) or best / len(few) < max(order_is_right, least):
        return order if order_is_right >= least else ""
    # Several normalisations can do as well, up to noise; the first is the simplest.
    correct, cause = next(pair for pair in right if pair[0] >= best - len(few) / 100)
    return f"it {cause.says} ({100 * correct / len(few):.1f}% right with them): {cause.fix}"


def _is_gain(after: int, before: int, n: int) -> bool:
    """Whether so many right answers of n are better than so many before by more than 10 points and more than noise."""
    return 100 * (after - before) / n > GAIN and Count(correct=after, n=n).interval(z=3)[0] > 100 * before / n


def _causes(teacher: nn.Module, data: ImageData, ids: Tensor) -> Iterator[_Cause]:
    x = data.batch(ids)[0].to(device_of(teacher))
    if isinstance(teacher, Adapted):
        x = teacher.adapt(x)
    channels = x.shape[1]
    mean, std = x.mean((0, 2, 3)).tolist(), x.std((0, 2, 3)).tolist()
    known = {"of this data": (mean, std), **{f"of {name}": both for name, both in NORMALISATIONS.items()}}
    scales = [_Cause("expects pixels as they are in [0, 1]", "", lambda x: x), _scaled()]
    if not normalizes(teacher.model if isinstance(teacher, Adapted) else teacher):
        fits = {name: both for name, both in known.items() if len(both[0]) == channels and min(both[1])}
        scales += [_normalised(name, *both) for name, both in fits.items()]
    twice = [_undone(name, *both) for name, both in known.items() if len(both[0]) == channels and min(both[1])]
    for flipped, scale in itertools.product((False, True) if channels == 3 else (False,), scales):
        if flipped:
            yield _bgr(scale)
        elif scale.fix:
            yield scale
    yield from twice


def _scaled() -> _Cause:
    return _Cause("expects pixels in [0, 255]", "wrap it so that it gets 255 * x", lambda x: 255 * x)


def _normalised(name: str, mean: Sequence[float], std: Sequence[float]) -> _Cause:
    return _Cause(
        f"expects normalised inputs, with mean and std {name}",
        f"wrap it with {_numbers(mean, std)}",
        lambda x: (x - _channels(mean, x)) / _channels(std, x),
    )


def _undone(name: str, mean: Sequence[float], std: Sequence[float]) -> _Cause:
    return _Cause(
        f"normalises once too often, with mean and std {name}, and expects inputs with that undone",
        f"leave the normalisation with {_numbers(mean, std)} away, in the teacher or around it",
        lambda x: x * _channels(std, x) + _channels(mean, x),
    )


def _bgr(scale: _Cause) -> _Cause:
    also = f" and {scale.says}" if scale.fix else ""
    fix = "wrap it so that it gets the channels in reverse, x.flip(1)" + (f", and {scale.fix}" if scale.fix else "")
    return _Cause(f"expects the channel order BGR{also}", fix, lambda x: scale.change(x.flip(1)))


def _numbers(mean: Sequence[float], std: Sequence[float]) -> str:
    return f"mean={[float(f'{value:.4g}') for value in mean]}, std={[float(f'{value:.4g}') for value in std]}"


def _channels(values: Sequence[float], x: Tensor) -> Tensor:
    return torch.tensor(values, dtype=x.dtype, device=x.device).reshape(1, -1, 1, 1)


def _class_order(predicted: Tensor, y: Tensor) -> tuple[float, str]:
    """Whether another order of the classes makes the teacher much better: found on one half, judged on the other.

    Returns:
        The accuracy with it, in [0, 1], and what to say; 0 and nothing where it does not.
    """
    from scipy.optimize import linear_sum_assignment  # slow to import, and only a teacher that is often wrong needs it

    by_class = y.argsort(stable=True)  # both halves have every class
    first, second = by_class[::2], by_class[1::2]
    classes = int(max(predicted.max(), y.max())) + 1
    together = (predicted[first] * classes + y[first]).bincount(minlength=classes**2).reshape(classes, classes)
    _, label = linear_sum_assignment(together.numpy(), maximize=True)
    meant = torch.as_tensor(label)[predicted[second]]
    after, before = int((meant == y[second]).sum()), int((predicted[second] == y[second]).sum())
    if not len(second) or not _is_gain(after, before, len(second)):
        return 0.0, ""
    order = torch.as_tensor(label).argsort().tolist()
    few = ", ".join(map(str, order[:20])) + (", ..." if classes > 20 else "")
    return after / len(second), (
        f"its class order is another one ({100 * after / len(second):.1f}% right with its classes reordered): "
        f"wrap it to return z[:, [{few}]] of its logits z"
    )


def _no_cause(predicted: Tensor) -> str:
    share, label = (predicted.bincount() / len(predicted)).max(0)
    constant = f"it answers class {int(label)} for {100 * float(share):.0f}% of the images, and " if share > 0.9 else ""
    return (
        f"{constant}neither normalisation, [0, 255] inputs, channel order nor class order explains it; look whether "
        "its weights were loaded, and whether it was trained on this data"
    )
