"""Downloads that survive a bad line: resumed, from several sources, checked, and unpacked without trust."""

import hashlib
import http
import http.client
import os
import re
import shutil
import tarfile
import tempfile
import urllib.error
import urllib.request
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import IO

from filelock import FileLock

from crdnd.data._named import FileSet, looks_like_a_page
from crdnd.data._sources import SOURCES, Source
from crdnd.errors import InputError, RunError, first_line
from crdnd.io import LOCK, cannot_write, make_folder

Listener = Callable[[str, int, int], None]
"""Called as a file grows, with its name, the bytes there are and the bytes there will be."""

PIECE = 1 << 18
PATIENCE = 30.0
"""Seconds without a byte after which a source is given up."""
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
        RunError: no source gave a whole file; what was loaded is kept, and the next call goes on with it.
    """
    try:
        files.load(data_dir=root)
        return files.locate(root)[1]
    except InputError:
        pass  # something is missing or damaged
    make_folder(root)
    with FileLock(root / LOCK):
        for source, folder in _wanted(files, root):
            make_folder(folder)
            whole = download(source, folder, listener)
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
    """The MD5 of a file in hexadecimal. The sets' authors published this one; it finds damage, and no forgery."""
    with file.open("rb") as handle:
        return hashlib.file_digest(handle, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()


def download(source: Source, folder: Path, listener: Listener | None = None) -> Path:
    """Have one file in a folder, from the first source that gives all of it.

    It grows as `<name>.part`, with which the next call goes on, and gets its name when its checksum is the published
    one. A source whose connection breaks is asked for the rest as long as something comes.

    Raises:
        RunError: no source gave the whole file, with what each one said.
    """
    target, part = folder / source.file, folder / f"{source.file}.part"
    if is_whole(source, folder):
        return target
    failures: list[str] = []
    failure: str | None = None
    for url in source.urls:
        # Twice, because what an earlier call or another source left may be of another file.
        for _ in range(2):
            begun = _size(part)
            failure = _grow(url, part, source, listener)
            if failure is None and md5_of(part) == source.md5:
                os.replace(part, target)
                return target
            if failure is None:
                part.unlink()
                failure = "the file has another checksum than the published one"
            if begun == 0 or _size(part):
                break
        failures.append(f"{url}: {failure}")
    raise RunError(
        f"{source.file}: no source gave the whole file ({'; '.join(failures)}). What came is kept, and the same "
        f"command goes on with it; or copy the file to {folder} by other means."
    )


def _grow(url: str, part: Path, source: Source, listener: Listener | None) -> str | None:
    """Load what is missing of a file. Returns why that ended before it was whole, or None."""
    while True:
        before = _size(part)
        if before >= source.size:
            return None  # the checksum says whether it is the file
        try:
            failure = _load(url, part, before, source, listener)
        except InputError:
            raise  # the folder cannot be written
        except (OSError, http.client.HTTPException, ValueError) as error:
            failure = first_line(error)
        if _size(part) <= before:
            return failure or "the connection ended early"


def _load(url: str, part: Path, before: int, source: Source, listener: Listener | None) -> str | None:
    headers = {"User-Agent": "crdnd", "Accept-Encoding": "identity"}
    if before:
        headers["Range"] = f"bytes={before}-"
    request = urllib.request.Request(url, headers=headers)  # noqa: S310 - an address of our own table
    try:
        response = urllib.request.urlopen(request, timeout=PATIENCE)  # noqa: S310
    except urllib.error.HTTPError as error:
        with error:
            if error.code == http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
                part.unlink(missing_ok=True)
            return f"HTTP {error.code} {error.reason}"
    with response:
        place = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", response.headers.get("Content-Range", ""))
        goes_on = response.status == http.HTTPStatus.PARTIAL_CONTENT and place and int(place[1]) == before
        if not goes_on:
            before = 0  # a server without ranges starts over
        length = response.headers.get("Content-Length")
        if length is not None and before + int(length) != source.size:
            return f"it offers {before + int(length)} bytes instead of {source.size}"
        piece = response.read(PIECE)
        if not before and (page := looks_like_a_page(piece)):
            return f"it sends {page}"
        with _opened(part, "ab" if goes_on else "wb") as file:
            done = before
            while piece and done <= source.size:
                _written(file, piece, part)
                done += len(piece)
                if listener is not None:
                    listener(source.file, done, source.size)
                piece = response.read(PIECE)
    return None


def _opened(part: Path, mode: str) -> IO[bytes]:
    try:
        return part.open(mode)
    except OSError as error:
        raise cannot_write(part, error) from error


def _written(file: IO[bytes], piece: bytes, part: Path) -> None:
    """Write, or raise the machine's own error: a full disk is not a source that failed."""
    try:
        file.write(piece)
    except OSError as error:
        raise cannot_write(part, error) from error


def _size(file: Path) -> int:
    return file.stat().st_size if file.is_file() else 0


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
                    shutil.copyfileobj(content, file, PIECE)
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
