"""Directions for several evaluations: drawn once, the same alone as among others, and seeds that are read when they are asked for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import vmap

import forwardgrad as fg
from forwardgrad.directions import Directions, HeldDirections, PartOfSeeds

CPU, LIKE = torch.device("cpu"), torch.empty(0)
LAWS = [fg.Gaussian(), fg.Rademacher()]


@pytest.mark.parametrize("law", LAWS, ids=repr)
def test_numbers_are_drawn_once_and_those_of_a_seed_are_the_same_alone(law: fg.Law) -> None:
    seeds = [5, 6, 7]
    held = HeldDirections(law, seeds, CPU)
    first, second = held.draw((130,), LIKE), held.draw((4, 2), LIKE)
    held.again()
    assert held.draw((130,), LIKE) is first
    assert held.draw((4, 2), LIKE) is second
    for index, seed in enumerate(seeds):
        alone = HeldDirections(law, PartOfSeeds(seeds, range(index, index + 1)), CPU)
        assert torch.equal(alone.draw((130,), LIKE)[0], first[index])
        assert torch.equal(HeldDirections(law, [seed], CPU).draw((130,), LIKE)[0], first[index])
    if law == fg.Gaussian():  # and of any evaluation
        assert torch.equal(Directions(law, seeds, CPU).draw((130,), LIKE), first)
    assert not torch.equal(held.again().draw((131,), LIKE)[:, :130], first) or law == fg.Rademacher()  # another path has another shape


def test_signs_of_many_seeds_and_places_are_independent() -> None:
    """|correlation| of 2,000 signs has a standard deviation of 1/√2000; of 500 pairs of rows and of columns none is beyond 4.5 of it."""
    held = HeldDirections(fg.Rademacher(), range(2000), CPU)
    signs = torch.cat([held.draw((130,), LIKE), held.draw((70,), LIKE)], 1)
    assert signs.abs().unique().tolist() == [1.0]
    assert abs(float(signs.mean())) * signs.numel() ** 0.5 < 4.5
    picked = torch.randint(200, (500, 2), generator=torch.Generator().manual_seed(0))
    picked = picked[picked[:, 0] != picked[:, 1]]
    assert ((signs[:, picked[:, 0]] * signs[:, picked[:, 1]]).mean(0) * 2000**0.5).abs().max() < 4.5  # m = 500: 0.4 % of all seeds
    rows = signs[:1000] * signs[1000:]
    assert (rows.mean(1) * 200**0.5).abs().max() < 4.9  # m = 1,000 of a binomial law: 0.1 %


@pytest.mark.parametrize("law", LAWS, ids=repr)
def test_what_is_drawn_inside_of_vmap_is_what_is_drawn_outside(law: fg.Law) -> None:
    outside, held = HeldDirections(law, [1, 2], CPU).draw((9,), LIKE), HeldDirections(law, [1, 2], CPU)

    def member(index: Tensor) -> Any:
        return held.again().draw((9,), LIKE).index_select(0, index.reshape(1)).squeeze(0)

    assert torch.equal(vmap(member, randomness="same")(torch.arange(2)), outside)


def test_a_part_of_the_seeds_follows_the_list() -> None:
    seeds = [1, 2, 3, 4]
    part = PartOfSeeds(seeds, range(1, 3))
    assert (list(part), len(part)) == ([2, 3], 2)
    seeds[:] = [5, 6, 7, 8]
    assert list(part) == [6, 7]
