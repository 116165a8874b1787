"""Data: images in [0, 1] and labels, in memory or streamed, with a held-out validation split.

One file, one named data set.
"""

from pathlib import Path

from crdnd import registry
from crdnd.data._augment import Augmentation, augment
from crdnd.data._base import DataInfo, ImageData, MapDataset, Splits, as_data, stratified
from crdnd.data._files import LAYOUTS, read_images
from crdnd.data._stream import StreamedData
from crdnd.errors import InputError, did_you_mean

__all__ = [
    "Augmentation",
    "DataInfo",
    "ImageData",
    "MapDataset",
    "Splits",
    "StreamedData",
    "as_data",
    "augment",
    "data_names",
    "load_data",
    "load_info",
    "load_test",
    "read_images",
    "stratified",
]


def data_names() -> list[str]:
    """The registry's keys."""
    return registry.names("data")


def load_data(name: str, split_seed: int = 0) -> Splits:
    """The named data set in its split of that seed, or an InputError with a suggestion."""
    return registry.load("data", name, "load")(split_seed)


def load_info(name: str) -> DataInfo:
    """Licence and citation of a named data set."""
    return registry.load("data", name, "INFO")


def load_test(spec: str, split_seed: int = 0) -> ImageData:
    """Test data by name or from files.

    Args:
        spec: the name of a data set, or a path as for `read_images`; where both exist the name wins, and "./name" is
            the path.
        split_seed: which split of a named set.

    Raises:
        InputError: there is neither, or the named set has no test split.
    """
    if spec in data_names():
        test = load_data(spec, split_seed).test
        if test is None:
            raise InputError(f"data {spec}: has no test split; give a path to the images.")
        return test
    if spec and Path(spec).exists():
        return read_images(spec)
    raise InputError(
        f"data: {spec!r} is neither a data set nor a path{did_you_mean(spec, data_names())}. A path may be {LAYOUTS}."
    )
