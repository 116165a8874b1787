"""Several attacks in turn, each on what the ones before left standing."""

from dataclasses import dataclass
from typing import Any

from crdnd.attacks._base import Attack, Round


@dataclass(frozen=True, kw_only=True)
class Sequence(Attack):
    """An attack made of others."""

    parts: tuple[Attack, ...]

    def rounds(self, num_classes: int) -> list[Round]:
        """The rounds of all parts, in their order."""
        return [part for attack in self.parts for part in attack.rounds(num_classes)]

    def notes(self, num_classes: int) -> list[str]:
        """Those of all parts."""
        return [note for attack in self.parts for note in attack.notes(num_classes)]

    def settings(self) -> dict[str, Any]:
        """Those of all parts, as part.setting."""
        return {f"{attack.name}.{key}": value for attack in self.parts for key, value in attack.identity().items()}
