"""Directions that share out the layers: what each of them moves, that the estimate stays unbiased, and how noisy it is.

Statistical tests have fixed seeds and compare at |z| < 4.5, which correct code passes but for 6.8e-6 a comparison; each says how many.
"""

from __future__ import annotations

import math

import pytest
import torch
from tests.support.cases import classify, perceptron, rows, seeded, trained, true_gradient
from torch import Tensor, nn

import forwardgrad as fg
from forwardgrad.calls import perturbed_pass
from forwardgrad.directions import fork
from forwardgrad.factored import dense
from forwardgrad.objective import Objective
from forwardgrad.perturbations import SplitUse

INNER = [fg.Dense(), fg.LowRank(2), fg.Informed(weighted=False)]


def deep() -> nn.Sequential:
    torch.manual_seed(3)
    layers = [nn.Linear(4, 5), nn.Tanh(), nn.LayerNorm(5), nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)]
    return nn.Sequential(*layers).double()


LOSS = classify(rows(3, 4))


@pytest.mark.parametrize(
    ("sizes", "parts", "cut"),
    [
        ([5, 5, 5, 5], 2, [0, 0, 1, 1]),
        ([1, 1, 1, 9], 2, [0, 0, 0, 1]),
        ([9, 1, 1, 1], 3, [0, 1, 1, 2]),
        ([3, 3, 3], 3, [0, 1, 2]),
        ([2, 7, 3, 4, 6], 3, [0, 0, 1, 1, 2]),
        ([0, 0, 8], 3, [0, 1, 2]),
        ([4], 5, [0]),
    ],
)
def test_parts_are_runs_of_layers_and_the_largest_is_as_small_as_can_be(sizes: list[int], parts: int, cut: list[int]) -> None:
    parameters = {f"{index}.weight": torch.empty(size) for index, size in enumerate(sizes)}
    assert list(fg.SplitWeights(parts).owners(parameters).values()) == cut


def test_a_layer_stays_whole_where_there_are_enough_of_them() -> None:
    owners = fg.SplitWeights(2).owners(trained(deep()))
    assert {name.rpartition(".")[0]: part for name, part in owners.items()} == {"0": 0, "2": 0, "3": 1, "5": 1}
    assert all(owners[f"{layer}.weight"] == owners[f"{layer}.bias"] for layer in (0, 2, 3, 5))
    assert sorted(fg.SplitWeights(8).owners(trained(deep())).values()) == list(range(8))  # else parameters are what is shared out


