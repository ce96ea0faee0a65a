"""Weights in bfloat16, float16 and int8: derivatives near those of float64 on the same weights, no copies in float32, and steps that move.

u is the spacing of a precision at 1, 2⁻⁷ for bfloat16 and 2⁻¹⁰ for float16. A derivative goes through some tens of roundings of at most u/2
each, relative to what they round, so it may be off by some u of ‖∇f‖, the size that it has itself: here by 5 u.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.support.cases import rows, seeded, trained
from torch import Tensor, nn

import forwardgrad as fg
from forwardgrad.diagnostics import peak_bytes
from forwardgrad.estimators.moved import spacings

HALF = [torch.bfloat16, torch.float16]
X = rows(32, 20, dtype=torch.float32)


def network(dtype: torch.dtype) -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Linear(20, 48), nn.LayerNorm(48), nn.GELU(), nn.Linear(48, 48), nn.Tanh(), nn.Linear(48, 5)]
    return nn.Sequential(*layers).to(dtype)


def loss(model: nn.Module) -> Tensor:
    """Half precision up to the outputs, and the loss in float32, as one has to write it."""
    x = X.to(next(p.dtype for p in model.parameters() if p.is_floating_point()))
    out = model(x)
    return F.cross_entropy(out if out.dtype == torch.float64 else out.float(), torch.arange(len(X)) % 5)


def exact(model: nn.Module, of: Callable[[nn.Module], Tensor] = loss) -> dict[str, Tensor]:
    """Backpropagation in float64 on the same weights."""
    wide = copy.deepcopy(model).double()
    return dict(zip(trained(wide), torch.autograd.grad(of(wide), list(trained(wide).values())), strict=True))


def error(model: nn.Module, method: fg.Estimator, seed: int, of: Callable[[nn.Module], Tensor] = loss) -> float:
    """How far d is from ∇f·v, in units of ‖∇f‖; v is read off the estimate."""
    model.zero_grad()
    record = fg.estimate_grad_(of, model, method, generator=seeded(seed))
    g, d = exact(model, of), float(record.derivatives)
    assert record.derivatives.dtype == record.loss.dtype == torch.float32
    product = sum(float((g[name] * p.grad.double()).sum()) / d for name, p in trained(model).items() if p.grad is not None)
    return (d - product) / float(torch.cat([part.flatten() for part in g.values()]).norm())


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize(
    "perturb",
    [
        fg.Dense(),
        fg.LowRank(),
        fg.LowRank(4),
        fg.Informed(weighted=False),
        fg.Informed(keep=8, weighted=False),
        fg.SplitWeights(2, fg.LowRank(), part=1),
    ],
    ids=repr,
)
def test_derivatives_are_near_those_of_float64_on_the_same_weights(perturb: fg.Perturbation, dtype: torch.dtype) -> None:
    model, u = network(dtype), torch.finfo(dtype).eps
    errors = torch.tensor([error(model, fg.ForwardGradient(perturb=perturb), seed) for seed in range(6)])
    assert float(errors.abs().max()) < 5 * u
    assert all(p.dtype == dtype and (p.grad is None or p.grad.dtype == dtype) for p in model.parameters())


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_differences_are_near_derivatives_where_the_step_fits_the_weights(dtype: torch.dtype) -> None:
    """ε = 4 spacings of the largest weights: θ ± εv is rounded to half a spacing, an eighth of a step, and so is v; and there is ε²."""
    model = network(dtype)
    model[1].requires_grad_(False)  # gains of 1, eight times as far apart as the other weights
    epsilon = 4 * max(float(spacings(p.detach()).max()) for p in model.parameters() if p.requires_grad)
    errors = torch.tensor([error(model, fg.ZerothOrder(epsilon), seed) for seed in range(6)])
    assert float(errors.abs().max()) < 0.25


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("options", [{}, {"feedback": True}], ids=str)
def test_local_losses_learn_in_half_precision(options: dict[str, Any], dtype: torch.dtype) -> None:
    """The estimates are those of a float32 model with the same weights, to the rounding of activities that are summed over 32 examples."""
    found = []
    for precision in (dtype, torch.float32):
        model, state = network(dtype).to(precision), dict[str, Tensor]()
        for seed in range(3):  # classifiers are zeros at first
            model.zero_grad()
            fg.estimate_grad_(loss, model, fg.LocalLosses(**options), generator=seeded(seed), state=state)
        found.append(torch.cat([p.grad.float().flatten() for p in model.parameters() if p.grad is not None]))
    assert found[0].shape == found[1].shape
    assert found[0].isfinite().all()
    assert F.cosine_similarity(found[0], found[1], dim=0) > 0.9 if options else found[0].any()


class Quantised(nn.Module):
    """A linear layer whose weight is int8, with a scale a row and LoRA beside it. It is made wide a block of rows at a time."""

    def __init__(self, weight: Tensor, rank: int, dtype: torch.dtype) -> None:
        super().__init__()
        scale = weight.abs().amax(1, keepdim=True) / 127
        self.register_buffer("weight", (weight / scale).round().to(torch.int8))
        self.register_buffer("scale", scale.squeeze(1).to(dtype))
        self.down = nn.Parameter(torch.randn(rank, weight.shape[1], dtype=dtype) / weight.shape[1] ** 0.5)
        self.up = nn.Parameter(torch.randn(weight.shape[0], rank, dtype=dtype) * 0.1)

    def forward(self, x: Tensor) -> Tensor:
        blocks = self.weight.split(16)
        base = torch.cat([F.linear(x, block.to(x.dtype)) for block in blocks], -1) * self.scale
        return base + F.linear(F.linear(x, self.down), self.up)


def adapted(dtype: torch.dtype, width: int = 48) -> nn.Sequential:
    torch.manual_seed(0)
    first, second = torch.randn(width, 20) / 20**0.5, torch.randn(width, width) / width**0.5
    head = nn.Linear(width, 5).to(dtype).requires_grad_(False)
    return nn.Sequential(Quantised(first, 4, dtype), nn.Tanh(), Quantised(second, 4, dtype), nn.Tanh(), head)


@pytest.mark.parametrize("dtype", [*HALF, torch.float32], ids=str)
@pytest.mark.parametrize("method", [fg.ForwardGradient(perturb=fg.LowRank()), fg.ForwardGradient(), fg.ZerothOrder(0.03)], ids=str)
def test_adapters_beside_int8_weights(method: fg.Estimator, dtype: torch.dtype) -> None:
    """Only they get a gradient, and the integers stay what they are."""
    model = adapted(dtype)
    integers = [layer.weight.clone() for layer in (model[0], model[2])]
    bound = 0.1 if isinstance(method, fg.ZerothOrder) else max(5 * torch.finfo(dtype).eps, 1e-5)  # ε² of third derivatives, and roundings
    errors = [abs(error(model, method, seed)) for seed in range(4)]
    assert max(errors) < bound
    assert {name for name, p in model.named_parameters() if p.grad is not None} == {"0.down", "0.up", "2.down", "2.up"}
    assert all(torch.equal(layer.weight, kept) for layer, kept in zip((model[0], model[2]), integers, strict=True))


def test_no_copy_of_weights_in_float32() -> None:
    """Four layers of 240 × 240, 2 · 240² bytes each in bfloat16: copies of all in float32 would be eight of those."""
    torch.manual_seed(0)
    layers = [nn.Linear(240, 240, bias=False) for _ in range(4)]
    model, x = nn.Sequential(*layers).bfloat16(), rows(2, 240, dtype=torch.bfloat16)
    plain = nn.Sequential(*[layer.requires_grad_(False) for layer in adapted(torch.bfloat16, 240)])
    for layer in (plain[0], plain[2]):
        layer.requires_grad_(True)
    y = rows(2, 20, dtype=torch.bfloat16)
    for of, at, method, limit in (
        (lambda m: m(x).float().square().mean(), model, fg.ForwardGradient(perturb=fg.LowRank()), 0.3),
        (lambda m: m(x).float().square().mean(), model, fg.ZerothOrder(0.1), 2.2),
        (lambda m: m(y).float().square().mean(), plain, fg.ForwardGradient(perturb=fg.LowRank()), 0.8),
        (lambda m: m(y).float().square().mean(), plain, fg.ZerothOrder(0.1), 1.3),
    ):
        step = fg.TrainingStep(of, at, torch.optim.SGD(at.parameters(), 1e-3), method, generator=seeded())  # type: ignore[arg-type]
        step()
        assert peak_bytes(step, [torch.device("cpu")]) < limit * 2 * 240 * 240, (method, limit)


# Steps that are too small for the spacing of the weights --------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [*HALF, torch.float32], ids=str)
def test_spacings_are_those_of_nextafter(dtype: torch.dtype) -> None:
    numbers = torch.tensor([1.0, 1.5, 0.75, -0.3, 3e-3, 100.0, 0.0], dtype=dtype)
    further = torch.nextafter(numbers, torch.full_like(numbers, math.inf).copysign(numbers))
    torch.testing.assert_close(spacings(numbers[:-1]), (further - numbers).abs().double()[:-1], rtol=0, atol=0)
    assert spacings(numbers)[-1] == 0


@pytest.mark.parametrize("share", [0.15, 0.25, 0.5, 1.0])
def test_a_step_of_some_spacings_shortens_the_estimate_by_its_formula(share: float) -> None:
    """E[ĝᵢ]/∂ᵢf = E[v′v], v′ the move as it is rounded: Σₖ φ((k + ½)/s)/s ≈ 1 − 2 exp(−2π²s²) with s = ε/spacing.

    20,000 weights in [1, 2) of bfloat16, which lie 2⁻⁷ apart, and one step: a comparison at |z| < 4.5 for each s.
    """
    weights = (1.25 + torch.arange(20_000) % 64 / 128).bfloat16().requires_grad_()
    epsilon, seen = share * 2**-7, list[Tensor]()

    def total(t: Tensor) -> Tensor:
        seen.append(t.double())
        return seen[-1].sum()

    with pytest.warns(UserWarning, match="leaves most numbers of tensor 0 where they are") if share < 0.5 else nullcontext():
        record = fg.estimate_grad_(total, weights, fg.ZerothOrder(epsilon), generator=seeded())
    assert weights.grad is not None
    products = (seen[-2] - seen[-1]) / (2 * epsilon) * weights.grad.double() / record.derivatives
    steps = torch.arange(-40, 40) + 0.5
    factor = float(torch.exp(-((steps / share) ** 2) / 2).sum()) / share / math.sqrt(2 * math.pi)
    assert factor == pytest.approx(1 - 2 * math.exp(-2 * (math.pi * share) ** 2), abs=2 * math.exp(-8 * (math.pi * share) ** 2) + 1e-6)
    assert abs(float((products.mean() - factor) / products.std())) * math.sqrt(20_000) < 4.5


def test_a_step_that_moves_nothing_is_told_once_with_one_that_moves() -> None:
    model = network(torch.bfloat16)
    method = fg.ZerothOrder(1e-3)
    with pytest.warns(UserWarning, match=r"most numbers of 1.weight where they are, as bfloat16 .* Take epsilon=0.0078 or more") as told:
        fg.estimate_grad_(loss, model, method, generator=seeded())
    assert len(told) == 1
    fg.estimate_grad_(loss, model, method, generator=seeded())  # warnings are errors here
    fg.estimate_grad_(loss, network(torch.bfloat16), fg.ZerothOrder(0.0078), generator=seeded())
    fg.estimate_grad_(loss, network(torch.float32), method, generator=seeded())
    with pytest.warns(UserWarning, match="as float32 has no other number that close"):
        fg.estimate_grad_(loss, network(torch.float32), fg.ZerothOrder(1e-9), generator=seeded())
    model[1].requires_grad_(False)
    fg.estimate_grad_(loss, model, fg.ZerothOrder(2e-3), generator=seeded())  # no other weight lies further apart


def test_a_layer_whose_outputs_stay_is_told_once_under_autocast() -> None:
    """A weight of 10 makes outputs whose numbers lie 2⁻⁸ of them apart: a step of 1e-4 moves hardly any of them."""
    model = nn.Sequential(nn.Linear(64, 32, bias=False), nn.ReLU(), nn.Linear(32, 4, bias=False))
    with torch.no_grad():
        for weight in model.parameters():
            weight.fill_(10.0)
    x, y = torch.randn(8, 64, generator=seeded()), torch.arange(8) % 4

    def estimate(epsilon: float, enabled: bool = True, **options: Any) -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            fg.estimate_grad_(
                lambda m: F.cross_entropy(m(x), y), model, fg.ZerothOrder(epsilon, perturb=fg.LowRank(), **options), generator=seeded()
            )

    with pytest.warns(UserWarning, match=r"epsilon=0.0001 along 0.weight, 2.weight leaves most numbers that they make .* bfloat16") as told:
        estimate(1e-4, tangents=2, chunk_size=None)
    assert len(told) == 1
    estimate(1e-4)  # warnings are errors here
    estimate(1e-4, enabled=False)
    estimate(2.0)


@pytest.mark.some(1)
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_a_sum_over_many_directions_is_not_lost_to_rounding(dtype: torch.dtype) -> None:
    """In bfloat16 a running sum stops growing where what is added is below its spacing: 4,096 directions came to 0.6 of their mean.

    Along each of K directions v of random signs the derivative of a linear loss with gradient 1 is Σv, so the mean of Σv·v is 1 in each of
    4 coordinates up to √(3/K), here 0.027, and three roundings of u/2: within 0.15, more than five times as much.
    """
    model = nn.Linear(4, 1, bias=False).to(dtype)
    estimator = fg.ZerothOrder(0.25, tangents=4096, law=fg.Rademacher())
    x = torch.ones(1, 4, dtype=dtype)
    fg.estimate_grad_(lambda m: m(x).float().mean(), model, estimator, generator=torch.Generator().manual_seed(0))
    assert model.weight.grad is not None
    assert model.weight.grad.dtype == dtype
    torch.testing.assert_close(model.weight.grad.float(), torch.ones(1, 4), rtol=0, atol=0.15)
