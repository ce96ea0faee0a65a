"""Timings of several pieces of work in one run, with intervals for medians and ratios.

The pieces take turns. Every round has a random order of its own, which a seed fixes. A ratio is that of two medians. Its interval is the
percentile bootstrap's over whole rounds, so that what slows down a whole round is in both. A value whose interval is wider than half of
it says nothing, and is refused.
"""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
from scipy import stats

from forwardgrad.lab.bench.records import ValueWithInterval

TimedWork = Callable[[], object]
Samples = np.ndarray[Any, np.dtype[np.float64]]

WARM_UP = 3
LEAST = 5  # rounds: fewer have no interval worth its name
WIDEST = 0.5  # of a value: an interval wider than this refuses it
NOISY = (
    "the machine was too noisy: the 95 % interval is wider than half of the value. Measure again with more --rounds (and --seconds), or on "
    "a quieter machine"
)


def interleaved(
    works: Mapping[str, TimedWork],
    *,
    rounds: int,
    warm_up: int = WARM_UP,
    seed: int = 0,
    seconds: float | None = None,
    times: int = 1,
    now: Callable[[], float],
) -> dict[str, Samples]:
    """The seconds of every piece of work in every round, each timed once a round.

    Each piece of work is done once more right before it is timed. So it finds in the processor's caches what it left there itself, as a
    step of training does, and not what the others left.

    Args:
        works: what is timed, by name.
        rounds: how many rounds there are at most.
        warm_up: how often everything is done before the first round.
        seed: of the orders.
        seconds: no round begins later than this, but there are never fewer than five.
        times: how often a piece is done in a row; what counts is the mean. A device that works beside the host is asked for one step
            after the other, as in training.
        now: the time when all that was asked of the device is done.
    """
    found: dict[str, list[float]] = {name: [] for name in works}
    with _collected_between_rounds() as collect:
        for _ in range(warm_up):
            for work in works.values():
                work()
        end = None if seconds is None else time.perf_counter() + seconds
        for index in range(rounds):
            if end is not None and index >= LEAST and time.perf_counter() > end:
                break
            collect()
            for name in order(list(works), seed, index):
                works[name]()
                began = now()
                for _ in range(times):
                    works[name]()
                found[name].append((now() - began) / times)
    return {name: np.array(times) for name, times in found.items()}


def order(names: list[str], seed: int, index: int) -> list[str]:
    """The order of one round. It differs from round to round, and is the same for the same seed."""
    return random.Random(f"{seed}/{index}").sample(names, len(names))


@contextmanager
def _collected_between_rounds() -> Iterator[Callable[[], int]]:
    """Inside, garbage is collected when the caller asks for it, and not while work is timed.

    Else the work that happens to reach the collector's threshold would pay for all.
    """
    enabled = gc.isenabled()
    gc.disable()
    free = gc.get_freeze_count() == 0
    if free:
        gc.freeze()  # what was there before need not be looked through in every round
    try:
        yield gc.collect
    finally:
        if free:
            gc.unfreeze()
        if enabled:
            gc.enable()


def median(times: Samples) -> ValueWithInterval:
    """The median with its interval."""
    return _measured((times,), lambda t, axis=-1: np.median(t, axis=axis), refusing=False)


def ratio(over: Samples, under: Samples) -> ValueWithInterval:
    """The ratio of two medians, paired by round, or why it is refused."""
    if over is under:
        return ValueWithInterval(value=1.0, low=1.0, high=1.0, refused=None)
    return _measured((over, under), lambda a, b, axis=-1: np.median(a, axis=axis) / np.median(b, axis=axis))


def further(many: Samples, one: Samples, unit: Samples, count: int) -> ValueWithInterval:
    """What each of `count` − 1 further tangents costs: (t_K − t_1)/(K − 1) over t_unit, where each t is a median."""

    def statistic(a: Samples, b: Samples, c: Samples, axis: int = -1) -> Any:
        return (np.median(a, axis=axis) - np.median(b, axis=axis)) / (count - 1) / np.median(c, axis=axis)

    return _measured((many, one, unit), statistic)


def _measured(samples: tuple[Samples, ...], statistic: Callable[..., Any], *, refusing: bool = True) -> ValueWithInterval:
    interval = stats.bootstrap(
        samples, statistic, paired=len(samples) > 1, vectorized=True, n_resamples=2000, method="percentile", rng=np.random.default_rng(0)
    ).confidence_interval
    value, low, high = float(statistic(*samples)), float(interval.low), float(interval.high)
    if refusing and not high - low <= WIDEST * abs(value):  # also where one of them is not finite
        return ValueWithInterval(value=None, low=None, high=None, refused=NOISY)
    return ValueWithInterval(value=value, low=low, high=high, refused=None)
