"""What an evaluation runs: attacks, presets, and what is left of them for a model without gradients."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from crdnd.attacks import Attack, attack_names, load_attack
from crdnd.attacks import Sequence as AttackSequence
from crdnd.errors import InputError, did_you_mean
from crdnd.threat import ThreatModel

TABLE_ATTACKS = ("fgsm", "pgd_sat", "pgd_trades", "cw_inf")


@dataclass(frozen=True)
class Preset:
    """Attacks that belong together."""

    summary: str
    attacks: dict[str, dict[str, Any]]
    """Settings that differ from the attack's own, by its name."""
    checks: bool = False


PRESETS = {
    "quick": Preset("pgd_sat, cw_inf, and APGD-T with 20 iterations", {
        "pgd_sat": {}, "cw_inf": {}, "apgd_t": {"iterations": 20},
    }),
    "apgd": Preset("pgd_trades, APGD-CE and APGD-T: most of what AutoAttack finds, in a quarter of its time", {
        "pgd_trades": {}, "apgd_ce": {}, "apgd_t": {},
    }),
    "rslad-table": Preset("the four attacks of the field's tables, and AutoAttack", {
        **{name: {} for name in TABLE_ATTACKS}, "autoattack": {},
    }),
    "standard": Preset("AutoAttack, the standard version", {"autoattack": {}}),
    "rand": Preset("AutoAttack, the version for models that are random at test time", {"autoattack_rand": {}}),
    "full": Preset("rslad-table, and all checks for false security", {
        **{name: {} for name in TABLE_ATTACKS}, "autoattack": {},
    }, checks=True),
}  # fmt: skip


@dataclass(frozen=True)
class Column:
    """One attack under one threat model, on the samples that are right under what it comes after."""

    name: str
    attack: Attack
    threat: ThreatModel
    after: tuple[str, ...] = ("clean",)
    """Columns; nothing means all samples."""


def preset(name: str) -> Preset:
    """The preset of that name, or an InputError with a suggestion."""
    if name not in PRESETS:
        raise InputError(f"unknown preset {name!r}{did_you_mean(name, PRESETS)}")
    return PRESETS[name]


def choose_attacks(attacks: Sequence[str] | Mapping[str, Any]) -> dict[str, Attack]:
    """Attacks by name: those of the registry, with settings where a mapping gives them, or attacks themselves.

    Args:
        attacks: names, or a mapping of names to `Attack` objects or to settings that differ from the attack's own.

    Raises:
        InputError: nothing was named, or an attack or a setting is not known.
    """
    if not attacks:
        raise InputError(f"attacks: name at least one of {', '.join(attack_names())}.")
    attacks = [attacks] if isinstance(attacks, str) else attacks
    entries = attacks.items() if isinstance(attacks, Mapping) else [(name, {}) for name in attacks]
    return {name: _with_settings(name, value) for name, value in entries}


def _with_settings(name: str, value: Any) -> Attack:
    if isinstance(value, Attack):
        return dataclasses.replace(value, name=name)
    attack = load_attack(name)
    if not isinstance(value, Mapping | None):
        raise InputError(f"attacks.{name}: must be settings, such as {{steps: 100}}, got {value!r}.")
    changes = cast("Mapping[str, Any]", value or {})
    own = {key: getattr(attack, key, None) for key in attack.settings()}
    numbers = {key: kind for key, kind in own.items() if isinstance(kind, int | float)}
    for key, given in changes.items():
        if key not in numbers:
            raise InputError(f"attacks.{name}.{key}: no such setting{did_you_mean(key, numbers)}")
        whole = isinstance(numbers[key], int)
        if isinstance(given, bool) or not isinstance(given, int if whole else (int, float)) or not 0 < given < math.inf:
            kind = "a whole number" if whole else "a number"
            raise InputError(f"attacks.{name}.{key}: must be {kind} above 0, got {given!r}.")
    return dataclasses.replace(attack, **changes)


def without_gradients(attacks: Mapping[str, Attack], *, with_surrogate: bool) -> tuple[dict[str, Attack], list[str]]:
    """What can be run on a model that gives scores but no gradients, and a note on what cannot.

    With a surrogate at hand, its adversarial images are tried too: they are then the only ones made by gradients.
    """
    singles: dict[str, Attack] = {}
    for name, attack in attacks.items():
        singles |= {part.name: part for part in attack.parts} if isinstance(attack, AttackSequence) else {name: attack}
    kept = {name: attack for name, attack in singles.items() if not attack.needs_gradients}
    left_out = ", ".join(name for name in singles if name not in kept)
    if not kept:
        kept = {"square": load_attack("square")}
    if left_out and with_surrogate:
        kept.setdefault("transfer", load_attack("transfer"))
    notes = [f"No gradients were available: {left_out} could not run, {', '.join(kept)} did."] if left_out else []
    return kept, notes
