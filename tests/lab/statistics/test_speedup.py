"""The ratio of two arms' times: against every arrangement written out, and against scipy's rank-sum test turned round."""

import itertools
import math
import random

import pytest
from scipy import stats as scipy_stats

from forwardgrad.lab.statistics.speedup import arrangements, fewest_a_side, time_ratio


@pytest.mark.parametrize(("m", "n"), [(1, 1), (1, 4), (2, 3), (4, 4), (3, 6)])
def test_arrangements_are_those_that_there_are(m: int, n: int) -> None:
    counted = [0] * (m * n + 1)
    for places in itertools.combinations(range(m + n), m):
        others = [place for place in range(m + n) if place not in places]
        counted[sum(one > other for one in places for other in others)] += 1
    assert arrangements(m, n) == counted


@pytest.mark.parametrize(("m", "n"), [(4, 4), (6, 6), (5, 7)])
def test_the_interval_holds_the_factors_that_the_rank_sum_test_does_not_reject(m: int, n: int) -> None:
    draw = random.Random(0)
    first, second = ([draw.lognormvariate(centre, 0.2) for _ in range(size)] for centre, size in ((0.0, m), (0.5, n)))
    found = time_ratio(first, second)
    assert found.low is not None
    assert found.high is not None

    def p(factor: float) -> float:
        scaled = [factor * time for time in second]
        return float(scipy_stats.mannwhitneyu(first, scaled, method="exact").pvalue)

    assert p(found.low * 1.0001) > 0.05 >= p(found.low * 0.9999)
    assert p(found.high * 0.9999) > 0.05 >= p(found.high * 1.0001)
    assert found.confidence >= 0.95
    assert found.decides


@pytest.mark.parametrize(("n", "confidence"), [(1, 0.0), (2, 2 / 3), (3, 0.9), (4, 34 / 35)])
def test_few_runs_have_an_interval_of_less_and_say_so(n: int, confidence: float) -> None:
    found = time_ratio([6.0 + i for i in range(n)], [10.0] * n)
    assert found.confidence == pytest.approx(confidence)
    assert (found.low, found.high) == ((None, None) if n == 1 else (0.6, (5 + n) / 10))
    assert found.decides == (n >= fewest_a_side())


def test_what_never_arrives_takes_for_ever() -> None:
    never = math.inf
    found = time_ratio([1.0, never, never, never], [2.0, 2.0, 2.0, never])
    assert (found.value, found.low, found.high) == (never, 0.0, never)
    assert time_ratio([1.0, 1.0, 1.0, never], [2.0, 2.0, 2.0, 2.0]).value == 0.5
    assert time_ratio([never] * 4, [never] * 4).low == never  # a challenger that is nowhere is not as fast as one that is nowhere


def test_no_times_are_refused() -> None:
    with pytest.raises(ValueError, match="no times to compare"):
        time_ratio([], [1.0])
