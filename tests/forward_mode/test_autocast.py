"""Mixed precision: layers compute in 8 or 11 bits, losses and directional derivatives in float32."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from tests.support.cases import rows, seeded, trained
from torch import Tensor, nn

import forwardgrad as fg

BITS = {torch.bfloat16: 0.1, torch.float16: 0.01}  # how far d may be from the exact one, in units of ‖∇f‖: about 25 roundings
LOSSES: dict[str, Callable[[Tensor], Tensor]] = {
    "cross-entropy": lambda out: F.cross_entropy(out, torch.arange(len(out)) % 5),
    "mean": lambda out: (out - 0.5).square().mean(),  # no function that autocast computes in float32
    "an example": lambda out: (out - 0.5).square().sum(1),
}
X = rows(32, 20, dtype=torch.float32)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 5))


def halved(loss: Callable[[Tensor], Tensor], dtype: torch.dtype) -> Callable[[nn.Module], Tensor]:
    def under_autocast(model: nn.Module) -> Tensor:
        with torch.autocast("cpu", dtype):
            return loss(model(X))

    return under_autocast


@pytest.mark.parametrize("dtype", BITS)
@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES.keys())
def test_the_derivative_along_whole_weights_is_float32_and_near_that_of_float64(
    loss: Callable[[Tensor], Tensor], dtype: torch.dtype
) -> None:
    model, exact = network(), network().double()
    gradient = dict(zip(trained(exact), torch.autograd.grad(loss(exact(X.double())).mean(), list(exact.parameters())), strict=True))
    norm = float(torch.cat([g.flatten() for g in gradient.values()]).norm())
    for seed in range(10):
        v = fg.Gaussian().draw(trained(model), 1, seeded(seed))
        d = sum(float((gradient[name] * part[0].double()).sum()) for name, part in v.items())
        record = fg.estimate_grad_(halved(loss, dtype), model, fg.ForwardGradient(), generator=seeded(seed))
        assert record.derivatives.dtype == record.loss.dtype == torch.float32
        assert abs(float(record.derivatives) - d) < BITS[dtype] * norm


@pytest.mark.product
@pytest.mark.parametrize("dtype", BITS)
@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES.keys())
@pytest.mark.parametrize("perturb", [fg.LowRank(2), fg.PerExample(), fg.Activity(), fg.Cheapest()], ids=lambda p: p.name)
def test_other_derivatives_are_float32_and_near_those_without_autocast(
    perturb: fg.Perturbation, loss: Callable[[Tensor], Tensor], dtype: torch.dtype
) -> None:
    model = network()
    norm = float(torch.cat([g.flatten() for g in torch.autograd.grad(loss(model(X)).mean(), list(model.parameters()))]).norm())
    method = fg.ForwardGradient(tangents=2, perturb=perturb)
    for seed in range(5):
        plain = fg.estimate_grad_(lambda m: loss(m(X)), copy.deepcopy(model), method, generator=seeded(seed))
        record = fg.estimate_grad_(halved(loss, dtype), model, method, generator=seeded(seed))
        assert record.derivatives.dtype == record.loss.dtype == torch.float32
        assert float((record.derivatives - plain.derivatives).abs().max()) < BITS[dtype] * norm
        assert {p.grad.dtype for p in model.parameters() if p.grad is not None} == {torch.float32}


@pytest.mark.parametrize("method", [fg.Backprop(), fg.ZerothOrder(epsilon=0.01)], ids=lambda m: m.name)
def test_the_loss_that_others_see_is_float32(method: fg.Estimator) -> None:
    record = fg.estimate_grad_(halved(LOSSES["mean"], torch.bfloat16), network(), method, generator=seeded())
    assert record.loss.dtype == torch.float32
    assert record.derivatives.dtype == torch.float32


def test_parameters_in_half_precision_keep_their_own() -> None:
    model = network().bfloat16()
    record = fg.estimate_grad_(lambda m: LOSSES["mean"](m(X.bfloat16())), model, generator=seeded())
    assert record.loss.dtype == record.derivatives.dtype == torch.bfloat16


@pytest.mark.parametrize("perturb", [fg.Dense(), fg.LowRank(1)], ids=lambda p: p.name)
def test_rounding_is_noise_and_no_change_of_scale(perturb: fg.Perturbation) -> None:
    """The slope of d on ∇f·v over 200 directions, 1 without bias: 4 standard errors are passed by chance once in 16,000 runs."""
    model = network()
    exact = torch.autograd.grad(LOSSES["cross-entropy"](model(X)), list(model.parameters()))
    found, along = [], []
    for seed in range(200):
        model.zero_grad()
        method = fg.ForwardGradient(perturb=perturb)
        d = float(fg.estimate_grad_(halved(LOSSES["cross-entropy"], torch.bfloat16), model, method, generator=seeded(seed)).derivatives)
        found.append(d)
        along.append(sum(float((p.grad * g).sum()) for p, g in zip(model.parameters(), exact, strict=True)) / d)
    d, v = torch.tensor(found), torch.tensor(along)
    slope = (d * v).sum() / v.square().sum()
    error = (d - slope * v).std() / v.norm()
    assert error < 0.005
    assert abs(slope - 1) < 4 * error
