"""What an evaluation measured: counts, and the protocol they were measured under."""

import hashlib
import json
from typing import Literal

from pydantic import Field

from crdnd.config import Frozen
from crdnd.counts import Count

EVALUATION_VERSION = 1
"""Goes up whenever the same protocol could give another verdict for the same model and sample."""


class Protocol(Frozen):
    """Everything besides the model that can change a verdict."""

    data: str
    data_sha256: str
    split: str
    n: int
    norm: str
    eps: float
    attacks: dict[str, dict[str, str | int | float]]
    seed: int
    evaluation_version: int = EVALUATION_VERSION
    fingerprint: str = ""

    def with_fingerprint(self) -> "Protocol":
        """The same protocol with its fingerprint: results are comparable if and only if these are equal."""
        text = json.dumps(self.model_dump(exclude={"fingerprint"}), sort_keys=True)
        return self.model_copy(update={"fingerprint": hashlib.sha256(text.encode()).hexdigest()[:16]})


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
    model_sha256: str


class Results(Frozen):
    """The document `crdnd.results/1`: rows that share one protocol, so that they may stand in one table."""

    schema_: Literal["crdnd.results/1"] = Field(default="crdnd.results/1", alias="schema")
    protocol: Protocol
    rows: list[Row]

    def to_json(self) -> str:
        """The document as JSON text."""
        return self.model_dump_json(by_alias=True, indent=1) + "\n"
