"""What zeroth order can do besides: scores to climb, steps scaled by the spread of losses, a part of the weights, a factor that is kept.

Statistical tests have fixed seeds. A |z| ≥ 4.5 has probability 6.8e-6 for a correct estimator; the number m of comparisons is stated.
"""

from __future__ import annotations

import io
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.support.cases import rows, seeded, trained, true_gradient
from torch import Tensor, nn

import forwardgrad as fg
from forwardgrad.directions import Directions

X = rows(6, 4)
PLACES = [fg.Dense(), fg.LowRank(), fg.PerExample()]


def network() -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()


def loss(model: nn.Module) -> Tensor:
    return F.cross_entropy(model(X), torch.arange(6) % 3)


def estimated(model: nn.Module, method: fg.Estimator, function: Any = loss, seed: int = 0) -> tuple[fg.Estimate, dict[str, Tensor]]:
    model.zero_grad(set_to_none=True)
    record = fg.estimate_grad_(function, model, method, generator=seeded(seed), state={})
    return record, {name: p.grad for name, p in trained(model).items() if p.grad is not None}


@pytest.mark.parametrize("perturb", PLACES, ids=lambda p: p.name)
def test_a_score_is_climbed(perturb: fg.Perturbation) -> None:
    down, g = estimated(network(), fg.ZerothOrder(perturb=perturb, tangents=2))
    up, opposite = estimated(network(), fg.ZerothOrder(perturb=perturb, tangents=2, maximize=True))
    torch.testing.assert_close(opposite, {name: -part for name, part in g.items()}, rtol=0, atol=0)
    assert (up.loss, up.derivatives.tolist()) == (down.loss, down.derivatives.tolist())  # of what the function returned


@pytest.mark.parametrize("perturb", [*PLACES, fg.Sparse(0.5)], ids=lambda p: p.name)
@pytest.mark.parametrize(
    "kind", [float, lambda t: t.double().detach(), lambda t: t.detach().numpy()[()], lambda t: int(1e6 * t), lambda t: (1e6 * t).long()]
)
def test_any_number_may_be_what_a_function_returns(kind: Any, perturb: fg.Perturbation) -> None:
    method = fg.ZerothOrder(0.01, perturb=perturb, tangents=2)
    record, _ = estimated(network(), method, lambda m: kind(loss(m)))
    scale = 1e6 if float(record.loss) > 100 else 1.0
    expected, _ = estimated(network(), method, loss)
    close = 1e-9 if scale == 1 else 1e-3
    torch.testing.assert_close(record.derivatives / scale, expected.derivatives, rtol=close, atol=close)
    assert record.loss.dtype == torch.float64


def test_other_estimators_ask_for_a_tensor_and_a_text_is_no_number() -> None:
    with pytest.raises(TypeError, match="the loss must return a tensor, not float"):
        estimated(network(), fg.ForwardGradient(), lambda m: float(loss(m)))
    for perturb in (fg.Dense(), fg.LowRank()):
        with pytest.raises(TypeError, match="the loss must return a tensor or a number, not str"):
            estimated(network(), fg.ZerothOrder(perturb=perturb), lambda m: str(loss(m)))


def test_truths_by_example_are_a_score_of_each() -> None:
    """Whether each example is classified, as a tensor of truths: its mean is the accuracy, and every example is scored by its own."""
    model, y = network(), torch.arange(6) % 3
    method = fg.ZerothOrder(1.0, tangents=64, perturb=fg.PerExample(), sides="one", chunk_size=None, maximize=True)
    record, _ = estimated(model, method, lambda m: m(X).argmax(1) == y)
    assert record.loss == (model(X).argmax(1) == y).double().mean()
    assert record.derivatives.any()
    for derivative in record.derivatives * 6:  # of whole examples
        assert float(derivative) == pytest.approx(round(float(derivative)))


@pytest.mark.parametrize("perturb", [fg.Dense(), fg.LowRank()], ids=lambda p: p.name)
def test_accuracy_itself_is_trained(perturb: fg.Perturbation) -> None:
    """A step function of the weights, counted in Python: its derivative is zero wherever there is one."""
    generator = seeded(5)
    centres = 2 * torch.eye(4)[:3]
    y = torch.randint(3, (300,), generator=generator)
    x = centres[y] + 0.5 * torch.randn(300, 4, generator=generator)
    model = nn.Linear(4, 3)
    nn.init.zeros_(model.weight)
    nn.init.zeros_(model.bias)

    def accuracy(m: nn.Module, x: Tensor, y: Tensor) -> float:
        return sum(int(a == b) for a, b in zip(m(x).argmax(1).tolist(), y.tolist(), strict=True)) / len(y)

    method = fg.ZerothOrder(0.5, tangents=16, law=fg.Rademacher(), perturb=perturb, maximize=True)
    step = fg.TrainingStep(accuracy, model, torch.optim.SGD(model.parameters(), 1.0), method, generator=generator)
    first = accuracy(model, x, y)
    for _ in range(25):
        step(x[:100], y[:100])
    assert first < 0.5
    assert accuracy(model, x[100:], y[100:]) > 0.9


