"""What a budget buys: the best of so many trials, how much the learning rate matters, how soon a target is reached over many tasks.

Losses and times that are not finite count as infinite: trials that diverged or failed, targets that were missed. Knows nothing of files.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from forwardgrad.lab.statistics.stats import CONFIDENCE

RESAMPLES = 1_999
SHOWN = 60  # numbers of trials that a curve is worked out at, at most
TOLERANCE = 1.2  # a learning rate is good enough where its loss is at most so many times that of the best
WITHIN = 4.0  # times the fastest arm's time, up to which a performance profile is scored


@dataclass(frozen=True)
class BestOf:
    """The best validation loss of so many trials, with a 95 % bootstrap band; ends and values may be infinite.

    `expected` says whether `value` is the expectation; it is the median where a trial's loss is infinite.
    """

    trials: tuple[int, ...]
    value: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]
    expected: bool


def best_of(losses: Sequence[float], expected: bool | None = None) -> BestOf:
    """The best loss to expect from 1, 2, … N trials, from the N that were made (Dodge et al. 2019, 'Show Your Work', section 3).

    With F the share of the N losses at or below a value and l₍₁₎ ≤ … ≤ l₍N₎, the least of n independent draws has the expectation

        E = Σᵢ l₍ᵢ₎·[(1 − (i − 1)/N)ⁿ − (1 − i/N)ⁿ],

    the paper's formula with the minimum in place of the maximum. One infinite loss makes every E infinite; the median of the least,
    l₍ᵢ₎ with the first i for which (1 − i/N)ⁿ ≤ ½, does not mind, and takes its place then or where `expected` is false. The band holds
    the middle 95 % of what resamples of the N losses give, and says how much hangs on the trials that chance had made.

    Limits: trials are taken for independent draws from the search space; those of a grid are more evenly spread, and the curve is that of
    a random search among its points. Drawing with replacement takes the best of nearly N trials to be a little worse than it is.

    Raises ValueError for no losses.

    >>> best_of([1.0, 3.0]).value, best_of([1.0, 3.0, float("inf")]).value
    ((2.0, 1.5), (3.0, 1.0, 1.0))
    """
    if not len(losses):
        raise ValueError("no trials to choose from")
    ordered = np.sort(_infinite(losses))
    size = len(ordered)
    expected = bool(np.isfinite(ordered).all()) if expected is None else expected
    trials = _places(size)
    resamples = np.sort(np.random.default_rng(0).choice(ordered, (RESAMPLES, size)), axis=1)
    curves = _least(resamples, trials, expected)
    low, high = np.quantile(curves, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2], axis=0, method="inverted_cdf")
    return BestOf(tuple(int(n) for n in trials), _tuple(_least(ordered[None], trials, expected)[0]), _tuple(low), _tuple(high), expected)


def _places(size: int) -> np.ndarray:
    """Every number of trials, or so many of them spread evenly in the logarithm."""
    return np.unique(np.round(np.geomspace(1, size, SHOWN)).astype(int)) if size > SHOWN else np.arange(1, size + 1)


def _least(ordered: np.ndarray, trials: np.ndarray, expected: bool) -> np.ndarray:
    """The expected or median least of n draws from every row of losses in rising order: rows × numbers of trials."""
    size = ordered.shape[1]
    above = (1 - np.arange(size + 1) / size) ** trials[:, None]  # the chance that n draws all come after the i-th
    if not expected:
        return ordered[:, (above > 0.5).sum(axis=1) - 1]
    lost = np.isinf(ordered).any(axis=1)
    found = np.where(np.isinf(ordered), 0.0, ordered) @ (above[:, :-1] - above[:, 1:]).T
    return np.where(lost[:, None], np.inf, found)


@dataclass(frozen=True)
class Sensitivity:
    """How an arm's loss depends on its learning rate, at the best of its other hyperparameters.

    `rates` rise; their `losses` may be infinite. From `low` to `high`, without a break around `best`, losses are at most `tolerance`
    times the best one; `decades` is log₁₀(high/low). Where `below` or `above` is true that end is the end of what was tried, and the
    true range may be wider.
    """

    rates: tuple[float, ...]
    losses: tuple[float, ...]
    best: float
    low: float
    high: float
    decades: float
    tolerance: float
    below: bool
    above: bool


def sensitivity(trials: Sequence[tuple[float, float]], per_decade: int | None = None, tolerance: float = TOLERANCE) -> Sensitivity | None:
    """The learning rates that do nearly as well as the best, from trials (learning rate, validation loss).

    For every rate the least loss over the other hyperparameters counts; with `per_decade`, for rates that were drawn and not laid on a
    grid, the least within each so many-th part of a decade, at its own rate. Good enough is a loss l ≤ l* + (tolerance − 1)·|l*|, l* the
    best; the range is that of the rates tried, so it is as fine as they are. None where no trial stayed finite: there is no best rate.

    Raises ValueError for no trials, or a rate that is not a positive number.

    >>> found = sensitivity([(0.001, 2.0), (0.01, 1.1), (0.1, 1.0), (1.0, float("inf"))])
    >>> found.low, found.high, found.decades, found.above
    (0.01, 0.1, 1.0, False)
    """
    if not trials:
        raise ValueError("no trials to compare learning rates by")
    if not all(rate > 0 and math.isfinite(rate) for rate, _ in trials):
        raise ValueError(f"a learning rate must be a positive number, not {min(rate for rate, _ in trials):g}")
    least: dict[float, tuple[float, float]] = {}
    for rate, loss in sorted(trials):
        place = rate if per_decade is None else math.floor(math.log10(rate) * per_decade + 1e-9)
        least[place] = min(least.get(place, (math.inf, rate)), (loss if math.isfinite(loss) else math.inf, rate))
    points = sorted((rate, loss) for loss, rate in least.values())
    rates, losses = (tuple(column) for column in zip(*points, strict=True))
    best = min(range(len(points)), key=losses.__getitem__)
    if math.isinf(losses[best]):
        return None
    bound = losses[best] + (tolerance - 1) * abs(losses[best])
    first = last = best
    while first > 0 and losses[first - 1] <= bound:
        first -= 1
    while last < len(points) - 1 and losses[last + 1] <= bound:
        last += 1
    low, high = rates[first], rates[last]
    decades = math.log10(high / low)
    return Sensitivity(rates, losses, rates[best], low, high, decades, tolerance, first == 0, last == len(points) - 1)


@dataclass(frozen=True)
class Profile:
    """An arm's share of tasks, against how many times the fastest arm's time it may take there; `score` is the area, 1 at most.

    The share is a staircase: from `within[i]` on it is `share[i]`.
    """

    within: tuple[float, ...]
    share: tuple[float, ...]
    score: float
    tasks: int


def profiles(times: Mapping[str, Sequence[float]], most: float = WITHIN) -> dict[str, Profile]:
    """Performance profiles of arms by their times to a target, one time for each task, infinite where the target was missed.

    rₛ,ₜ = time of arm s on task t over the least time of any arm there, ρₛ(τ) = the share of tasks with rₛ,ₜ ≤ τ, and the score is the
    area under it, 1/(r_max − 1)·∫ρₛ(τ)dτ from 1 to r_max (Dolan and Moré 2002; Dahl et al. 2023, AlgoPerf, where r_max is 4, too). A task
    that every arm missed stays in the count, and is nobody's. What is fast depends on the arms beside it: a profile ranks these arms only.

    Raises ValueError for no arms or tasks, arms with different numbers of tasks, times that are not positive, and r_max ≤ 1.

    >>> profiles({"a": [1.0, 2.0], "b": [2.0, float("inf")]})["b"].share
    (0.0, 0.5)
    """
    if not times or len({len(row) for row in times.values()}) != 1 or not next(iter(times.values())):
        raise ValueError("every arm needs a time for every task, and there must be one of each")
    table = np.stack([_infinite(row) for row in times.values()])
    if (table <= 0).any():
        raise ValueError(f"a time to a target must be positive, not {table.min():g}")
    if most <= 1:
        raise ValueError(f"the profile must reach beyond 1, not to {most:g}")
    fastest = table.min(axis=0)
    ratios = np.where(np.isinf(table), np.inf, table / np.where(np.isinf(fastest), 1.0, fastest))
    return {arm: _profile(row, most) for arm, row in zip(times, ratios, strict=True)}


def _profile(ratios: np.ndarray, most: float) -> Profile:
    steps = sorted({1.0, *(float(ratio) for ratio in ratios if ratio <= most)})
    share = tuple(float(np.mean(ratios <= step)) for step in steps)
    return Profile(tuple(steps), share, float(np.mean(np.clip(most - ratios, 0.0, None)) / (most - 1)), len(ratios))


def _infinite(values: Sequence[float]) -> np.ndarray:
    given = np.asarray(values, dtype=float)
    return np.where(np.isfinite(given), given, np.inf)


def _tuple(values: np.ndarray) -> tuple[float, ...]:
    return tuple(float(value) for value in values)
