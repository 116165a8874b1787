"""MNIST: 28x28 grey scans of handwritten digits (LeCun et al. 1998)."""

from crdnd.data._idx import layout
from crdnd.data._named import DataInfo, FileSet

FILES = FileSet(
    name="mnist",
    title="MNIST",
    layouts=(layout("mnist", "MNIST/raw", "MNIST", title="MNIST", classes=tuple("0123456789")),),
    expected="mnist/ (or MNIST/raw/) with train-images-idx3-ubyte, train-labels-idx1-ubyte, t10k-images-idx3-ubyte and "
    "t10k-labels-idx1-ubyte, each plain or as .gz",
    counts={"train": 60_000, "test": 10_000},
    classes=10,
)
INFO = DataInfo(
    summary="28x28 grey scans of handwritten digits, 10 classes; 54,000 train, 6,000 validation, 10,000 test",
    licence="CC BY-SA 3.0, as commonly stated",
    citation="Y. LeCun, L. Bottou, Y. Bengio, P. Haffner: Gradient-Based Learning Applied to Document Recognition. "
    "Proceedings of the IEEE 86(11), 1998. doi:10.1109/5.726791",
    files=FILES,
)
load = FILES.load
