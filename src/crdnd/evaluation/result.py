"""What an evaluation measured: counts, verdicts per sample, and the protocol they were measured under."""

import hashlib
import json
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from crdnd.config import Frozen, build
from crdnd.counts import Count
from crdnd.errors import InputError
from crdnd.io import read_json

EVALUATION_VERSION = 2
"""Goes up whenever the same protocol could give another verdict for the same model and sample."""

RIGHT, WRONG, NOT_RUN = "1", "0", "."
"""Verdicts of a sample: right, wrong, and not attacked because it had fallen before."""


class Protocol(Frozen):
    """Everything besides the model that can change a verdict."""

    data: str
    data_sha256: str
    split: str
    n: int
    norm: str
    eps: float
    attacks: dict[str, dict[str, str | int | float]]
    eps_sweep: tuple[float, ...] = ()
    checks: bool = False
    """Whether all checks for false security ran, or only those that come for free."""
    surrogate_sha256: str = ""
    """Of the model whose images the checks tried."""
    seed: int
    precision: str = "float32, TF32 off"
    evaluation_version: int = EVALUATION_VERSION
    fingerprint: str = ""

    def with_fingerprint(self) -> "Protocol":
        """The same protocol with its fingerprint: results are comparable if and only if these are equal."""
        text = json.dumps(self.model_dump(exclude={"fingerprint"}), sort_keys=True)
        return self.model_copy(update={"fingerprint": hashlib.sha256(text.encode()).hexdigest()[:16]})


class Check(Frozen):
    """One check for false security; docs/checks.md says what each one means."""

    name: str
    number: float
    threshold: float
    suspicious: bool
    says: str
    """The number in words."""
    advice: str


class SweepPoint(Frozen):
    """What stands at one eps and at every smaller one of a sweep."""

    eps: float
    worst_case: Count


class ClassCounts(Frozen):
    """One class of a row."""

    clean: Count
    worst_case: Count


class Row(Frozen):
    """One model under one protocol."""

    method: str
    role: Literal["teacher", "student"]
    model: str
    params: int
    seed: int | None
    checkpoint: Literal["best", "last"] | None
    n: int
    clean: Count
    attacks: dict[str, Count]
    worst_case: Count
    verdict: str = ""
    """'consistent', 'suspicious because ...', or that no image is right."""
    checks: list[Check] = []
    notes: list[str] = []
    """What a reader must know, such as that a model gave no gradients."""
    sweep: list[SweepPoint] = []
    per_class: dict[str, ClassCounts] = {}
    verdicts: dict[str, str] = {}
    """For 'clean', every attack and every part of one: a character a sample, in the order of the data."""
    model_sha256: str

    def stands(self) -> str:
        """The verdicts of the worst case, a character a sample."""
        columns = [self.verdicts["clean"], *(self.verdicts[name] for name in self.attacks)]
        return "".join(RIGHT if set(column) == {RIGHT} else WRONG for column in zip(*columns, strict=True))


class Results(Frozen):
    """The document `crdnd.results/1`: rows that share one protocol, so that they may stand in one table."""

    schema_: Literal["crdnd.results/1"] = Field(default="crdnd.results/1", alias="schema")
    protocol: Protocol
    rows: list[Row]

    def to_json(self) -> str:
        """The document as JSON text."""
        return self.model_dump_json(by_alias=True, indent=1) + "\n"


def load_results(path: str | Path) -> Results:
    """Read a document that `crdnd evaluate --out` or `crdnd demo` wrote."""
    content: dict[str, Any] = read_json(Path(path))
    if content.get("schema") != "crdnd.results/1":
        raise InputError(f"{path}: has the format {content.get('schema')!r}; this version reads crdnd.results/1.")
    return build(Results, content, where=str(path))
