"""Model folders at the Hugging Face hub: pushed by an explicit list of files, pulled likewise, and nothing is run."""

import json
import os
import re
import shutil
import tempfile
from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from crdnd.errors import InputError, RunError, first_line
from crdnd.io import cannot_write, make_folder, read_bytes, sha256
from crdnd.models._folder import CARD, WEIGHTS, parse_card, parse_tensors

HUB = "hf:"
PAGE, EVALUATION, EXPORTS = "README.md", "evaluation.json", "exports.json"
OF_A_MODEL = (WEIGHTS, CARD, PAGE, EVALUATION, EXPORTS)
"""The files that a repository has of a model; besides them only the ONNX files that `exports.json` names."""
_ONNX = re.compile(r"[A-Za-z0-9_][\w.-]*\.onnx")
_TIMEOUT = 30.0


def parse_hub(spec: str) -> tuple[str, str | None]:
    """Repository and revision of `owner/name[@revision]`, with `hf:` before it or without."""
    found = re.fullmatch(r"(?:hf:)?([\w.-]+/[\w.-]+)(?:@([\w./-]+))?", spec)
    if not found or ".." in spec:
        form = f"{HUB if spec.startswith(HUB) else ''}owner/name"
        raise InputError(f"{spec}: a model of the hub is written as {form}, or {form}@revision.")
    return found[1], found[2]


def check_has_model(spec: str, names: Iterable[str]) -> None:
    """See that a repository has the files without which it is no model of this package."""
    if missing := [name for name in (CARD, WEIGHTS) if name not in names]:
        raise InputError(
            f"{spec}: has no {missing[0]}; only model folders of this package are read from the hub. Weights of others "
            "are given by their URL and sha256, with the architecture as the model."
        )


def exported_files(exports: bytes, where: str) -> dict[str, str | None]:
    """The ONNX files that the content of an `exports.json` names, with their sha256 where it says it."""
    try:
        documents = json.loads(exports)
    except ValueError as error:
        raise InputError(f"{where}: cannot be read as JSON ({first_line(error)}).") from None
    found: dict[str, str | None] = {}
    for document in documents if isinstance(documents, list) else ():
        name = document.get("file") if isinstance(document, dict) else None
        if isinstance(name, str) and _ONNX.fullmatch(name):
            digest = document.get("sha256")
            found[name] = digest if isinstance(digest, str) else None
    return found


def push_files(spec: str, files: Mapping[str, bytes | Path], message: str, *, private: bool = False) -> str:
    """Put the files of a model into a repository, which is created where there is none, as one commit.

    Files of a model that an earlier push left and this one lacks are removed; what else is there stays.

    Args:
        spec: as for `parse_hub`; the revision is a branch.
        files: contents, or where they lie, by their names in the repository.
        message: of the commit.
        private: whether a repository that is created is private.

    Returns:
        The address of the commit.

    Raises:
        InputError: there is no token, or it may not write there.
        RunError: the hub cannot be reached, or fails.
    """
    repository, branch = parse_hub(spec)
    with asking_hub(spec):
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

        hub = HfApi()
        hub.create_repo(repository, private=private or None, exist_ok=True)
        if branch:
            hub.create_branch(repository, branch=branch, exist_ok=True)
        there = hub.list_repo_files(repository, revision=branch)
        stale = [name for name in OF_A_MODEL if name in there and name not in files]
        commit = hub.create_commit(
            repository,
            [
                *(CommitOperationAdd(path_in_repo=name, path_or_fileobj=content) for name, content in files.items()),
                *(CommitOperationDelete(path_in_repo=name) for name in stale),
            ],
            commit_message=message,
            revision=branch,
        )
        return commit.commit_url


@dataclass(frozen=True)
class Pulled:
    """What came of a repository."""

    files: tuple[str, ...]
    commit: str
    """Of the repository."""
    sha256: str
    """Of the weights."""
    left: tuple[str, ...]
    """Files of the repository that were not downloaded, because they are none of a model's."""


