"""Comparisons over seeds, against hand computations, scipy's own tests, full enumeration and simulated false alarms."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats as scipy_stats

from forwardgrad.lab.statistics import comparison
from forwardgrad.lab.statistics.comparison import ConfidenceInterval

INF = math.inf
STATISTICS = (comparison.mean, comparison.median, comparison.interquartile_mean)
Located = Callable[[Sequence[float]], ConfidenceInterval]


def enumerated_bca(values: Sequence[float], statistic: Callable[[Sequence[float]], float]) -> tuple[float, float]:
    """Efron's BCa interval (1987, equations 2.3 and 6.6) from all nⁿ resamples in place of random ones."""
    replicates = sorted(statistic(sample) for sample in itertools.product(values, repeat=len(values)))
    value = statistic(values)
    below = sum((one < value) + (one == value) / 2 for one in replicates) / len(replicates)
    z0 = scipy_stats.norm.ppf(below)
    jackknife = [statistic([*values[:i], *values[i + 1 :]]) for i in range(len(values))]
    apart = [sum(jackknife) / len(jackknife) - one for one in jackknife]
    a = sum(one**3 for one in apart) / (6 * sum(one**2 for one in apart) ** 1.5)
    ends = [scipy_stats.norm.cdf(z0 + (z0 + z) / (1 - a * (z0 + z))) for z in scipy_stats.norm.ppf([0.025, 0.975])]
    low, high = np.quantile(replicates, ends)
    return float(low), float(high)


@pytest.mark.parametrize("values", [[1.0, 2.0, 4.0, 9.0, 11.0], [0.31, 0.29, 0.35, 0.8, 0.33]])
def test_a_bca_interval_is_that_of_all_resamples(values: list[float]) -> None:
    found = comparison.mean(values)
    low, high = enumerated_bca(values, lambda sample: sum(sample) / len(sample))
    assert (found.method, found.n, found.caution) == ("BCa", 5, "")
    # 1,999 resamples of 3,125 possible ones: an end moves by a few percent of the range of the means
    assert found.low == pytest.approx(low, abs=0.05 * (high - low))
    assert found.high == pytest.approx(high, abs=0.05 * (high - low))


def test_statistics_are_those_computed_by_hand() -> None:
    values = [8.0, 1.0, 2.0, 3.0, 4.0, 6.0, 100.0, 5.0]
    assert comparison.mean(values).value == 129 / 8
    assert comparison.median(values).value == 4.5  # of 1 2 3 4 | 5 6 8 100
    assert comparison.interquartile_mean(values).value == 4.5  # without 1 2 and 8 100: (3 + 4 + 5 + 6)/4
    assert comparison.interquartile_mean([1.0, 2.0, 6.0]).value == 3.0  # ⌊3/4⌋ = 0 values cut


def test_what_is_not_finite_is_infinite_and_kept() -> None:
    values = [0.1, 0.2, 0.3, 0.4, math.nan, 0.5, 0.6, 0.7]
    assert comparison.mean(values) == ConfidenceInterval(INF, None, None, 8, caution="a loss is not finite, no interval")
    middle = comparison.median(values)  # 0.1 … 0.4 | 0.5 0.6 0.7 ∞; k = 1: from the first to the last
    assert (middle.value, middle.low, middle.high, middle.method) == (0.45, 0.1, INF, "order statistics")
    trimmed = comparison.interquartile_mean(values)  # 0.3 … 0.6 are left
    assert trimmed.value == pytest.approx(0.45)
    assert trimmed.method == "percentile"
    assert trimmed.low is not None
    assert 0.1 <= trimmed.low < 0.45
    assert trimmed.high == INF  # three of eight infinite is likelier than 2.5 %: P(Bin(8, 1/8) ≥ 3) = 7 %
    assert comparison.interquartile_mean([0.1, INF, INF, 0.2]).value == INF


@pytest.mark.parametrize("statistic", STATISTICS)
def test_no_interval_where_none_can_be_given(statistic: Located) -> None:
    assert statistic([0.3]) == ConfidenceInterval(0.3, None, None, 1, caution="n = 1, no interval")
    assert statistic([0.3, 0.3, 0.3]).caution == "all values equal, no interval"
    assert statistic([INF, INF]).value == INF
    assert statistic([INF, INF]).low is None
    with pytest.raises(ValueError, match="no values"):
        statistic([])


