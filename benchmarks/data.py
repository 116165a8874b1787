"""What loading and augmenting cost: beside a training step, and beside a loader with worker processes.

The data are random 32x32 colour images in memory, uint8, on the device; the transform is crop_flip (4 pixels each way,
mirrored every other time).

1. Batches of crdnd: an order for the epoch, a batch from the tensor, augmentation in one go.
2. `torch.utils.data.DataLoader` with worker processes and a random sampler; every sample is padded, cropped, mirrored
   and made a float on its own, and batches are moved to the device. Two forms: `pictures` takes the steps that
   torchvision's CIFAR-10 with RandomCrop, RandomHorizontalFlip and ToTensor takes, on Pillow's images; `tensors` does
   as little as a sample on its own needs, in torch alone.
3. One step of adversarial training (PGD-10) of the CIFAR ResNet-18, with the batch size of `--step-batch-size`, and
   loading and augmenting of that many images.

`ratio` is the time of the loader of pictures over ours; at least 5 is wanted. The share of a training step should be
below 2%. Printing is described in _pairs.py.
"""

import argparse
import functools
from collections.abc import Callable
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from _pairs import Job, finish, interleaved, machine, parser, ratio, table
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, RandomSampler

from crdnd import ImageData, ThreatModel, create_model
from crdnd.attacks import PROBE, Folding
from crdnd.data import augment
from crdnd.engine.step import Step
from crdnd.models import evaluating
from crdnd.objectives import load_objective
from crdnd.random import Stream, permutation

SHAPE, CLASSES, PADDING = (3, 32, 32), 10, 4
THREAT = ThreatModel(norm="linf", eps=8 / 255)


def on_a_picture(pixels: Tensor) -> Tensor:
    """One image, as torchvision's transforms handle it; uint8 (C, H, W) -> float (C, H, W)."""
    picture = ImageOps.expand(Image.fromarray(pixels.permute(1, 2, 0).numpy()), border=PADDING, fill=0)
    top, left = _corner()
    picture = picture.crop((left, top, left + SHAPE[2], top + SHAPE[1]))
    if torch.rand(1) < 0.5:
        picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).contiguous().float().div(255)


def on_a_tensor(pixels: Tensor) -> Tensor:
    """The same in torch alone."""
    padded = F.pad(pixels, (PADDING,) * 4)
    top, left = _corner()
    image = padded[:, top : top + SHAPE[1], left : left + SHAPE[2]]
    if torch.rand(1) < 0.5:
        image = image.flip(2)
    return image.float().div(255)


def _corner() -> tuple[int, int]:
    return int(torch.randint(0, 2 * PADDING + 1, (1,))), int(torch.randint(0, 2 * PADDING + 1, (1,)))


class PerSample(Dataset[tuple[Tensor, int]]):
    """What a worker does: one image at a time."""

    def __init__(self, x: Tensor, y: Tensor, transform: Callable[[Tensor], Tensor]) -> None:
        self.x, self.y, self.transform = x, y.tolist(), transform

    def __len__(self) -> int:
        """How many images."""
        return len(self.x)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(self.x[index]), self.y[index]


def ours(data: ImageData, batch_size: int, batches: int) -> None:
    """An epoch's first batches."""
    order = permutation(len(data), "order", 0)
    for ids in order[: batches * batch_size].split(batch_size):
        x, y = data.pixels(ids), data.y[ids.to(data.device)]
        augment(x, y, CLASSES, "crop_flip", Stream.of("augment", 0, ids=ids.to(data.device)))


def theirs(loader: DataLoader[tuple[Tensor, Tensor]], device: torch.device) -> None:
    """As many batches from worker processes."""
    for x, y in loader:
        x.to(device), y.to(device)


def _loader(per_sample: PerSample, options: argparse.Namespace) -> DataLoader[tuple[Tensor, Tensor]]:
    loader = DataLoader(
        per_sample,
        options.batch_size,
        sampler=RandomSampler(per_sample, num_samples=options.batches * options.batch_size),
        num_workers=options.workers,
        persistent_workers=True,
        pin_memory=options.device != "cpu",
    )
    return cast("DataLoader[tuple[Tensor, Tensor]]", loader)


