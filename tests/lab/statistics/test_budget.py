"""What a budget buys, against hand computations and the enumeration of every draw."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from forwardgrad.lab.statistics import budget as budget

INF = math.inf


def test_the_expected_best_is_computed_by_hand() -> None:
    # 1 trial: (1 + 2 + 6)/3. 2 trials, nine draws: 1 in five of them, 2 in three, 6 in one
    found = budget.best_of([6.0, 1.0, 2.0])
    assert found.trials == (1, 2, 3)
    assert found.value[:2] == pytest.approx((3.0, (5 * 1 + 3 * 2 + 1 * 6) / 9))
    assert found.expected


@given(st.lists(st.floats(-3, 3), min_size=1, max_size=4))
def test_the_expected_best_is_that_of_every_draw(losses: list[float]) -> None:
    found = budget.best_of(losses)
    for trials, value in zip(found.trials, found.value, strict=True):
        draws = [min(draw) for draw in itertools.product(losses, repeat=trials)]
        assert value == pytest.approx(sum(draws) / len(draws), abs=1e-12)


@given(st.lists(st.integers(0, 3).map(lambda k: INF if k == 3 else float(k)), min_size=1, max_size=4))
def test_the_median_best_is_that_of_every_draw(losses: list[float]) -> None:
    found = budget.best_of(losses, expected=False)
    for trials, value in zip(found.trials, found.value, strict=True):
        draws = sorted(min(draw) for draw in itertools.product(losses, repeat=trials))
        assert value == draws[math.ceil(len(draws) / 2) - 1]  # the least value that half of the draws do not exceed


def test_the_paper_s_formula_is_this_one_with_signs_turned() -> None:
    """Dodge et al.: E[max of n] = Σ_v v·(P̂(V ≤ v)ⁿ − P̂(V < v)ⁿ) over the accuracies that were seen."""
    accuracies = [0.61, 0.74, 0.74, 0.8, 0.55]
    found = budget.best_of([-accuracy for accuracy in accuracies])
    for n, value in zip(found.trials, found.value, strict=True):
        below = {v: sum(a < v for a in accuracies) / 5 for v in accuracies}
        expected = sum(v * ((below[v] + accuracies.count(v) / 5) ** n - below[v] ** n) for v in set(accuracies))
        assert -value == pytest.approx(expected)


def test_lost_trials_make_the_expectation_infinite_and_leave_the_median() -> None:
    # a trial is lost with chance 2/3: the best of 1 is, of 2 no longer ((2/3)² = 4/9 ≤ ½)
    found = budget.best_of([INF, 1.0, math.nan])
    assert (found.value, found.expected) == ((INF, 1.0, 1.0), False)
    assert set(budget.best_of([INF, 1.0], expected=True).value) == {INF}
    assert set(budget.best_of([INF, INF]).value) == {INF}
    with pytest.raises(ValueError, match="no trials"):
        budget.best_of([])


def test_the_band_is_that_of_every_resample() -> None:
    # two losses resampled: 11, 13, 31, 33, a quarter each. Best of 1: 1, 2, 2, 3; best of 2: 1, 1.5, 1.5, 3
    found = budget.best_of([1.0, 3.0])
    assert (found.value, found.low, found.high) == ((2.0, 1.5), (1.0, 1.0), (3.0, 3.0))
    # one of 60 losses infinite: resamples hold none of it with chance (59/60)⁶⁰ = 36 %, so the band is open above
    assert math.isinf(budget.best_of([*map(float, range(59)), INF], expected=True).high[-1])


def test_many_trials_are_shown_at_few_places() -> None:
    found = budget.best_of(list(np.random.default_rng(0).random(1_000)))
    assert (found.trials[0], found.trials[-1]) == (1, 1_000)
    assert len(found.trials) <= budget.SHOWN
    assert list(found.value) == sorted(found.value, reverse=True)
    assert all(low <= value <= high for low, value, high in zip(found.low, found.value, found.high, strict=True))


def test_sensitivity_is_computed_by_hand() -> None:
    trials = [(1.0, INF), (0.01, 3.0), (0.01, 1.15), (0.1, 1.0), (0.001, 1.19), (0.0001, 1.3), (0.00001, 1.0)]
    found = budget.sensitivity(trials)
    assert found is not None
    assert found.rates == (0.00001, 0.0001, 0.001, 0.01, 0.1, 1.0)
    assert found.losses == (1.0, 1.3, 1.19, 1.15, 1.0, INF)
    # of two rates at 1.0 the lower is the best; 1.3 beside it is above 1.2
    assert (found.best, found.low, found.high, found.decades, found.below) == (0.00001, 0.00001, 0.00001, 0.0, True)
    wider = budget.sensitivity(trials, tolerance=1.3)
    assert wider is not None
    assert (wider.low, wider.high, wider.below, wider.above) == (0.00001, 0.1, True, False)
    assert wider.decades == pytest.approx(4)


def test_drawn_rates_compete_within_a_class() -> None:
    trials = [(0.0011, 2.0), (0.0012, 1.0), (0.05, 0.9), (0.06, INF), (0.7, math.nan)]
    found = budget.sensitivity(trials, per_decade=2)  # classes from 1 and 3.16 of every decade on
    assert found is not None
    assert (found.rates, found.losses) == ((0.0012, 0.05, 0.7), (1.0, 0.9, INF))
    assert (found.low, found.high, found.above) == (0.0012, 0.05, False)


def test_losses_below_zero_have_a_tolerance_too() -> None:
    found = budget.sensitivity([(0.1, -10.0), (0.2, -8.0), (0.4, -7.9)])  # −10 + 0.2·10 = −8
    assert found is not None
    assert found.high == 0.2


def test_no_rate_is_best_where_all_trials_were_lost() -> None:
    assert budget.sensitivity([(0.1, INF), (0.2, math.nan)]) is None


@pytest.mark.parametrize(("trials", "message"), [([], "no trials"), ([(0.0, 1.0)], "positive number, not 0"), ([(INF, 1.0)], "positive")])
def test_learning_rates_are_positive(trials: list[tuple[float, float]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        budget.sensitivity(trials)


TIMES = {"a": [10.0, 20.0, INF, INF], "b": [20.0, 10.0, 30.0, INF], "c": [25.0, 60.0, INF, INF]}


def test_profiles_are_computed_by_hand() -> None:
    found = budget.profiles(TIMES)
    # ratios: a 1 2 ∞ ∞, b 2 1 1 ∞, c 2.5 6 ∞ ∞; the last task is nobody's
    assert (found["a"].within, found["a"].share) == ((1.0, 2.0), (0.25, 0.5))
    assert (found["b"].within, found["b"].share) == ((1.0, 2.0), (0.5, 0.75))
    assert (found["c"].within, found["c"].share) == ((1.0, 2.5), (0.0, 0.25))
    # areas up to 4 over 3: a (3 + 2)/12, b (2 + 3 + 3)/12, c 1.5/12
    assert [found[arm].score for arm in "abc"] == pytest.approx([5 / 12, 8 / 12, 1.5 / 12])
    assert {profile.tasks for profile in found.values()} == {4}


@given(st.lists(st.tuples(*[st.sampled_from([1.0, 1.5, 2.0, 3.0, 7.0, INF])] * 2), min_size=1, max_size=5), st.floats(1.1, 9))
def test_the_score_is_the_area_under_the_staircase(rows: list[tuple[float, float]], most: float) -> None:
    times: dict[str, Sequence[float]] = {"a": [a for a, _ in rows], "b": [b for _, b in rows]}
    for found in budget.profiles(times, most).values():
        ends = [*found.within[1:], most]
        area = sum(share * (end - start) for start, end, share in zip(found.within, ends, found.share, strict=True))
        assert found.score == pytest.approx(area / (most - 1))
        assert list(found.share) == sorted(found.share)


def test_the_fastest_everywhere_scores_one() -> None:
    assert budget.profiles({"a": [1.0, 2.0], "b": [8.0, INF]})["a"].score == 1.0


@pytest.mark.parametrize(
    ("times", "most", "message"),
    [({}, 4, "every arm"), ({"a": []}, 4, "every arm"), ({"a": [1.0], "b": [1.0, 2.0]}, 4, "every arm"),
     ({"a": [0.0]}, 4, "must be positive, not 0"), ({"a": [1.0]}, 1, "beyond 1, not to 1")],
)  # fmt: skip
def test_a_profile_asks_for_positive_times(times: dict[str, list[float]], most: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        budget.profiles(times, most)
