"""Fashion-MNIST: 28x28 grey pictures of clothes, in MNIST's files (Xiao et al. 2017)."""

from crdnd.data._idx import layout
from crdnd.data._named import DataInfo, FileSet

CLASSES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip
FILES = FileSet(
    name="fashion_mnist",
    title="Fashion-MNIST",
    layouts=(layout("fashion_mnist", "FashionMNIST/raw", "fashion-mnist", title="Fashion-MNIST", classes=CLASSES),),
    expected="fashion_mnist/ (or FashionMNIST/raw/) with train-images-idx3-ubyte, train-labels-idx1-ubyte, "
    "t10k-images-idx3-ubyte and t10k-labels-idx1-ubyte, each plain or as .gz",
    counts={"train": 60_000, "test": 10_000},
    classes=10,
)
INFO = DataInfo(
    summary="28x28 grey pictures of clothes, 10 classes; 54,000 train, 6,000 validation, 10,000 test",
    licence="MIT",
    citation="H. Xiao, K. Rasul, R. Vollgraf: Fashion-MNIST: a Novel Image Dataset for Benchmarking Machine Learning "
    "Algorithms. arXiv 1708.07747, 2017.",
    files=FILES,
)
load = FILES.load
