"""Estimates to a cosine: the formula against simulated estimates, and estimators whose worth is known."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import forwardgrad as fg
from forwardgrad.lab.bench.worth_of_a_step import Worth, averaged, cosine_prices, estimates_needed, one_direction, worth

N = 60  # dimensions; 0.3 then takes 6 estimates, 0.8 takes 109


def known(variance: float, length: float = 1.0, bias: float = 0.0) -> Worth:
    square = bias + 2 * length - 1
    limit = length / math.sqrt(square)
    return Worth(variance=variance, low=variance, high=variance, length=length, square=square, limit=limit, biased=bias > 0)


def test_without_bias_the_number_is_that_of_the_variance() -> None:
    assert estimates_needed(known(300.0), 0.5) == 100  # V·c²/(1 − c²)
    assert estimates_needed(known(99.0), 0.1) == 1
    assert estimates_needed(known(0.0), 0.99) == 1  # exact: one is enough


@pytest.mark.parametrize("cosine", [0.3, 0.5, 0.8])
def test_the_number_brings_simulated_gaussian_estimates_to_the_cosine(cosine: float) -> None:
    """400 means of as many Gaussian estimates (g·v)v as the formula says. Of so few that the length of their mean still varies, the mean
    cosine is up to a tenth off the formula's; the noise of 400 is 0.005 (standard error).
    """
    count = estimates_needed(known(N + 1.0), cosine)
    assert count is not None
    generator = torch.Generator().manual_seed(0)
    g = torch.randn(N, generator=generator, dtype=torch.float64)
    v = torch.randn(400, count, N, generator=generator, dtype=torch.float64)
    mean = ((v @ g).unsqueeze(2) * v).mean(1)
    found = F.cosine_similarity(mean, g.unsqueeze(0), dim=1)
    assert float(found.mean()) == pytest.approx(cosine, rel=0.1)


def test_a_bias_ends_at_its_own_cosine() -> None:
    """m = g + b with b at right angles to g and as long: the limit is cos 45°."""
    tilted = known(100.0, length=1.0, bias=1.0)
    assert tilted["limit"] == pytest.approx(math.sqrt(0.5))
    assert estimates_needed(tilted, 0.71) is None
    assert estimates_needed(tilted, 0.7) is not None
    assert estimates_needed(tilted, 0.5) == 50  # V / (1/c² − 2)
    assert estimates_needed(known(100.0, length=-0.5, bias=3.0), 0.1) is None  # the wrong way round


def test_costs_are_estimates_times_seconds() -> None:
    measured = Worth(**{**known(300.0), "low": 150.0, "high": 600.0})  # type: ignore[typeddict-item]
    near, far = cosine_prices(measured, 0.01, (0.5, 0.8))
    assert near == {"cosine": 0.5, "estimates": 100, "low": 50, "high": 200, "seconds": pytest.approx(1.0)}
    assert far["estimates"] == 534  # 300·0.64/0.36 = 533.3
    assert cosine_prices(known(1.0, bias=1.0), 0.01, (0.9,))[0]["seconds"] is None


def test_averaging_divides_the_noise_of_independent_directions() -> None:
    assert averaged(known(300.0), 4)["variance"] == 75
    many = fg.ForwardGradient(tangents=16, perturb=fg.LowRank(1), chunk_size=4)
    assert one_direction(many) == (fg.ForwardGradient(perturb=fg.LowRank(1)), 16)
    for whole in (fg.ForwardGradient(tangents=4, law=fg.Orthogonal()), fg.ForwardGradient(tangents=4, combine="projection"),
                  fg.ForwardGradient(tangents=4, clip=1.0), fg.Backprop()):  # fmt: skip
        assert one_direction(whole) == (whole, 1)


def problem() -> tuple[nn.Module, fg.Estimator]:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)), fg.Backprop()


def measured(estimator: fg.Estimator, repeats: int = 20) -> Worth:
    model, exact = problem()
    x, y = torch.randn(8, 6), torch.randint(3, (8,))

    def loss(model: nn.Module) -> torch.Tensor:
        return F.cross_entropy(model(x), y)

    fg.estimate_grad_(loss, model, exact)
    gradients = {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}
    return worth(estimator, loss, model, repeats=repeats, exact=gradients, state={})


def test_an_exact_estimator_is_worth_one_estimate() -> None:
    found = measured(fg.Backprop())
    assert (found["variance"], found["limit"], found["biased"]) == (0, 1, False)


def test_a_formula_is_taken_before_a_measurement() -> None:
    found = measured(fg.ForwardGradient())
    assert found["variance"] == found["low"] == found["high"] == 6 * 5 + 5 + 5 * 3 + 3 + 1
    rank_one = measured(fg.ForwardGradient(perturb=fg.LowRank(1), law=fg.Rademacher()), repeats=400)
    assert rank_one["low"] < 52 < rank_one["high"]  # n − 1, as with dense signs
    assert rank_one["low"] < rank_one["variance"] < rank_one["high"]


def test_a_biased_estimator_has_a_limit_and_one_that_shows_no_bias_has_none() -> None:
    readout = measured(fg.Readout())  # the last layer alone, exactly: the rest of the gradient is never seen
    assert readout["biased"]
    assert 0 < readout["limit"] < 1
    assert estimates_needed(readout, readout["limit"] + 0.01) is None
    assert estimates_needed(readout, readout["limit"] - 0.01) == 1
    assert not measured(fg.ZerothOrder())["biased"]