def training_step(data: ImageData, batch_size: int) -> Job:
    """A step of adversarial training on natural weights, batches left out."""
    ids = torch.arange(batch_size)
    x, y = data.batch(ids)
    stream = Stream.of("benchmark", ids=ids.to(data.device))
    student = create_model("resnet18", input_shape=SHAPE, num_classes=CLASSES, seed=0).to(data.device).train()
    with evaluating(student):
        folding = Folding(student, x[:PROBE])
    objective = load_objective("pgd_at")(CLASSES).to(data.device)
    step = Step(student, None, objective, objective.attack, THREAT, folding=folding)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.01, momentum=0.9)

    def job() -> None:
        optimizer.zero_grad(set_to_none=True)
        terms, _ = step(x, y, stream, 0.5)
        terms.total.backward()
        optimizer.step()

    return job


def main() -> None:
    """Measure, then print."""
    options = arguments()
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    draws = torch.Generator().manual_seed(0)
    x = torch.randint(0, 256, (options.images, *SHAPE), dtype=torch.uint8, generator=draws)
    y = torch.randint(0, CLASSES, (options.images,), generator=draws)
    data = ImageData(x, y, CLASSES).to(device)
    jobs: dict[str, Job] = {"crdnd": functools.partial(ours, data, options.batch_size, options.batches)}
    for name, transform in (("pictures", on_a_picture), ("tensors", on_a_tensor)):
        jobs[name] = functools.partial(theirs, _loader(PerSample(x, y, transform), options), device)
    timings = interleaved(jobs, repeats=options.repeats, warm_up=options.warm_up, device=device)
    a_step = interleaved(
        {
            "loading": functools.partial(ours, data, options.step_batch_size, options.batches),
            "step": training_step(data, options.step_batch_size),
        },
        repeats=options.step_repeats,
        warm_up=options.warm_up,
        device=device,
    )
    share = a_step["loading"].median / options.batches / a_step["step"].median
    milliseconds = {name: 1000 * timing.median / options.batches for name, timing in timings.items()}
    over = {name: ratio(timings[name], timings["crdnd"]) for name in timings}
    document: dict[str, Any] = {
        "benchmark": "data",
        "machine": machine(device),
        "settings": {key: v for key, v in vars(options).items() if key not in ("json", "device", "threads")},
        "timings": timings | a_step,
        "milliseconds_a_batch": milliseconds,
        "over_crdnd": over,
        "share_of_a_step": share,
        "targets": {"ratio": 5, "share_of_a_step": 0.02},
    }
    rows: list[tuple[object, ...]] = [("", "a batch", "over crdnd")]
    rows += [(name, f"{milliseconds[name]:.2f} ms", f"{over[name]:.2f}") for name in timings]
    lines = [
        f"Batches of {options.batch_size} images of 32x32, crop_flip; the loaders have {options.workers} workers",
        *table(rows),
        f"A step of ResNet-18 with PGD-10 on {options.step_batch_size} images: {a_step['step']}",
        f"Loading and augmenting as many images: {100 * share:.3f}% of that (below 2% is wanted)",
    ]
    finish(document, lines, over["pictures"], as_json=options.json)


def arguments() -> argparse.Namespace:
    """The options."""
    result = parser(__doc__, repeats=7)
    result.add_argument("--images", type=int, default=50_000, help="in the data (default %(default)s)")
    result.add_argument("--batch-size", type=int, default=128, help="of loading (default %(default)s)")
    result.add_argument("--batches", type=int, default=100, help="a round (default %(default)s)")
    result.add_argument("--workers", type=int, default=2, help="processes of the loader (default %(default)s)")
    result.add_argument("--step-batch-size", type=int, default=16, help="of the training step (default %(default)s)")
    result.add_argument("--step-repeats", type=int, default=3, help="training steps that count (default %(default)s)")
    return result.parse_args()


if __name__ == "__main__":
    main()
