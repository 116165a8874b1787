"""The document `crdnd.export/1`: what an exported file is, and what was measured on it."""

import json
from pathlib import Path
from typing import Any, Literal, cast

from pydantic import Field

from crdnd.config import Frozen, build
from crdnd.counts import Count
from crdnd.errors import InputError
from crdnd.evaluation import paired_difference
from crdnd.io import atomic_write_text, read_bytes
from crdnd.threat import ThreatModel

SCHEMA = "crdnd.export/1"
EXPORTS = "exports.json"
"""In a model folder: the documents of the files that were exported from it."""


class Share(Frozen):
    """How many of n images, with the 95% Wilson interval in percent."""

    correct: int
    n: int
    low: float
    high: float

    @classmethod
    def of(cls, correct: int, n: int) -> "Share":
        """The share with its interval."""
        low, high = Count(correct=correct, n=n).interval()
        return cls(correct=correct, n=n, low=low, high=high)

    @property
    def count(self) -> Count:
        """Without the interval, to be shown."""
        return Count(correct=self.correct, n=self.n)

    def __str__(self) -> str:
        return str(self.count)


class Measured(Frozen):
    """What is right naturally, under each attack, and under all of them."""

    clean: Share
    attacks: dict[str, Share]
    """`square` ran on the model or file itself; `model:` and `twin:` name images that were made on those."""
    worst_case: Share


class Cost(Frozen):
    """Accuracy of the file minus that of the model on the same images, in points, with a paired 95% interval."""

    points: float
    low: float
    high: float

    @classmethod
    def of(cls, file: str, model: str) -> "Cost":
        """From verdicts, a character an image."""
        found = paired_difference(file, model)
        return cls(points=found.points, low=found.low, high=found.high)

    def __str__(self) -> str:
        return f"{self.points:+.1f} [{self.low:+.1f}, {self.high:+.1f}]"


class Equality(Frozen):
    """How far the float32 graph is from the model."""

    inputs: int
    tolerance: float
    largest_difference: float
    """Of a logit."""


class Quantisation(Frozen):
    """How an int8 file was made, and how far it is from the model on the measured images."""

    calibration_images: int
    calibration_data: str
    agreeing: Share
    """Images that the file and the model give the same class."""
    largest_difference: float
    """Of a logit."""


class Latency(Frozen):
    """Median milliseconds for one image of a batch, file and model in turns."""

    batch: int
    file: float
    model: float
    runs: int
    threads: int
    processor: str


class Export(Frozen):
    """An exported file and what it can do."""

    schema_: Literal["crdnd.export/1"] = Field(default=SCHEMA, alias="schema")
    file: str
    """Its name, without the folder."""
    format: Literal["onnx", "program", "int8"]
    sha256: str
    size_bytes: int
    source: str
    """The MODEL that it was made from."""
    source_sha256: str
    input: str
    """Name of the input: images (batch, C, height, width) in [0, 1], float32."""
    output: str
    input_shape: tuple[int, int, int]
    """(C, H, W) that images of other sizes are scaled and cropped to, inside the file."""
    class_names: tuple[str, ...]
    equality: Equality
    quantisation: Quantisation | None = None
    threat: ThreatModel
    data: str
    data_sha256: str
    split: str
    n: int
    seed: int
    preset: dict[str, dict[str, str | int | float]]
    """The attacks that made images on the model, with their settings."""
    square_queries: int
    accuracy: Measured
    model_accuracy: Measured
    cost_clean: Cost
    cost_worst_case: Cost
    latency: list[Latency]
    versions: dict[str, str]
    commit: str | None = None
    command: str = ""

    def to_json(self) -> str:
        """The document as JSON text."""
        return self.model_dump_json(by_alias=True, indent=1) + "\n"


def read_exports(folder: Path) -> list[Export]:
    """The exports that a model folder remembers, in the order they were made; none where there is no such file.

    Raises:
        InputError: the file is damaged or of another format.
    """
    file = folder / EXPORTS
    if not file.exists():
        return []
    try:
        content: Any = json.loads(read_bytes(file))
    except ValueError as error:
        raise InputError(f"{file}: cannot be read as JSON ({error}); delete it, it is written again.") from None
    if not isinstance(content, list):
        raise InputError(f"{file}: must be a list of documents {SCHEMA}; delete it, it is written again.")
    return [build(Export, entry, where=str(file)) for entry in cast("list[Any]", content)]


def remember(folder: Path, export: Export) -> None:
    """Put an export into a model folder's list; one of the same file name and content is replaced."""
    others = [known for known in read_exports(folder) if (known.file, known.sha256) != (export.file, export.sha256)]
    documents = [entry.model_dump(mode="json", by_alias=True) for entry in (*others, export)]
    atomic_write_text(folder / EXPORTS, json.dumps(documents, indent=1) + "\n")
