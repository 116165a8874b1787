"""Models and weights from the web, brought into the cache before they are read. Nothing in them is ever run."""

import logging
import re
import time
from pathlib import Path
from urllib.parse import unquote, urlsplit, urlunsplit

from crdnd.download import Progress, cache_folder, download, read_url
from crdnd.errors import InputError, first_line
from crdnd.io import atomic_write_bytes
from crdnd.models._folder import CARD, WEIGHTS, parse_card
from crdnd.models._hub import HUB, asking_hub, check_has_model, parse_hub

log = logging.getLogger("crdnd")

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
    named = parse_card(content, beside)
    if named.sha256 != fragment.removeprefix("sha256=").lower():
        raise InputError(f"{beside}: is the card of another model, its sha256 is {named.sha256}.")
    atomic_write_bytes(card, content)


def _from_hub(spec: str) -> Path:
    """The folder of a model of the Hugging Face hub: two files of a repository, and no other one is looked at."""
    repository, revision = parse_hub(spec)
    with asking_hub(spec):
        from huggingface_hub import snapshot_download

        folder = Path(
            snapshot_download(
                repository, revision=revision, allow_patterns=[CARD, WEIGHTS], cache_dir=cache_folder() / "hub"
            )
        )
    check_has_model(spec, [path.name for path in folder.iterdir()])
    return folder
