"""A model folder's `README.md`, in the Hub's layout: every number comes from the files in the folder."""

import json
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined

from crdnd import provenance
from crdnd.config import build
from crdnd.data import data_names, load_info
from crdnd.engine.checkpoint import read_checkpoint
from crdnd.engine.run import RUN
from crdnd.errors import InputError
from crdnd.evaluation.result import Results, Row, load_results
from crdnd.export import read_exports
from crdnd.io import atomic_write_text, json_object, read_bytes, read_json, read_verified, sha256
from crdnd.models import CARD, EVALUATION, EXPORTS, PAGE, WEIGHTS, ModelCard, exported_files, read_card
from crdnd.report._lines import eps_in_words
from crdnd.threat import ThreatModel

MARK = "<!-- Written by crdnd from the files of the model's folder. What is typed here is lost. -->"


def model_card(folder: Path, *, licence: str = "", repository: str = "OWNER/NAME") -> str:
    """The page of a model folder, as Markdown.

    Args:
        folder: a model folder; what lies there of its run (`run.json`, the checkpoint), of its measurement
            (`evaluation.json`) and of its exports (`exports.json`) is told, and what does not is said to be missing.
        licence: of the weights, as the Hub abbreviates it, such as apache-2.0; by default nothing is said of it.
        repository: where readers get the model.

    Raises:
        InputError: the folder holds no whole model, or a file in it is damaged.
    """
    card = read_card(folder)
    read_verified(folder / WEIGHTS, card.sha256, "copy the model again")
    shown = build(ModelCard, provenance.without_places(card.model_dump(mode="json", by_alias=True)))
    results, row = _measured(folder, card)
    saved = read_checkpoint(folder)
    history = saved.history if saved else ()
    name = f"{shown.method or shown.class_name}-{shown.architecture.name if shown.architecture else 'model'}"
    page = Environment(
        loader=PackageLoader("crdnd", "report"),
        autoescape=False,  # noqa: S701  # Markdown, which is not shown as it is written by anything of ours
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    ).get_template("model_card.md.j2")
    return page.render(
        front=_yaml(_front_matter(name, shown, licence, results, row)),
        mark=MARK,
        name=name,
        card=shown,
        info=load_info(shown.data) if shown.data in data_names() else None,
        threat=threat_in_words(card.threat) if card.threat else "",
        results=results,
        row=row,
        eps=eps_in_words,
        epochs=history,
        chosen=history[saved.best_epoch - 1] if saved and saved.best_epoch else None,
        run=provenance.without_places(read_json(folder / RUN)) if (folder / RUN).exists() else {},
        exports=[export for export in read_exports(folder) if export.source_sha256 == card.sha256],
        repository=repository,
        yaml=_yaml,
    )


def write_model_card(folder: Path, *, licence: str = "") -> Path:
    """Write `README.md` into a model folder.

    Raises:
        InputError: as for `model_card`; or the folder has a README that somebody else wrote, which stays.
    """
    path = folder / PAGE
    if path.exists() and MARK.encode() not in read_bytes(path):
        raise InputError(f"{path}: is not one that crdnd wrote; move it away to have one written.")
    atomic_write_text(path, model_card(folder, licence=licence))
    return path


def published_files(folder: Path, *, licence: str = "", repository: str = "OWNER/NAME") -> dict[str, bytes | Path]:
    """What is shared of a model folder, by name: nothing that is not in the list of `docs/sharing.md`.

    Paths that lead out of the folder in which a command ran are cut to their last names.

    Raises:
        InputError: as for `model_card`.
    """
    files: dict[str, bytes | Path] = {
        PAGE: model_card(folder, licence=licence, repository=repository).encode(),
        CARD: _shared_json(folder / CARD),
        WEIGHTS: folder / WEIGHTS,
    }
    if _measured(folder, read_card(folder))[1] is not None:
        files[EVALUATION] = _shared_json(folder / EVALUATION)
    if (folder / EXPORTS).exists():
        files[EXPORTS] = _shared_json(folder / EXPORTS)
        for name, digest in exported_files(read_bytes(folder / EXPORTS), str(folder / EXPORTS)).items():
            if (folder / name).is_file():
                if digest is not None and sha256(read_bytes(folder / name)) != digest:
                    raise InputError(f"{folder / name}: is not the file that {EXPORTS} names; export it again.")
                files[name] = folder / name
    return files


def threat_in_words(threat: ThreatModel) -> str:
    """What an adversary may do, in a sentence.

    >>> threat_in_words(ThreatModel(norm="linf", eps="8/255"))
    'Every pixel may be changed by up to 8/255, on the scale on which black is 0 and white is 1.'
    """
    eps = eps_in_words(threat.eps)
    if threat.norm == "linf":
        return f"Every pixel may be changed by up to {eps}, on the scale on which black is 0 and white is 1."
    return (
        f"An image may be changed by a perturbation of Euclidean length up to {eps}, on the scale on which black is 0 "
        "and white is 1."
    )


def _yaml(value: Any) -> str:
    return yaml.safe_dump(value, sort_keys=False, allow_unicode=True, width=1000).rstrip()


def _measured(folder: Path, card: ModelCard) -> tuple[Results | None, Row | None]:
    """The document in the folder, and its row of these weights; neither where it is about others."""
    if not (folder / EVALUATION).exists():
        return None, None
    results = load_results(folder / EVALUATION)
    row = next((row for row in results.rows if row.model_sha256 == card.sha256), None)
    return (results, row) if row else (None, None)


def _front_matter(name: str, card: ModelCard, licence: str, results: Results | None, row: Row | None) -> dict[str, Any]:
    """What the Hub reads: the head of its model cards."""
    front: dict[str, Any] = {}
    if licence:
        front["license"] = licence
    front |= {
        "library_name": "crdnd",
        "pipeline_tag": "image-classification",
        "tags": ["adversarial-robustness", *(["knowledge-distillation"] if card.teacher_sha256 else []), "safetensors"],
    }
    if card.data in data_names():
        front["datasets"] = [card.data]
    elif card.data.startswith("hf:"):
        front["datasets"] = [card.data.removeprefix("hf:").partition("#")[0]]
    if results and row:
        protocol = results.protocol
        attacked = f"{protocol.norm}, eps {eps_in_words(protocol.eps)}"
        counts = {
            "Natural accuracy": row.clean,
            **{f"Accuracy under {attack}, {attacked}": count for attack, count in row.attacks.items()},
            f"Robust accuracy (worst case of all attacks), {attacked}": row.worst_case,
        }
        front["metrics"] = ["accuracy"]
        front["model-index"] = [
            {
                "name": name,
                "results": [
                    {
                        "task": {"type": "image-classification"},
                        "dataset": {"type": protocol.data, "name": protocol.data, "split": protocol.split},
                        "metrics": [
                            {"type": "accuracy", "name": what, "value": round(count.percent, 2)}
                            for what, count in counts.items()
                        ],
                    }
                ],
            }
        ]
    return front


def _shared_json(path: Path) -> bytes:
    """A document without the places of this machine; the very bytes of the file where it has none."""
    content = read_bytes(path)
    document = json.loads(content) if path.name == EXPORTS else json_object(content, str(path))
    shared = provenance.without_places(document)
    return content if shared == document else (json.dumps(shared, indent=1) + "\n").encode()