def test_an_interval_from_few_seeds_is_marked() -> None:
    assert comparison.mean([0.1, 0.2, 0.3, 0.5]).caution == "n = 4: too narrow"
    assert comparison.mean([0.1, 0.2, 0.3, 0.5, 0.6]).caution == ""


def test_the_same_values_give_the_same_interval() -> None:
    values = [0.3, 0.1, 0.7, 0.2, 0.4]
    for statistic in STATISTICS:
        assert statistic(values) == statistic(values)
    assert comparison.improvement(values, values[1:]) == comparison.improvement(values, values[1:])


def test_bca_intervals_hold_the_mean_as_often_as_theory_says() -> None:
    """1,000 samples of 20 normal values. A bootstrap interval of a mean is ± 1.96·√((n−1)/n)·s/√n but for its corrections, which
    on average leave symmetric samples alone, so it holds the mean with P(|t₁₉| < 1.96·√(19/20)) = 92.9 %. z < 4.5: 7 in a million.
    """
    n, samples = 20, 1_000
    expected = 1 - 2 * scipy_stats.t.sf(1.959964 * math.sqrt((n - 1) / n), n - 1)
    generator = np.random.default_rng(7)
    found = [comparison.mean(list(generator.normal(size=n))) for _ in range(samples)]
    held = sum(one.low <= 0 <= one.high for one in found if one.low is not None and one.high is not None)
    assert abs(held / samples - expected) < 4.5 * math.sqrt(expected * (1 - expected) / samples)


@pytest.mark.parametrize("n", [6, 9, 20, 41])
def test_a_median_between_order_statistics_is_held_often_enough_and_no_tighter_pair_would_do(n: int) -> None:
    found = comparison.between_order_statistics(list(range(1, n + 1)))
    assert found.low is not None
    assert found.high is not None
    k = int(found.low)
    assert (found.value, found.high) == ((n + 1) / 2, n + 1 - k)
    outside = [sum(math.comb(n, i) for i in range(place)) / 2**n for place in (k, k + 1)]
    assert 1 - 2 * outside[0] >= 0.95 > 1 - 2 * outside[1]


def test_the_order_statistics_are_those_of_the_table() -> None:
    # n = 20: P(Bin(20, ½) < 6) = 0.0207 ≤ 0.025 < 0.0577: the 6th and the 15th value
    found = comparison.between_order_statistics([*map(float, range(1, 15)), *[INF] * 6])
    assert (found.value, found.low, found.high) == (10.5, 6.0, INF)
    assert comparison.between_order_statistics([1.0, 2.0, 3.0, 4.0, 5.0]).caution == "no interval below 6 values, n = 5"
    assert comparison.between_order_statistics([1.0, INF]).value == INF


def test_a_difference_is_paired() -> None:
    found = comparison.difference([1.1, 2.1, 3.1, 4.2, 5.1], [1.0, 2.0, 3.0, 4.0, 5.0])  # differences 0.1, 0.1, 0.1, 0.2, 0.1
    assert found.value == pytest.approx(0.12)
    assert found.excludes_zero
    assert not comparison.difference([1.0, 3.0, 2.0, 5.0, 4.0], [3.0, 1.0, 5.0, 2.0, 4.1]).excludes_zero
    with pytest.raises(ValueError, match="equal numbers, not 1 and 2"):
        comparison.difference([1.0], [1.0, 2.0])


@pytest.mark.parametrize(
    ("first", "second", "gap"),
    [([INF, 1.0], [1.0, 1.0], INF), ([1.0, 1.0], [INF, math.nan], -INF), ([INF, 1.0], [1.0, INF], 0.0), ([INF], [INF], 0.0)],
)
def test_a_difference_with_lost_runs_has_no_interval(first: list[float], second: list[float], gap: float) -> None:
    found = comparison.difference(first, second)
    assert (found.value, found.low, found.high) == (gap, None, None)
    assert not found.excludes_zero


def enumerated_p(apart: Sequence[float]) -> float:
    """The share of all choices of signs whose sum is at least as far from zero."""
    seen = abs(sum(apart))
    sums = [abs(sum(sign * d for sign, d in zip(signs, apart, strict=True))) for signs in itertools.product((-1, 1), repeat=len(apart))]
    return sum(one >= seen - 1e-12 for one in sums) / len(sums)


