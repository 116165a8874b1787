"""CIFAR-10: 32x32 colour photographs in 10 classes (Krizhevsky 2009)."""

from crdnd.data._cifar import CIFAR10
from crdnd.data._named import DataInfo, FileSet

FILES = FileSet(
    name="cifar10",
    title=CIFAR10.title,
    layouts=CIFAR10.layouts(),
    expected="cifar-10-batches-bin/ with data_batch_1.bin to data_batch_5.bin and test_batch.bin, or "
    "cifar-10-batches-py/ with data_batch_1 to data_batch_5 and test_batch",
    counts={"train": 50_000, "test": 10_000},
    classes=10,
)
INFO = DataInfo(
    summary="32x32 colour photographs, 10 classes; 45,000 train, 5,000 validation, 10,000 test",
    licence="none stated by its authors; cite the report",
    citation="A. Krizhevsky: Learning Multiple Layers of Features from Tiny Images. Technical report, "
    "University of Toronto, 2009.",
    files=FILES,
)
load = FILES.load
