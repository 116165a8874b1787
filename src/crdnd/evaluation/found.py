"""The adversarial images that an evaluation found, in a file that is verified when it is loaded."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from crdnd.attacks import Attack, true_float32
from crdnd.config import build
from crdnd.data import ImageData
from crdnd.errors import InputError
from crdnd.evaluation._progress import Progress
from crdnd.evaluation.result import Protocol
from crdnd.io import atomic_write_bytes, make_folder
from crdnd.models import evaluating, weights_sha256
from crdnd.threat import ThreatModel

SCHEMA = "crdnd.adversarial/1"


@dataclass(frozen=True)
class Found:
    """What one attack found."""

    ids: Tensor
    """Which samples of the data fell, int64 (M,)."""
    images: Tensor
    """(M, C, H, W)."""


def save_found(
    path: Path, progress: Progress, attacks: Mapping[str, Attack], protocol: Protocol, model_sha256: str
) -> None:
    """Write what every attack found to a `.safetensors` file."""
    tensors: dict[str, Tensor] = {}
    for name in attacks:
        chunks = [chunk for step, found in progress.found.items() if step.split("/")[0] == name for chunk in found]
        whole = [chunk for chunk in chunks if chunk.adversarial is not None]
        if not whole:
            continue
        ids = torch.cat([chunk.ids[~chunk.stands] for chunk in whole])
        images = torch.cat([chunk.adversarial.cpu() for chunk in whole if chunk.adversarial is not None])
        # A batch may have been attacked twice, by two processes that did not know of each other.
        order = ids.argsort(stable=True)
        first = torch.ones(len(ids), dtype=torch.bool)
        first[1:] = ids[order][1:] != ids[order][:-1]
        tensors[f"{name}.ids"], tensors[f"{name}.images"] = ids[order][first], images[order][first].contiguous()
    metadata = {"schema": SCHEMA, "protocol": protocol.model_dump_json(), "model_sha256": model_sha256}
    make_folder(path.parent)
    atomic_write_bytes(path, safetensors.torch.save(tensors, metadata=metadata))


def load_adversarial(path: str | Path, model: nn.Module, data: ImageData, batch_size: int = 256) -> dict[str, Found]:
    """Read adversarial images and verify them again: they are legal, and they fool this model.

    Args:
        path: a file that `evaluate(save_adversarial=...)` or `crdnd evaluate --save-adv` wrote.
        model: the model that was attacked.
        data: the samples that were attacked, in their order.
        batch_size: how many images go through the model at once.

    Returns:
        By attack: ids and images.

    Raises:
        InputError: the file is damaged, was made for another model or for other data, or an image of it is not what it
            should be.
    """
    path = Path(path)
    try:
        with safetensors.safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path}: is not a readable file of adversarial images ({error}).") from None
    if metadata.get("schema") != SCHEMA:
        raise InputError(f"{path}: has the format {metadata.get('schema')!r}; this version reads {SCHEMA}.")
    try:
        protocol = Protocol.model_validate_json(metadata.get("protocol", ""))
    except ValueError:
        raise InputError(f"{path}: its protocol cannot be read; the file is damaged.") from None
    if metadata.get("model_sha256") != weights_sha256(model):
        raise InputError(f"{path}: was made for another model (sha256 {metadata.get('model_sha256', '')[:12]}).")
    if protocol.data_sha256 != data.sha256:
        raise InputError(f"{path}: was made for other data ({protocol.data}, sha256 {protocol.data_sha256[:12]}).")
    threat = build(ThreatModel, {"norm": protocol.norm, "eps": protocol.eps})
    names = [key.removesuffix(".ids") for key in tensors if key.endswith(".ids")]
    found: dict[str, Found] = {}
    for name in names:
        ids, images = tensors[f"{name}.ids"], tensors.get(f"{name}.images")
        known = ids.ndim == 1 and ids.dtype == torch.int64 and bool(((ids >= 0) & (ids < len(data))).all())
        if not known or images is None or images.shape != (len(ids), *data.shape):
            raise InputError(f"{path}: ids and images of {name} do not belong together; the file is damaged.")
        found[name] = Found(ids, images)
    for name, entry in found.items():
        _verify(path, name, entry, model, data, threat, batch_size)
    return found


def _verify(
    path: Path, name: str, found: Found, model: nn.Module, data: ImageData, threat: ThreatModel, batch_size: int
) -> None:
    device = data.device
    with true_float32(), evaluating(model), torch.no_grad():
        for rows in torch.arange(len(found.ids)).split(batch_size):
            x, y = data.batch(found.ids[rows].to(device))
            x_adv = found.images[rows].to(device)
            for what, bad in (
                (f"does not lie in {threat} around its sample", ~threat.allows(x_adv, x)),
                ("does not fool the model", model(x_adv).argmax(1) == y),
            ):
                if bool(bad.any()):
                    sample = int(found.ids[rows][bad.cpu()][0])
                    raise InputError(f"{path}: the image of {name} for sample {sample} {what}.")
