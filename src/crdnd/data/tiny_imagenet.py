"""Tiny-ImageNet: 64x64 colour photographs in 200 classes (Le and Yang 2015).

The official `val` is the test data here, because the labels of the official test images are not public. The classes are
in the order of their WordNet ids, as in a folder listing, which is what the field's models are trained with.
"""

from collections import Counter
from pathlib import Path

import torch

from crdnd.data._base import ImageData, in_colour
from crdnd.data._files import from_files, subfolders
from crdnd.data._images import image_files
from crdnd.data._named import DataInfo, FileSet, Layout, Part
from crdnd.errors import InputError, first_line

ANNOTATIONS = "val_annotations.txt"


def read(folder: Path, part: Part) -> ImageData:
    """Images (N, 3, 64, 64), uint8, and labels of a part; streamed where all are there.

    `val` may be as published or sorted into class folders.
    """
    ids = _ids(folder)
    if part == "train":
        files = [(file, wnid) for wnid, found in _by_class(folder / "train", ids).items() for file in found]
    else:
        files = _validation(folder / "val", ids)
    label = {wnid: number for number, wnid in enumerate(ids)}
    y = torch.tensor([label[wnid] for _, wnid in files])
    name = folder.resolve().name or "data"
    data, failed = from_files(folder, [file for file, _ in files], y, _names(folder, ids), name)
    for error in failed.values():
        raise error  # a published set is whole
    return in_colour(data)


def find(folder: Path, name: str) -> Path | None:
    """A file or a folder of that name."""
    return folder / name if (folder / name).exists() else None


def _ids(folder: Path) -> list[str]:
    file = folder / "wnids.txt"
    if not file.is_file():
        return [entry.name for entry in subfolders(folder / "train")]
    return sorted(set(_lines(file)))


def _by_class(folder: Path, ids: list[str]) -> dict[str, list[Path]]:
    """Images in a folder for each class, at whatever depth; every class has some."""
    files = {wnid: list(image_files(folder / wnid)) if (folder / wnid).is_dir() else [] for wnid in ids}
    empty = [wnid for wnid, found in files.items() if not found]
    if empty:
        raise InputError(f"{folder}: {len(empty)} of {len(ids)} classes have no images, {empty[0]} among them.")
    others = [entry.name for entry in subfolders(folder) if entry.name not in files]
    if others:
        raise InputError(f"{folder}: has the folder {others[0]}, which is none of the {len(ids)} classes.")
    return files


def _validation(folder: Path, ids: list[str]) -> list[tuple[Path, str]]:
    if not (folder / "images").is_dir():
        files = _by_class(folder, ids)
        # The classes take turns, as they do where nobody has sorted them: an evaluation may take only the first n.
        turns = range(max(map(len, files.values())))
        return [(found[turn], wnid) for turn in turns for wnid, found in files.items() if turn < len(found)]
    file = folder / ANNOTATIONS
    if not file.is_file():
        raise InputError(f"{folder}: has images/ but no {ANNOTATIONS}, which has their classes.")
    rows = [line.split("\t") for line in _lines(file)]
    known = set(ids)
    found: list[tuple[Path, str]] = []
    for row in rows:
        if len(row) < 2 or row[1] not in known or Path(row[0]).name != row[0]:
            raise InputError(f"{file}: has the line {' '.join(row)!r:.60}, which names no image with its class.")
        if not (folder / "images" / row[0]).is_file():
            raise InputError(f"{folder / 'images' / row[0]}: is missing, and {ANNOTATIONS} names it.")
        found.append((folder / "images" / row[0], row[1]))
    return sorted(found)


def _names(folder: Path, ids: list[str]) -> tuple[str, ...]:
    """The first of each class's words; its id too where two classes would have one name."""
    file = folder / "words.txt"
    if not file.is_file():
        return tuple(ids)
    wanted = set(ids)
    rows = (line.partition("\t") for line in _lines(file))
    words = {wnid: text.partition(",")[0].strip() for wnid, _, text in rows if wnid in wanted}
    names = [words.get(wnid) or wnid for wnid in ids]
    count = Counter(names)
    return tuple(name if count[name] == 1 else f"{name} ({wnid})" for name, wnid in zip(names, ids, strict=True))


def _lines(file: Path) -> list[str]:
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{file}: cannot be read ({first_line(error)}).") from None
    return [line.strip() for line in text.splitlines() if line.strip()]


FILES = FileSet(
    name="tiny_imagenet",
    title="Tiny-ImageNet",
    layouts=(
        Layout(
            ("tiny-imagenet-200",),
            {"train": ("train",), "test": ("val",)},
            read,
            find,
            marks=("wnids.txt", "words.txt"),
        ),
    ),
    expected="tiny-imagenet-200/ with wnids.txt, words.txt, train/<class>/images/*.JPEG, and val/ with images/ and "
    f"{ANNOTATIONS}, or with a folder for each class",
    counts={"train": 100_000, "test": 10_000},
    classes=200,
)
INFO = DataInfo(
    summary="64x64 colour photographs, 200 classes; 90,000 train, 10,000 validation, 10,000 test (the official val)",
    licence="ImageNet's terms: non-commercial research and education",
    citation="Y. Le, X. Yang: Tiny ImageNet Visual Recognition Challenge. Stanford CS 231N, 2015; O. Russakovsky et "
    "al.: ImageNet Large Scale Visual Recognition Challenge. IJCV 115(3), 2015. arXiv 1409.0575",
    files=FILES,
)
load = FILES.load
