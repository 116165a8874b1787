"""Named sets in files: where they are looked for, how they are split, and one message for whatever is wrong."""

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from crdnd.data._base import ImageData, Splits, hold_out
from crdnd.data._sources import SOURCES
from crdnd.errors import InputError

VARIABLE = "CRDND_DATA"
DEFAULT_FOLDER = Path("data")
HELD_OUT = 0.1
"""The part of the training data that becomes validation data."""

Part = Literal["train", "test"]


def data_folder(data_dir: str | Path | None = None) -> Path:
    """Where named sets are looked for: the folder given, else that of CRDND_DATA, else `data` in the current folder."""
    chosen = data_dir or os.environ.get(VARIABLE)
    return Path(chosen).expanduser() if chosen else DEFAULT_FOLDER


def there(folder: Path, name: str) -> Path | None:
    """A file of that name in a folder, or None."""
    return folder / name if (folder / name).is_file() else None


@dataclass(frozen=True)
class Layout:
    """One of the ways in which a set's files may lie."""

    folders: tuple[str, ...]
    """What archives and other tools call the folder they are in."""
    files: Mapping[Part, tuple[str, ...]]
    """The names in it that each part needs."""
    read: Callable[[Path, Part], ImageData]
    """Reads a part from the folder the files are in."""
    find: Callable[[Path, str], Path | None] = there
    """Where in that folder a name is, if it is."""
    marks: tuple[str, ...] = ()
    """Names that tell this layout from others; by default all that it needs."""

    def names(self) -> tuple[str, ...]:
        """All names that the set needs."""
        return (*self.files["train"], *self.files["test"])

    def missing(self, folder: Path) -> list[str]:
        """What the set needs and the folder lacks."""
        return [name for name in self.names() if self.find(folder, name) is None]

    def is_in(self, folder: Path) -> bool:
        """Whether a folder is one of this layout, be it complete or not."""
        return any(self.find(folder, name) is not None for name in self.marks or self.names())

    def places(self, root: Path, name: str = "") -> Iterator[Path]:
        """Where the files may be if they are in `root`, what `data get` made first: it replaces what is damaged."""
        yield from (root / folder for folder in self.folders)
        if name:
            yield from (root / name / folder for folder in self.folders)
            yield root / name
        yield root


@dataclass(frozen=True)
class FileSet:
    """A published set in files."""

    name: str
    title: str
    layouts: tuple[Layout, ...]
    expected: str
    """The layout in words, for messages."""
    counts: Mapping[Part, int]
    """Images in each part, as published."""
    classes: int

    def load(self, split_seed: int = 0, data_dir: str | Path | None = None) -> Splits:
        """Read the set and hold a stratified tenth of its training data out for validation.

        The test part is the official one, whatever the seed.

        Args:
            split_seed: which split of the training data.
            data_dir: as for `crdnd.data.load_data`.

        Raises:
            InputError: files are missing or damaged; the message has the expected layout and the command that gets it.
        """
        root = data_folder(data_dir)
        layout, folder = self.locate(root)
        train, test = (self._read(layout, folder, part, root) for part in ("train", "test"))
        return held_out(train, test, split_seed)

    def locate(self, root: Path) -> tuple[Layout, Path]:
        """The layout in which the set lies in a data folder and the folder of its files, or an InputError."""
        begun: list[str] = []
        for layout in self.layouts:
            for folder in layout.places(root, self.name):
                missing = layout.missing(folder)
                if not missing:
                    return layout, folder
                if layout.is_in(folder):
                    begun.append(f"{folder} lacks {_some(missing)}")
                elif folder.is_dir() and folder != root and folder.name in layout.folders and not any(folder.iterdir()):
                    begun.append(f"{folder} is empty")
        raise self.problem(root, "; ".join((begun or [f"there is no {self.title} in {root}"])[:1] + self._left(root)))

    def problem(self, root: Path, what: str) -> InputError:
        """The one message for everything that can be wrong with a set's files."""
        command = f"crdnd data get {self.name}" + ("" if root == DEFAULT_FOLDER else f" --data-dir {root}")
        return InputError(
            f"data {self.name}: {what.rstrip('.')}. Expected in {root} (--data-dir or {VARIABLE} name another folder), "
            f"or in a folder below it: {self.expected}. To get it: {command}"
        )

    def _left(self, root: Path) -> list[str]:
        """What a download left: archives that were not unpacked, and files that are not whole yet."""
        found: list[str] = []
        for source in (source for way in SOURCES.get(self.name, ()) for source in way):
            for folder in (root, root / self.name):
                if (folder / f"{source.file}.part").is_file():
                    found.append(f"{folder / source.file}.part is an unfinished download")
                if source.folder and (folder / source.file).is_file():
                    found.append(f"{folder / source.file} is not unpacked")
        return found

    def _read(self, layout: Layout, folder: Path, part: Part, root: Path) -> ImageData:
        try:
            data = layout.read(folder, part)
            if len(data) != self.counts[part]:
                raise InputError(
                    f"{folder}: has {len(data)} {part} images, and {self.title} has {self.counts[part]}; it is "
                    f"incomplete or another set (data of your own in this layout is given by its path)"
                )
            if data.num_classes != self.classes:
                raise InputError(f"{folder}: has {data.num_classes} classes, and {self.title} has {self.classes}")
            return replace(data, name=self.name)
        except InputError as error:
            raise self.problem(root, str(error)) from None


@dataclass(frozen=True)
class DataInfo:
    """What a named data set is, where it comes from and what its licence allows."""

    summary: str
    licence: str
    citation: str
    files: FileSet | None = None
    """How it lies in files; None for one that comes with a package."""
    draws_test: bool = False
    """Whether its test images differ from split to split, because nobody published any."""


def held_out(train: ImageData, test: ImageData | None, split_seed: int) -> Splits:
    """Hold a stratified tenth of training data out for validation, by a split of that seed."""
    count = max(1, round(HELD_OUT * len(train)))
    if count >= len(train):
        raise InputError(f"{train.name}: {len(train)} images are too few to hold some out for validation.")
    kept, validation = hold_out(train.y, count, "held_out", split_seed)
    return Splits(train.subset(kept), train.subset(validation), test, split_seed)


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
