"""Training data of one's own: a path, split into training, validation and, where there is any, test data."""

import logging
from dataclasses import replace
from pathlib import Path

from crdnd.data._base import ImageData, Splits, in_colour, with_classes
from crdnd.data._files import (
    Shape,
    brought_to,
    from_npz,
    name_of,
    npz_arrays,
    published_layout,
    read_classes,
    read_images,
    refuse_image_size,
    split_folders,
)
from crdnd.data._named import held_out
from crdnd.errors import InputError

log = logging.getLogger("crdnd")


def read_splits(
    path: str | Path, split_seed: int = 0, image_size: int | None = None, model_shape: Shape | None = None
) -> Splits:
    """Read training data from a path.

    - A folder with the folders `train`, optionally `val` and `test`, each with a subfolder of images per class. Without
      `val` a stratified tenth of the training data is held out.
    - A folder with a subfolder of images per class: a tenth is held out, and there is no test data.
    - An `.npz` file with `x` and `y`, or `x_train` and `y_train`; optionally `x_test` and `y_test`.
    - The layout of a named set, as for `read_images`.

    Args:
        path: where it lies; what messages and results call it is the name of the file or folder.
        split_seed: which split of the training data, where a part of it is held out.
        image_size: as for `read_images`.
        model_shape: as for `read_images`.

    Raises:
        InputError: there is nothing of this kind, something in it is damaged, or its parts do not fit together.
    """
    path = Path(path)
    if path.is_dir():
        return _read_folder(path, split_seed, image_size, model_shape)
    refuse_image_size(image_size, path)
    if path.suffix.lower() == ".npz":
        arrays = npz_arrays(path)
        train = from_npz(path, arrays, "train" if "x_train" in arrays else "")
        test = from_npz(path, arrays, "test") if "x_test" in arrays else None
        return held_out(*_alike(train, test), split_seed)
    return held_out(read_images(path), None, split_seed)


def _read_folder(folder: Path, split_seed: int, image_size: int | None, model_shape: Shape | None) -> Splits:
    name = name_of(folder)
    if found := published_layout(folder):
        refuse_image_size(image_size, folder)
        layout, place = found
        if missing := layout.missing(place):
            raise InputError(f"{place}: lacks {', '.join(missing)}.")
        train, test = (replace(layout.read(place, part), name=name) for part in ("train", "test"))
        return held_out(*_alike(train, test), split_seed)
    parts = split_folders(folder)
    size, channels = brought_to(image_size, model_shape)
    if not parts:
        train, skipped = read_classes(folder, name, size, channels)
        return replace(held_out(_with_images(train, folder), None, split_seed), skipped=skipped)
    if "train" not in parts:
        found = ", ".join(entry.name for entry in parts.values())
        raise InputError(f"{folder}: has {found} but no train; give a folder with training data.")
    train, skipped = read_classes(parts["train"], name, size, channels)
    _with_images(train, parts["train"])
    others: dict[str, ImageData] = {}
    for part in ("validation", "test"):
        if part in parts:
            data, more = read_classes(parts[part], name, size, train.shape[0], train.class_names)
            others[part] = _named(_like(data, train), train, parts[part], parts["train"])
            skipped += more
    if "validation" in others:
        return Splits(train, others["validation"], others.get("test"), split_seed, skipped)
    return replace(held_out(train, others.get("test"), split_seed), skipped=skipped)


def _with_images(train: ImageData, folder: Path) -> ImageData:
    """Training data, or an InputError where a class has no images."""
    counts = train.y.bincount(minlength=train.num_classes).tolist()
    if 0 in counts:
        raise InputError(
            f"{folder / train.class_names[counts.index(0)]}: has no images; add some, or remove the folder."
        )
    return train


def _named(data: ImageData, train: ImageData, folder: Path, train_folder: Path) -> ImageData:
    """The data with the classes of the training data, which are told by the names of their folders."""
    if odd := sorted(set(data.class_names) - set(train.class_names)):
        raise InputError(f"{folder}: its classes are not those of {train_folder}; {odd[0]} is in one only.")
    counts = data.y.bincount(minlength=data.num_classes).tolist()
    here = {name for name, count in zip(data.class_names, counts, strict=True) if count}
    if missing := [name for name in train.class_names if name not in here]:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        log.warning("%s: has no images of the class %s%s; nothing is measured of it.", folder, missing[0], more)
    return with_classes(data, train.class_names)


def _like(data: ImageData, train: ImageData) -> ImageData:
    """Images as the training data are, grey ones in colour where those are; images of another size are refused."""
    if data.shape[1:] != train.shape[1:]:
        (height, width), (train_height, train_width) = data.shape[1:], train.shape[1:]
        raise InputError(
            f"{data.name}: has images of {width}x{height} beside training images of {train_width}x{train_height}; "
            "bring all to one size."
        )
    if train.shape[0] == 3:
        data = in_colour(data)
    if data.shape[0] != train.shape[0]:
        raise InputError(f"{data.name}: has images in colour beside training images in grey.")
    return data


def _alike(train: ImageData, test: ImageData | None) -> tuple[ImageData, ImageData | None]:
    """Both with as many classes as the one that has more; a set without class names is numbered."""
    if test is None:
        return train, None
    if test.num_classes > train.num_classes:
        raise InputError(
            f"{test.name}: the test data have labels up to {test.num_classes - 1}, the training data do not."
        )
    test = replace(test, num_classes=train.num_classes, class_names=train.class_names)
    return train, _like(test, train)
