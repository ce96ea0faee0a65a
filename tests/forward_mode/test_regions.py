"""Parts of a loss under `torch.no_grad()` are constant, as they are for backpropagation in float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from tests.support.cases import seeded, trained
from torch import Tensor, nn

import forwardgrad as fg

X = torch.randn(6, 4, generator=seeded(1), dtype=torch.float64)
LABELS = torch.arange(6) % 3


def model_of() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 3)).double()


@torch.no_grad()
def target(m: nn.Module) -> Tensor:
    return 2 * m(X)


def with_target(m: nn.Module) -> Tensor:
    with torch.no_grad():
        other = 2 * m(X)
    return (m(X) - other).square().mean()


def with_decorated_target(m: nn.Module) -> Tensor:
    return (m(X) - target(m)).square().mean()


def switched(m: nn.Module) -> Tensor:
    torch.set_grad_enabled(False)
    other = 2 * m(X)
    torch.set_grad_enabled(True)
    return (m(X) - other).square().mean()


def weighted(m: nn.Module) -> Tensor:
    scores = m(X)
    with torch.no_grad():
        weights = scores.softmax(1).amax(1)
    return (F.cross_entropy(scores, LABELS, reduction="none") * weights).mean()


def viewed(m: nn.Module) -> Tensor:
    """A view that is made there is constant; what a call gives back as it was given is not."""
    assert isinstance(m, nn.Sequential)
    hidden = m[0](X)
    with torch.no_grad():
        flat, column, same = hidden.view(-1), hidden[:, 0], hidden.contiguous()
    return m[2](m[1](hidden)).square().mean() + (2 * flat).mean() + (column * hidden[:, 1]).mean() + 0.3 * same.square().mean()


def enabled_again(m: nn.Module) -> Tensor:
    assert isinstance(m, nn.Sequential)
    with torch.no_grad():
        hidden = m[1](m[0](X))
        with torch.enable_grad():
            scores = m[2](hidden)
        hidden = hidden * 3
    return scores.square().mean() + F.cross_entropy(m(X), LABELS) + hidden.mean()


def after_an_error(m: nn.Module) -> Tensor:
    try:
        with torch.no_grad():
            raise KeyError
    except KeyError:
        return F.cross_entropy(m(X), LABELS)


LOSSES = [with_target, with_decorated_target, switched, weighted, viewed, enabled_again, after_an_error]
EXACT = [fg.ForwardGradient(tangents=27, law=fg.Orthogonal()), fg.ForwardGradient(tangents=27, law=fg.Orthogonal(), chunk_size=1)]
MEAN = [
    *(fg.ForwardGradient(tangents=4000, perturb=perturb) for perturb in (fg.LowRank(1), fg.PerExample(), fg.Activity())),
    fg.LearnedFeedback(use="control-variate", tangents=4000),
]


def twice(loss: Callable[[nn.Module], Tensor], method: fg.Estimator) -> tuple[Tensor, Tensor]:
    """The second estimate on a path, by what was learned of it, and backpropagation's gradient."""
    model = model_of()
    exact = torch.autograd.grad(loss(model), list(trained(model).values()))
    for _ in range(2):
        model.zero_grad()
        fg.estimate_grad_(loss, model, method, generator=seeded(3), state={})
    found = [p.grad for p in model.parameters() if p.grad is not None]
    return torch.cat([g.flatten() for g in found]), torch.cat([g.flatten() for g in exact])


@pytest.mark.parametrize("method", EXACT, ids=["together", "one by one"])
@pytest.mark.parametrize("loss", LOSSES)
def test_directions_at_right_angles_give_backpropagations_gradient(loss: Callable[[nn.Module], Tensor], method: fg.Estimator) -> None:
    found, exact = twice(loss, method)
    torch.testing.assert_close(found, exact, rtol=1e-9, atol=1e-12)


@pytest.mark.some(3)
@pytest.mark.product
@pytest.mark.filterwarnings("ignore:.*a part of the loss does not tell examples apart", "ignore:.*torch's own forward mode from now on")
@pytest.mark.parametrize("method", MEAN, ids=repr)
@pytest.mark.parametrize("loss", LOSSES)
def test_the_mean_of_many_directions_is_backpropagations_gradient(loss: Callable[[nn.Module], Tensor], method: fg.Estimator) -> None:
    """27 weights and 4,000 directions: the noise is about √(28/4,000) = 0.08 of the gradient, or √6 times that where the examples' scores
    are noisy. A part that moves after all puts it 0.5 or more away."""
    found, exact = twice(loss, method)
    assert float((found - exact).norm() / exact.norm()) < 0.35


def test_inference_mode_is_told() -> None:
    def loss(m: nn.Module) -> Tensor:
        with torch.inference_mode():
            other = 2 * m(X)
        return (m(X) - other.clone()).square().mean()

    with pytest.raises(NotImplementedError, match=r"uses torch\.inference_mode\(\).*use torch\.no_grad\(\) there"):
        fg.estimate_grad_(loss, model_of(), fg.ForwardGradient(), generator=seeded())


GRAPHS = [pytest.param(fg.ForwardGradient(2, perturb=fg.LowRank()), id="low rank")]
GRAPHS += [
    pytest.param(method, id=method.name, marks=pytest.mark.full)
    for method in (fg.ForwardGradient(2), fg.ForwardGradient(perturb=fg.Activity()), fg.LearnedFeedback())
]


@pytest.mark.full
@pytest.mark.parametrize("method", GRAPHS)
def test_a_graph_has_the_parts_that_stand_still(method: fg.Estimator) -> None:
    found = []
    for engine in ("eager", "compile"):
        model, state = model_of(), {} if method.stateful else None
        step = fg.TrainingStep(
            lambda m, x: with_target(m),
            model,
            torch.optim.SGD(model.parameters(), 0.1),
            method,
            generator=seeded(2),
            state=state,
            engine=engine,
        )
        for _ in range(3):
            step(X)
        assert step.fallback == ""
        found.append(trained(model))
    torch.testing.assert_close(found[1], found[0], rtol=1e-12, atol=1e-12)
