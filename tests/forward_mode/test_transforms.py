"""Transforms of torch.func inside a loss: every estimator sees what goes through them, or moves it before they begin."""

from __future__ import annotations

import contextlib

import pytest
import torch
import torch.nn.functional as F
from tests.support.cases import GIVEN_UP, Loss, rows, seeded
from tests.support.units import summed_over_units
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, vmap

import forwardgrad as fg

X, Y = rows(6, 4), rows(6, 1).tanh()
pytestmark = GIVEN_UP  # the plain way alone knows a tensor inside a transform
WARNING = r"inside torch\.func\.grad, vmap or jvp: they move as whole weights"
IGNORED = "ignore:the loss uses"


def network() -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 1)).double()


def slope_penalty(m: nn.Module) -> Tensor:
    return F.mse_loss(m(X), Y) + vmap(grad(lambda x: m(x).sum()))(X).square().sum()


def mapped(m: nn.Module) -> Tensor:
    return F.mse_loss(vmap(m)(X), Y)


def along_inputs(m: nn.Module) -> Tensor:
    return F.mse_loss(m(X), Y) + jvp(m, (X,), (torch.ones_like(X),))[1].square().mean()


def gradient_penalty(m: nn.Module) -> Tensor:
    def one(parameters: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return F.mse_loss(functional_call(m, parameters, (x[None],)), y[None])

    each = vmap(grad(one), (None, 0, 0))(dict(m.named_parameters()), X, Y)
    return F.mse_loss(m(X), Y) + sum(g.square().sum() for g in each.values())


def head_alone(m: nn.Module) -> Tensor:
    h = m[2](m[1](m[0](X)))
    return vmap(lambda a, y: F.mse_loss(m[4](m[3](a)), y))(h, Y).mean()


def between_layers(m: nn.Module) -> Tensor:
    """What a layer passes on goes into a transform; the parameters do not."""
    slope = vmap(grad(lambda a: a.relu().square().sum()))(m[0](X))
    return F.mse_loss(m[4](m[2](slope)), Y)


def along_activities(m: nn.Module) -> Tensor:
    h = m[0](X)
    return F.mse_loss(m[4](jvp(torch.tanh, (h,), (m[2](h),))[1]), Y)


def without_the_model(m: nn.Module) -> Tensor:
    mask = vmap(lambda i: vmap(lambda j: (i > j).double())(torch.arange(4)))(torch.arange(6))
    return F.mse_loss(m(X * mask), Y)


WHOLE = {f.__name__: f for f in (slope_penalty, mapped, along_inputs, gradient_penalty)}
"""Losses that use every parameter inside."""
PART = {f.__name__: f for f in (head_alone, between_layers, along_activities, without_the_model)}
PERTURBATIONS = [kind() for kind in fg.PERTURBATIONS if kind().unbiased]


def gradient(loss: Loss, model: nn.Module, method: fg.Estimator) -> dict[str, Tensor]:
    model.zero_grad()
    fg.estimate_grad_(loss, model, method, generator=seeded(1), state={})
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def dot(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    return sum(float((a[name] * b[name]).sum()) for name in b)


@pytest.mark.parametrize("plain", [False, True], ids=["explicit", "plain"])
@pytest.mark.parametrize("perturb", [fg.LowRank(), fg.PerExample(), fg.Activity(), fg.Cheapest()], ids=lambda p: p.name)
@pytest.mark.parametrize("loss", WHOLE.values(), ids=WHOLE.keys())
def test_what_a_transform_uses_moves_before_it_begins(
    loss: Loss, perturb: fg.Perturbation, plain: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Along directions that move one number each, estimates add up to the gradient; all of the model is used inside, and moves whole."""
    model, exact = network(), gradient(loss, network(), fg.Backprop())
    with fg.plainly() if plain else contextlib.nullcontext(), pytest.warns(UserWarning, match=WARNING) as warned:
        found = summed_over_units(model, loss, perturb, monkeypatch)
    assert len([w for w in warned if "inside torch.func" in str(w.message)]) == 1  # once, for all layers together
    for name, g in exact.items():
        torch.testing.assert_close(found[name], g, rtol=1e-9, atol=1e-12)


@pytest.mark.some(3)
@pytest.mark.product
@pytest.mark.filterwarnings(IGNORED)
@pytest.mark.parametrize("perturb", PERTURBATIONS, ids=lambda p: p.name)
@pytest.mark.parametrize("loss", PART.values(), ids=PART.keys())
def test_layers_outside_of_a_transform_keep_their_rules(loss: Loss, perturb: fg.Perturbation) -> None:
    """E[ĝ·∇f] = ‖∇f‖² over 400 directions: a right estimator fails at 4 standard errors once in 16,000 runs, and the seed is fixed."""
    model, exact, generator = network(), gradient(loss, network(), fg.Backprop()), seeded(5)
    lengths = []
    for _ in range(100):
        model.zero_grad()
        fg.estimate_grad_(loss, model, fg.ForwardGradient(tangents=4, perturb=perturb, law=fg.Rademacher()), generator=generator)
        lengths.append(dot({name: p.grad for name, p in model.named_parameters()}, exact) / dot(exact, exact))
    found = torch.tensor(lengths)
    assert abs(float(found.mean()) - 1) < 4 * float(found.std()) / 10
    assert float(found.std()) > 0


@pytest.mark.parametrize("loss", [*WHOLE.values(), *PART.values()], ids=[*WHOLE, *PART])
def test_differences_of_the_loss_see_it_too(loss: Loss) -> None:
    model, exact = network(), gradient(loss, network(), fg.Backprop())
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for seed in range(3):
        model.zero_grad()
        record = fg.estimate_grad_(loss, model, fg.ZerothOrder(epsilon=1e-5), generator=seeded(seed))
        found = {name: p.grad for name, p in model.named_parameters()}
        assert dot(found, exact) == pytest.approx(float(record.derivatives) ** 2, rel=1e-5)
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())


def test_a_padding_row_stays_still_where_all_parameters_are_exchanged_at_once() -> None:
    model = nn.Embedding(5, 3, padding_idx=1).double()
    row = model.weight[1].detach().clone()
    seen = []

    def loss(m: nn.Embedding) -> Tensor:
        seen.append(m.weight[1].detach().clone())
        return vmap(lambda i: m(i).sin().sum())(torch.tensor([0, 1, 2])).sum()

    fg.estimate_grad_(loss, model, fg.ZerothOrder(), generator=seeded())
    assert torch.equal(seen[-1], row)


def block_inside(m: nn.Module) -> Tensor:
    return F.cross_entropy(m[4](vmap(nn.Sequential(m[2], m[3]))(m[1](m[0](X)))), torch.arange(6) % 3)


def classifier() -> nn.Sequential:
    model = network()
    model[4] = nn.Linear(5, 3).double()
    return model


@pytest.mark.filterwarnings(IGNORED)
def test_learned_feedback_trains_what_a_transform_uses() -> None:
    assert (
        gradient(block_inside, classifier(), fg.LearnedFeedback(use="control-variate")).keys() == dict(network().named_parameters()).keys()
    )


@pytest.mark.parametrize("feedback", [False, True])
def test_local_losses_refuse_what_would_be_seen_by_the_loss_of_another_block(feedback: bool) -> None:
    with pytest.raises(RuntimeError, match=r"the loss uses 2\.bias, 2\.weight inside torch\.func\.grad, vmap or jvp: use ForwardGradient"):
        gradient(block_inside, classifier(), fg.LocalLosses(feedback=feedback))


@pytest.mark.filterwarnings(IGNORED)
def test_an_ensemble_says_what_to_do_instead() -> None:
    ensemble = fg.Ensemble([network(), network()])
    with pytest.raises(
        RuntimeError, match=r"inside torch\.func\.grad, vmap or jvp: use ForwardGradient\(perturb=Dense\(\)\) or ZerothOrder\(\)"
    ):
        fg.estimate_grads_(
            lambda m, x: vmap(m)(x).square().mean(),
            ensemble,
            (X.expand(2, 6, 4),),
            fg.ForwardGradient(perturb=fg.LowRank(1)),
            generators=[seeded(0), seeded(1)],
        )
