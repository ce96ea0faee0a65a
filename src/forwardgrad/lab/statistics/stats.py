"""Estimates and intervals of numbers; knows nothing of files.

In means and comparisons a loss that is not finite counts as infinite: leaving out the runs that failed would flatter an arm. Curves can
only show what is finite, and say so.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import ndtri, stdtrit

from forwardgrad.lab.statistics.summary import LossSummary

CONFIDENCE = 0.95


@dataclass(frozen=True)
class MeanEstimate:
    """A mean over n values with its two-sided 95 % t interval; no interval from one value or where a value is not finite."""

    mean: float
    low: float | None
    high: float | None
    n: int


@dataclass(frozen=True)
class Curve:
    """Values against steps, over one run or several: mean, least and greatest."""

    at: tuple[float, ...]
    mean: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]


def estimate(values: Sequence[float], least: float = -math.inf, most: float = math.inf) -> MeanEstimate:
    """The mean of independent values and its interval, cut to the values that are possible at all (a loss is never negative).

    >>> estimate([1.0, 2.0, 3.0]).mean, estimate([1.0]).low
    (2.0, None)
    """
    if not values:
        raise ValueError("no values to average")
    n = len(values)
    if not all(math.isfinite(value) for value in values):
        return MeanEstimate(math.inf, None, None, n)
    mean = float(np.mean(values))
    if n == 1:
        return MeanEstimate(mean, None, None, n)
    half = _quantile(n - 1) * float(np.std(values, ddof=1)) / math.sqrt(n)
    return MeanEstimate(mean, max(least, mean - half), min(most, mean + half), n)


def proportion(right: int, n: int) -> MeanEstimate:
    """The share of `right` among n examples with Wilson's 95 % interval, which stays within [0, 1] and holds at its ends too.

    >>> found = proportion(9, 10)
    >>> found.mean, round(found.low, 3), round(found.high, 3)
    (0.9, 0.596, 0.982)
    """
    share, z = right / n, float(ndtri((1 + CONFIDENCE) / 2))
    middle, scale = share + z * z / (2 * n), 1 + z * z / n
    half = z * math.sqrt(share * (1 - share) / n + (z / (2 * n)) ** 2)
    return MeanEstimate(share, max(0.0, (middle - half) / scale), min(1.0, (middle + half) / scale), n)


def difference(first: Sequence[float], second: Sequence[float]) -> MeanEstimate:
    """The mean of first − second over runs that share their seeds, and so split, initialisation and order: a paired 95 % t interval."""
    if len(first) != len(second):
        raise ValueError(f"paired values come in equal numbers, not {len(first)} and {len(second)}")
    one, two = estimate(first), estimate(second)
    if not (math.isfinite(one.mean) and math.isfinite(two.mean)):
        gap = 0.0 if one.mean == two.mean else one.mean - two.mean  # inf − inf: neither arm is ahead
        return MeanEstimate(gap, None, None, one.n)
    return estimate([a - b for a, b in zip(first, second, strict=True)])


def at_once(mean: float, low: float, high: float, n: int, intervals: int) -> tuple[float, float]:
    """The ends of a 95 % t interval of a mean of n values, as wide as one of several that hold at once with 95 % (Bonferroni's).

    >>> [round(end, 3) for end in at_once(1.0, 0.9, 1.1, n=100, intervals=4)]
    [0.872, 1.128]
    """
    wider = _quantile(n - 1, 1 - (1 - CONFIDENCE) / intervals) / _quantile(n - 1)
    return mean - wider * (mean - low), mean + wider * (high - mean)


def _quantile(freedom: float, confidence: float = CONFIDENCE) -> float:
    return float(stdtrit(freedom, (1 + confidence) / 2))


def first_at_or_below(at: Sequence[float], losses: Sequence[float], target: float) -> float:
    """Where (step or second) the loss was first seen at or below the target; infinity where it never was.

    >>> first_at_or_below([50, 100, 200], [2.0, 0.9, 1.1], 1.0), first_at_or_below([50], [2.0], 1.0)
    (100.0, inf)
    """
    return next((float(place) for place, loss in zip(at, losses, strict=True) if loss <= target), math.inf)


def first_at_or_above(at: Sequence[float], accuracies: Sequence[float], target: float) -> float:
    """Where (step or second) the accuracy was first seen at or above the target; infinity where it never was.

    >>> first_at_or_above([50, 100, 200], [0.5, 0.9, 0.8], 0.8), first_at_or_above([50], [0.5], 0.8)
    (100.0, inf)
    """
    return next((float(place) for place, accuracy in zip(at, accuracies, strict=True) if accuracy >= target), math.inf)


def median(values: Sequence[float]) -> float:
    """The median, infinite where half of the values or more are: a miss counts as taking for ever.

    >>> median([100.0, 300.0]), median([100.0, float("inf")])
    (200.0, inf)
    """
    ordered = sorted(values)
    middle = len(ordered) // 2
    return ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2


def binned(curves: Sequence[Sequence[float] | LossSummary], bins: int = 400) -> Curve:
    """Losses of steps 1, 2, … of one run or several, pooled into at most `bins` equal bins; what is not finite is a gap."""
    longest = max((len(curve) for curve in curves), default=0)
    if not longest:
        return Curve((), (), (), ())
    width = bin_width(longest, bins)
    first, sizes, sums, lows, highs = (np.concatenate(parts) for parts in zip(*(_parts(curve, width) for curve in curves), strict=True))
    places, count = first.astype(int) // width, math.ceil(longest / width)
    low, high = np.full(count, np.inf), np.full(count, -np.inf)
    np.minimum.at(low, places, lows)
    np.maximum.at(high, places, highs)
    held = np.bincount(places, weights=sizes, minlength=count)
    there = held > 0
    means = np.bincount(places, weights=sums, minlength=count)[there] / held[there]
    starts = np.arange(count) * width + 1
    centres = (starts + np.minimum(starts + width - 1, longest)) / 2
    return Curve(_tuple(centres[there]), _tuple(means), _tuple(low[there]), _tuple(high[there]))


def bin_width(longest: int, bins: int) -> int:
    """The steps of a bin where the longest of some runs has at most `bins` of them."""
    return math.ceil(longest / bins)


def _parts(curve: Sequence[float] | LossSummary, width: int) -> tuple[np.ndarray, ...]:
    """What a curve is pooled of, as first steps, sizes, sums, least and greatest: single finite values, or the bins of a summary."""
    if isinstance(curve, LossSummary):
        kept = curve.at(width)
        return tuple(np.asarray(each, dtype=float) for each in (kept.first, kept.sizes, kept.sums, kept.low, kept.high))
    values = np.asarray(curve, dtype=float)
    steps = np.flatnonzero(np.isfinite(values))
    return steps.astype(float), np.ones(len(steps)), values[steps], values[steps], values[steps]


def pooled(curves: Sequence[tuple[Sequence[float], Sequence[float]]]) -> Curve:
    """Evaluations (steps, losses) of several runs, pooled where they share a step; values that are not finite are gaps."""
    seen: dict[float, list[float]] = {}
    for at, losses in curves:
        for place, loss in zip(at, losses, strict=True):
            if math.isfinite(loss):
                seen.setdefault(float(place), []).append(float(loss))
    rows = sorted(seen.items())
    return Curve(
        tuple(place for place, _ in rows),
        tuple(float(np.mean(values)) for _, values in rows),
        tuple(min(values) for _, values in rows),
        tuple(max(values) for _, values in rows),
    )


def thinned(path: Sequence[Sequence[float]], most: int = 400) -> list[tuple[float, float]]:
    """A path of points with at most about `most` of them, its ends kept, up to the first point that is not finite."""
    points: list[tuple[float, float]] = []
    for point in path:
        if not all(isinstance(value, (int, float)) and math.isfinite(value) for value in point):
            break
        points.append((float(point[0]), float(point[1])))
    stride = math.ceil(len(points) / most) if points else 1
    return [point for i, point in enumerate(points) if i % stride == 0 or i == len(points) - 1]


def _tuple(values: np.ndarray) -> tuple[float, ...]:
    return tuple(float(value) for value in values)
