"""`crdnd card`, `crdnd push` and `crdnd pull`."""

import re
from pathlib import Path
from typing import Annotated

import typer

from crdnd.errors import InputError

ModelFolder = Annotated[Path, typer.Argument(metavar="MODEL", help="A run's folder, or another model folder.")]
LicenceOption = Annotated[
    str,
    typer.Option("--license", help="Of the weights, as the Hub abbreviates it, such as apache-2.0."),
]


def card_command(model: ModelFolder, licence: LicenceOption = "") -> None:
    """Write a model's README.md from the files in its folder: use, data, threat model, results, cost, provenance.

    Every number comes from a file; results from evaluation.json, so measure the model first. `crdnd push` writes the
    page anew.

    Examples:

        crdnd evaluate runs/student --preset full --out runs/student/evaluation.json

        crdnd card runs/student --license apache-2.0
    """
    from crdnd.report import write_model_card

    print(f"wrote {write_model_card(model, licence=_licence(licence))}")


def push_command(
    model: ModelFolder,
    repository: Annotated[str, typer.Argument(metavar="OWNER/NAME", help="At the Hugging Face hub.")],
    private: Annotated[bool, typer.Option("--private", help="A repository that is created is private.")] = False,
    revision: Annotated[str | None, typer.Option("--revision", help="Branch; the main one by default.")] = None,
    licence: LicenceOption = "",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the files and the page, and send nothing.")] = False,
) -> None:
    """Share a model at the Hugging Face hub, with a page that is written from its files.

    Sent are README.md, model.safetensors, model.json and, where they are, evaluation.json, exports.json and the ONNX
    files that it names; never checkpoints, logs or settings files. Paths of this machine are cut to their last names.

    A token is given by HF_TOKEN or `hf auth login`; HF_ENDPOINT names another hub.

    Examples:

        crdnd push runs/student ada/digits-rslad --dry-run

        crdnd push runs/student ada/digits-rslad --license apache-2.0 --private
    """
    from crdnd.models import PAGE, parse_hub, push_files
    from crdnd.provenance import package_versions
    from crdnd.report import published_files

    name, branch = parse_hub(repository)
    if branch is not None and revision is not None:
        raise InputError("revision: is named twice; give it with --revision alone.")
    files = published_files(model, licence=_licence(licence), repository=name)
    for file, content in files.items():
        size = content.stat().st_size if isinstance(content, Path) else len(content)
        print(f"{size:>12,} bytes  {file}")
    if dry_run:
        page = files[PAGE]
        print(f"\nNothing was sent. {PAGE}:\n\n{page.decode() if isinstance(page, bytes) else ''}", end="")
        return
    branch = revision or branch
    spec = f"{name}@{branch}" if branch else name
    print(push_files(spec, files, f"Pushed by crdnd {package_versions()['crdnd']}", private=private))


def pull_command(
    repository: Annotated[str, typer.Argument(metavar="OWNER/NAME[@REVISION]", help="At the Hugging Face hub.")],
    out: Annotated[Path, typer.Option("--out", help="The folder to make.")],
    sha256: Annotated[str | None, typer.Option("--sha256", help="Of the weights; others are refused.")] = None,
) -> None:
    """Get a model from the Hugging Face hub, verified; nothing of it is run.

    The weights must have the sha256 that the repository's model.json names. That finds damage, not an owner who
    changed both: --sha256, from somebody whom you trust, does. Files that are no model folder's are not downloaded.

    Examples:

        crdnd pull ada/digits-rslad --out models/rslad

        crdnd evaluate models/rslad --preset standard
    """
    from crdnd.models import pull_model

    found = pull_model(repository, out, sha256)
    print(f"{out}: {', '.join(found.files)} of commit {found.commit[:12]}; weights have sha256 {found.sha256}")
    if found.left:
        some = ", ".join(found.left[:5]) + (f" and {len(found.left) - 5} more" if len(found.left) > 5 else "")
        print(f"Not downloaded, for they are no part of a model folder and may hold code: {some}")


def _licence(text: str) -> str:
    if text and not re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", text):
        raise InputError(f"license: must be an abbreviation of the Hub such as apache-2.0 or other, got {text!r}.")
    return text
