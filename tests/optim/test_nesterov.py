"""Look-ahead Nesterov against its formula written out in float64, and against torch's re-parametrised form."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

import forwardgrad as fg

A = torch.tensor([[3.0, 0.5], [0.5, 1.0]], dtype=torch.float64)


def quadratic(t: Tensor) -> Tensor:
    return 0.5 * t @ A @ t - t.sum()


def rosenbrock(t: Tensor) -> Tensor:
    return (1 - t[0]) ** 2 + 100 * (t[1] - t[0] ** 2) ** 2


PROBLEMS = [(quadratic, 0.1), (rosenbrock, 5e-4)]


def start() -> Tensor:
    return torch.tensor([-1.2, 1.0], dtype=torch.float64)


def reference(f: Callable[[Tensor], Tensor], rates: list[float], momentum: float) -> Iterator[tuple[Tensor, Tensor]]:
    """θ and v of v ← μv − γ g(θ + μv), θ ← θ + v."""
    theta, v = start(), torch.zeros(2, dtype=torch.float64)
    for rate in rates:
        ahead = (theta + momentum * v).requires_grad_()
        (g,) = torch.autograd.grad(f(ahead), ahead)
        v = momentum * v - rate * g
        theta = theta + v
        yield theta, v


def closure(optimizer: torch.optim.Optimizer, f: Callable[[Tensor], Tensor], t: Tensor) -> Callable[[], Tensor]:
    def evaluate() -> Tensor:
        optimizer.zero_grad()
        loss = f(t)
        loss.backward()
        return loss

    return evaluate


@pytest.mark.parametrize(("f", "lr"), PROBLEMS)
@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("decay", [1.0, 0.9])
def test_follows_the_formula(f: Callable[[Tensor], Tensor], lr: float, momentum: float, decay: float) -> None:
    t = start().requires_grad_()
    optimizer = fg.Nesterov([t], lr, momentum)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, decay)
    for theta, v in reference(f, [lr * decay**step for step in range(20)], momentum):
        optimizer.step(closure(optimizer, f, t))
        scheduler.step()
        torch.testing.assert_close(t.detach(), theta, rtol=1e-11, atol=1e-13)
        torch.testing.assert_close(optimizer.state[t]["velocity"], v, rtol=1e-11, atol=1e-13)


def gaps_to_torch(f: Callable[[Tensor], Tensor], lr: float, decay: float) -> list[float]:
    """Along 20 steps of momentum 0.9: how far torch's parameters are from our θ + μv, relative to the path's length."""
    ours, theirs = start().requires_grad_(), start().requires_grad_()
    ahead, sgd = fg.Nesterov([ours], lr, 0.9), torch.optim.SGD([theirs], lr, momentum=0.9, nesterov=True)
    schedulers = [torch.optim.lr_scheduler.ExponentialLR(optimizer, decay) for optimizer in (ahead, sgd)]
    gaps = []
    for _ in range(20):
        ahead.step(closure(ahead, f, ours))
        sgd.step(closure(sgd, f, theirs))
        for scheduler in schedulers:
            scheduler.step()
        seen = ours.detach() + 0.9 * ahead.state[ours]["velocity"]
        gaps.append(float((theirs.detach() - seen).norm() / (seen - start()).norm()))
    return gaps


@pytest.mark.parametrize(("f", "lr"), PROBLEMS)
def test_walks_the_path_of_torch_while_the_rate_is_constant_and_parts_from_it_once_it_changes(
    f: Callable[[Tensor], Tensor], lr: float
) -> None:
    assert max(gaps_to_torch(f, lr, decay=1.0)) < 1e-11
    assert max(gaps_to_torch(f, lr, decay=0.8)) > 1e-2


def test_closure_sees_the_look_ahead_point_with_gradients_enabled_and_its_value_is_returned() -> None:
    t = start().requires_grad_()
    optimizer = fg.Nesterov([t], 0.1, 0.5)
    optimizer.step(closure(optimizer, quadratic, t))
    expected = t.detach() + 0.5 * optimizer.state[t]["velocity"]
    seen = []

    def evaluate() -> str:
        assert torch.is_grad_enabled()
        seen.append(t.detach().clone())
        return "loss"

    with torch.no_grad():
        assert optimizer.step(evaluate) == "loss"
    assert torch.equal(seen[0], expected)


def test_a_closure_that_raises_leaves_the_parameters_at_theta() -> None:
    t = start().requires_grad_()
    optimizer = fg.Nesterov([t], 0.1, 0.5)
    for _ in range(3):
        optimizer.step(closure(optimizer, quadratic, t))
    theta, velocity = t.detach().clone(), optimizer.state[t]["velocity"].clone()

    def fail() -> None:
        assert not torch.equal(t, theta)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        optimizer.step(fail)
    torch.testing.assert_close(t.detach(), theta, rtol=1e-15, atol=1e-15)
    assert torch.equal(optimizer.state[t]["velocity"], velocity)


def test_needs_a_closure() -> None:
    with pytest.raises(ValueError, match="needs a closure"):
        fg.Nesterov([start().requires_grad_()], 0.1, 0.5).step()


@pytest.mark.parametrize(
    ("lr", "momentum", "what"),
    [(0, 0.5, "lr"), (-1.0, 0.5, "lr"), (math.nan, 0.5, "lr"), (0.1, 1.0, "momentum"), (0.1, -0.1, "momentum"), (1, math.nan, "momentum")],
)
def test_limits(lr: float, momentum: float, what: str) -> None:
    with pytest.raises(ValueError, match=f"{what} must"):
        fg.Nesterov([start().requires_grad_()], lr, momentum)


def test_state_dict_continues_to_the_same_bits() -> None:
    t = start().requires_grad_()
    optimizer = fg.Nesterov([t], 5e-4, 0.9)
    for _ in range(5):
        optimizer.step(closure(optimizer, rosenbrock, t))
    u = t.detach().clone().requires_grad_()
    resumed = fg.Nesterov([u], 1.0, 0.0)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for _ in range(5):
        optimizer.step(closure(optimizer, rosenbrock, t))
        resumed.step(closure(resumed, rosenbrock, u))
    assert torch.equal(t, u)
    assert torch.equal(optimizer.state[t]["velocity"], resumed.state[u]["velocity"])


def test_groups_have_their_own_rate_and_momentum() -> None:
    def f(t: Tensor) -> Tensor:
        return (t**2).sum()

    pair = [start().requires_grad_() for _ in range(2)]
    alone = [start().requires_grad_() for _ in range(2)]
    options = [{"lr": 0.1, "momentum": 0.9}, {"lr": 0.02, "momentum": 0.3}]
    together = fg.Nesterov([{"params": [t], **option} for t, option in zip(pair, options, strict=True)], 1.0, 0.0)
    apart = [fg.Nesterov([t], **option) for t, option in zip(alone, options, strict=True)]

    def evaluate() -> None:
        together.zero_grad()
        (f(pair[0]) + f(pair[1])).backward()

    for _ in range(10):
        together.step(evaluate)
        for t, optimizer in zip(alone, apart, strict=True):
            optimizer.step(closure(optimizer, f, t))
    assert all(torch.equal(a, b) for a, b in zip(pair, alone, strict=True))


def test_a_parameter_without_gradient_coasts_as_with_gradient_zero_and_never_moves_before_its_first() -> None:
    has_gradient = [False, True, True, False, False, True]
    coasting, zeros = start().requires_grad_(), start().requires_grad_()
    optimizers = [fg.Nesterov([coasting], 0.1, 0.9), fg.Nesterov([zeros], 0.1, 0.9)]
    for index, has in enumerate(has_gradient):

        def evaluate(has: bool = has) -> None:
            for t, otherwise in ((coasting, None), (zeros, torch.zeros(2, dtype=torch.float64))):
                t.grad = torch.autograd.grad(quadratic(t), t)[0] if has else otherwise

        for optimizer in optimizers:
            optimizer.step(evaluate)
        torch.testing.assert_close(coasting, zeros, rtol=1e-14, atol=1e-14)
        assert torch.equal(coasting.detach(), start()) == (index == 0)


def test_works_with_forward_gradients_of_a_model() -> None:
    torch.manual_seed(0)
    model, x = nn.Linear(3, 1).double(), torch.randn(20, 3, dtype=torch.float64)
    optimizer = fg.Nesterov(model.parameters(), 0.02, 0.5)
    generator = torch.Generator().manual_seed(0)

    def evaluate() -> Tensor:
        optimizer.zero_grad()
        return fg.estimate_grad_(lambda m: (m(x) - x.sum(dim=1, keepdim=True)).square().mean(), model, generator=generator).loss

    losses = [float(optimizer.step(evaluate)) for _ in range(150)]
    assert losses[-1] < 0.1 * losses[0]
