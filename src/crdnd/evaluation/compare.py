"""Two models on the same samples: the difference of their accuracies with a paired interval."""

import math
from dataclasses import dataclass

from crdnd.errors import InputError
from crdnd.evaluation.result import RIGHT, Protocol, Row


@dataclass(frozen=True)
class Difference:
    """Accuracy of the first minus accuracy of the second, in points."""

    points: float
    low: float
    high: float
    """95% interval."""
    only_first: int
    """Samples that only the first model gets right."""
    only_second: int
    differing: tuple[int, ...]
    """Samples on which the two disagree, by their place in the data."""


def paired_difference(first: str, second: str, z: float = 1.959963984540054) -> Difference:
    """The difference of two proportions of the same samples, by Agresti and Min 2005 (doi 10.1002/sim.1781).

    Half a sample is added to each cell of the 2 x 2 table before Wald's interval for pairs is taken, which keeps it
    honest where few samples differ. The two samples' common difficulty cancels, so this interval is much narrower than
    what two separate ones suggest.

    Args:
        first: verdicts of a row, a character a sample, "1" for right.
        second: those of the other row, for the same samples.
        z: quantile of the normal distribution.

    >>> found = paired_difference("1101", "1000")
    >>> found.points, found.only_first, found.only_second, found.differing
    (50.0, 2, 0, (1, 3))
    """
    if len(first) != len(second) or not first:
        raise InputError(f"verdicts of {len(first)} and {len(second)} samples cannot be paired.")
    right = [(a == RIGHT, b == RIGHT) for a, b in zip(first, second, strict=True)]
    only_first, only_second = sum(a and not b for a, b in right), sum(b and not a for a, b in right)
    n = len(right) + 2
    centre = (only_first - only_second) / n
    spread = math.sqrt((only_first + only_second + 1) / n - centre**2) / math.sqrt(n)
    return Difference(
        points=100 * (only_first - only_second) / len(right),
        low=100 * max(-1.0, centre - z * spread),
        high=100 * min(1.0, centre + z * spread),
        only_first=only_first,
        only_second=only_second,
        differing=tuple(index for index, (a, b) in enumerate(right) if a != b),
    )


def compare(first: tuple[Protocol, Row], second: tuple[Protocol, Row]) -> dict[str, Difference]:
    """Differences on natural images, under each attack and in the worst case.

    Raises:
        InputError: the two were measured under different protocols, or without verdicts for each sample.
    """
    (protocol, one), (other_protocol, other) = first, second
    if protocol.fingerprint != other_protocol.fingerprint:
        parts = [
            key
            for key in type(protocol).model_fields
            if key != "fingerprint" and getattr(protocol, key) != getattr(other_protocol, key)
        ]
        raise InputError(f"results of different protocols cannot be compared; they differ in {', '.join(parts)}.")
    if not one.verdicts or not other.verdicts:
        raise InputError("these results have no verdicts for each sample; run `crdnd evaluate` again.")
    names = ["clean", *one.attacks]
    found = {name: paired_difference(one.verdicts[name], other.verdicts[name]) for name in names}
    return found | {"worst_case": paired_difference(one.stands(), other.stands())}
