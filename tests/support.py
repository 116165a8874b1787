"""Shared by the tests: victims whose worst case is known, a network without batch norm, views, a recorder."""

import dataclasses
from collections.abc import Collection

import torch
from torch import Tensor, nn

from crdnd.attacks import Attack, Classifier, Sequence, load_attack
from crdnd.objectives import Sizes, Views

# No two of these are equal, so that an index or a mean over the wrong dimension cannot pass by luck.
BATCH, SHAPE, CLASSES, FEATURES, TEACHER_FEATURES = 6, (3, 4, 7), 5, 11, 13
SIZES = Sizes(student_features=FEATURES, teacher_features=TEACHER_FEATURES, samples=400)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def images(count: int = BATCH, shape: tuple[int, ...] = SHAPE, seed: int = 0, dtype: torch.dtype = torch.float64):
    """Uniform pixels, so that some lie within eps of the box's faces."""
    return torch.rand(count, *shape, generator=generator(seed), dtype=dtype)


FEW = {"iterations": 5, "targets": 2, "queries": 20, "draws": 3, "search_steps": 2}


def small_attack(attack: str | Attack, surrogate: Classifier | None = None) -> Attack:
    """The attack with so few iterations that it takes no time, and with a surrogate where it needs one."""
    attack = load_attack(attack) if isinstance(attack, str) else attack
    if isinstance(attack, Sequence):
        return dataclasses.replace(attack, parts=tuple(small_attack(part, surrogate) for part in attack.parts))
    values = {**FEW, "surrogate": surrogate}
    names = {field.name for field in dataclasses.fields(attack)}
    return dataclasses.replace(attack, **{key: value for key, value in values.items() if key in names})


class RankOneVictim(nn.Module):
    """Logits z_j = t_j <d, x> + b_j with t_0 < t_1 < ... < t_{K-1}, float64.

    Only s = <d, x> counts. With label 0 every z_j - z_0 = (t_j - t_0) s + const grows with s, and with label K - 1
    every one falls. So cross-entropy and margin both have their maximum over any set where s is largest (label 0) or
    smallest (label K - 1), and both gradients are a positive multiple of +d or -d: `uphill`.
    """

    def __init__(self, classes: int, shape: tuple[int, ...] = SHAPE, seed: int = 0, scale: float = 1.0) -> None:
        super().__init__()
        self.classes = classes
        self.d = nn.Parameter(torch.randn(*shape, generator=generator(seed), dtype=torch.float64))
        spread = torch.rand(classes, generator=generator(seed + 1), dtype=torch.float64) + 0.5
        self.t = nn.Parameter(scale * spread.cumsum(0) / classes)
        self.b = nn.Parameter(torch.randn(classes, generator=generator(seed + 2), dtype=torch.float64) / 10)

    def forward(self, x: Tensor) -> Tensor:
        return (x * self.d).flatten(1).sum(1, keepdim=True) * self.t + self.b

    def labels(self, count: int) -> Tensor:
        """Labels 0 and K - 1 in turn: the two for which the worst case is known."""
        return (torch.arange(count) % 2) * (self.classes - 1)

    def uphill(self, y: Tensor) -> Tensor:
        """The direction in which every loss of the labels y grows, (B, C, H, W)."""
        sign = torch.where(y == 0, 1.0, -1.0).double()
        return sign.reshape(-1, *(1,) * self.d.ndim) * self.d.detach()


class TinyNet(nn.Module):
    """A convolution, tanh, a mean over places and a linear layer: smooth, curved, without batch norm."""

    def __init__(
        self,
        classes: int = CLASSES,
        channels: int = SHAPE[0],
        seed: int = 0,
        dtype=torch.float64,
        features: int = FEATURES,
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, features, 3, padding=1, dtype=dtype)
        self.classifier = nn.Linear(features, classes, dtype=dtype)
        draws = generator(seed)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=draws, dtype=dtype))

    def features(self, x: Tensor) -> Tensor:
        return torch.tanh(self.conv(x)).mean(dim=(2, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x))


def wavering(seed: int = 0) -> TinyNet:
    """A TinyNet whose classes have the same mean logit on `images()`, so that small perturbations decide there."""
    model = TinyNet(seed=seed)
    with torch.no_grad():
        model.classifier.bias -= model(images()).mean(0)
    return model


class Recorder(nn.Module):
    """Passes images on to a model and keeps a copy of every input, with the mode the model was in."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.inputs: list[Tensor] = []
        self.modes: list[bool] = []

    def forward(self, x: Tensor) -> Tensor:
        self.inputs.append(x.detach().clone())
        self.modes.append(self.model.training)
        return self.model(x)


def random_views(
    needs: Collection[str],
    *,
    batch: int = BATCH,
    classes: int = CLASSES,
    scale: float = 2.0,
    seed: int = 0,
    progress: float = 0.0,
    dtype: torch.dtype = torch.float64,
) -> Views:
    """Views with exactly the tensors of `needs`; those of the student are leaves that take a gradient."""
    draws = generator(seed)
    views: dict[str, Tensor] = {}
    for name in sorted(needs):
        features = FEATURES if name.startswith("s_") else TEACHER_FEATURES
        width = features if name.endswith("_features") else classes
        view = scale * torch.randn(batch, width, generator=draws, dtype=dtype)
        views[name] = view.requires_grad_(name.startswith("s_"))
    y = torch.randint(0, classes, (batch,), generator=draws)
    return Views(y, progress, views=views)