def test_permutations_are_those_counted_by_hand() -> None:
    # d = 1, 2, −1: the eight sums of ±1 ±2 ±1 are 4 2 0 −2 2 0 −2 −4, six of them as far from zero as 2
    found = comparison.permutation([2.0, 3.0, 1.0], [1.0, 1.0, 2.0])
    assert (found.p, found.least, found.n, found.exact) == (0.75, 0.25, 3, True)
    # d = 1, 2, 4: only all plus and all minus reach 7
    assert comparison.permutation([2.0, 3.0, 5.0], [1.0, 1.0, 1.0]).p == 0.25


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=7))
def test_permutations_are_those_enumerated(rows: list[tuple[int, int]]) -> None:
    first, second = ([float(value) for value in column] for column in zip(*rows, strict=True))
    found = comparison.permutation(first, second)
    assert found.p == pytest.approx(enumerated_p([a - b for a, b in rows]))
    assert found.p == comparison.permutation(second, first).p
    if all(a != b for a, b in rows):
        assert found.p >= found.least == 2.0 ** (1 - len(rows))


def test_lost_runs_are_compared_by_rank() -> None:
    first, second = [0.1, 0.2, 0.5, 0.3, 0.35, 0.6], [0.15, 0.4, 0.2, 0.7, INF, 1.2]
    found = comparison.permutation(first, second)
    # |d| = 0.05 0.2 0.3 0.4 ∞ 0.6, ranks 1 2 3 4 6 5, the third against the first arm: Wilcoxon's T = 3
    expected = scipy_stats.wilcoxon([-1, -2, 3, -4, -6, -5], method="exact").pvalue
    assert found.statistic == "signed ranks"
    assert found.p == pytest.approx(expected) == pytest.approx(10 / 64)
    assert comparison.permutation([0.1] * 6, [INF] * 6).p == 2 / 64
    assert comparison.permutation([INF] * 6, [INF] * 6).p == 1.0  # level on every seed
    # lost on both sides on two seeds: no size is unknown, and only the four others say something
    level = comparison.permutation([INF, INF, 0.1, 0.2, 0.3, 0.4], [INF, INF, 0.2, 0.3, 0.4, 0.5])
    assert (level.p, level.statistic) == (2 / 16, "mean difference")


def test_many_tests_at_once_are_each_its_own() -> None:
    generator = np.random.default_rng(2)
    pairs = [(list(generator.normal(size=n)), list(generator.normal(size=n))) for n in (4, 1, 7, 4, 15, 7, 15)]
    pairs[3][0][1] = INF
    assert comparison.permutations(pairs) == [comparison.permutation(*pair) for pair in pairs]
    assert comparison.permutations([]) == []


def test_many_pairs_are_permuted_at_random() -> None:
    generator = np.random.default_rng(3)
    apart = generator.normal(0.5, 1, size=18)
    found = comparison.permutation(list(apart), [0.0] * 18)
    every = (
        np.array(list(itertools.product((-1, 1), repeat=17)), dtype=np.int8) @ apart[1:]
    )  # the first sign may stay: sums come in ± pairs
    p = float(np.mean(np.abs(np.stack([every + apart[0], every - apart[0]])) >= abs(apart.sum()) - 1e-12))
    assert not found.exact
    assert 0.001 < p < 0.5
    assert abs(found.p - p) < 4.5 * 2 * math.sqrt(p / 2 / comparison.PERMUTATIONS)  # 7 in a million: two tails of random signs


def test_false_alarms_come_as_often_as_promised() -> None:
    """1,000 times 6 pairs without a difference: p ≤ 2/64 in 2/64 of the cases, with one run in ten lost in no more. z < 4.5."""
    generator = np.random.default_rng(11)
    losses = generator.lognormal(size=(1_000, 2, 6))
    losses[generator.random(losses.shape) < 0.1] = INF
    alarms = sum(comparison.permutation(list(one), list(two)).p <= 2 / 64 for one, two in losses) / len(losses)
    assert alarms < 2 / 64 + 4.5 * math.sqrt(2 / 64 / len(losses))
    finite = generator.lognormal(size=(1_000, 2, 6))
    alarms = sum(comparison.permutation(list(one), list(two)).p <= 2 / 64 for one, two in finite) / len(finite)
    assert abs(alarms - 2 / 64) < 4.5 * math.sqrt(2 / 64 / len(finite))


