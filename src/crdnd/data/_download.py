"""Named sets brought to this machine: downloaded, checked, and unpacked without trust."""

import shutil
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import IO

from filelock import FileLock

from crdnd.data._named import FileSet
from crdnd.data._sources import SOURCES, Source
from crdnd.download import digest_of, download
from crdnd.errors import InputError, first_line
from crdnd.io import LOCK, cannot_write, make_folder

Listener = Callable[[str, int, int], None]
"""Called as a file grows, with its name, the bytes there are and the bytes there will be."""

LARGEST = 2 << 30
"""Bytes that an archive may unpack to."""


def get(files: FileSet, root: Path, listener: Listener | None = None) -> Path:
    """Have a named set in a data folder: use what is there, unpack what is packed, and download the rest.

    Archives stay beside what they are unpacked to, so that their checksum can be looked at again. A damaged folder is
    replaced.

    Args:
        files: the set.
        root: the data folder; it is made if need be.
        listener: told how far it is.

    Returns:
        The folder of the set's files.

    Raises:
        InputError: no source has a file any more, or an archive is damaged.
        RunError: a source cannot be reached; what was loaded is kept, and the next call goes on with it.
    """
    try:
        files.load(data_dir=root)
        return files.locate(root)[1]
    except InputError:
        pass  # something is missing or damaged
    make_folder(root)
    with FileLock(root / LOCK):
        for source, folder in _wanted(files, root):
            whole = _downloaded(source, folder, listener)
            if source.folder:
                unpack(whole, root, source.folder)
    files.load(data_dir=root)
    return files.locate(root)[1]


def _wanted(files: FileSet, root: Path) -> list[tuple[Source, Path]]:
    """The files to have and where: those of a way whose archives are there already, else those of the first way."""
    ways = SOURCES[files.name]
    for way in ways:
        for folder in (root, root / files.name):
            if all(source.folder and is_whole(source, folder) for source in way):
                return [(source, folder) for source in way]
    return [(source, root if source.folder else root / files.name) for source in ways[0]]


def is_whole(source: Source, folder: Path) -> bool:
    """Whether a file is there, with the published checksum."""
    file = folder / source.file
    return file.is_file() and file.stat().st_size == source.size and md5_of(file) == source.md5


def md5_of(file: Path) -> str:
    """The MD5 of a file in hexadecimal, which is the checksum that the sets' authors published."""
    return digest_of(file, "md5")


def _downloaded(source: Source, folder: Path, listener: Listener | None) -> Path:
    def progress(done: int, _: int | None) -> None:
        if listener is not None:
            listener(source.file, done, source.size)

    return download(source.urls, folder / source.file, md5=source.md5, size=source.size, progress=progress)


def unpack(archive: Path, root: Path, folder: str) -> Path:
    """Unpack an archive's one folder into `root`, in place of what is there of that name.

    Only plain files below that folder are taken. A name that leads elsewhere, or more than `LARGEST` bytes, is refused
    before anything is put in place.

    Returns:
        The folder.
    """
    with tempfile.TemporaryDirectory(prefix=".unpack-", dir=root) as made:
        temporary, total = Path(made), 0
        try:
            for name, size, content in _members(archive):
                path = PurePosixPath(name)
                if path.is_absolute() or ".." in path.parts or "\\" in name or ":" in name:
                    raise InputError(f"{archive}: has a member that leads elsewhere ({name!r:.60}); it is not used.")
                if path.parts[0] != folder:
                    continue
                total += size
                if total > LARGEST:
                    raise InputError(f"{archive}: unpacks to more than {LARGEST} bytes; it is not used.")
                target = temporary.joinpath(*path.parts)
                target.parent.mkdir(parents=True, exist_ok=True)
                with content, target.open("wb") as file:
                    shutil.copyfileobj(content, file)
        except (tarfile.TarError, zipfile.BadZipFile, zlib.error, EOFError) as error:
            raise InputError(f"{archive}: cannot be unpacked ({first_line(error)}); it is damaged.") from None
        except OSError as error:
            raise cannot_write(root, error) from error
        if not (temporary / folder).is_dir():
            raise InputError(f"{archive}: has no folder {folder}; it is another archive.")
        target = root / folder
        if target.exists():
            target.rename(temporary / f"{folder}.old")
        (temporary / folder).rename(target)
    return target


def _members(archive: Path) -> Iterator[tuple[str, int, IO[bytes]]]:
    """Name, size and content of an archive's plain files; links, devices and folders are passed over."""
    if archive.suffix == ".zip":
        with zipfile.ZipFile(archive) as packed:
            for entry in packed.infolist():
                if not entry.is_dir():
                    yield entry.filename, entry.file_size, packed.open(entry)
        return
    with tarfile.open(archive) as packed:
        for member in packed:
            content = packed.extractfile(member) if member.isfile() else None
            if content is not None:
                yield member.name, member.size, content
