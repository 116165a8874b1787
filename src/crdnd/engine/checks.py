"""A look at networks before hours are spent on them."""

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from crdnd.data import ImageData, Splits
from crdnd.engine.step import feature_size
from crdnd.errors import InputError, first_line
from crdnd.models import device_of, evaluating, lets_gradients_through
from crdnd.objectives import TrainingAttack, load_objective

log = logging.getLogger("crdnd")

IMBALANCED = 10
"""How many times as many images the largest class has as the smallest one, before a run warns of it."""
OTHER_SHAPE = "; a teacher made for other images needs teacher_input=[C, H, W], and the images are then resized for it"


def check_is_module(model: object, what: str) -> None:
    """Refuse what only names a model, or holds one."""
    if not isinstance(model, nn.Module):
        way = (
            "give its .model"
            if isinstance(getattr(model, "model", None), nn.Module)
            else ("make one with load_model(FOLDER) or create_model(NAME, ...)")
        )
        raise InputError(f"{what}: must be a torch.nn.Module, got {type(model).__name__}; {way}.")


def check_model(model: nn.Module, data: ImageData, what: str, *, probabilities: bool = False, way_out: str = "") -> int:
    """Run a few images through a model and return how many classes it has, or say what is wrong with it.

    Args:
        model: images -> logits.
        data: where the images come from.
        what: what messages call the model.
        probabilities: let a model pass that returns them; an evaluation has a check of its own for that.
        way_out: what to do about a model that cannot process the images.
    """
    check_is_module(model, what)
    x = few_images(data, model)
    with evaluating(model), torch.no_grad():
        try:
            logits: Any = model(x)
        except (RuntimeError, ValueError, TypeError, IndexError) as error:
            kinds = {parameter.dtype for parameter in model.parameters()}
            if x.is_floating_point() and len(kinds) == 1 and x.dtype not in kinds:
                way_out = f"; the images are {x.dtype}, so make them {kinds.pop()}, as its weights are"
            raise InputError(
                f"{what}: cannot process images of shape {data.shape}: {first_line(error)}{way_out}"
            ) from None
    if not isinstance(logits, torch.Tensor) or logits.ndim != 2 or len(logits) != len(x):
        shape = tuple(logits.shape) if isinstance(logits, torch.Tensor) else type(logits).__name__
        raise InputError(f"{what}: must return logits (B, K), got {shape} for a batch of {len(x)}.")
    if not bool(logits.isfinite().all()):
        raise InputError(f"{what}: returns NaN or infinite logits on natural images.")
    if not probabilities and bool((logits >= 0).all()) and bool(((logits.sum(1) - 1).abs() < 1e-3).all()):
        raise InputError(f"{what}: returns probabilities, but logits are needed; remove its softmax.")
    if logits.shape[1] < data.num_classes:
        raise InputError(f"{what}: has {logits.shape[1]} classes, but the data has {data.num_classes}.")
    return logits.shape[1]


def feature_sizes(
    objective: str, student: nn.Module, teachers: Sequence[nn.Module], data: ImageData
) -> tuple[int, int]:
    """How wide the features of student and first teacher are; 0 where the method of that name does not look at them.

    Raises:
        InputError: it does, and a network has none.
    """
    needs, sizes = load_objective(objective).needs, [0, 0]
    for place, (what, network) in enumerate(zip(("student", "teacher"), (student, *teachers), strict=False)):
        if any(view.startswith(f"{what[0]}_") and view.endswith("_features") for view in needs):
            try:
                sizes[place] = feature_size(network, few_images(data, network))
            except InputError as error:
                raise InputError(f"{what}: {str(error).rstrip('.')}, and objective {objective} needs them.") from None
    return sizes[0], sizes[1]


def check_teacher_gradients(teacher: nn.Module, attack: TrainingAttack | None, data: ImageData) -> None:
    """Refuse a teacher without gradients to its images, for a method or a training attack that needs them."""
    if not lets_gradients_through(teacher, few_images(data, teacher)):
        why = f"attack.loss: {attack.loss}" if attack else "the method"
        raise InputError(
            f"teacher: lets no gradient through to its images, as an ONNX file does not, and {why} needs it; give the "
            "model that it is of."
        )


def few_images(data: ImageData, model: nn.Module) -> Tensor:
    """Some images to look at a model with, where it is."""
    x, _ = data.batch(torch.arange(min(3, len(data)), device=data.device))
    return x.to(device_of(model))


def check_splits(splits: Splits) -> None:
    """Validation data must look like the training data."""
    train, validation = splits.train, splits.validation
    if validation.shape != train.shape:
        raise InputError(
            f"validation images have shape {validation.shape}, training images {train.shape}; they must agree."
        )
    if validation.num_classes != train.num_classes:
        raise InputError(
            f"validation data has {validation.num_classes} classes, training data {train.num_classes}; they must agree."
        )


def say_classes(splits: Splits) -> None:
    """Log how many images the classes have, and warn where they are too uneven to be learned or judged alike."""
    names = splits.train.class_names
    counts = splits.train.y.bincount(minlength=len(names))
    few, many = int(counts.argmin()), int(counts.argmax())
    log.info(
        "%d classes, with %d (%s) to %d (%s) training images",
        len(names), counts[few], names[few], counts[many], names[many],
    )  # fmt: skip
    if counts[many] > IMBALANCED * counts[few]:
        log.warning(
            "the classes are imbalanced: %s has %.0f times as many training images as %s, and small classes are learned"
            " badly; `crdnd evaluate --per-class` shows each one",
            names[many], counts[many] / max(int(counts[few]), 1), names[few],
        )  # fmt: skip
    if absent := (splits.validation.y.bincount(minlength=len(names)) == 0).nonzero().flatten().tolist():
        more = f" and {len(absent) - 1} more" if len(absent) > 1 else ""
        log.warning(
            "no validation images of %s%s: the choice of the best weights does not see it", names[absent[0]], more
        )


def check_networks(student: nn.Module, teachers: Sequence[nn.Module], data: ImageData) -> int:
    """Check all networks of a run and return how many classes they have."""
    num_classes = check_model(student, data, "student" if teachers else "model")
    learning = {id(parameter) for parameter in student.parameters() if parameter.requires_grad}
    if not learning:
        raise InputError("student: none of its weights is trained; set requires_grad on those that are to be.")
    for what, teacher in zip(("teacher", "second teacher"), teachers, strict=False):
        if learning & {id(parameter) for parameter in teacher.parameters()}:
            raise InputError(f"{what}: has weights of the student, which change; give it its own: copy.deepcopy(...).")
        if (found := check_model(teacher, data, what, way_out=OTHER_SHAPE)) != num_classes:
            raise InputError(
                f"the {what} has {found} classes and the student {num_classes}; they must agree. The data has "
                f"{data.num_classes}: take a teacher that was trained on it."
            )
    return num_classes
