"""Moves of torch's own optimizers: which are known, and that they are made for some parameters as for all."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.support.cases import seeded
from torch import Tensor, nn

import forwardgrad as fg
from forwardgrad.engines.moves import is_by_parameter, move, rates_by_parameter, settings_of
from forwardgrad.engines.plain_sgd import HeldRates

Made = Callable[[list[nn.Parameter]], torch.optim.Optimizer]


def with_(kind: type[torch.optim.Optimizer], **settings: Any) -> Made:
    return lambda parameters: kind(parameters, **{"lr": 0.05, **settings})  # type: ignore[call-arg]


def groups(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.Adam([{"params": parameters[:1], "lr": 0.2, "betas": (0.5, 0.9)}, {"params": parameters[1:]}], lr=0.05)


class Subclass(torch.optim.Adam):
    """An optimizer of which nobody knows what its step does."""


def hooked(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    optimizer = torch.optim.Adam(parameters)
    optimizer.register_step_pre_hook(lambda *_: None)
    return optimizer


SGD, ADAM, ADAMW = torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW
KNOWN: dict[str, Made] = {
    "momentum": with_(SGD, momentum=0.9),
    "momentum and decay": with_(SGD, momentum=0.9, weight_decay=0.1, dampening=0.3),
    "nesterov": with_(SGD, momentum=0.9, nesterov=True, weight_decay=0.1),
    "maximize": with_(SGD, momentum=0.9, maximize=True),
    "adam": with_(ADAM),
    "adam and decay": with_(ADAM, weight_decay=0.1, eps=1e-3),
    "amsgrad": with_(ADAM, amsgrad=True, maximize=True),
    "adamw": with_(ADAMW, weight_decay=0.3),
    "adamw, amsgrad": with_(ADAMW, amsgrad=True, weight_decay=0.0, betas=(0.6, 0.7)),
    "rate as a tensor": with_(ADAM, lr=torch.tensor(0.05)),
    "fused": with_(ADAMW, fused=True),
    "two groups": groups,
}
OTHER: dict[str, Made] = {
    "subclass": lambda parameters: Subclass(parameters),
    "differentiable": with_(ADAM, differentiable=True),
    "hooks": hooked,
    "another": with_(torch.optim.RMSprop),
    "looking ahead": lambda parameters: fg.Nesterov(parameters, 0.05, 0.9),
}


@pytest.mark.parametrize("make", KNOWN.values(), ids=KNOWN)
def test_these_are_known(make: Made) -> None:
    assert is_by_parameter(make(weights()))


@pytest.mark.parametrize("make", OTHER.values(), ids=OTHER)
def test_these_are_not(make: Made) -> None:
    assert not is_by_parameter(make(weights()))


def weights() -> list[nn.Parameter]:
    return [nn.Parameter(torch.randn(shape, generator=seeded(len(shape)), dtype=torch.float64)) for shape in ((3, 4), (4,), (2, 1, 2))]


def fill(parameters: list[nn.Parameter], number: int) -> None:
    for index, p in enumerate(parameters):
        p.grad = torch.randn(p.shape, generator=seeded(10 * number + index), dtype=p.dtype)


def stepped(make: Made, steps: int = 4) -> tuple[list[nn.Parameter], torch.optim.Optimizer]:
    """Plain torch."""
    parameters = weights()
    optimizer = make(parameters)
    for number in range(steps):
        fill(parameters, number)
        optimizer.step()
    return parameters, optimizer


def slots(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    kept = optimizer.state_dict()["state"]
    return [torch.as_tensor(kept[index][name]) for index in sorted(kept) for name in sorted(kept[index]) if kept[index][name] is not None]


@pytest.mark.parametrize("make", KNOWN.values(), ids=KNOWN)
def test_parameters_that_move_one_by_one_move_as_in_one_step(make: Made) -> None:
    wanted, plain = stepped(make)
    parameters = weights()
    optimizer = make(parameters)
    before = [[*group["params"]] for group in optimizer.param_groups]
    for number in range(4):
        fill(parameters, number)
        for p in reversed(parameters):
            move(optimizer, [p])
            assert p.grad is None
    assert all(map(torch.equal, parameters, wanted))
    assert all(map(torch.equal, slots(optimizer), slots(plain)))
    assert [[*map(id, group["params"])] for group in optimizer.param_groups] == [[*map(id, group)] for group in before]


@pytest.mark.parametrize("make", KNOWN.values(), ids=KNOWN)
def test_moves_by_rates_from_outside_are_those_of_torch(make: Made) -> None:
    """As a graph makes them, after one step that fills the state."""
    wanted, plain = stepped(make)
    parameters, optimizer = stepped(make, 1)
    for p in parameters:
        p.grad = None
    held = HeldRates()
    for number in range(1, 4):
        fill(parameters, number)
        rates = rates_by_parameter(optimizer)
        assert rates is not None
        for p in parameters:
            move(optimizer, [p], held.written(rates, p.device))
    for found, value in zip([*parameters, *slots(optimizer)], [*wanted, *slots(plain)], strict=True):
        torch.testing.assert_close(found, value, rtol=1e-9, atol=1e-9)


def test_one_that_has_no_gradient_stays_with_its_state() -> None:
    parameters, optimizer = stepped(KNOWN["adam"], 2)
    before, kept = [p.detach().clone() for p in parameters], copy.deepcopy(optimizer.state_dict()["state"][1])
    parameters[1].grad = None
    move(optimizer, parameters)
    assert torch.equal(parameters[1], before[1])
    assert all(torch.equal(torch.as_tensor(optimizer.state_dict()["state"][1][name]), torch.as_tensor(kept[name])) for name in kept)
    assert not torch.equal(parameters[0], before[0])


def test_the_group_is_whole_again_after_an_error() -> None:
    parameters = weights()
    optimizer = torch.optim.SGD(parameters, lr=0.1, momentum=0.9)
    fill(parameters, 0)
    optimizer.param_groups[0]["lr"] = "fast"
    with pytest.raises(TypeError):
        move(optimizer, parameters[:1])
    assert len(optimizer.param_groups[0]["params"]) == 3


def test_no_single_rate_where_parameters_of_a_group_took_other_numbers_of_steps() -> None:
    parameters, optimizer = stepped(KNOWN["adam"], 3)
    assert rates_by_parameter(optimizer) is not None
    fill(parameters, 3)
    move(optimizer, parameters[:1])
    assert rates_by_parameter(optimizer) is None
    _, apart = stepped(groups, 3)
    for p in apart.param_groups[0]["params"]:
        move(apart, [p])
    assert rates_by_parameter(apart) is not None  # each group has its own


def test_no_rates_where_an_option_is_a_tensor() -> None:
    assert rates_by_parameter(torch.optim.SGD(weights(), lr=0.1, momentum=0.9, weight_decay=torch.tensor(0.1), foreach=False)) is None  # type: ignore[arg-type]


def test_settings_change_with_all_but_the_rate() -> None:
    optimizer = torch.optim.Adam(weights(), lr=0.1)
    before = settings_of(optimizer)
    optimizer.param_groups[0]["lr"] = 0.2
    assert settings_of(optimizer) == before
    optimizer.param_groups[0]["betas"] = (0.8, 0.9)
    assert settings_of(optimizer) != before
