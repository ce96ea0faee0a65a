"""Arms compared over seeds: typical losses with bootstrap intervals, paired differences and tests, and the chance to do better.

Values are losses, so less is better. One that is not finite counts as infinite, as a run that diverged or failed does, and is never left
out: a mean is then infinite, while a median or an interquartile mean may stay finite. Knows nothing of files. Random numbers come from a
fixed seed: the same values give the same interval.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats as scipy_stats

from forwardgrad.lab.statistics import stats
from forwardgrad.lab.statistics.stats import CONFIDENCE

RESAMPLES = 1_999
PERMUTATIONS = 9_999  # every one of them up to 13 pairs, as many at random beyond ...
MANY, FEWER = 100, 1_999  # ... and fewer beyond so many pairs
FEWEST = 5  # values below which a bootstrap interval is marked: that of 3 normal values holds their mean in 72 % of cases, of 5 in 84 %
LEVEL = 0.05  # the chance of calling arms different that are not, over all comparisons together

Statistic = Callable[..., Any]  # of an array along `axis`


@dataclass(frozen=True)
class ConfidenceInterval:
    """A statistic of n values and its two-sided 95 % interval.

    `low` and `high` are None where none can be given. `caution` says in words why, or why the one given is not to be trusted; empty where
    there is nothing to say. `method` is "BCa", "percentile" or "order statistics", empty without an interval. Ends may be infinite.
    """

    value: float
    low: float | None
    high: float | None
    n: int
    method: str = ""
    caution: str = ""

    @property
    def excludes_zero(self) -> bool:
        """Whether there is an interval, and zero lies outside it."""
        return self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)


def mean(values: Sequence[float]) -> ConfidenceInterval:
    """The mean, with the BCa bootstrap interval of Efron (1987, 'Better bootstrap confidence intervals').

    The quantiles Φ(z₀ + (z₀ + z)/(1 − a(z₀ + z))), z = ±1.96, of the means of resamples: z₀ corrects the bias, the jackknife's
    a the skewness. Infinite, without an interval, where a value is. Raises ValueError for no values.

    >>> mean([1.0, 2.0, 3.0, 6.0]).value, mean([1.0, float("inf")]).value
    (3.0, inf)
    """
    return _located(values, np.mean)


def median(values: Sequence[float]) -> ConfidenceInterval:
    """The median with its BCa interval; where values are infinite, the interval that `between_order_statistics` gives.

    Raises ValueError for no values.

    >>> median([1.0, 2.0, 9.0]).value, median([1.0, 2.0, float("inf")]).value
    (2.0, 2.0)
    """
    if math.inf in _losses(values):
        return between_order_statistics(values)
    return _located(values, np.median)


def interquartile_mean(values: Sequence[float]) -> ConfidenceInterval:
    """The mean of what is left without the ⌊n/4⌋ least and greatest values (Agarwal et al. 2021, section 4.3), with its BCa interval.

    As sparing of seeds as the mean, nearly as robust as the median; the mean itself below four values. Finite while at most ⌊n/4⌋
    values are infinite; its interval is then the bootstrap's percentiles, whose upper end may be infinite. Raises ValueError for no values.

    >>> interquartile_mean([0.0, 1.0, 3.0, 100.0]).value, interquartile_mean([0.0, 1.0, 3.0, float("inf")]).value
    (2.0, 2.0)
    """
    return _located(values, _trimmed)


def _trimmed(values: np.ndarray, axis: int = -1) -> Any:
    return scipy_stats.trim_mean(values, 0.25, axis=axis)


def between_order_statistics(values: Sequence[float]) -> ConfidenceInterval:
    """The median with an interval that needs no distribution and stands infinite values: for times to a target, misses being infinite.

    x₍ₖ₎ to x₍ₙ₊₁₋ₖ₎ with the greatest k for which 1 − 2·P(Bin(n, ½) < k) ≥ 0.95 (Conover 1999, section 3.2): exact, if anything too
    wide. None below six values, where even the range of all holds the median in less than 95 % of cases. Raises ValueError for no values.

    >>> between_order_statistics([10, 20, 30, 40, 50, float("inf")])
    ConfidenceInterval(value=35.0, low=10.0, high=inf, n=6, method='order statistics', caution='')
    """
    ordered = np.sort(_losses(values))
    n, value = len(ordered), stats.median(list(ordered))
    outside = int(scipy_stats.binom.ppf((1 - CONFIDENCE) / 2, n, 0.5))  # P(Bin < k) ≤ 0.025 up to this k
    if outside < 1:
        return ConfidenceInterval(
            float(value), None, None, n, caution="n = 1, no interval" if n == 1 else f"no interval below 6 values, n = {n}"
        )
    return ConfidenceInterval(float(value), float(ordered[outside - 1]), float(ordered[n - outside]), n, "order statistics")


def difference(first: Sequence[float], second: Sequence[float]) -> ConfidenceInterval:
    """The mean of first − second over runs that share their seeds, with its BCa interval.

    With an infinite loss on either side there is no interval, and the difference is infinite, towards the arm with more of them; zero
    where both have as many. Raises ValueError for no values or unequal numbers.

    >>> difference([3.0, 5.0], [1.0, 1.0]).value, difference([3.0, float("inf")], [1.0, 1.0]).value
    (3.0, inf)
    """
    one, two = _paired(first, second)
    lost = int(np.isinf(one).sum()) - int(np.isinf(two).sum())
    if np.isinf(one).any() or np.isinf(two).any():
        return ConfidenceInterval(
            math.copysign(math.inf, lost) if lost else 0.0, None, None, len(one), caution="a loss is not finite, no interval"
        )
    return _located(list(one - two), np.mean)


@dataclass(frozen=True)
class Permutation:
    """A two-sided p, the least that so many pairs can give, and whether every permutation was looked at.

    `statistic` is what the test looked at: "mean difference", or "signed ranks" where losses are infinite.
    """

    p: float
    least: float
    n: int
    exact: bool
    statistic: str


def permutation(first: Sequence[float], second: Sequence[float]) -> Permutation:
    """The paired permutation test: were the arms alike, each seed's two losses could as well have come the other way round.

    p = share of the 2ⁿ ways to choose signs in which |Σ ±dᵢ| ≥ |Σ dᵢ|, dᵢ = first − second (Fisher 1935, section 21). Exact up to 13
    pairs, from 9,999 random signs (and the signs that were seen) beyond, from 1,999 for more than 100 pairs. No p is below 2/2ⁿ, so that
    up to five pairs never reach 0.05.

    A difference that is infinite has no size, only a rank: as soon as there is one, signed ranks take the place of all dᵢ, the infinite
    ones sharing the greatest (Wilcoxon 1945); two infinite losses on one seed are a tie, d = 0. Whether there is one does not depend on the
    signs, so that the test stays exact. Raises ValueError for no values or unequal numbers.

    >>> permutation([2.0, 3.0, 5.0], [1.0, 1.0, 1.0])
    Permutation(p=0.25, least=0.25, n=3, exact=True, statistic='mean difference')
    """
    return permutations([(first, second)])[0]


def permutations(pairs: Sequence[tuple[Sequence[float], Sequence[float]]]) -> list[Permutation]:
    """The test of `permutation` for many pairs of arms: those over as many seeds share the choices of signs, which saves time."""
    differences = [_differences(*_paired(first, second)) for first, second in pairs]
    p_values: dict[int, float] = {}
    for n in {len(apart) for apart, _ in differences}:
        places = [place for place, (apart, _) in enumerate(differences) if len(apart) == n and n > 1]
        if places:
            together = np.stack([differences[place][0] for place in places], axis=1)
            found = scipy_stats.permutation_test(
                (together,), np.mean, permutation_type="samples", n_resamples=_choices(n), vectorized=True, axis=0, rng=_generator()
            )
            p_values |= zip(places, np.minimum(1.0, found.pvalue), strict=True)
    return [
        Permutation(float(p_values.get(place, 1.0)), min(1.0, 2.0 ** (1 - n)), n, 2**n <= PERMUTATIONS, statistic)
        for place, (apart, statistic) in enumerate(differences)
        for n in [len(apart)]
    ]


def _differences(one: np.ndarray, two: np.ndarray) -> tuple[np.ndarray, str]:
    """The numbers whose signs are chosen, and what they are called: differences, or signed ranks where losses are infinite."""
    both = np.isinf(one) & np.isinf(two)
    apart = np.where(both, 0.0, one) - np.where(both, 0.0, two)
    if not np.isinf(apart).any():
        return apart, "mean difference"
    return np.sign(apart) * scipy_stats.rankdata(np.abs(apart)), "signed ranks"


def pairs_needed(comparisons: int = 1, level: float = LEVEL) -> int:
    """The fewest pairs whose least p, 2/2ⁿ, is at most `level` after Holm's correction for so many comparisons.

    >>> pairs_needed(), pairs_needed(3)
    (6, 7)
    """
    return 1 + math.ceil(math.log2(comparisons / level))


def holm(p_values: Sequence[float]) -> tuple[float, ...]:
    """p values corrected for their number, in the order given: none of the true hypotheses is rejected but with probability `level`.

    With p₍₁₎ ≤ … ≤ p₍ₘ₎ the i-th becomes max over j ≤ i of min(1, (m − j + 1)·p₍ⱼ₎) (Holm 1979). Asks for no independence.

    >>> holm([0.01, 0.04, 0.03])
    (0.03, 0.06, 0.06)
    """
    corrected, so_far = [0.0] * len(p_values), 0.0
    for passed, place in enumerate(sorted(range(len(p_values)), key=lambda place: p_values[place])):
        so_far = max(so_far, min(1.0, (len(p_values) - passed) * p_values[place]))
        corrected[place] = so_far
    return tuple(corrected)


def _choices(n: int) -> int:
    """How many choices of signs are drawn for so many pairs. Many pairs make the test slow, so fewer are drawn."""
    return PERMUTATIONS if n <= MANY else FEWER


def improvement(first: Sequence[float], second: Sequence[float]) -> ConfidenceInterval:
    """The probability that a run of the first arm ends lower than one of the second: P(X < Y) + ½·P(X = Y).

    The mean over all pairs of runs, paired or not (Agarwal et al. 2021, section 4.3; Mann and Whitney's U/nm). The interval is the
    percentile bootstrap, each arm resampled on its own. None where one arm lies wholly below the other: resamples then never differ,
    which says nothing of the chance. Infinite losses compare as any, two of them as equal. Raises ValueError for no values.

    >>> improvement([1.0, 2.0], [2.0, 3.0]).value, improvement([1.0, 2.0], [3.0, float("inf")]).value
    (0.875, 1.0)
    """
    one, two = _losses(first), _losses(second)
    wins = (one[:, None] < two) + 0.5 * (one[:, None] == two)
    value, n = float(wins.mean()), min(wins.shape)
    if n == 1 or wins.min() == wins.max():
        return ConfidenceInterval(value, None, None, n, caution="n = 1, no interval" if n == 1 else "all pairs alike, no interval")
    rows, columns = _shares(0, len(one)), _shares(1, len(two))
    low, high = _quantiles(np.clip(np.sum(rows @ wins * columns, axis=1), 0.0, 1.0))
    return ConfidenceInterval(value, low, high, n, "percentile", _few(n))


@functools.lru_cache(maxsize=8)
def _shares(seed: int, n: int) -> np.ndarray:
    """How often each of n values occurs in each resample, over n; the same resamples for every pair of arms of that size."""
    return np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=RESAMPLES) / n


def _located(values: Sequence[float], statistic: Statistic) -> ConfidenceInterval:
    """A statistic of one sample: BCa where all is finite, percentiles where only the statistic is."""
    sample = _losses(values)
    n, value = len(sample), float(statistic(sample, axis=-1))
    if not math.isfinite(value):
        return ConfidenceInterval(math.inf, None, None, n, caution="a loss is not finite, no interval")
    if n == 1:
        return ConfidenceInterval(value, None, None, n, caution="n = 1, no interval")
    if np.ptp(sample) == 0:
        return ConfidenceInterval(value, None, None, n, caution="all values equal, no interval")
    if np.isinf(sample).any():
        low, high = _quantiles(statistic(_generator().choice(sample, (RESAMPLES, n)), axis=-1))
        return ConfidenceInterval(value, low, high, n, "percentile", _few(n))
    found = _bca(sample, statistic)
    if found is None:
        return ConfidenceInterval(value, None, None, n, caution="resamples too much alike, no interval")
    return ConfidenceInterval(value, *found, n, "BCa", _few(n))


def _bca(sample: np.ndarray, statistic: Statistic) -> tuple[float, float] | None:
    """None where the jackknife or the resamples have no spread, which scipy says by NaN."""
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        found = scipy_stats.bootstrap(
            (sample,), statistic, n_resamples=RESAMPLES, confidence_level=CONFIDENCE, method="BCa", vectorized=True, rng=_generator()
        )
    low, high = (float(end) for end in found.confidence_interval)
    return None if math.isnan(low) or math.isnan(high) else (low, high)


def _quantiles(replicates: np.ndarray) -> tuple[float, float]:
    """The bootstrap's percentiles as values that occurred: between a finite and an infinite one there is nothing."""
    low, high = np.quantile(replicates, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2], method="inverted_cdf")
    return float(low), float(high)


def _few(n: int) -> str:
    return f"n = {n}: too narrow" if n < FEWEST else ""


def _losses(values: Sequence[float]) -> np.ndarray:
    if not len(values):
        raise ValueError("no values to compare")
    given = np.asarray(values, dtype=float)
    return np.where(np.isfinite(given), given, np.inf)


def _paired(first: Sequence[float], second: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    if len(first) != len(second):
        raise ValueError(f"paired values come in equal numbers, not {len(first)} and {len(second)}")
    return _losses(first), _losses(second)


def _generator() -> np.random.Generator:
    return np.random.default_rng(0)
