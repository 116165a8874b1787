"""SVHN: 32x32 colour crops of house numbers, the second of its two formats (Netzer et al. 2011).

The files hold the label 10 for the digit 0; here it is 0. The part `extra` is not used.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from crdnd.data._base import ImageData
from crdnd.data._named import DataInfo, FileSet, Layout, Part
from crdnd.download import looks_like_a_page
from crdnd.errors import InputError, first_line
from crdnd.io import read_bytes


def read(folder: Path, part: Part) -> ImageData:
    """Images (N, 3, 32, 32), uint8, and labels 0 .. 9 of a part."""
    from scipy.io import loadmat

    file = folder / f"{part}_32x32.mat"
    head = read_bytes(file)[:200]
    if page := looks_like_a_page(head):
        raise InputError(f"{file}: is {page}.")
    try:
        content: dict[str, Any] = loadmat(file, variable_names=["X", "y"])
    # scipy's reader ends in whatever its parsers meet in a damaged file, zlib's errors and IndexError among them.
    except Exception as error:
        raise InputError(
            f"{file}: is no readable .mat file ({first_line(error)}); it is truncated or damaged."
        ) from None
    x, y = content.get("X"), content.get("y")
    if not isinstance(x, np.ndarray) or x.dtype != np.uint8 or x.ndim != 4 or x.shape[:3] != (32, 32, 3):
        found = f"{x.dtype} {x.shape}" if isinstance(x, np.ndarray) else "nothing"
        raise InputError(f"{file}: X must be uint8 of shape (32, 32, 3, N), got {found}.")
    if not isinstance(y, np.ndarray) or y.dtype.kind not in "iu" or y.size != x.shape[3]:
        found = f"{y.dtype} {y.shape}" if isinstance(y, np.ndarray) else "nothing"
        raise InputError(f"{file}: y must be {x.shape[3]} integers, got {found}.")
    labels = y.reshape(-1).astype(np.int64)
    if labels.min() < 1 or labels.max() > 10:
        bad = labels.min() if labels.min() < 1 else labels.max()
        raise InputError(f"{file}: has the label {bad}; SVHN has 1 .. 10 in its files.")
    images = torch.from_numpy(np.ascontiguousarray(x.transpose(3, 2, 0, 1)))
    return ImageData(images, torch.from_numpy(labels % 10), 10, tuple("0123456789"), folder.resolve().name or "svhn")


FILES = FileSet(
    name="svhn",
    title="SVHN",
    layouts=(Layout(("svhn", "SVHN"), {"train": ("train_32x32.mat",), "test": ("test_32x32.mat",)}, read),),
    expected="svhn/ with train_32x32.mat and test_32x32.mat",
    counts={"train": 73_257, "test": 26_032},
    classes=10,
)
INFO = DataInfo(
    summary="32x32 colour crops of house numbers, 10 classes; 65,931 train, 7,326 validation, 26,032 test",
    licence="for non-commercial use only",
    citation="Y. Netzer, T. Wang, A. Coates, A. Bissacco, B. Wu, A. Y. Ng: Reading Digits in Natural Images with "
    "Unsupervised Feature Learning. NIPS Workshop on Deep Learning, 2011.",
    files=FILES,
)
load = FILES.load
