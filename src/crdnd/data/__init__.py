"""Data: images in [0, 1] and labels, in memory, with a held-out validation split. One file, one named data set."""

from crdnd import registry
from crdnd.data._augment import Augmentation, augment
from crdnd.data._base import DataInfo, ImageData, MapDataset, Splits, as_data, stratified

__all__ = [
    "Augmentation",
    "DataInfo",
    "ImageData",
    "MapDataset",
    "Splits",
    "as_data",
    "augment",
    "data_names",
    "load_data",
    "load_info",
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
