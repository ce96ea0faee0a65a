import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from forwardgrad.lab.statistics import stats

FINITE = st.floats(-1e6, 1e6)


def test_the_interval_of_three_values_is_the_one_in_the_t_table() -> None:
    found = stats.estimate([1.0, 2.0, 3.0])
    half = 4.30265 / math.sqrt(3)  # t(0.975; 2) from a table, times s/√n with s = 1
    assert (found.mean, found.n) == (2.0, 3)
    assert found.low == pytest.approx(2 - half, abs=1e-4)
    assert found.high == pytest.approx(2 + half, abs=1e-4)


def test_one_value_has_no_interval() -> None:
    assert stats.estimate([0.5]) == stats.MeanEstimate(0.5, None, None, 1)


def test_a_value_that_is_not_finite_is_not_left_out() -> None:
    assert stats.estimate([0.5, math.inf, 0.7]) == stats.MeanEstimate(math.inf, None, None, 3)


def test_an_interval_stays_among_possible_values() -> None:
    found = stats.estimate([0.99, 1.0], least=0.0, most=1.0)
    assert found.high == 1.0
    assert found.low is not None
    assert 0 < found.low < 0.99


def test_no_values_are_an_error() -> None:
    with pytest.raises(ValueError, match="no values"):
        stats.estimate([])


@given(st.lists(FINITE, min_size=2, max_size=8))
def test_the_mean_lies_in_its_interval(values: list[float]) -> None:
    found = stats.estimate(values)
    assert found.low is not None
    assert found.high is not None
    assert found.low <= found.mean <= found.high


def test_a_difference_is_paired_by_seed() -> None:
    gap = stats.difference([1.0, 2.0, 6.0], [0.0, 2.0, 4.0])  # differences 1, 0, 2: mean 1, sd 1
    half = 4.30265 / math.sqrt(3)  # t(0.975; 2) from a table
    assert gap.mean == 1.0
    assert gap.low == pytest.approx(1 - half, abs=1e-4)
    assert gap.high == pytest.approx(1 + half, abs=1e-4)
    with pytest.raises(ValueError, match="equal numbers"):
        stats.difference([1.0], [1.0, 2.0])


@pytest.mark.parametrize(
    ("first", "second", "gap"),
    [([math.inf], [1.0], math.inf), ([1.0], [math.inf], -math.inf), ([math.inf], [math.inf], 0.0), ([1.0], [3.0], -2.0)],
)
def test_a_difference_without_interval(first: list[float], second: list[float], gap: float) -> None:
    assert stats.difference(first, second) == stats.MeanEstimate(gap, None, None, 1)


def test_equal_values_have_a_difference_without_width() -> None:
    assert stats.difference([1.0, 1.0], [3.0, 3.0]) == stats.MeanEstimate(-2.0, -2.0, -2.0, 2)


def test_the_target_is_first_met_where_it_is_met_and_never_by_nan() -> None:
    assert stats.first_at_or_below([50, 100, 200], [math.nan, 0.5, 0.4], 0.5) == 100
    assert stats.first_at_or_below([], [], 0.5) == math.inf


def test_the_median_counts_misses_as_infinite() -> None:
    assert stats.median([300.0, 100.0, math.inf]) == 300.0
    assert stats.median([100.0, math.inf, math.inf]) == math.inf
    assert stats.median([100.0, math.inf]) == math.inf


def test_bins_pool_runs_of_unequal_length() -> None:
    curve = stats.binned([[1.0, 3.0, 5.0, 7.0], [2.0, 2.0]], bins=2)
    assert curve.at == (1.5, 3.5)
    assert curve.mean == (2.0, 6.0)
    assert curve.low == (1.0, 5.0)
    assert curve.high == (3.0, 7.0)


def test_bins_leave_gaps_where_nothing_is_finite() -> None:
    curve = stats.binned([[1.0, math.nan, math.inf]], bins=3)
    assert curve.at == (1.0,)
    assert stats.binned([]) == stats.binned([[]]) == stats.Curve((), (), (), ())


@given(st.integers(1, 3000), st.integers(1, 50))
def test_no_more_bins_than_asked_for_and_every_value_counted(length: int, bins: int) -> None:
    values = [float(i) for i in range(1, length + 1)]
    curve = stats.binned([values], bins)
    assert len(curve.at) <= bins
    assert (min(curve.low), max(curve.high)) == (1.0, float(length))
    assert curve.mean == pytest.approx(curve.at)  # the value of step i is i


def test_evaluations_are_pooled_by_step() -> None:
    curve = stats.pooled([([50, 100], [2.0, 1.0]), ([50, 100], [4.0, math.nan])])
    assert curve == stats.Curve((50.0, 100.0), (3.0, 1.0), (2.0, 1.0), (4.0, 1.0))


def test_a_thinned_path_keeps_its_ends_and_stops_at_what_is_not_finite() -> None:
    path = [(float(i), 0.0) for i in range(1000)]
    thin = stats.thinned(path, 100)
    assert thin[0] == path[0]
    assert thin[-1] == path[-1]
    assert len(thin) <= 101
    assert stats.thinned([(0.0, 0.0), (math.inf, 1.0), (2.0, 2.0)]) == [(0.0, 0.0)]
    assert stats.thinned([]) == []
