"""Counts of right answers and their intervals: accuracies are stored as counts and shown as percentages."""

import math

from pydantic import Field

from crdnd.config import Frozen


class Count(Frozen):
    """How many of n samples were classified right."""

    correct: int = Field(ge=0)
    n: int = Field(gt=0)

    @property
    def percent(self) -> float:
        """100 * correct / n."""
        return 100 * self.correct / self.n

    def interval(self, z: float = 1.959963984540054) -> tuple[float, float]:
        """The Wilson score interval in percent, 95% by default (Wilson 1927).

        >>> [round(end, 2) for end in Count(correct=0, n=10).interval()]
        [0.0, 27.75]
        """
        p, n = self.correct / self.n, self.n
        centre = (p + z * z / (2 * n)) / (1 + z * z / n)
        half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
        return 100 * max(0.0, centre - half), 100 * min(1.0, centre + half)

    def __str__(self) -> str:
        """Percentage, count and 95% interval.

        >>> print(Count(correct=9, n=10))
        90.0% (9/10) [59.6, 98.2]
        """
        low, high = self.interval()
        return f"{self.percent:.1f}% ({self.correct}/{self.n}) [{low:.1f}, {high:.1f}]"
