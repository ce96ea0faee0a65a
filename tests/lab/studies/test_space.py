"""Search spaces: what a range is, that samples are spread evenly and stay the same, and where a winner on an edge leads."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from forwardgrad.lab.errors import UserError
from forwardgrad.lab.studies.space import LogUniform, Range, Uniform, Whole, edges, further, grid, sampled, size, to_json

RATES = {"lr": LogUniform(1e-4, 1.0)}


def test_a_logarithmic_range_is_even_in_its_exponent() -> None:
    assert [LogUniform(1e-4, 1.0).at(share) for share in (0, 0.25, 0.5, 1)] == [1e-4, 1e-3, 1e-2, 1.0]
    assert [Uniform(1, 3).at(share) for share in (0, 0.25, 1)] == [1.0, 1.5, 3.0]
    assert [Whole(1, 16, log=True).at(share) for share in (0, 0.25, 0.5, 1)] == [1, 2, 4, 16]
    assert isinstance(Whole(1, 16).at(0.3), int)


@given(st.floats(1e-6, 1e3), st.floats(1.5, 1e6), st.floats(0, 1), st.booleans())
def test_a_share_of_a_range_and_back(low: float, factor: float, share: float, log: bool) -> None:
    values = Range(low, low * factor, log=log)
    assert math.isclose(values.share(values.at(share)), share, abs_tol=1e-3)  # six significant digits are kept


@pytest.mark.parametrize(
    ("low", "high", "log"), [(1.0, 1.0, False), (2.0, 1.0, False), (0.0, 1.0, True), (math.nan, 1.0, False), (1, math.inf, False)]
)
def test_a_range_that_is_none_is_refused(low: float, high: float, log: bool) -> None:
    with pytest.raises(UserError, match=r"a (logarithmic )?range"):
        Range(low, high, log=log)


def test_the_grid_is_every_combination() -> None:
    assert grid({"lr": (1, 2), "decay": (0.0, 0.1)}) == [
        {"lr": 1, "decay": 0.0},
        {"lr": 1, "decay": 0.1},
        {"lr": 2, "decay": 0.0},
        {"lr": 2, "decay": 0.1},
    ]
    with pytest.raises(UserError, match="'lr' is a range"):
        grid(RATES)


def test_a_sample_is_spread_evenly_and_the_same_for_the_same_name() -> None:
    """Of 64 points of a Halton sequence in base 2 each eighth of the range holds eight; of 64 random ones that is next to impossible."""
    points = sampled(RATES, 64, "a")
    eighths = [min(7, int(8 * RATES["lr"].share(point["lr"]))) for point in points]
    assert {eighths.count(i) for i in range(8)} <= {7, 8, 9}
    assert points == sampled(RATES, 64, "a")
    assert points[:10] == sampled(RATES, 10, "a")
    assert points != sampled(RATES, 64, "b")


def test_points_of_a_sample_differ_and_a_small_grid_is_taken_whole() -> None:
    space = {"lr": (0.1, 0.2, 0.3), "momentum": (0.0, 0.9)}
    assert size(space) == 6
    assert sampled(space, 6, "a") == sampled(space, 100, "a") == grid(space)
    five = sampled(space, 5, "a")
    assert len({tuple(point.values()) for point in five}) == 5
    assert all(point in grid(space) for point in five)


def test_a_range_of_few_whole_numbers_is_taken_whole_and_rounding_stays_inside() -> None:
    assert sampled({"n": Whole(1, 3)}, 5, "a") == [{"n": 1}, {"n": 2}, {"n": 3}]
    assert sampled({"lr": (0.1, 0.1, 0.2)}, 3, "a") == [{"lr": 0.1}, {"lr": 0.2}]
    assert Uniform(0, 0.9999999).at(1) < 1
    assert Uniform(0.12345649, 1).at(0) >= 0.12345649


def test_a_winner_at_the_end_of_a_grid_lies_on_its_edge() -> None:
    space = {"lr": (0.01, 0.1, 1.0), "decay": (0.0, 1e-5)}
    tried = grid(space)
    assert edges(space, tried, {"lr": 0.1, "decay": 1e-5}) == {"decay": 1}
    assert edges(space, tried, {"lr": 0.01, "decay": 0.0}) == {"lr": -1}  # no decay is no edge
    assert edges({"on": (True, False)}, [{"on": True}, {"on": False}], {"on": True}) == {}


def test_a_winner_in_the_outermost_tenth_of_a_range_lies_on_its_edge() -> None:
    tried = sampled(RATES, 8, "a")
    value = RATES["lr"]
    for share, found in ((0.05, {"lr": -1}), (0.5, {}), (0.95, {"lr": 1})):
        point = {"lr": value.at(share)}
        assert edges(RATES, [*tried, point], point) == found
    low = {"lr": value.at(0.05)}
    assert edges(RATES, [*tried, low, {"lr": value.at(-0.5)}], low) == {}  # it was looked beyond


def test_widening_goes_on_beyond_the_edge_in_the_strides_of_the_space() -> None:
    space = {"lr": (0.01, 0.1, 1.0), "momentum": (0.0, 0.5)}
    assert further(space, grid(space), {"lr": 1.0, "momentum": 0.0}) == [{"lr": 10.0, "momentum": 0.0}, {"lr": 100.0, "momentum": 0.0}]
    assert further(space, grid(space), {"lr": 0.01, "momentum": 0.0}) == [{"lr": 1e-3, "momentum": 0.0}, {"lr": 1e-4, "momentum": 0.0}]
    both = further(space, grid(space), {"lr": 1.0, "momentum": 0.5})
    assert both == [{"lr": 10.0, "momentum": 1.0}, {"lr": 100.0, "momentum": 1.5}]
    ranged = further(RATES, sampled(RATES, 8, "a"), {"lr": 0.9})
    assert ranged == [{"lr": 10.0}, {"lr": 100.0}]  # a quarter and a half of four decades


def test_a_winner_inside_gets_as_many_points_close_to_it() -> None:
    space = {"lr": (0.01, 0.1, 1.0)}
    assert further(space, grid(space), {"lr": 0.1}) == [{"lr": 0.0316228}, {"lr": 0.316228}]


def test_a_space_as_a_record_keeps_it() -> None:
    assert to_json({"lr": LogUniform(1e-3, 1), "tangents": Whole(1, 8), "momentum": (0.0, 0.9)}) == {
        "lr": {"low": 1e-3, "high": 1, "log": True},
        "tangents": {"low": 1, "high": 8, "log": False, "integer": True},
        "momentum": [0.0, 0.9],
    }