@pytest.mark.parametrize("sides", ["two", "one"])
@pytest.mark.parametrize("perturb", PLACES, ids=lambda p: p.name)
def test_a_normalised_estimate_is_divided_by_the_spread_of_the_losses(perturb: fg.Perturbation, sides: Any) -> None:
    options: dict[str, Any] = {"epsilon": 0.01, "tangents": 4, "perturb": perturb, "sides": sides, "law": fg.Rademacher()}
    record, g = estimated(network(), fg.ZerothOrder(**options))
    same, normalised = estimated(network(), fg.ZerothOrder(**options, normalize=True))
    assert torch.equal(record.derivatives, same.derivatives)
    spread = float((0.01 * record.derivatives).std())
    torch.testing.assert_close(normalised, {name: part / spread for name, part in g.items()}, rtol=1e-9, atol=1e-12)
    flat, none = estimated(network(), fg.ZerothOrder(**options, normalize=True), lambda m: 0 * loss(m))
    assert not flat.derivatives.any()
    assert not any(part.any() for part in none.values())


def test_the_length_of_a_normalised_estimate_is_that_of_the_formula() -> None:
    g, epsilon, k = torch.tensor([3.0, -4.0, 12.0], dtype=torch.float64), 0.1, 6
    x, generator, samples = torch.zeros(3, dtype=torch.float64, requires_grad=True), seeded(6), []
    method = fg.ZerothOrder(epsilon, tangents=k, sides="one", normalize=True, chunk_size=None)
    for _ in range(500):
        x.grad = None
        fg.estimate_grad_(lambda x: g @ x, x, method, generator=generator)
        samples.append(x.grad)
    a = math.sqrt(2 / (k - 1)) * math.gamma(k / 2) / math.gamma((k - 1) / 2)
    b = math.sqrt((k - 1) / 2) * math.gamma((k - 2) / 2) / math.gamma((k - 1) / 2)
    expected = (a * (k - 1) / k + b / k) / epsilon * g / g.norm()
    each = torch.stack(samples)
    assert ((each.mean(0) - expected) / each.std(0) * math.sqrt(500)).abs().max() < 4.5  # m = 3


@pytest.mark.parametrize("of", ["smallest", "largest"])
@pytest.mark.parametrize("method", [fg.ZerothOrder, fg.ForwardGradient], ids=lambda kind: kind.name)
def test_a_part_of_the_weights_moves_those_of_smallest_magnitude_at_this_step(method: Any, of: Any) -> None:
    model = nn.Linear(10, 3).double()
    exact = true_gradient(model, lambda m: m(rows(5, 10)).exp().sum())
    for shift in (0.01, 0.3):  # the mask follows the weights
        with torch.no_grad():
            model.weight.copy_(torch.linspace(-1, 1, 30, dtype=torch.float64).view(3, 10).sin() + shift)
        exact = true_gradient(model, lambda m: m(rows(5, 10)).exp().sum())
        record, g = estimated(model, method(perturb=fg.Sparse(0.3, of)), lambda m: m(rows(5, 10)).exp().sum())
        order = model.weight.detach().abs().flatten().argsort(descending=of == "largest")
        assert set(g["weight"].flatten().nonzero().flatten().tolist()) == set(order[:9].tolist())
        assert int((g["bias"] != 0).sum()) == 1
        slope = sum((exact[name] * part / record.derivatives).sum() for name, part in g.items())
        torch.testing.assert_close(record.derivatives[0], slope, rtol=1e-5, atol=0)


def test_all_weights_or_equal_ones_move_whole() -> None:
    same, whole = (estimated(network(), fg.ZerothOrder(perturb=perturb))[1] for perturb in (fg.Sparse(1.0), fg.Dense()))
    torch.testing.assert_close(same, whole, rtol=0, atol=0)
    model = network()
    nn.init.zeros_(model[2].weight)
    assert estimated(model, fg.ZerothOrder(perturb=fg.Sparse(0.1)))[1]["2.weight"].all()
    assert fg.ForwardGradient(perturb=fg.Sparse(1.0)).unbiased
    assert not fg.ForwardGradient(perturb=fg.Sparse(0.5)).unbiased


def rowspace(g: Tensor) -> Tensor:
    """The direction of the rows of a matrix of rank one, with a sign that does not change."""
    row = g[g.norm(dim=1).argmax()]
    return row / row[row.abs().argmax()]


KEEPING: list[Any] = [
    fg.ZerothOrder(perturb=fg.LowRank(1, period=3)),
    fg.ZerothOrder(perturb=fg.LowRank(1, period=3), sides="one", chunk_size=None),
    fg.ForwardGradient(perturb=fg.LowRank(1, period=3)),
]


