"""Files from the network: resumed where they were cut off, verified, whole or not there at all. Nothing is ever run."""

import contextlib
import hashlib
import http.client
import os
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from typing import BinaryIO, cast

from filelock import FileLock

from crdnd.errors import InputError, RunError, first_line
from crdnd.io import cannot_write, make_folder

Progress = Callable[[int, int | None], None]
"""Called with the bytes that are there, and how many it will be where that is known."""

TIMEOUT = 30.0
"""Seconds without a byte after which a connection is given up."""
WAITS = (1.0, 4.0, 10.0)
"""Seconds to wait before the sources that may have more are asked again."""
BUSY = (408, 429, 500, 502, 503, 504)
"""HTTP states that may be over in a moment."""
CHUNK = 1 << 18
WEB_PAGE = "a web page instead of the file"
SENDS_A_PAGE = f"sends {WEB_PAGE} (a login, a warning, or a quota that is spent)"


class _CutError(Exception):
    """A source stopped, or did not begin; what came so far is kept."""


class _UnusableError(Exception):
    """A source has something else; there is no point in asking it again."""


def cache_folder() -> Path:
    """Where downloads are kept: CRDND_CACHE, or the user's cache folder as the platform has it."""
    if own := os.environ.get("CRDND_CACHE"):
        return Path(own)
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA") or str(Path.home() / "AppData" / "Local")
    elif sys.platform == "darwin":
        base = str(Path.home() / "Library" / "Caches")
    else:
        base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "crdnd"


def download(
    urls: str | Sequence[str],
    target: Path,
    *,
    sha256: str | None = None,
    md5: str | None = None,
    size: int | None = None,
    progress: Progress | None = None,
) -> Path:
    """Bring a file here, unless it is here already. It appears under its name when all of it is there and verified.

    What came before a cut lies in `<target>.part`; the next call goes on behind it. A second process that wants the
    same file waits for the first.

    Args:
        urls: http or https, one or several sources of the same file; the next is asked where one fails.
        target: where the file goes; its folder is created.
        sha256: of the file, in hexadecimal.
        md5: likewise, for files whose publisher names nothing better; one of the two is required.
        size: in bytes, where it is known.
        progress: called after every piece.

    Returns:
        `target`.

    Raises:
        InputError: all sources have another file than the checksum says, a web page, or nothing; or the folder cannot
            be written.
        RunError: a source that may have it cannot be reached, or the disk is full; what came so far is kept.
    """
    if not sha256 and not md5:
        raise InputError(f"{target.name}: a download needs a sha256 or md5 to be verified by.")
    sources = [urls] if isinstance(urls, str) else list(urls)
    for url in sources:
        if not url.startswith(("https://", "http://")):
            raise InputError(f"{url}: downloads are made from https:// or http:// alone.")
    wanted = _Wanted(target, sha256, md5, size)
    make_folder(target.parent)
    with FileLock(target.with_name(f".{target.name}.lock")):
        if target.exists():
            if wanted.is_in(target):
                return target
            target.unlink()
        _from_any(sources, wanted, progress)
    return target


def read_url(url: str, limit: int = 1 << 20) -> bytes:
    """The content of a small file of the web, of at most `limit` bytes; raises as `download` does.

    Nothing verifies it: what it says must be checked against something that is.
    """
    try:
        with _answer(url, {}) as response:
            content = response.read(limit + 1) if response is not None else b""
    except _UnusableError as error:
        raise InputError(f"{url} {error}.") from None
    except _CutError as error:
        raise RunError(f"{url} {error}.") from None
    if len(content) > limit:
        raise InputError(f"{url} is larger than {limit} bytes, which is not what was expected there.")
    return content


def looks_like_a_page(data: bytes) -> str:
    """What to call data that is a web page, as hosts send instead of a file; empty otherwise."""
    start = data[:200].lstrip().lower()
    return WEB_PAGE if start.startswith((b"<!doctype", b"<html", b"<?xml")) else ""


