"""Data: images in [0, 1] and labels, in memory or streamed, with a held-out validation split.

One file, one named data set.
"""

from pathlib import Path

from crdnd import registry
from crdnd.data._augment import Augmentation, augment, augmentation_names
from crdnd.data._base import (
    ImageData,
    MapDataset,
    Splits,
    as_data,
    hold_out,
    stratified,
    with_classes,
    with_wrong_labels,
)
from crdnd.data._files import LAYOUTS, has_test, name_of, read_images, refuse_image_size, training_folder
from crdnd.data._hub import PREFIX, read_hub
from crdnd.data._images import image_files, image_shape, read_image, stacked
from crdnd.data._named import HELD_OUT, VARIABLE, DataInfo, data_folder
from crdnd.data._own import read_splits
from crdnd.data._stream import StreamedData
from crdnd.errors import InputError, did_you_mean

__all__ = [
    "HELD_OUT",
    "PREFIX",
    "VARIABLE",
    "Augmentation",
    "DataInfo",
    "ImageData",
    "MapDataset",
    "Splits",
    "StreamedData",
    "as_data",
    "augment",
    "augmentation_names",
    "data_folder",
    "data_names",
    "has_test",
    "hold_out",
    "image_files",
    "image_shape",
    "load_data",
    "load_info",
    "load_test",
    "name_of",
    "read_image",
    "read_images",
    "read_splits",
    "stacked",
    "stratified",
    "training_folder",
    "with_classes",
    "with_wrong_labels",
]


def data_names() -> list[str]:
    """The registry's keys."""
    return registry.names("data")


def load_data(
    spec: str,
    split_seed: int = 0,
    data_dir: str | Path | None = None,
    image_size: int | None = None,
    model_shape: tuple[int, int, int] | None = None,
) -> Splits:
    """Training, validation and test data by name, from a path, or from the Hugging Face hub.

    Nothing is downloaded, except for a name that begins with `hf:`, which asks for it.

    Args:
        spec: the name of a data set; a path as for `read_splits`; or `hf:owner/name`. Where both a set and a path
            exist the name wins, and "./name" is the path.
        split_seed: which split into training and validation data; for the digits into test data too.
        data_dir: where the files of named sets lie: a set's own folder or the one above it. By default the folder of
            the environment variable CRDND_DATA, else `data` in the current folder.
        image_size: for a path to folders of images, which are resized and cropped to squares of that size.
        model_shape: as for `read_images`.

    Raises:
        InputError: there is nothing of that name (with a suggestion), or its files are missing or damaged (with the
            expected layout, and the command that gets them).
    """
    is_named = spec in data_names()
    if is_named or spec.startswith(PREFIX):
        refuse_image_size(image_size, Path(spec))
        return registry.load("data", spec, "load")(split_seed, data_dir) if is_named else read_hub(spec, split_seed)
    if spec and Path(spec).exists():
        return read_splits(spec, split_seed, image_size, model_shape)
    raise _neither(spec)


def load_info(name: str) -> DataInfo:
    """Licence and citation of a named data set."""
    return registry.load("data", name, "INFO")


def load_test(
    spec: str,
    split_seed: int = 0,
    data_dir: str | Path | None = None,
    image_size: int | None = None,
    model_shape: tuple[int, int, int] | None = None,
) -> ImageData:
    """Test data by name, from files, or from the Hugging Face hub.

    Args:
        spec: as for `load_data`, but a path is one for `read_images`.
        split_seed: which split of a named set.
        data_dir: as for `load_data`.
        image_size: as for `load_data`.
        model_shape: as for `read_images`.

    Raises:
        InputError: there is neither, or the set has no test split.
    """
    if spec in data_names() or spec.startswith(PREFIX):
        test = load_data(spec, split_seed, data_dir, image_size).test
        if test is None:
            raise InputError(f"data {spec}: has no test split; give a path to the images.")
        return test
    if spec and Path(spec).exists():
        return read_images(spec, image_size, model_shape)
    raise _neither(spec)


def _neither(spec: str) -> InputError:
    return InputError(
        f"data: {spec!r} is neither a data set nor a path{did_you_mean(spec, data_names())}. A path may be {LAYOUTS}."
    )
