"""Products by `addmm`, whose weight lies the other way round: the same layer as `F.linear`, whatever moves."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import forwardgrad as fg


class Turned(nn.Module):
    """As transformers' GPT-2 writes a linear layer."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(layer.weight.detach().T.clone()), nn.Parameter(layer.bias.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x.view(-1, x.shape[-1]), self.weight).view(*x.shape[:-1], -1)


class Flat(nn.Module):
    """The same by `F.linear`, on as many rows."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = layer.weight, layer.bias

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x.view(-1, x.shape[-1]), self.weight, self.bias).view(*x.shape[:-1], -1)


X = torch.randn(3, 5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(3) % 2


def twins() -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    first, second, last = nn.Linear(4, 6).double(), nn.Linear(6, 5).double(), nn.Linear(5, 2).double()
    made = [
        nn.Sequential(kind(copy.deepcopy(first)), nn.Tanh(), kind(copy.deepcopy(second)), copy.deepcopy(last)) for kind in (Turned, Flat)
    ]
    return made[0], made[1]


def loss(model: nn.Module) -> Tensor:
    return F.cross_entropy(model(X).mean(1), LABELS)


ESTIMATORS: dict[str, Callable[[], fg.Estimator]] = {
    "dense": fg.ForwardGradient,
    "low rank": lambda: fg.ForwardGradient(perturb=fg.LowRank(2), tangents=3),
    "low rank, control variate": lambda: fg.ForwardGradient(perturb=fg.LowRank(1), control_variate=0.5),
    "informed": lambda: fg.ForwardGradient(perturb=fg.Informed(1)),
    "per example": lambda: fg.ForwardGradient(perturb=fg.PerExample(), tangents=2),
    "activity": lambda: fg.ForwardGradient(perturb=fg.Activity()),
    "feedback": fg.LearnedFeedback,
    "local": lambda: fg.LocalLosses(feedback=True),
    "zeroth order": lambda: fg.ZerothOrder(perturb=fg.LowRank(), epsilon=1e-5),
}


@pytest.mark.parametrize(
    ("name", "plain"), [(name, plain) for name in ESTIMATORS for plain in (False, True) if not plain or "zeroth" not in name]
)
def test_the_estimate_is_that_of_the_linear_layer(name: str, plain: bool) -> None:
    """Two steps with the same directions; those of whole weights lie as the weights do, and are compared with the derivative alone."""
    found = []
    for model in twins():
        generator, state = torch.Generator().manual_seed(1), dict[str, Tensor]()
        for _ in range(2):
            model.zero_grad()
            with fg.plainly() if plain else nullcontext():
                record = fg.estimate_grad_(loss, model, ESTIMATORS[name](), generator=generator, state=state)
        found.append((record, model))
    (record, turned), (other, flat) = found
    if name == "dense":
        exact, _ = twins()
        loss(exact).backward()
        product = sum((p.grad * q.grad).sum() for p, q in zip(exact.parameters(), turned.parameters(), strict=True))
        torch.testing.assert_close(product, record.derivatives[0] ** 2, rtol=1e-9, atol=1e-12)
        return
    torch.testing.assert_close(record.derivatives, other.derivatives, rtol=1e-9, atol=1e-12)
    for (key, p), q in zip(turned.named_parameters(), flat.parameters(), strict=True):
        assert p.grad is not None
        assert q.grad is not None
        grad = p.grad.T if p.shape != q.shape or key == "2.weight" else p.grad
        torch.testing.assert_close(grad, q.grad, rtol=1e-6 if name == "zeroth order" else 1e-9, atol=1e-9)


def test_a_step_by_seeds_and_numbers_is_the_step() -> None:
    """The recipe of an estimate knows which way the weight lies."""
    turned, _ = twins()
    estimator = fg.ForwardGradient(perturb=fg.LowRank(1))
    fg.estimate_grad_(loss, turned, estimator, generator=torch.Generator().manual_seed(1))
    objective = fg.Objective(loss, turned)
    with torch.no_grad():
        _, recipe = estimator.recipe(objective, torch.Generator().manual_seed(1), {})
        again = {name: torch.zeros_like(p) for name, p in objective.parameters.items()}
        for name, part in recipe.parts(objective.parameters):
            again[name] += part if isinstance(part, Tensor) else part.dense()
    for name, p in objective.parameters.items():
        torch.testing.assert_close(again[name], p.grad, rtol=1e-12, atol=1e-14)


@pytest.mark.filterwarnings("ignore:derivatives of Sequential under this loss are made by torch's own forward mode")
@pytest.mark.parametrize("call", [{"beta": 0.5}, {"alpha": 2.0}])
def test_a_product_with_factors_moves_as_a_whole(call: dict[str, float]) -> None:
    turned, _ = twins()
    layer = turned[0]  # type: ignore[index]

    def scaled(model: nn.Module) -> Tensor:
        return torch.addmm(layer.bias, X[0], layer.weight, **call).square().sum()

    scaled(turned).backward()
    exact = {name: p.grad.clone() for name, p in turned.named_parameters() if p.grad is not None}
    turned.zero_grad()
    record = fg.estimate_grad_(scaled, turned, fg.ForwardGradient(perturb=fg.LowRank(1)), generator=torch.Generator().manual_seed(1))
    product = sum((exact[name] * p.grad).sum() for name, p in turned.named_parameters() if name in exact)
    torch.testing.assert_close(product, record.derivatives[0] ** 2, rtol=1e-9, atol=1e-12)
