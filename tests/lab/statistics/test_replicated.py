"""Whether fresh runs bear out a claim: against the formula with a printed t table, and against simulated claims."""

import math

import numpy as np
import pytest

from forwardgrad.lab.statistics.replicated import FALSE_ALARM, replication

T_95 = {2: 2.919986, 5: 2.015048, 9: 1.833113}  # of a printed table, by degrees of freedom


@pytest.mark.parametrize(("fresh", "of"), [((0.80, 0.81, 0.82), 3), ((0.1, 0.5, 0.2, 0.9, 0.4, 0.4), 10), (tuple(range(10)), 1)])
def test_the_tolerance_is_that_of_the_formula(fresh: tuple[float, ...], of: int) -> None:
    n, mean = len(fresh), sum(fresh) / len(fresh)
    spread = math.sqrt(sum((value - mean) ** 2 for value in fresh) / (n - 1))
    wanted = T_95[n - 1] * spread * math.sqrt(1 / n + 1 / of)
    assert replication(mean, of, fresh).tolerance == pytest.approx(wanted, rel=1e-6)
    assert replication(mean, of, fresh, 0.25).tolerance == pytest.approx(wanted + 0.25, rel=1e-6)
    assert replication(mean + 0.99 * wanted, of, fresh).holds
    assert not replication(mean + 1.01 * wanted, of, fresh).holds
    assert replication(mean - 100 * wanted, of, fresh).holds  # a claim too modest is none too good


@pytest.mark.parametrize(("of", "n"), [(3, 3), (3, 6), (10, 3)])
def test_one_true_claim_in_twenty_is_refused(of: int, n: int) -> None:
    """z < 4.5 for the share of refused claims among 4,000: a false alarm about 7 times in a million seeds."""
    draw, trials = np.random.default_rng(0), 4000
    values = draw.normal(0.9, 0.01, (trials, of + n))
    refused = sum(not replication(float(each[:of].mean()), of, each[of:].tolist()).holds for each in values)
    assert abs(refused - FALSE_ALARM * trials) < 4.5 * math.sqrt(trials * FALSE_ALARM * (1 - FALSE_ALARM))


def test_claims_that_are_far_too_good_are_refused_however_much_their_figures_scatter() -> None:
    draw = np.random.default_rng(1)
    fresh = draw.normal(0.9, 0.01, (500, 3))
    refused = sum(not replication(0.99, 3, each.tolist()).holds for each in fresh)
    assert refused > 0.95 * len(fresh)


@pytest.mark.parametrize(
    ("claimed", "of", "fresh"), [(0.9, 3, (0.9,)), (0.9, 0, (0.9, 0.8)), (math.nan, 3, (0.9, 0.8)), (0.9, 3, (0.9, math.inf))]
)
def test_what_cannot_be_tested_is_refused(claimed: float, of: int, fresh: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="two fresh runs or more"):
        replication(claimed, of, fresh)