def pull_model(spec: str, out: Path, expected_sha256: str | None = None) -> Pulled:
    """Download a model folder, verify it, and only then give it its name.

    The weights must be those that the card of the same repository names. Whoever can write there can change both;
    `expected_sha256` comes from somewhere else and rules that out.

    Args:
        spec: as for `parse_hub`.
        out: the folder to make; there is none yet.
        expected_sha256: of the weights.

    Raises:
        InputError: there is no such repository, it holds no model, or a file is not what it should be; nothing is kept.
        RunError: the hub cannot be reached, or fails.
    """
    repository, revision = parse_hub(spec)
    if expected_sha256 is not None and not re.fullmatch("[0-9a-fA-F]{64}", expected_sha256):
        raise InputError(f"sha256: must be the 64 digits of the weights, got {expected_sha256!r}.")
    if out.exists():
        raise InputError(f"{out}: is there already; choose another --out.")
    with asking_hub(spec):
        from huggingface_hub import HfApi

        info = HfApi().model_info(repository, revision=revision, timeout=_TIMEOUT)
    names = [sibling.rfilename for sibling in info.siblings or ()]
    for name in names:
        if "\\" in name or ":" in name or PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            raise InputError(f"{spec}: lists a file {name!r}, which would lie outside its folder; nothing was kept.")
    check_has_model(spec, names)
    make_folder(out.parent)
    try:
        work = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".tmp", dir=out.parent))
    except OSError as error:
        raise cannot_write(out, error) from error
    try:
        folder = work / "model"
        folder.mkdir()
        _fetch(spec, repository, info.sha, [name for name in OF_A_MODEL if name in names], folder)
        digest = _verify(spec, folder, expected_sha256)
        exports = exported_files(read_bytes(folder / EXPORTS), f"{spec}/{EXPORTS}") if EXPORTS in names else {}
        _fetch(spec, repository, info.sha, [name for name in exports if name in names], folder)
        for name, expected in exports.items():
            if expected is not None and name in names and sha256(read_bytes(folder / name)) != expected:
                raise InputError(f"{spec}: {name} is not the file that {EXPORTS} names; nothing was kept.")
        kept = tuple(sorted(path.name for path in folder.iterdir()))
        folder.rename(out)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    left = tuple(name for name in names if name not in kept and name != ".gitattributes")
    return Pulled(kept, info.sha or "", digest, left)


def _fetch(spec: str, repository: str, commit: str | None, names: Sequence[str], folder: Path) -> None:
    """Download files of one commit into a folder; the client's own cache is kept out of it."""
    cache = folder.parent / "cache"
    for name in names:
        with asking_hub(spec):
            from huggingface_hub import hf_hub_download

            file = Path(hf_hub_download(repository, name, revision=commit, cache_dir=cache))
        os.replace(file.resolve(), folder / name)  # the name is a link to where the content is


def _verify(spec: str, folder: Path, expected_sha256: str | None) -> str:
    """See that the weights are whole and those of the card. Returns their sha256."""
    content = read_bytes(folder / WEIGHTS)
    digest = sha256(content)
    if expected_sha256 is not None and digest != expected_sha256.lower():
        raise InputError(f"{spec}: has other weights than --sha256 names, theirs is {digest}; nothing was kept.")
    named = parse_card(read_bytes(folder / CARD), f"{spec}/{CARD}").sha256
    if digest != named:
        raise InputError(
            f"{spec}: {WEIGHTS} is not the file that {CARD} names (sha256 {digest[:12]}..., not {named[:12]}...): "
            "damaged or tampered with; nothing was kept."
        )
    parse_tensors(content, Path(f"{spec}/{WEIGHTS}"))
    return digest


@contextmanager
def asking_hub(spec: str) -> Generator[None]:
    """Errors of the hub's client in the body become ours, of one line; its progress bars would mix with ours."""
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        HTTPError,  # pyright: ignore[reportPrivateImportUsage]  # that of the client's own HTTP library
        LocalEntryNotFoundError,
        LocalTokenNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    shown = not are_progress_bars_disabled()
    if shown:
        disable_progress_bars()
    try:
        yield
    except RevisionNotFoundError:
        raise InputError(f"{spec}: there is no such revision.") from None
    except RepositoryNotFoundError:
        raise InputError(f"{spec}: there is no such model at the hub, or it is private{_TOKEN}.") from None
    except HFValidationError as error:
        raise InputError(f"{spec}: {first_line(error)}") from None
    except LocalTokenNotFoundError:
        raise InputError(f"{spec}: the hub asks who you are{_TOKEN}.") from None
    except LocalEntryNotFoundError:
        raise RunError(f"{spec}: the hub cannot be reached, and the model is not in the cache.") from None
    except HfHubHTTPError as error:
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status in (401, 403):
            raise InputError(f"{spec}: the hub refuses ({first_line(error)}){_TOKEN}.") from None
        raise RunError(f"{spec}: the hub answers {first_line(error)}") from None
    except (HTTPError, OSError, RuntimeError) as error:  # an upload that fails is a plain RuntimeError there
        raise RunError(f"{spec}: the hub cannot be reached ({first_line(error.__cause__ or error)}).") from None
    finally:
        if shown:
            enable_progress_bars()


_TOKEN = "; a token is given by HF_TOKEN or `hf auth login`, and it must be allowed to do this"  # noqa: S105
