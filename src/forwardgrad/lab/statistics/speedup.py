"""How many times as long one arm takes as another, from independent runs of both: the ratio of their medians and an exact interval.

Knows nothing of files. A run that never arrives takes for ever, and is never left out.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from forwardgrad.lab.statistics.stats import CONFIDENCE, median


@dataclass(frozen=True)
class TimeRatio:
    """A ratio of medians and the interval that holds the true factor with at least `confidence`; without ends where it has none.

    `confidence` falls short of 95 % where runs are too few for more: the interval is then from the least to the greatest ratio of pairs.
    """

    value: float
    low: float | None
    high: float | None
    confidence: float
    first: int
    second: int

    @property
    def decides(self) -> bool:
        """Whether the interval is one of 95 %."""
        return self.low is not None and self.confidence >= CONFIDENCE


def time_ratio(first: Sequence[float], second: Sequence[float]) -> TimeRatio:
    """Median of the first times over median of the second, with the exact interval of the rank-sum (permutation) test.

    Formula: of all m·n ratios of a first time over a second one, in their order, the interval runs from the k-th least to the k-th
    greatest. These are the factors that the two-sided rank-sum test would not reject: k is the largest with 2·P(U < k) ≤ 5 %, P over all
    arrangements of m + n values, each as likely as any other; at least 1 (Hollander & Wolfe 1999, 4.3, on logarithms).
    Bias and variance: none assumed but that the times of one arm are those of the other times a factor, in distribution.
    Ties make the interval wider than it need be. With three runs a side k = 1 and the confidence is 90 %, with four 97 %.
    A first time that is infinite has an infinite ratio, whatever the second; raises ValueError without times.

    >>> found = time_ratio([6.0, 7.0, 8.0, 9.0], [10.0, 10.0, 10.0, 10.0])
    >>> found.value, found.low, found.high, round(found.confidence, 3)
    (0.75, 0.6, 0.9, 0.971)
    """
    if not first or not second:
        raise ValueError("no times to compare")
    m, n = len(first), len(second)
    ratios = sorted(_over(one, other) for one in first for other in second)
    below = list(itertools.accumulate(arrangements(m, n)))  # [u]: arrangements with U ≤ u
    total = math.comb(m + n, m)
    k = max(1, sum(2 * count <= (1 - CONFIDENCE) * total for count in below))
    confidence = 1 - 2 * below[k - 1] / total
    value = _over(median(first), median(second))
    if confidence <= 0:
        return TimeRatio(value, None, None, 0.0, m, n)
    return TimeRatio(value, ratios[k - 1], ratios[m * n - k], confidence, m, n)


def fewest_a_side() -> int:
    """The runs of each arm that an interval of 95 % needs.

    >>> fewest_a_side()
    4
    """
    return next(n for n in itertools.count(1) if 2 / math.comb(2 * n, n) <= 1 - CONFIDENCE)


def arrangements(m: int, n: int) -> list[int]:
    """How many arrangements of m first and n second values have u pairs with the first above the second, for u = 0, …, m·n.

    These are the coefficients of the Gaussian binomial: the product of (1 − q^(n+i)) / (1 − q^i) for i = 1, …, m.

    >>> arrangements(2, 2)
    [1, 1, 2, 1, 1]
    """
    counts = [1] + [0] * (m * n)
    for i in range(1, m + 1):
        for u in range(m * n, n + i - 1, -1):
            counts[u] -= counts[u - n - i]
        for u in range(i, m * n + 1):
            counts[u] += counts[u - i]
    return counts


def _over(one: float, other: float) -> float:
    return math.inf if math.isinf(one) else one / other  # one that never arrives is later than any other, also one that does not either
