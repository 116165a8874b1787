"""AutoAttack as its authors wrote it: the package pyautoattack behind the same interface."""

import importlib
import logging
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from crdnd.attacks import Attack, Classifier, Round
from crdnd.attacks import Sequence as AttackSequence
from crdnd.errors import InputError, first_line
from crdnd.provenance import installed_version
from crdnd.random import Stream
from crdnd.threat import ThreatModel


@dataclass(frozen=True, kw_only=True)
class ReferenceAutoAttack(Attack):
    """The official implementation; its draws depend on the batch."""

    version: str
    package: str
    seed: int

    def rounds(self, num_classes: int) -> list[Round]:
        """One: it keeps its own books of what stands."""
        return [Round(self.name, 0, self._search)]

    def _search(
        self,
        model: Classifier,
        x: Tensor,
        y: Tensor,
        threat: ThreatModel,
        stream: Stream,
    ) -> Tensor:
        package: Any = importlib.import_module("pyautoattack")
        norm = {"linf": "Linf", "l2": "L2"}[threat.norm]
        devices = [x.device.index or 0] if x.device.type == "cuda" else []
        with torch.random.fork_rng(devices):  # it seeds torch's own generator
            attack = package.AutoAttack(
                model, device=x.device, eps=threat.eps, norm=norm, seed=self.seed, version=self.version
            )
            try:
                x_adv, _ = attack.run_standard_evaluation(x, y, batch_size=len(x))
            except Exception as error:  # fewer than 4 classes, and l2 on images that are not square, end in one
                raise InputError(
                    f"engine: {self.package} fails on this model and these images ({first_line(error)}); "
                    "leave --engine away, our own has no such limits."
                ) from error
        # It clamps to the ball by another formula, which may miss ours by a rounding.
        return threat.project(x_adv, x)


def reference(attacks: dict[str, Attack], seed: int) -> dict[str, Attack]:
    """The same attacks by the official implementation, which has AutoAttack and nothing else.

    Raises:
        InputError: something else was asked for, settings were changed, or the package is not installed.
    """
    from crdnd.attacks import load_attack

    version = installed_version("pyautoattack")
    if version is None:
        raise InputError("engine: the reference is not installed; pip install pyautoattack")
    logging.getLogger("auto-attack").setLevel(logging.ERROR)
    versions = {"autoattack": "standard", "autoattack_rand": "rand"}
    found: dict[str, Attack] = {}
    for name, attack in attacks.items():
        if name not in versions or not isinstance(attack, AttackSequence):
            raise InputError(
                f"engine: the reference has AutoAttack only, not {name}; take the preset standard or rand."
            )
        if attack.settings() != load_attack(name).settings():
            raise InputError(f"engine: the reference runs {name} with its own settings only.")
        found[name] = ReferenceAutoAttack(
            name=name, summary=attack.summary, paper=attack.paper, version=versions[name],
            package=f"pyautoattack {version}", seed=seed,
        )  # fmt: skip
    return found
