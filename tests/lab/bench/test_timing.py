"""Timings in turn, and what is made of them: on a clock that the tests turn, and on numbers made up beforehand."""

from __future__ import annotations

import gc
import itertools

import numpy as np
import pytest

from forwardgrad.lab.bench import timing
from forwardgrad.lab.bench.timing import LEAST, NOISY, further, interleaved, median, order, ratio

NAMES = ["a", "b", "c", "d", "e"]


def timed(rounds: int, seed: int = 0, seconds: float | None = None, warm_up: int = 0) -> tuple[list[str], dict[str, timing.Samples]]:
    """What was called in which order, and the times: work `x` takes as many seconds as its place in the alphabet."""
    calls: list[str] = []
    clock = [0.0]

    def work(name: str) -> timing.TimedWork:
        def run() -> None:
            calls.append(name)
            clock[0] += ord(name) - ord("a") + 1

        return run

    works = {name: work(name) for name in NAMES}
    return calls, interleaved(works, rounds=rounds, seed=seed, seconds=seconds, warm_up=warm_up, now=lambda: clock[0])


def test_every_round_has_every_arm_once_in_an_order_of_its_own() -> None:
    calls, times = timed(20, warm_up=2)
    assert calls[:10] == NAMES * 2
    assert calls[10::2] == calls[11::2]  # each once more right before it is timed
    rounds = [calls[start : start + 10 : 2] for start in range(10, len(calls), 10)]
    assert [sorted(one) for one in rounds] == [NAMES] * 20
    assert rounds == [order(NAMES, 0, index) for index in range(20)]
    assert len({tuple(one) for one in rounds}) > 10
    assert all(any(one[0] == name for one in rounds) for name in NAMES)  # nobody always comes first
    assert {name: set(found) for name, found in times.items()} == {name: {place + 1.0} for place, name in enumerate(NAMES)}


def test_a_seed_fixes_the_orders() -> None:
    assert timed(6, seed=1)[0] == timed(6, seed=1)[0] != timed(6, seed=2)[0]


def test_a_spent_budget_leaves_the_least_number_of_rounds() -> None:
    assert {len(found) for found in timed(30, seconds=0.0)[1].values()} == {LEAST}
    assert {len(found) for found in timed(30, seconds=3600.0)[1].values()} == {30}


def test_nothing_is_collected_while_an_arm_is_timed() -> None:
    seen: list[bool] = []
    ticks = itertools.count()
    interleaved({"a": lambda: seen.append(gc.isenabled())}, rounds=5, now=lambda: float(next(ticks)))
    assert gc.isenabled()
    assert not any(seen)


def noise(count: int, spread: float, seed: int = 0) -> timing.Samples:
    return np.exp(spread * np.random.default_rng(seed).standard_normal(count))


def test_a_ratio_is_paired_by_round() -> None:
    rounds = noise(30, 1.0)  # so noisy that unpaired medians could be told apart no finer than by a factor of two
    found = ratio(2 * rounds, rounds)
    assert found == {"value": pytest.approx(2), "low": pytest.approx(2), "high": pytest.approx(2), "refused": None}
    assert ratio(2 * rounds, noise(30, 1.0, seed=1))["refused"] == NOISY
    assert ratio(rounds, rounds) == {"value": 1.0, "low": 1.0, "high": 1.0, "refused": None}


def test_an_interval_covers_the_ratio_that_is_there() -> None:
    """Both arms independently noisy, 200 times: a 95 % interval that misses more than 10 % is none (chance below 1 in 300)."""
    hits = 0
    for seed in range(200):
        found = ratio(0.6 * noise(30, 0.1, seed), noise(30, 0.1, 1000 + seed))
        assert found["low"] is not None
        assert found["high"] is not None
        hits += found["low"] <= 0.6 <= found["high"]
    assert hits >= 180


@pytest.mark.parametrize(("spread", "refused"), [(0.1, False), (1.5, True)])
def test_a_ratio_is_refused_where_its_interval_is_wider_than_half_of_it(spread: float, refused: bool) -> None:
    found = ratio(0.5 * noise(15, spread), noise(15, spread, seed=1))
    assert (found["value"] is None) == (found["low"] is None) == (found["high"] is None) == refused
    assert found["refused"] == (NOISY if refused else None)
    if found["value"] is not None and found["low"] is not None and found["high"] is not None:
        assert found["high"] - found["low"] <= found["value"] / 2
        assert found["low"] <= found["value"] <= found["high"]


def test_the_rule_is_on_the_width_and_not_on_the_noise() -> None:
    """More rounds of the same noise give a narrower interval."""
    assert ratio(noise(8, 0.6), noise(8, 0.6, seed=1))["refused"]
    assert not ratio(noise(400, 0.6), noise(400, 0.6, seed=1))["refused"]


def test_what_each_further_tangent_costs() -> None:
    one, unit = noise(30, 0.05), 0.5 * noise(30, 0.05)
    found = further(one + 15 * 0.9 * unit, one, unit, 16)
    assert found["value"] == pytest.approx(0.9, rel=0.1)
    assert further(one + noise(30, 3.0, seed=2), one, unit, 2)["refused"] == NOISY
    assert further(one, one.copy(), unit, 2)["refused"] is None  # nothing more is a value, too: zero, known exactly
    assert further(one, one.copy(), unit, 2)["value"] == 0


def test_a_median_is_told_with_its_interval_however_wide() -> None:
    found = median(np.array([1.0, 2.0, 3.0, 4.0, 100.0]))
    assert found["value"] == 3
    assert found["low"] is not None
    assert found["high"] is not None
    assert found["low"] < 3 < found["high"]
