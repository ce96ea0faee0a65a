"""Losses that write to what is trained, or keep what they computed of it: against backpropagation in float64.

A weight of one number, and directions of ±1: the estimate is then the derivative itself.
"""

from __future__ import annotations

import pytest
import torch
from tests.support.cases import seeded
from torch import Tensor, nn
from torch.nn.utils import parametrize

import forwardgrad as fg

X = torch.tensor([[0.5], [-1.0], [2.0]], dtype=torch.float64)
LAW = fg.Rademacher()
METHODS = [
    fg.ZerothOrder(1e-5, law=LAW),
    fg.ZerothOrder(1e-5, tangents=2, law=LAW, chunk_size=2),
    fg.ZerothOrder(1e-5, law=LAW, perturb=fg.LowRank()),
    fg.ZerothOrder(1e-5, tangents=2, law=LAW, chunk_size=2, perturb=fg.LowRank()),
    fg.ForwardGradient(law=LAW),
    fg.ForwardGradient(tangents=2, law=LAW),
    fg.ForwardGradient(law=LAW, perturb=fg.LowRank()),
]


def loss(model: nn.Module) -> Tensor:
    return (model(X) - 1).square().mean()


class Square(nn.Module):
    def forward(self, w: Tensor) -> Tensor:
        return w.square()


def squared() -> tuple[nn.Module, nn.Parameter]:
    model = nn.Linear(1, 1, bias=False, dtype=torch.float64)
    parametrize.register_parametrization(model, "weight", Square())
    (weight,) = model.parameters()
    nn.init.constant_(weight, 0.7)
    return model, weight


@pytest.mark.parametrize("method", METHODS, ids=repr)
def test_a_cache_around_a_step_keeps_no_weight_of_another_evaluation(method: fg.Estimator) -> None:
    model, weight = squared()
    (truth,) = torch.autograd.grad(loss(model), [weight])
    with parametrize.cached():
        before = model.weight
        found = fg.estimate_grad_(loss, model, method, generator=seeded())
        assert model.weight is before
    torch.testing.assert_close(weight.grad, truth, rtol=1e-6, atol=0)
    torch.testing.assert_close(found.loss, loss(model).detach(), rtol=1e-6, atol=0)