def digest_of(path: Path, algorithm: str) -> str:
    """The checksum of a file in hexadecimal; `algorithm` is sha256 or md5, which finds damage, and no forgery."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.new(algorithm, usedforsecurity=False)).hexdigest()


class _Wanted:
    """The file that is wanted, and how it is known."""

    def __init__(self, target: Path, sha256: str | None, md5: str | None, size: int | None) -> None:
        self.target, self.part = target, target.with_name(f"{target.name}.part")
        self.algorithm = "sha256" if sha256 else "md5"
        self.digest = (sha256 or md5 or "").lower()
        self.size = size

    def is_in(self, path: Path) -> bool:
        return self.size in (None, path.stat().st_size) and digest_of(path, self.algorithm) == self.digest


def _from_any(sources: Sequence[str], wanted: _Wanted, progress: Progress | None) -> None:
    """The whole file from the first source that gives it. All are asked before any is waited for."""
    failures: dict[int, _CutError | _UnusableError] = {}
    for wait in (0.0, *WAITS):
        time.sleep(wait)
        for number, url in enumerate(sources):
            if isinstance(failures.get(number), _UnusableError):
                continue
            try:
                _from(url, wanted, progress)
            except (_CutError, _UnusableError) as error:
                failures[number] = error
            else:
                return
        if all(isinstance(error, _UnusableError) for error in failures.values()):
            break
    said = "; ".join(f"{sources[number]} {error}" for number, error in failures.items())
    message, by_hand = f"{wanted.target.name}: cannot be downloaded: {said}", f"by hand and put it at {wanted.target}."
    if any(isinstance(error, _CutError) for error in failures.values()):
        raise RunError(f"{message}. What came so far is kept, and the same command goes on; or get the file {by_hand}")
    raise InputError(f"{message}. Get it {by_hand}")


def _from(url: str, wanted: _Wanted, progress: Progress | None) -> None:
    """The whole file from one source, which is asked again as long as that brings it further."""
    while True:
        before = _size(wanted.part)
        try:
            _fetch(url, wanted, before, progress)
        except _CutError:
            if _size(wanted.part) <= before:
                raise
            continue
        if wanted.is_in(wanted.part):
            os.replace(wanted.part, wanted.target)
            return
        found = digest_of(wanted.part, wanted.algorithm)
        wanted.part.unlink()
        if not before:
            raise _UnusableError(f"has another file (its {wanted.algorithm} is {found}, not {wanted.digest})")
        # The beginning may be from another file or another time: once more, from the start.


def _fetch(url: str, wanted: _Wanted, start: int, progress: Progress | None) -> None:
    """Append to the part what is missing, from byte `start` on."""
    headers = {"Range": f"bytes={start}-"} if start else {}
    with _answer(url, headers) as response:
        if response is None:  # nothing lies behind what is there: it is whole, or of another file
            return
        if response.status != 206 or not _continues(response, start):
            start = 0  # the source sends the whole file again
        length = response.headers.get("Content-Length")
        total = start + int(length) if length and length.isdecimal() else None
        if wanted.size is not None and total not in (None, wanted.size):
            raise _UnusableError(f"has another file ({total} bytes, not {wanted.size})")
        done = _append(response, wanted, start, total or wanted.size, progress)
    if total is not None and done < total:
        raise _CutError(f"stopped after {done} of {total} bytes")


@contextlib.contextmanager
def _answer(url: str, headers: dict[str, str]) -> Generator[http.client.HTTPResponse | None]:
    """What a source answers, None where it has nothing in the range; its failures, and those of the body, in words."""
    headers = {"User-Agent": "crdnd", "Accept-Encoding": "identity", **headers}
    try:
        with _opener().open(urllib.request.Request(url, headers=headers), timeout=TIMEOUT) as answer:  # noqa: S310
            response = cast("http.client.HTTPResponse", answer)
            if response.headers.get_content_type() in ("text/html", "application/xhtml+xml"):
                raise _UnusableError(SENDS_A_PAGE)
            yield response
            return
    except urllib.error.HTTPError as error:
        error.close()
        message = f"answers {error.code} {error.reason}"
        if error.code != 416:
            raise (_CutError(message) if error.code in BUSY else _UnusableError(message)) from None
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", None)
        raise _CutError(f"cannot be reached ({reason or first_line(error)})") from None
    yield None


def _append(
    response: http.client.HTTPResponse, wanted: _Wanted, start: int, total: int | None, progress: Progress | None
) -> int:
    """Write what the source sends behind byte `start` of the part. Returns how long the part is then."""
    piece, done = response.read(CHUNK), start
    if not start and looks_like_a_page(piece):
        raise _UnusableError(SENDS_A_PAGE)
    with _opened(wanted.part, "ab" if start else "wb") as file:
        while piece:
            done += len(piece)
            if wanted.size is not None and done > wanted.size:
                break
            _write(file, piece, wanted.part)
            if progress:
                progress(done, total)
            piece = response.read(CHUNK)
    if piece:
        wanted.part.unlink()
        raise _UnusableError(f"has another file (more than {wanted.size} bytes)")
    return done


def _opened(path: Path, mode: str) -> BinaryIO:
    try:
        return cast("BinaryIO", path.open(mode))
    except OSError as error:  # nor must a folder that cannot be written
        raise cannot_write(path, error) from error


def _write(file: BinaryIO, piece: bytes, path: Path) -> None:
    try:
        file.write(piece)
        file.flush()
    except OSError as error:  # a full disk must not look like a broken connection
        raise cannot_write(path, error) from error


def _continues(response: http.client.HTTPResponse, start: int) -> bool:
    """Whether an answer to a request for a range begins where it was asked to."""
    return response.headers.get("Content-Range", "").startswith(f"bytes {start}-")


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _opener() -> urllib.request.OpenerDirector:
    """Opens http and https, behind the user's proxy, and nothing else: a redirect cannot lead to a local file."""
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler(),
        urllib.request.HTTPHandler(),
        urllib.request.HTTPSHandler(),
        urllib.request.HTTPDefaultErrorHandler(),
        urllib.request.HTTPRedirectHandler(),
        urllib.request.HTTPErrorProcessor(),
        urllib.request.UnknownHandler(),
    ):
        opener.add_handler(handler)
    return opener
