"""Models of other packages, imported where one is asked for: timm's as students, RobustBench's as teachers."""

import importlib
from collections.abc import Mapping
from typing import Any, Literal

from torch import nn

from crdnd.config import Frozen, build
from crdnd.errors import InputError, first_line

TIMM, ROBUSTBENCH = "timm:", "robustbench:"
# RobustBench 1.1.1 on PyPI imports the official AutoAttack, which it does not require and which PyPI does not have.
INSTALL = {"timm": '"crdnd[timm]"', "robustbench": '"crdnd[robustbench]" git+https://github.com/fra31/auto-attack'}
Normalization = tuple[tuple[float, ...], tuple[float, ...]]


def timm_network(
    name: str, input_shape: tuple[int, int, int], num_classes: int, settings: Mapping[str, Any]
) -> tuple[nn.Module, Normalization]:
    """A model of timm for these images, and the mean and std that its weights were trained with, per channel.

    Args:
        name: `timm:` and the name, such as `timm:resnet18.a1_in1k`.
        input_shape: (C, H, W); a model that fixes its input size is built for H x W.
        num_classes: K.
        settings: arguments of `timm.create_model`, such as `pretrained=True`, which downloads weights.
    """
    timm, key = _imported("timm", name), name.removeprefix(TIMM)
    if not timm.is_model(key):
        raise InputError(f"model {name}: timm has no such model; timm.list_models() has all.")
    arguments = {"num_classes": num_classes, "in_chans": input_shape[0], **settings}
    if getattr(timm.get_pretrained_cfg(key), "fixed_input_size", False):
        arguments.setdefault("img_size", tuple(input_shape[1:]))
    try:
        network: nn.Module = timm.create_model(key, **arguments)
    except (TypeError, ValueError, AssertionError, RuntimeError) as error:  # it has no error of its own
        raise InputError(f"model {name}: timm cannot build it so ({first_line(error)}).") from None
    cfg: Any = network.pretrained_cfg
    mean, std = (_per_channel(cfg[key], input_shape[0]) for key in ("mean", "std"))
    return network, (mean, std)


def fixes_size(network: nn.Module) -> bool:
    """Whether a network was built for images of one size, as some of timm's are."""
    cfg: Any = getattr(network, "pretrained_cfg", {})
    return bool(cfg.get("fixed_input_size", False))


def _per_channel(values: tuple[float, ...], channels: int) -> tuple[float, ...]:
    """As they are, or their average where the images have another number of channels."""
    return tuple(values) if len(values) == channels else (sum(values) / len(values),) * channels


class _RobustBench(Frozen):
    """Which of RobustBench's tables a model is in, and where its file is kept."""

    dataset: Literal["cifar10", "cifar100", "imagenet"] = "cifar10"
    threat_model: Literal["Linf", "L2", "corruptions"] = "Linf"
    model_dir: str = "models"


def robustbench_model(name: str, settings: Mapping[str, Any]) -> nn.Module:
    """A model of RobustBench, from images in [0, 1] to logits. That package downloads the file and unpickles it.

    Args:
        name: `robustbench:` and the name, such as `robustbench:Chen2021LTD_WRN34_10`.
        settings: `dataset`, `threat_model` and `model_dir` of `robustbench.utils.load_model`.
    """
    chosen, key = build(_RobustBench, dict(settings), name), name.removeprefix(ROBUSTBENCH)
    package = _imported("robustbench.utils", name)
    try:
        model: nn.Module = package.load_model(model_name=key, **chosen.model_dump())
    except KeyError:
        where = f"dataset={chosen.dataset} and threat_model={chosen.threat_model}"
        raise InputError(f"{name}: RobustBench has no such model for {where}.") from None
    return model.eval()


def _imported(module: str, name: str) -> Any:
    package = module.partition(".")[0]
    try:
        return importlib.import_module(module)
    except (ImportError, RuntimeError, OSError) as error:  # a torchvision of another torch fails with the latter two
        why = first_line(error)
        raise InputError(f"{name}: {package} cannot be imported ({why}): pip install {INSTALL[package]}") from None
