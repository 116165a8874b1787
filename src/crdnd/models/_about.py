"""What an exported file says of the model in it."""

import json
from collections.abc import Mapping
from typing import Annotated

from pydantic import Field, ValidationError

from crdnd.config import Frozen
from crdnd.threat import ThreatModel

Side = Annotated[int, Field(ge=1, le=8192)]


class About(Frozen):
    """Kept as text under these names: an ONNX file's metadata, and `crdnd.json` in an exported program."""

    class_names: tuple[str, ...] = ()
    """Of the logits."""
    threat: ThreatModel | None = None
    """What the model was trained or measured to withstand."""
    input_shape: tuple[Side, Side, Side] | None = None
    """(C, H, W) of the network's images, where the file itself takes any size."""
    source_sha256: str = ""
    """Of the weights that the file was made from."""

    def metadata(self) -> dict[str, str]:
        """Each value as JSON."""
        return {name: json.dumps(value) for name, value in self.model_dump(mode="json").items()}


def read_about(metadata: Mapping[str, str]) -> About:
    """What a file's metadata say; whatever is missing, or is no value of its kind, is as if it were not said."""
    found: dict[str, object] = {}
    for name in About.model_fields.keys() & metadata.keys():
        try:
            value = json.loads(metadata[name])
            About.model_validate({name: value})
        except (ValueError, ValidationError, TypeError, RecursionError):
            continue
        found[name] = value
    return About.model_validate(found)
