"""CIFAR-100: 32x32 colour photographs in 100 classes, the fine labels (Krizhevsky 2009)."""

from crdnd.data._cifar import CIFAR100
from crdnd.data._named import DataInfo, FileSet

FILES = FileSet(
    name="cifar100",
    title=CIFAR100.title,
    layouts=CIFAR100.layouts(),
    expected="cifar-100-binary/ with train.bin and test.bin, or cifar-100-python/ with train and test",
    counts={"train": 50_000, "test": 10_000},
    classes=100,
)
INFO = DataInfo(
    summary="32x32 colour photographs, 100 classes; 45,000 train, 5,000 validation, 10,000 test",
    licence="none stated by its authors; cite the report",
    citation="A. Krizhevsky: Learning Multiple Layers of Features from Tiny Images. Technical report, "
    "University of Toronto, 2009.",
    files=FILES,
)
load = FILES.load
