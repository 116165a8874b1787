"""`--images DIR`: a folder of one's own images, and settings for it that nobody has to know about."""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from crdnd.errors import InputError

TEACHER_OBJECTIVE, STUDENT_OBJECTIVE = "trades", "rslad"
"""The methods of `--images`: TRADES needs no teacher, and RSLAD runs with its paper's settings, whatever the data."""
EPS = {"linf": "8/255", "l2": 0.5}
"""What is hard to see in a photograph, and what the field measures at."""
LARGEST = 64
"""Pixels along a side of what photographs are brought to; training costs 4 times as much at twice the size."""
MANY = 10_000
"""Training images from which on networks are large; fewer are learned by heart by those, and a CPU can train small."""
IMAGES_SEEN, EPOCHS = 2_000_000, (30, 100)
"""A run sees so many images, in between so many epochs."""
LOOKED_AT = 1000
"""Files whose heads are read to learn how large the images are."""

# Settings of a student's run that its teacher's run does not share: the student's own, and those of its teachers.
STUDENTS_OWN = (
    "model", "objective", "attack", "role", "out", "teacher", "teacher_weights", "second_teacher",
    "second_teacher_weights", "check_teacher", "teacher_input", "shard_teacher", "igdm", "repair",
)  # fmt: skip


def with_defaults(settings: Mapping[str, Any], role: Literal["teacher", "student"]) -> dict[str, Any]:
    """Settings for the folder `data`, with what they leave open; all that was chosen is said on standard error.

    Args:
        settings: of a recipe; the folder is `data`.
        role: a teacher gets a larger network and a method that needs no teacher.
    """
    from crdnd.recipe import merge

    folder = Path(str(settings["data"]))
    count, side, grey = _look(folder)
    size = settings.get("image_size") or min(side, LARGEST)
    if not isinstance(size, int):
        raise InputError(f"image_size: must be a whole number of pixels, such as 64, got {size!r}.")
    teaches = role == "teacher"
    if count >= MANY:
        model: dict[str, Any] = {"name": "resnet18" if teaches else "mobilenet_v2"}
    else:
        width = 64 if size > 32 else 32
        model = {"name": "cnn", "width": width if teaches else width // 4}
    threat = settings.get("threat")
    norm = str(threat.get("norm", "linf")) if isinstance(threat, Mapping) else "linf"
    epochs = min(max(IMAGES_SEEN // count, EPOCHS[0]), EPOCHS[1])
    chosen: dict[str, tuple[Any, str]] = {
        "image_size": (size, f"the images' shorter side is typically {side} pixels"),
        "model": (model, f"for {count:,} training images; a {role}"),
        "objective": (TEACHER_OBJECTIVE if teaches else STUDENT_OBJECTIVE, "the method"),
        "threat": (
            {"norm": norm, "eps": EPS.get(norm, EPS["linf"])},
            "how far an attacker may change an image",
        ),
        "augmentation": (
            ("shift", "grey images are moved a little and not mirrored")
            if grey
            else ("crop_flip", "images are moved and mirrored; for text or signs use --set augmentation=shift")
        ),
        "epochs": (epochs, "passes over the training images"),
        "batch_size": (128 if count >= 2000 else 32 if count < 500 else 64, "images a step"),
    }
    model_given = settings.get("model")
    if isinstance(model_given, str) or (isinstance(model_given, Mapping) and "name" in model_given):
        chosen.pop("model")  # another network has other settings
    open_ = {key: value for key, value in chosen.items() if key not in settings or isinstance(settings[key], Mapping)}
    filled = merge({key: value for key, (value, _) in open_.items()}, settings)
    if teaches:
        filled.setdefault("role", "teacher")
    new = [key for key in open_ if key not in settings]
    if new:
        print(f"settings chosen for the {role} on {folder}; options and --set win over them:", file=sys.stderr)
    for key in new:
        print(f"  {key}={_shown(filled[key])}  ({open_[key][1]})", file=sys.stderr)
    return filled


def teacher_folder(settings: Mapping[str, Any]) -> str:
    """Where the teacher of such a student's run is trained: beside it."""
    return f"{str(settings['out']).rstrip('/')}-teacher"


def teacher_of(settings: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of the teacher that a student's run needs first, which is said; its run lies beside the student's.

    Args:
        settings: of the student, complete.
        given: what the user gave of them.
    """
    own = {key: value for key, value in given.items() if key not in STUDENTS_OWN}
    out = teacher_folder(settings)
    print(f"no --teacher was given, so one is trained first, in {out}", file=sys.stderr)
    return with_defaults(own | {"out": out}, "teacher")


def check_folder(images: str | None, settings: Mapping[str, Any]) -> bool:
    """Whether the folder of `--images` is what a run is to be on; another `--data` beside it is refused."""
    if images is None:
        return False
    if "data" in settings:
        raise InputError("images: is a folder of your own, and --data (or a recipe's data) another one; give one.")
    if not Path(images).is_dir():
        raise InputError(
            f"images: {images} is no folder; give one with train/ and test/ and a folder of images a class."
        )
    if Path(images).resolve() in [place := Path(str(settings.get("out", ""))).resolve(), *place.parents]:
        raise InputError(f"out: {place} lies in the folder of the images; choose one elsewhere, such as runs/mine.")
    from crdnd.data import has_test

    if not has_test(Path(images)):
        print(
            f"{images} has no test/, so nothing in it can measure the model: training looks at all of these images",
            file=sys.stderr,
        )
    return True


def _look(folder: Path) -> tuple[int, int, bool]:
    """How many training images there are, how long their shorter side typically is, and whether all seem grey."""
    from crdnd.data import image_files, image_shape, training_folder

    files = list(image_files(training_folder(folder)))
    if not files:
        raise InputError(f"images: {folder} holds no images; give a folder with train/ and test/, and classes in them.")
    sides: list[int] = []
    grey = True
    for file in files[:: -(-len(files) // LOOKED_AT)]:
        try:
            height, width, channels = image_shape(file)
        except InputError:
            continue  # the run says so
        sides.append(min(height, width))
        grey = grey and channels == 1
    if not sides:
        raise InputError(f"images: none of the {len(files)} images in {folder} can be read.")
    return len(files), sorted(sides)[len(sides) // 2], grey


def _shown(value: Any) -> str:
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {_shown(entry)}" for key, entry in value.items()) + "}"
    return str(value)
