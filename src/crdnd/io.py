"""Files that are either the old one or the new one, never half of one."""

import contextlib
import errno
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Collection, Generator
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from crdnd.errors import InputError, RunError

LOCK = ".lock"
_ZEROS = bytes(1 << 20)
SECONDS_OF_A_LOOK = 0.2
"""`is_held` holds a lock for a moment; whoever wants it tries for longer than that."""


def atomic_write_bytes(path: Path, data: bytes) -> None:
    """Write `data` to `path` so that a reader, or a kill at any moment, finds the old content or the new, never a part.

    Raises:
        RunError: the disk is full; what stood at `path` before is untouched.
        InputError: the folder cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:  # a signal may end the writing too
        with contextlib.suppress(OSError):
            temporary.unlink()
        if isinstance(error, OSError):
            raise cannot_write(path, error) from error
        raise
    _sync_folder(path.parent)


def atomic_write_text(path: Path, text: str) -> None:
    """Like `atomic_write_bytes`, for text in UTF-8."""
    atomic_write_bytes(path, text.encode())


def make_folder(path: Path) -> None:
    """Create a folder and its parents; a path that cannot be one is an error of one line."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise cannot_write(path, error) from error


def check_room(folder: Path, size: int, what: str) -> None:
    """See that there is room for so many bytes in a folder: they are written and removed.

    Raises:
        RunError: the disk, or what this user may use of it, is too small; the message says what it is for.
        InputError: the folder cannot be written.
    """
    probe = folder / f".probe.{os.getpid()}.tmp"
    try:
        with probe.open("wb") as file:
            for start in range(0, size, len(_ZEROS)):
                file.write(_ZEROS[: size - start])
    except OSError as error:
        failed = cannot_write(probe, error)
        if isinstance(failed, InputError):
            raise failed from error
        free = shutil.disk_usage(folder).free
        raise RunError(
            f"{folder}: {what} need {size / 2**30:.3g} GiB, and {free / 2**30:.3g} GiB are free; free space or choose "
            "another --out."
        ) from error
    finally:
        with contextlib.suppress(OSError):
            probe.unlink()


def move_aside(folder: Path, marks: Collection[str]) -> Path | None:
    """Move everything but the lock into `<folder>.old-<n>`, and say where that is; None where there was nothing.

    Raises:
        InputError: the folder holds something, and no file by which what belongs here is known.
    """
    folder = folder if folder.name.strip(".") else folder.resolve()  # '.' has no name to add to
    content = [path for path in folder.iterdir() if path.name != LOCK]
    if not content:
        return None
    if not any((folder / name).exists() for name in marks):
        raise InputError(
            f"{folder}: --fresh moves an old run aside, and this folder holds something else (none of "
            f"{', '.join(sorted(marks))}); choose another --out."
        )
    number = 1
    while (aside := folder.with_name(f"{folder.name}.old-{number}")).exists():
        number += 1
    make_folder(aside)
    for path in content:
        path.rename(aside / path.name)
    return aside


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object that this package wrote; anything else is an InputError that names the file."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read as JSON ({error}); the file is missing or damaged.") from None
    return json_object(content, str(path))


def json_object(content: bytes, where: str) -> dict[str, Any]:
    """The JSON object in the content of a file; anything else is an InputError that says where it lies."""
    try:
        value = json.loads(content)
    except ValueError as error:
        raise InputError(f"{where}: cannot be read as JSON ({error}); the file is missing or damaged.") from None
    if not isinstance(value, dict):
        raise InputError(f"{where}: is not one of this package's files (a JSON object was expected).")
    return value


def read_bytes(path: Path) -> bytes:
    """The content of a file, or an InputError that names it."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}).") from None


def read_verified(path: Path, expected_sha256: str, way_out: str) -> bytes:
    """Read a file whose SHA-256 is known; an InputError with the way out if it is missing, cut short or damaged."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); {way_out}.") from None
    if sha256(data) != expected_sha256:
        raise InputError(f"{path}: is truncated or damaged, its sha256 is not the recorded one; {way_out}.")
    return data


def sha256(data: bytes) -> str:
    """The SHA-256 of `data` in hexadecimal."""
    return hashlib.sha256(data).hexdigest()


@contextlib.contextmanager
def exclusive(folder: Path) -> Generator[None]:
    """Hold a run's folder; a second process that wants it is refused at once.

    The operating system releases the lock when the process dies, so a killed run never leaves a stale one.
    """
    lock = FileLock(folder / LOCK)
    try:
        lock.acquire(timeout=SECONDS_OF_A_LOOK, poll_interval=0.02)
    except Timeout:
        raise InputError(f"{folder}: another run is writing here; wait for it or choose another --out.") from None
    except OSError as error:
        raise cannot_write(folder, error) from error
    try:
        yield
    finally:
        lock.release()


def is_held(folder: Path) -> bool:
    """Whether a process holds a run's folder; nothing in it changes by asking, and nobody is kept from it."""
    try:
        with (folder / LOCK).open("rb") as file:
            return not _can_lock(file.fileno())
    except OSError:
        return False


def _can_lock(handle: int) -> bool:
    if sys.platform == "win32":
        import msvcrt

        try:
            msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)
            msvcrt.locking(handle, msvcrt.LK_UNLCK, 1)
        except OSError:
            return False
        return True
    import fcntl

    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)  # several may look at once; closing lets go
    except BlockingIOError:
        return False
    return True


def cannot_write(path: Path, error: OSError) -> RunError | InputError:
    """The error for a path that cannot be written: the machine's when the disk is full, else the caller's."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return RunError(f"{path}: the disk is full; what was saved before is untouched. Free space and run again.")
    return InputError(f"{path}: cannot be written ({error.strerror or error}); choose another place.")


def _sync_folder(folder: Path) -> None:
    """Make a rename survive a power cut; not every platform lets a folder be opened."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