@pytest.mark.parametrize("inner", INNER, ids=repr)
@pytest.mark.parametrize("plainly", [False, True], ids=["explicit", "dual numbers"])
def test_a_direction_moves_its_own_part_along_its_derivative(inner: fg.Perturbation, plainly: bool) -> None:
    """Of eight directions and three parts, exactly: d = ∇f·v, and v is zero outside the part."""
    model, split, objective = deep(), fg.SplitWeights(3, inner), Objective(LOSS, deep())
    owners, exact = split.owners(objective.parameters), true_gradient(model, LOSS)
    with torch.no_grad():
        if plainly:
            with fg.plainly():
                found = perturbed_pass(objective, split, fg.Gaussian(), fork(seeded(), 8), torch.device("cpu"))
        else:
            found = perturbed_pass(objective, split, fg.Gaussian(), fork(seeded(), 8), torch.device("cpu"))
    for k in range(8):
        alone, product = torch.zeros(8, 1, dtype=torch.float64), torch.zeros((), dtype=torch.float64)
        alone[k] = 1
        for entered in found.entered:
            assert isinstance(entered, SplitUse)
            moved = {name: dense(part) / entered.share for name, part in entered.gradient(alone).items()}
            for name, v in moved.items():
                assert bool(v.any()) == (owners[name] == k % 3)
                product += (exact[name.removeprefix("model.")] * v).sum()
        torch.testing.assert_close(found.derivatives[k], product, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("inner", INNER, ids=repr)
def test_unbiased_with_uneven_turns(inner: fg.Perturbation) -> None:
    """200 directions for 3 parts, ten times, along the gradient of backpropagation: one comparison for each perturbation."""
    model = deep()
    exact = torch.cat([g.flatten() for g in true_gradient(model, LOSS).values()])
    method, generator, samples = fg.ForwardGradient(200, perturb=fg.SplitWeights(3, inner)), seeded(1), []
    assert method.unbiased
    for _ in range(10):
        model.zero_grad()
        fg.estimate_grad_(LOSS, model, method, generator=generator)
        samples.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    found = torch.stack(samples)
    along = found @ exact / exact.square().sum()  # its mean is 1
    assert abs(float((along.mean() - 1) / along.std())) * math.sqrt(10) < 4.5
    assert float((found.mean(0) - exact).norm() / exact.norm()) < 0.5


def test_variance_of_a_part_is_that_of_its_own_weights_alone() -> None:
    """E‖ĝₚ‖² = (nₚ + 2)‖∇ₚf‖² of one direction, and the mean of dv is ∇ₚf: 2000 directions a part, 2 + 2 comparisons."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 2, bias=False), nn.Linear(2, 3, bias=False)).double()
    x = rows(4, 3)

    def loss(model: nn.Module) -> Tensor:
        return classify(x)(model)

    exact = true_gradient(model, loss)
    with torch.no_grad():
        found = perturbed_pass(
            Objective(loss, model), fg.SplitWeights(2, fg.Dense()), fg.Gaussian(), fork(seeded(2), 4000), torch.device("cpu")
        )
    assert len(found.entered) == 2
    for entered, name in zip(found.entered, exact, strict=True):
        assert isinstance(entered, SplitUse)
        g, d, v = exact[name].flatten(), found.derivatives[entered.mine], entered.use.v.flatten(1)  # type: ignore[union-attr]
        assert v.shape == (2000, 6)
        squares = d.square() * v.square().sum(1) / g.square().sum()
        assert abs(float((squares.mean() - 8) / squares.std())) * math.sqrt(2000) < 4.5
        along = d * (v @ g) / g.square().sum()
        assert abs(float((along.mean() - 1) / along.std())) * math.sqrt(2000) < 4.5


def test_the_variance_that_is_told_is_that_of_the_parts() -> None:
    gradient = {"0.weight": torch.ones(10), "1.weight": torch.full((20,), 2.0)}
    method = fg.ForwardGradient(3, perturb=fg.SplitWeights(2))  # two directions for the first part, one for the second
    assert method.variance(gradient) == pytest.approx((11 / 2 * 10 + 21 * 80) / 90)
    assert fg.ForwardGradient(3, perturb=fg.SplitWeights(1)).variance(gradient) == fg.ForwardGradient(3).variance(gradient)
    assert fg.ForwardGradient(3, perturb=fg.SplitWeights(2, fg.LowRank())).variance(gradient) is None


@pytest.mark.some(1)
@pytest.mark.parametrize("inner", INNER, ids=repr)
def test_workers_with_a_part_each_add_up(inner: fg.Perturbation) -> None:
    """A worker fills its own part and no other, with a squared error of about its own number of weights over K."""
    model = deep()
    exact = true_gradient(model, LOSS)
    for part in range(3):
        method = fg.ForwardGradient(400, law=fg.Rademacher(), perturb=fg.SplitWeights(3, inner, part=part))
        assert not method.unbiased
        model.zero_grad()
        fg.estimate_grad_(LOSS, model, method, generator=seeded(part))
        owners = fg.SplitWeights(3, inner).owners(trained(model))
        assert {name for name, p in trained(model).items() if p.grad is not None} == {name for name in owners if owners[name] == part}
        found = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        own = torch.cat([g.flatten() for name, g in exact.items() if owners[name] == part])
        assert float((found - own).square().sum() / own.square().sum()) < 3 * len(own) / 400


def test_layers_ahead_of_the_part_that_moves_carry_no_tangent() -> None:
    model, moving = deep(), list[bool]()

    class Counts(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            moving.append("_forwardgrad_track" in x.__dict__)
            return x * 1

    model.insert(3, Counts())  # between the first part and the second
    for part in (0, 1):
        moving.clear()
        fg.estimate_grad_(LOSS, model, fg.ForwardGradient(perturb=fg.SplitWeights(2, fg.LowRank(), part=part)), generator=seeded())
        assert any(moving) == (part == 0)


@pytest.mark.parametrize("inner", [fg.LowRank(2), fg.Informed(weighted=False)], ids=repr)
@pytest.mark.parametrize("plainly", [False, True], ids=["explicit", "dual numbers"])
def test_a_weight_and_its_bias_may_belong_to_different_parts(inner: fg.Perturbation, plainly: bool) -> None:
    """As where an output layer with a bias of its own shares its weight: four parts, each with one tensor, exactly."""
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    exact = true_gradient(model, LOSS)
    for part, name in enumerate(exact):
        method = fg.ForwardGradient(perturb=fg.SplitWeights(4, inner, part=part))
        model.zero_grad()
        if plainly:
            with fg.plainly():
                record = fg.estimate_grad_(LOSS, model, method, generator=seeded())
        else:
            record = fg.estimate_grad_(LOSS, model, method, generator=seeded())
        (found,) = ((key, p.grad / record.derivatives) for key, p in trained(model).items() if p.grad is not None)
        assert found[0] == name
        torch.testing.assert_close(record.derivatives[0], (exact[name] * found[1]).sum(), rtol=1e-10, atol=1e-12)


def test_limits() -> None:
    for options, said in (
        ({"parts": 0}, "parts must be a whole number of at least 1, not 0"),
        ({"inner": fg.Activity()}, "inner must move weights that a batch shares"),
        ({"inner": fg.SplitWeights()}, "inner must move weights that a batch shares"),
        ({"parts": 2, "part": 2}, "part must be None or a whole number from 0 to 1, not 2"),
    ):
        with pytest.raises(ValueError, match=said):
            fg.SplitWeights(**options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="needs tangents=3 or more, one for each part, not 2"):
        fg.ForwardGradient(2, perturb=fg.SplitWeights(3))
    with pytest.raises(ValueError, match="couples all weights of a tangent"):
        fg.ForwardGradient(2, law=fg.Orthogonal(), perturb=fg.SplitWeights(2))
    with pytest.raises(ValueError, match="the model has 4 parameters to split, and so no part 5"):
        fg.estimate_grad_(LOSS, perceptron().double(), fg.ForwardGradient(perturb=fg.SplitWeights(6, part=5)), generator=seeded())
