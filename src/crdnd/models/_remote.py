"""Models and weights from the web, brought into the cache before they are read. Nothing in them is ever run."""

import logging
import re
import time
from collections.abc import Callable
from pathlib import Path
from urllib.parse import unquote, urlsplit, urlunsplit

from crdnd.config import build
from crdnd.download import Progress, cache_folder, download, read_url
from crdnd.errors import InputError, RunError, first_line
from crdnd.io import atomic_write_bytes, json_object
from crdnd.models._folder import CARD, WEIGHTS, ModelCard

log = logging.getLogger("crdnd")

HUB = "hf:"
SECONDS_BETWEEN_LINES = 10.0


def is_remote(spec: str) -> bool:
    """Whether a model or a weights file is named by where it lies in the web: a URL, or an id of the hub."""
    return spec.startswith(("https://", "http://", HUB))


def remote_name(spec: str) -> str:
    """The name of the file at the end of a URL, or of the model in an id of the hub."""
    if spec.startswith(HUB):
        return spec.removeprefix(HUB).partition("@")[0].rpartition("/")[2]
    return re.sub(r"[^\w.-]", "_", unquote(urlsplit(spec).path).rpartition("/")[2]) or "file"


def local_weights(spec: str) -> str:
    """The path of a weights file, which is downloaded once where it is named by its place in the web.

    Args:
        spec: a path, which is returned as it is, `https://...#sha256=...`, or `hf:owner/name[@revision]`.

    Raises:
        InputError: the spec names no sha256, or there is another file at its place.
        RunError: its place cannot be reached.
    """
    if not is_remote(spec):
        return spec
    return str(_from_hub(spec) if spec.startswith(HUB) else _from_url(spec))


def local_model(spec: str) -> str:
    """Likewise the path of a model. A `.safetensors` file of this package has its card, a `.json`, beside it."""
    path = Path(local_weights(spec))
    if is_remote(spec) and path.suffix == ".safetensors":
        _bring_card(spec, path)
    return str(path)


def _from_url(spec: str) -> Path:
    url, _, fragment = spec.partition("#")
    found = re.fullmatch(r"sha256=([0-9a-fA-F]{64})", fragment)
    if not found:
        raise InputError(
            f"{spec}: a file of the web is taken with its sha256 alone; write {url}#sha256=... with its 64 digits, "
            "which whoever publishes it names, or `sha256sum FILE` for a copy that you trust."
        )
    digest = found[1].lower()
    name = remote_name(url)
    if not Path(name).suffix:
        name += ".pt"  # file hosts with ids in place of names: what lies there is most often a torch file
    target = cache_folder() / "models" / digest / name
    if not target.exists():
        log.info("downloading %s", url)
    return download(url, target, sha256=digest, progress=_lines(name))


def _lines(name: str) -> Progress:
    """Says now and then how far a download is."""
    said = time.monotonic()

    def progress(done: int, total: int | None) -> None:
        nonlocal said
        if time.monotonic() - said >= SECONDS_BETWEEN_LINES:
            said = time.monotonic()
            log.info("%s: %.0f MB%s", name, done / 1e6, f" of {total / 1e6:.0f}" if total else "")

    return progress


def _bring_card(spec: str, weights: Path) -> None:
    """Put the card that lies beside a weights file in the web beside it here too; it must name these weights."""
    card = weights.with_suffix(".json")
    if card.exists():
        return
    url, _, fragment = spec.partition("#")
    parts = urlsplit(url)
    beside = urlunsplit(parts._replace(path=parts.path.removesuffix(weights.suffix) + ".json"))
    try:
        content = read_url(beside)
    except InputError as error:
        raise InputError(
            f"{url}: is a weights file without the card {card.name} of this package beside it ({first_line(error)}); "
            "give the architecture as the model, and this file as its weights."
        ) from None
    named = build(ModelCard, json_object(content, beside), where=beside)
    if named.sha256 != fragment.removeprefix("sha256=").lower():
        raise InputError(f"{beside}: is the card of another model, its sha256 is {named.sha256}.")
    atomic_write_bytes(card, content)


def _from_hub(spec: str) -> Path:
    """The folder of a model of the Hugging Face hub: two files of a repository, and no other one is looked at."""
    found = re.fullmatch(r"hf:([\w.-]+/[\w.-]+)(?:@([\w./-]+))?", spec)
    if not found:
        raise InputError(f"{spec}: a model of the hub is written as hf:owner/name, or hf:owner/name@revision.")
    folder = Path(_quietly(lambda: _snapshot(spec, found[1], found[2])))
    if missing := [name for name in (CARD, WEIGHTS) if not (folder / name).exists()]:
        raise InputError(
            f"{spec}: has no {missing[0]}; only model folders of this package are read from the hub. Weights of others "
            "are given by their URL and sha256, with the architecture as the model."
        )
    return folder


def _snapshot(spec: str, repository: str, revision: str | None) -> str:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        return snapshot_download(
            repository, revision=revision, allow_patterns=[CARD, WEIGHTS], cache_dir=cache_folder() / "hub"
        )
    except RevisionNotFoundError:
        raise InputError(f"{spec}: there is no such revision.") from None
    except RepositoryNotFoundError:
        raise InputError(f"{spec}: there is no such model at the hub, or it is private.") from None
    except HFValidationError as error:
        raise InputError(f"{spec}: {first_line(error)}") from None
    except LocalEntryNotFoundError:
        raise RunError(f"{spec}: the hub cannot be reached, and the model is not in the cache.") from None
    except HfHubHTTPError as error:
        raise RunError(f"{spec}: the hub answers {first_line(error)}") from None


def _quietly(body: Callable[[], str]) -> str:
    """Run the body without the hub's own progress bars, which would mix with ours."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    if are_progress_bars_disabled():
        return body()
    disable_progress_bars()
    try:
        return body()
    finally:
        enable_progress_bars()