@pytest.mark.parametrize("method", KEEPING, ids=repr)
def test_a_factor_is_kept_for_a_period_and_the_other_is_new(method: fg.Estimator) -> None:
    model, state, generator, spaces, columns = nn.Linear(6, 4).double(), {}, seeded(), [], []
    for _ in range(7):
        model.zero_grad()
        fg.estimate_grad_(lambda m: m(rows(5, 6)).square().mean(), model, method, generator=generator, state=state)
        spaces.append(rowspace(model.weight.grad))
        columns.append(rowspace(model.weight.grad.T))
    same = [torch.allclose(a, b, rtol=1e-9) for a, b in zip(spaces[1:], spaces, strict=False)]
    assert same == [True, True, False, True, True, False]
    assert not any(torch.allclose(a, b, rtol=1e-3) for a, b in zip(columns[1:], columns, strict=False))
    assert method.stateful
    with pytest.raises(ValueError, match="learns from step to step: begin with state"):
        fg.estimate_grad_(lambda m: m(rows(5, 6)).mean(), model, method, generator=generator)


def test_a_run_that_is_stopped_in_a_period_goes_on_to_the_same_bits() -> None:
    def run(stop: int | None) -> list[Tensor]:
        model, state, generator = network(), dict[str, Tensor](), seeded()
        method, optimizer = fg.ZerothOrder(perturb=fg.LowRank(2, period=4), tangents=2), torch.optim.SGD(model.parameters(), 0.1)
        for index in range(7):
            if index == stop:
                file = io.BytesIO()
                torch.save((state, generator.get_state()), file)
                file.seek(0)
                state, numbers = torch.load(file, weights_only=True)
                generator = torch.Generator()
                generator.set_state(numbers)
            fg.TrainingStep(loss, model, optimizer, method, generator=generator, state=state)()
        return [p.detach() for p in model.parameters()]

    assert all(map(torch.equal, run(None), run(2)))


def test_a_step_that_fails_does_not_count() -> None:
    model, state, method = network(), dict[str, Tensor](), fg.ZerothOrder(perturb=fg.LowRank(period=2))
    fg.estimate_grad_(loss, model, method, generator=seeded(), state=state)
    before = {name: t.clone() for name, t in state.items()}

    def fails(m: nn.Module) -> Tensor:
        raise ArithmeticError

    with pytest.raises(ArithmeticError):
        fg.estimate_grad_(fails, model, method, generator=seeded(), state=state)
    assert all(torch.equal(t, before[name]) for name, t in state.items())
    with pytest.raises(ValueError, match="the state keeps factors of 1 directions, and there are 3"):
        fg.estimate_grad_(loss, model, fg.ZerothOrder(perturb=fg.LowRank(period=2), tangents=3), generator=seeded(), state=state)


@pytest.mark.some(1)
@pytest.mark.parametrize("rank", [1, pytest.param(2, marks=pytest.mark.full)])
def test_within_a_period_the_mean_is_the_gradient_seen_from_the_subspace_and_over_periods_the_gradient(rank: int) -> None:
    """f = ⟨G, W⟩, of which differences are exact: given B the mean is G B Bᵀ/r, and E[B Bᵀ/r] = I."""
    model, G = nn.Linear(4, 3, bias=False).double(), rows(3, 4)
    value = lambda m: (m(torch.eye(4, dtype=torch.float64)).T * G).sum()  # noqa: E731
    generator, means, each = seeded(8), [], []
    for _ in range(2):
        state: dict[str, Tensor] = {}
        for _ in range(400):
            model.zero_grad()
            method = fg.ZerothOrder(0.1, perturb=fg.LowRank(rank, period=10**6), sides="one")
            fg.estimate_grad_(value, model, method, generator=generator, state=state)
            each.append(model.weight.grad)
        b = Directions(fg.Gaussian(), state["subspace.seeds"].tolist(), torch.device("cpu")).draw((4 * rank,), G)[0].view(4, rank)
        samples = torch.stack(each[-400:])
        z = (samples.mean(0) - G @ b @ b.T / rank) / samples.std(0) * 20
        assert z.abs().max() < 4.5  # m = 12, twice
        means.append(samples.mean(0))
    assert (means[0] - means[1]).norm() > 0.3 * G.norm()  # it is another subspace
    fresh = []
    for _ in range(400):
        model.zero_grad()
        fg.estimate_grad_(value, model, fg.ZerothOrder(0.1, perturb=fg.LowRank(rank, period=2)), generator=generator, state={})
        fresh.append(model.weight.grad)
    samples = torch.stack(fresh)
    assert ((samples.mean(0) - G) / samples.std(0) * 20).abs().max() < 4.5  # m = 12