def test_a_test_needs_so_many_pairs() -> None:
    assert [comparison.pairs_needed(m) for m in (1, 3, 15)] == [6, 7, 10]  # 2/2⁶ = 0.031, 3·2/2⁷ = 0.047, 15·2/2¹⁰ = 0.029
    for m in range(1, 60):
        n = comparison.pairs_needed(m)
        assert m * 2.0 ** (1 - n) <= 0.05 < m * 2.0 ** (2 - n)


def test_holm_is_computed_by_hand() -> None:
    # in order 0.005 0.01 0.03 0.04: 4·0.005, 3·0.01, 2·0.03, then 1·0.04 raised to what came before it
    assert comparison.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx((0.03, 0.06, 0.06, 0.02))
    assert comparison.holm([0.7, 0.9]) == (1.0, 1.0)
    assert comparison.holm([]) == ()


def test_holm_holds_the_rate_over_all_comparisons() -> None:
    """Five true hypotheses, independent: one is rejected at 5 % in 1 − 0.99⁵ = 4.9 % of 20,000 families. z < 4.5."""
    families = np.random.default_rng(5).random((20_000, 5))
    rejected = np.mean([min(comparison.holm(list(family))) <= 0.05 for family in families])
    expected = 1 - 0.99**5
    assert abs(rejected - expected) < 4.5 * math.sqrt(expected * (1 - expected) / len(families))


def test_arms_that_are_alike_are_seldom_told_apart() -> None:
    """1,000 groups of three equal arms over seven seeds: some pair has a corrected p ≤ 0.05 in at most 5 % of them. z < 4.5."""
    groups = np.random.default_rng(9).normal(size=(1_000, 3, 7))
    wrong = 0
    for arms in groups:
        tests = comparison.permutations(list(itertools.combinations([list(arm) for arm in arms], 2)))
        wrong += min(comparison.holm([test.p for test in tests])) <= 0.05
    assert 0 < wrong / len(groups) < 0.05 + 4.5 * math.sqrt(0.05 * 0.95 / len(groups))


def test_the_probability_of_improvement_counts_pairs() -> None:
    # 1 beats 2, 2, 5; 2 beats 5 and ties with both 2s; 9 beats none: 3 + 1 + 2/2 of 9
    found = comparison.improvement([1.0, 2.0, 9.0], [2.0, 2.0, 5.0])
    assert found.value == pytest.approx(5 / 9)
    assert (found.method, found.caution) == ("percentile", "n = 3: too narrow")
    assert comparison.improvement([1.0, INF], [2.0, INF]).value == (2 + 0 + 0.5) / 4
    apart = comparison.improvement([1.0, 2.0, 3.0], [4.0, 5.0, 6.0])
    assert (apart.value, apart.low, apart.caution) == (1.0, None, "all pairs alike, no interval")


@given(st.lists(st.integers(0, 5), min_size=1, max_size=6), st.lists(st.integers(0, 5), min_size=1, max_size=6))
def test_the_probability_of_improvement_is_mann_and_whitneys(first: list[int], second: list[int]) -> None:
    found = comparison.improvement(first, second)
    expected = scipy_stats.mannwhitneyu(second, first).statistic / len(first) / len(second) if len({*first, *second}) > 1 else 0.5
    assert found.value == pytest.approx(expected)
    assert found.value + comparison.improvement(second, first).value == pytest.approx(1)
    if found.low is not None:
        assert 0 <= found.low <= found.high <= 1


def test_the_interval_of_an_improvement_is_that_of_all_resamples() -> None:
    first, second = [1.0, 4.0, 6.0], [2.0, 5.0, 7.0]
    resamples = [list(sample) for sample in itertools.product(range(3), repeat=3)]
    wins = np.less.outer(first, second).astype(float)
    shares = sorted(wins[np.ix_(rows, columns)].mean() for rows in resamples for columns in resamples)
    found = comparison.improvement(first, second)
    # 729 resamples of both arms; the ends are values that occur, ninths, and the drawn ones lie at most one of them further
    assert found.low == pytest.approx(np.quantile(shares, 0.025, method="inverted_cdf"), abs=1 / 9 + 1e-9)
    assert found.high == pytest.approx(np.quantile(shares, 0.975, method="inverted_cdf"), abs=1 / 9 + 1e-9)
