"""Handwritten digits, 8x8 grey: the data set that scikit-learn carries, so that nothing needs to be downloaded.

1,797 scans of digits by 43 people, reduced to 8x8 with 17 levels of grey.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from crdnd.data._base import ImageData, Splits, stratified
from crdnd.data._named import DataInfo

INFO = DataInfo(
    summary="8x8 grey scans of handwritten digits, 10 classes; 1,147 train, 200 validation, 450 test",
    licence="CC BY 4.0",
    citation="E. Alpaydin, C. Kaynak: Optical Recognition of Handwritten Digits. UCI Machine Learning Repository, "
    "1998. doi:10.24432/C50P49",
    draws_test=True,
)

SIZES = (1147, 200, 450)


def load(split_seed: int = 0, data_dir: str | Path | None = None) -> Splits:
    """The stratified split of that seed. The digits come with scikit-learn, wherever other sets lie."""
    from sklearn.datasets import load_digits  # slow to import, and only this data set needs it

    bunch: Any = load_digits()
    x = torch.from_numpy(np.asarray(bunch.images, dtype=np.float32) / 16)[:, None]
    y = torch.from_numpy(np.asarray(bunch.target, dtype=np.int64))
    whole = ImageData(x, y, 10, name="digits")
    train, validation, test = (whole.subset(ids) for ids in stratified(y, SIZES, "digits", split_seed))
    return Splits(train, validation, test, split_seed)
