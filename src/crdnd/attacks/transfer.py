"""Transfer: the images that fool another model, Papernot et al. 2016 (arXiv 1605.07277).

PGD on the margin of a surrogate, 20 steps of eps/4, judged on the model under attack, whose gradients are not used. A
model that falls to a stranger's images more often than to its own gradients has gradients that hide something.
"""

from dataclasses import dataclass, fields
from typing import Any, ClassVar

from torch import Tensor

from crdnd.attacks._base import UNTOLD, Attack, Classifier, Round
from crdnd.attacks._pgd import pgd
from crdnd.errors import InputError
from crdnd.losses import margin
from crdnd.random import Stream
from crdnd.threat import ThreatModel


@dataclass(frozen=True, kw_only=True)
class Transfer(Attack):
    """PGD on a surrogate."""

    surrogate: Classifier | None = None
    """Images -> logits over the same classes."""
    surrogate_sha256: str = ""
    """Of its weights, for the protocol."""
    steps: int = 20
    step: float = 0.25
    """As a fraction of eps."""
    restarts: int = 1

    needs_gradients: ClassVar[bool] = False

    def rounds(self, num_classes: int) -> list[Round]:
        """One for each restart."""
        return [Round(self.name, restart, self._search) for restart in range(self.restarts)]

    def settings(self) -> dict[str, Any]:
        """All but the surrogate itself, which its sha256 stands for."""
        names = [field.name for field in fields(self)]
        found = {name: getattr(self, name) for name in names if name not in ("name", "summary", "paper", "surrogate")}
        if self.surrogate is not None and not self.surrogate_sha256:
            found["surrogate_sha256"] = f"none is given, {UNTOLD}"
        return found

    def _search(
        self,
        model: Classifier,
        x: Tensor,
        y: Tensor,
        threat: ThreatModel,
        stream: Stream,
    ) -> Tensor:
        surrogate = self.surrogate
        if surrogate is None:
            raise InputError("transfer: this attack needs another model; give one with --surrogate.")
        return pgd(
            lambda z: margin(surrogate(z), y),
            x, threat, steps=self.steps, step=self.step, start="uniform", stream=stream,
        )  # fmt: skip


ATTACK = Transfer(
    summary="PGD on the margin of another model, 20 steps of eps/4; needs --surrogate",
    paper="Papernot et al. 2016, arXiv 1605.07277",
)
