"""Some of the directions of an evaluation: the numbers that they have among all, and places that count as if all were drawn."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

import forwardgrad as fg
from forwardgrad.directions import Directions, Still, fork

CPU = torch.device("cpu")
LIKE = torch.empty(0, dtype=torch.float64)


def directions(law: fg.Law) -> Directions:
    return Directions(law, fork(torch.Generator().manual_seed(0), 5), CPU)


@pytest.mark.parametrize("law", [fg.Gaussian(), fg.Rademacher(), fg.Sphere()], ids=lambda law: law.name)
@pytest.mark.parametrize("which", [[0], [1, 4], range(0, 5, 2), range(5), []], ids=str)
def test_some_of_many_have_the_same_bits_and_count_places_alike(which: Sequence[int], law: fg.Law) -> None:
    every, other = directions(law), directions(law)
    some = other.only(which)
    assert len(some) == len(which)
    assert some.seeds == [every.seeds[k] for k in which]
    for shape in ((3,), (2, 4)):
        assert some.next_place == every.next_place
        assert torch.equal(some.draw(shape, LIKE), every.draw(shape, LIKE)[list(which)])
    assert torch.equal(other.draw((3,), LIKE), every.draw((3,), LIKE))  # the next place of all


def test_a_place_can_be_drawn_alone() -> None:
    every, again = directions(fg.Gaussian()), directions(fg.Gaussian())
    _, second = every.draw((3,), LIKE), every.draw((2, 4), LIKE)
    again.next_place = 1
    assert torch.equal(again.draw((2, 4), LIKE), second)


def test_of_none_there_are_none() -> None:
    assert len(Still().only([0, 1])) == 0
    assert Still().only([]).draw((3,), LIKE).shape == (0, 3)
