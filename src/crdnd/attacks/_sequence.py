"""Several attacks in turn, each on what the ones before left standing."""

from dataclasses import dataclass
from typing import Any

from crdnd.attacks._base import Attack, Round
from crdnd.errors import InputError


@dataclass(frozen=True, kw_only=True)
class Sequence(Attack):
    """An attack made of others."""

    parts: tuple[Attack, ...]
    """Each under a name of its own, by which its verdicts are kept."""

    def __post_init__(self) -> None:
        names = [part.name for part in self.parts]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise InputError(f"{self.name}: two parts are called {twice[0]}; give each a name of its own.")

    def rounds(self, num_classes: int) -> list[Round]:
        """The rounds of all parts, in their order."""
        return [part for attack in self.parts for part in attack.rounds(num_classes)]

    def notes(self, num_classes: int) -> list[str]:
        """Those of all parts."""
        return [note for attack in self.parts for note in attack.notes(num_classes)]

    def settings(self) -> dict[str, Any]:
        """Those of all parts, as part.setting."""
        return {f"{attack.name}.{key}": value for attack in self.parts for key, value in attack.identity().items()}
