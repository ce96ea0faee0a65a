"""The plan of a step's random numbers: the same bits again, and handed to whoever would draw them."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import pytest
import torch
from tests.support.cases import perceptron, seeded
from torch import Tensor

import forwardgrad as fg
from forwardgrad.directions import laws
from forwardgrad.directions.evaluation import Directions
from forwardgrad.directions.laws import fork
from forwardgrad.directions.plan import Growth, Plan, Unplanned, drawn, handed, planned

LAWS = [fg.Gaussian(), fg.Rademacher(), fg.Sphere(), fg.Orthogonal()]


def numbers(generator: torch.Generator, law: fg.Law) -> list[Tensor]:
    """A step's draws of all kinds: of the law itself, and along streams that are forked off."""
    like = dict(perceptron().double().named_parameters())
    whole = law.draw(like, 2, generator)
    directions = Directions(law, fork(generator, 3), torch.device("cpu"))
    return [*whole.values(), directions.draw((4, 2), torch.empty(0)), directions.draw((3,), torch.empty(0, dtype=torch.float64))]


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.name)
def test_a_plan_draws_what_the_steps_after_it_would_have_drawn(law: fg.Law) -> None:
    planning, plain = seeded(1), seeded(1)
    with planned() as plan:
        first = numbers(planning, law)
    wanted = [numbers(plain, law) for _ in range(3)]
    found = [first, plan.again(), plan.again()]
    assert all(torch.equal(a, b) for one, other in zip(found, wanted, strict=True) for a, b in zip(one, other, strict=True))
    assert torch.equal(planning.get_state(), plain.get_state())
    assert not torch.equal(found[1][0], found[2][0])


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.name)
def test_a_step_gets_the_numbers_of_the_plan_and_may_write_to_them(law: fg.Law) -> None:
    generator = seeded(1)
    with planned() as plan:
        numbers(generator, law)
    given = plan.again()
    kept, state = [t.clone() for t in given], generator.get_state()
    with handed(plan, given):
        found = numbers(generator, law)
    assert all(torch.equal(a, b) for a, b in zip(found, given, strict=True))
    for tensor in found:
        tensor.zero_()
    assert all(torch.equal(a, b) for a, b in zip(given, kept, strict=True))
    assert torch.equal(generator.get_state(), state)


def test_draws_that_are_known_to_be_the_same_are_made_once() -> None:
    calls = []

    def step() -> list[Tensor]:
        return [drawn(lambda: calls.append(0) or torch.ones(2), once=("a", k % 2)) for k in range(6)]

    with planned() as plan:
        step()
    assert (len(calls), len(plan.again()), len(calls)) == (6, 2, 8)
    with handed(plan, [torch.full((2,), 5.0), torch.full((2,), 6.0)]):
        assert [float(t[0]) for t in step()] == [5, 6, 5, 6, 5, 6]


@pytest.mark.parametrize("count", [1, 3])
def test_a_step_that_draws_more_or_less_than_planned_is_told(count: int) -> None:
    generator = seeded()
    with planned() as plan:
        for _ in range(2):
            fg.Gaussian().draw({"a": torch.zeros(2)}, 1, generator)

    def step() -> None:
        with handed(plan, given):
            for _ in range(count):
                fg.Gaussian().draw({"a": torch.zeros(2)}, 1, generator)

    given = plan.again()
    with pytest.raises(Unplanned):
        step()


def test_without_a_plan_nothing_is_kept() -> None:
    assert torch.equal(drawn(lambda: torch.ones(1)), torch.ones(1))


def test_a_plan_knows_what_a_step_makes_of_its_seeds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Large parts of Gaussian directions are streams, made of drawn seeds outside every draw."""
    monkeypatch.setattr(laws, "_WORTH_A_STREAM", 100)
    like = {"large": torch.empty(10, 20), "small": torch.empty(5)}
    with planned() as plan:
        fg.Gaussian().draw(like, 3, torch.Generator().manual_seed(0))
    assert len(plan.draws) == 1
    assert plan.growths == [Growth(3, 200, torch.float32, torch.device("cpu"), on_host=True)]


def test_a_plan_of_ones_own_takes_the_notes() -> None:
    class Names(Plan):
        def note(self, make: Callable[[], Any], once: Hashable, on: Sequence[torch.Generator] | None) -> Any:
            return super().note(make, None, on)

    mine = Names()
    with planned(mine) as plan:
        drawn(lambda: torch.ones(1), once="same")
        drawn(lambda: torch.ones(1), once="same")
    assert plan is mine
    assert len(mine.draws) == 2
