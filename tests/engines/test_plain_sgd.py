"""What plain SGD is has one answer, and every engine moves the parameters by it as `torch.optim.SGD` itself does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.engines.test_engines import RANK_1, X, Y, compare, groups, loss, network, small, uncompiled, whole  # noqa: F401  # a fixture
from tests.support.cases import seeded
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

import forwardgrad as fg
from forwardgrad.engines.plain_sgd import descend, is_plain_sgd

Optimizers = Callable[[nn.Module], torch.optim.Optimizer]


def with_(**settings: Any) -> Optimizers:
    def make(model: nn.Module) -> torch.optim.Optimizer:
        own = {name: value.clone() if isinstance(value, Tensor) else value for name, value in settings.items()}  # schedules write to them
        return torch.optim.SGD(model.parameters(), **{"lr": 0.05, **own})

    return make


class Subclass(torch.optim.SGD):
    """An optimizer of which nobody knows what its step does."""


def one_group_of_two(**settings: Any) -> Optimizers:
    def make(model: nn.Module) -> torch.optim.Optimizer:
        first, *rest = model.parameters()
        return torch.optim.SGD([{"params": [first], "lr": 0.2, **settings}, {"params": rest}], lr=0.05)

    return make


def hooked(kind: str) -> Optimizers:
    def make(model: nn.Module) -> torch.optim.Optimizer:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        getattr(optimizer, f"register_step_{kind}_hook")(lambda *_: None)
        return optimizer

    return make


PLAIN: dict[str, Optimizers] = {
    "alone": with_(),
    "whole number": with_(lr=1),
    "weight decay": with_(weight_decay=0.1),
    "tensor": with_(lr=torch.tensor(0.05), foreach=False),
    "tensor with a dimension": with_(lr=torch.tensor([0.05]), foreach=False),
    "tensor and weight decay": with_(lr=torch.tensor(0.05), weight_decay=0.1, foreach=False),
    "decay as a tensor": with_(weight_decay=torch.tensor(0.1), foreach=False),
    "foreach": with_(foreach=True),
    "no foreach": with_(foreach=False),
    "fused": with_(fused=True),
    "fused and weight decay": with_(fused=True, weight_decay=0.1),
    "two groups": groups,
    "decay in one group": one_group_of_two(weight_decay=0.1),
}
OTHER: dict[str, Optimizers] = {
    "momentum": with_(momentum=0.9),
    "nesterov": with_(momentum=0.9, nesterov=True),
    "maximize": with_(maximize=True),
    "differentiable": with_(differentiable=True),
    "momentum in one group": one_group_of_two(momentum=0.9),
    "hook before": hooked("pre"),
    "hook behind": hooked("post"),
    "subclass": lambda model: Subclass(model.parameters(), lr=0.05),
    "another": lambda model: torch.optim.Adam(model.parameters(), lr=0.05),
    "looking ahead": lambda model: fg.Nesterov(model.parameters(), 0.05, 0.9),
}


@pytest.mark.parametrize("optimizer", PLAIN.values(), ids=PLAIN.keys())
def test_these_are_plain(optimizer: Optimizers) -> None:
    assert is_plain_sgd(optimizer(small()))


@pytest.mark.parametrize("optimizer", OTHER.values(), ids=OTHER.keys())
def test_these_are_not(optimizer: Optimizers) -> None:
    assert not is_plain_sgd(optimizer(small()))


@pytest.mark.parametrize("register", [register_optimizer_step_pre_hook, register_optimizer_step_post_hook], ids=["before", "behind"])
def test_no_optimizer_is_plain_while_all_have_a_hook(register: Any) -> None:
    handle = register(lambda *_: None)
    try:
        assert not is_plain_sgd(with_()(small()))
    finally:
        handle.remove()
    assert is_plain_sgd(with_()(small()))


def test_the_answer_is_asked_for_at_every_step() -> None:
    optimizer = with_()(small())
    optimizer.param_groups[0]["momentum"] = 0.9
    assert not is_plain_sgd(optimizer)


@pytest.mark.parametrize("method", [fg.Backprop(), RANK_1], ids=["backprop", "rank 1"])
@pytest.mark.parametrize("optimizer", PLAIN.values(), ids=PLAIN.keys())
def test_an_eager_step_is_that_of_torch(optimizer: Optimizers, method: fg.Estimator) -> None:
    found = []
    for by_torch in (True, False):
        model, generator = network(), seeded(3)
        torch.manual_seed(7)
        optim = optimizer(model)
        step = fg.TrainingStep(loss, model, optim, method, generator=generator)
        schedule = torch.optim.lr_scheduler.ExponentialLR(optim, 0.5)
        for _ in range(3):
            if by_torch:
                optim.zero_grad()
                fg.estimate_grad_(lambda model: loss(model, X, Y), model, method, generator=generator)
                optim.step()
            else:
                step(X, Y)
                assert all(p.grad is None for p in model.parameters())
            schedule.step()
        found.append(list(model.parameters()))
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-6)


@pytest.mark.some(5)
@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("optimizer", PLAIN.values(), ids=PLAIN.keys())
def test_a_graph_moves_as_the_eager_step_does_and_leaves_no_gradient_either(optimizer: Optimizers, monkeypatch: pytest.MonkeyPatch) -> None:
    step = compare(network, RANK_1, optimizer, run=whole, graphs=1)
    before = [p.clone() for p in step.model.parameters()]
    monkeypatch.setattr(step.optimizer, "step", None)  # what would move outside
    step(X, Y)
    assert not any(torch.equal(one, p) for one, p in zip(before, step.model.parameters(), strict=True))
    assert all(p.grad is None for p in step.model.parameters())


@pytest.mark.usefixtures("uncompiled")
def test_rates_and_decays_may_change_between_the_steps_of_a_graph() -> None:
    def run(step: fg.TrainingStep) -> list[fg.Estimate]:
        records = []
        for lr, decay in ((0.05, 0.1), (0.02, 0.1), (0.02, 0.3), (0.02, 0.0), (0.05, 0.0), (0.05, 0.1)):
            step.optimizer.param_groups[0].update(lr=lr, weight_decay=decay)
            records.append(step(X, Y))
        return records

    compare(network, RANK_1, with_(), run=run, graphs=2)  # one with decay and one without


@pytest.mark.parametrize("optimizer", ["hook before", "hook behind", "subclass"])
@pytest.mark.parametrize("engine", ["eager", "compile"])
@pytest.mark.usefixtures("uncompiled")
def test_any_other_is_asked_to_step(optimizer: str, engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, asked = network(), []
    step = fg.TrainingStep(loss, model, OTHER[optimizer](model), RANK_1, generator=seeded(3), engine=engine)
    itself = step.optimizer.step
    monkeypatch.setattr(step.optimizer, "step", lambda *args: asked.append(args) or itself(*args))
    for _ in range(3):
        step(X, Y)
    assert len(asked) == 3


def test_a_parameter_of_several_parts_decays_once_and_one_of_none_stays() -> None:
    several, none, foreign = (nn.Parameter(torch.ones(2, dtype=torch.float64)) for _ in range(3))
    optimizer = torch.optim.SGD([several, none], lr=0.1, weight_decay=0.5)
    part: Tensor = torch.ones(2, dtype=torch.float64)
    descend(optimizer, [(several, part), (foreign, part), (several, 2 * part)])
    assert several.tolist() == pytest.approx([1 - 0.05 - 0.1 - 0.2] * 2)
    assert none.tolist() == foreign.tolist() == [1.0, 1.0]
