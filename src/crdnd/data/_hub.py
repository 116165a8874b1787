"""Data sets of the Hugging Face hub, through its own package, an optional extra."""

from typing import Any

import torch

from crdnd.data._base import ImageData, Splits
from crdnd.data._images import pixels_of, stacked
from crdnd.data._named import held_out
from crdnd.errors import InputError, first_line

PREFIX = "hf:"
# What owners call the splits.
TRAIN, VALIDATION, TEST = ("train",), ("validation", "valid", "val", "dev"), ("test",)
LABELS = ("label", "labels", "fine_label", "fine_labels")


def read_hub(spec: str, split_seed: int = 0) -> Splits:
    """Load `hf:owner/name`, or `hf:owner/name#column` to say which column has the labels.

    Naming such a set is asking for the network: what the package has not cached yet is downloaded (`HF_HUB_OFFLINE=1`
    forbids it). Image and label columns are found by their types (`Image` and `ClassLabel`). Without a validation split
    a tenth of the training data is held out.

    Raises:
        InputError: the package is missing, there is no such set, or it has no images with class labels.
    """
    repository, _, column = spec.removeprefix(PREFIX).partition("#")
    if not repository:
        raise InputError(f"data {spec}: name the set as hf:owner/name.")
    try:
        import datasets  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise InputError(f'data {spec}: needs the package datasets: pip install "crdnd[hf]"') from None
    try:
        found: Any = datasets.load_dataset(repository)
    except (OSError, ValueError, RuntimeError, LookupError) as error:
        raise InputError(f"data {spec}: cannot be loaded ({first_line(error)}).") from None
    parts = {
        kind: next((found[name] for name in names if name in found), None)
        for kind, names in (("train", TRAIN), ("validation", VALIDATION), ("test", TEST))
    }
    if parts["train"] is None:
        raise InputError(f"data {spec}: has no split train, only {', '.join(found) or 'none'}.")
    data = {kind: _read(part, spec, column, datasets) for kind, part in parts.items() if part is not None}
    if "validation" in data:
        return Splits(data["train"], data["validation"], data.get("test"), split_seed)
    return held_out(data["train"], data.get("test"), split_seed)


def _read(part: Any, spec: str, column: str, datasets: Any) -> ImageData:
    images = [key for key, kind in part.features.items() if isinstance(kind, datasets.Image)]
    labels = [key for key, kind in part.features.items() if isinstance(kind, datasets.ClassLabel)]
    if len(images) != 1:
        raise InputError(f"data {spec}: must have one column of images, has {', '.join(images) or 'none'}.")
    usual = [key for key in LABELS if key in labels]
    chosen = column or (usual[0] if usual else labels[0] if len(labels) == 1 else "")
    if chosen not in labels:
        raise InputError(
            f"data {spec}: write hf:owner/name#column with one of its columns of class labels: "
            f"{', '.join(labels) or 'it has none'}."
        )
    names = [f"{spec}, row {row}" for row in range(len(part))]
    rows = zip(part[images[0]], names, strict=True)
    x = stacked((pixels_of(image, name) for image, name in rows), names)
    kind = part.features[chosen]
    return ImageData(x, torch.tensor(part[chosen]), kind.num_classes, tuple(kind.names), spec)
