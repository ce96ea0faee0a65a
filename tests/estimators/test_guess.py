"""Guessed directions: what is found along them, and the complement that makes up for the rest.

Statistical tests have fixed seeds. A |z| ≥ 4.5 has probability 6.8e-6 for a correct estimator, so a test of m numbers gives a false
alarm for less than m · 6.8e-6 of all seeds (Bonferroni); m is stated in each.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from tests.support.cases import EXACT, Case, frozen, perceptron, regress, rows, seeded, tied, trained, true_gradient
from torch import Tensor, nn

import forwardgrad as fg

X = rows(5, 4)
ALONE, WITH_REST = fg.Guess("given", complement=False), fg.Guess("given")
EACH_ALONE, EACH_WITH_REST = fg.Guess("given", complement=False, per_parameter=True), fg.Guess("given", per_parameter=True)
GIVEN = [ALONE, WITH_REST, EACH_ALONE, EACH_WITH_REST]
given = pytest.mark.parametrize("method", GIVEN, ids=["alone", "with rest", "each alone", "each with rest"])
State = dict[str, Tensor]


def step(loss: Any, at: Any, method: fg.Estimator, state: State, seed: int = 0) -> fg.Estimate:
    torch.manual_seed(7)
    return fg.estimate_grad_(loss, at, method, generator=seeded(seed), state=state)


def found(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in trained(model).items()}


def a_guess(model: nn.Module) -> dict[str, Tensor]:
    return {name: torch.linspace(-1, 2, p.numel(), dtype=p.dtype).cos().view(p.shape) for name, p in trained(model).items()}


def flat(tensors: dict[str, Tensor]) -> Tensor:
    return torch.cat([t.flatten() for t in tensors.values()])


@pytest.mark.parametrize("case", EXACT, ids=str)
def test_estimate_is_the_projection_of_the_gradient_on_the_guess(case: Case) -> None:
    model, loss = case.build()
    g, w, state = true_gradient(model, loss), a_guess(model), {}
    fg.Guess.give(state, model, w)
    record = step(loss, model, ALONE, state)
    along = flat(g) @ flat(w) / flat(w).norm()
    torch.testing.assert_close(record.derivatives, along[None], rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(flat(found(model)), along * flat(w) / flat(w).norm(), rtol=1e-11, atol=1e-12)

    model.zero_grad()
    model, loss = case.build()
    record = step(loss, model, EACH_ALONE, state)
    torch.testing.assert_close(found(model), {n: (g[n] * w[n]).sum() * w[n] / w[n].square().sum() for n in w}, rtol=1e-11, atol=1e-12)
    assert len(record.derivatives) == len(w)


@given
@pytest.mark.parametrize("case", EXACT, ids=str)
def test_the_gradient_itself_as_guess_gives_the_gradient(case: Case, method: fg.Guess) -> None:
    model, loss = case.build()
    g, state = true_gradient(model, loss), {}
    fg.Guess.give(state, model, {name: -3 * part for name, part in g.items()})
    step(loss, model, method, state)
    torch.testing.assert_close(found(model), g, rtol=1e-9, atol=1e-11)


def test_one_length_for_each_parameter_is_found_with_one_derivative_each() -> None:
    model, loss = perceptron().double(), regress(X)
    g, state = true_gradient(model, loss), {}
    guess = {name: (index + 1) * part for index, (name, part) in enumerate(g.items())}
    fg.Guess.give(state, model, guess)
    step(loss, model, EACH_ALONE, state)
    torch.testing.assert_close(found(model), g)
    model.zero_grad()
    step(loss, model, ALONE, state)
    assert not torch.allclose(flat(found(model)), flat(g), rtol=0.01)


@pytest.mark.some(2)
@pytest.mark.parametrize("method", GIVEN[1::2], ids=["one", "each"])
@pytest.mark.parametrize("law", [fg.Gaussian(), fg.Rademacher(), fg.Sphere()], ids=repr)
def test_unbiased_with_the_complement(method: fg.Guess, law: fg.Law) -> None:
    """And as noisy as the formula for Gaussian directions says: (n − P + 1)‖g⊥‖²."""
    g = torch.linspace(-1, 2, 12, dtype=torch.float64)
    at = [torch.zeros(6, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    guesses = (2 - torch.linspace(0, 3, 12, dtype=torch.float64) ** 2).chunk(2)
    state: State = {}
    fg.Guess.give(state, at, list(guesses))
    method = fg.Guess("given", per_parameter=method.per_parameter, law=law)
    generator, samples = seeded(1), []
    for _ in range(500):
        at[0].grad = at[1].grad = None
        fg.estimate_grad_(lambda a, b: g[:6] @ a + g[6:] @ b, at, method, generator=generator, state=state)
        samples.append(torch.cat([t.grad for t in at]))
    drawn = torch.stack(samples)
    z = (drawn.mean(dim=0) - g) / drawn.std(dim=0) * math.sqrt(500)
    assert z.abs().max() < 4.5  # m = 12 for each of six: false alarms below 0.05 % in all
    if law == fg.Gaussian():
        parts = list(zip(g.chunk(2), guesses, strict=True)) if method.per_parameter else [(g, torch.cat(guesses))]
        rest = torch.cat([part - part @ w * w / (w @ w) for part, w in parts])
        noise = (drawn - g).square().sum(dim=1)
        expected = (12 - len(parts) + 1) * (rest @ rest)
        assert abs(noise.mean() - expected) < 4.5 * noise.std() / math.sqrt(500)  # m = 1 for each of two
        assert noise.std() / math.sqrt(500) < 0.1 * expected


def test_without_the_complement_what_lies_at_right_angles_is_missing() -> None:
    g, w = torch.linspace(-1, 2, 12, dtype=torch.float64), torch.linspace(1, 3, 12, dtype=torch.float64)
    at, state = torch.zeros(12, dtype=torch.float64, requires_grad=True), {}
    fg.Guess.give(state, at, w)
    for seed in range(3):  # no noise at all: E[ĝ] is every ĝ
        at.grad = None
        step(lambda t: g @ t, at, ALONE, state, seed)
        torch.testing.assert_close(at.grad, g @ w * w / (w @ w))
    cosine = g @ w / g.norm() / w.norm()
    torch.testing.assert_close(at.grad.norm(), cosine.abs() * g.norm())
    assert 0.1 < cosine < 0.9


@pytest.mark.parametrize("guess", ["missing", "zero"])
@pytest.mark.parametrize("per_parameter", [False, True])
def test_without_a_guess_the_complement_is_everything(guess: str, per_parameter: bool) -> None:
    (model, other), loss, state = (perceptron().double() for _ in range(2)), regress(X), {}
    other.load_state_dict(model.state_dict())
    if guess == "zero":
        fg.Guess.give(state, model, {name: torch.zeros_like(p) for name, p in trained(model).items()})
    step(loss, model, fg.Guess("given", per_parameter=per_parameter), state)
    step(loss, other, fg.ForwardGradient(), {})
    torch.testing.assert_close(found(model), found(other), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("guess", ["missing", "zero"])
def test_without_a_guess_or_complement_the_direction_is_random(guess: str) -> None:
    model, loss, state = perceptron().double(), regress(X), {}
    if guess == "zero":
        fg.Guess.give(state, model, {name: torch.zeros_like(p) for name, p in trained(model).items()})
    g = true_gradient(model, loss)
    step(loss, model, ALONE, state)
    v = {name: drawn[0] for name, drawn in fg.Gaussian().draw(trained(model), 1, seeded()).items()}
    torch.testing.assert_close(flat(found(model)), flat(g) @ flat(v) * flat(v) / flat(v).square().sum())


def test_only_the_direction_of_a_guess_matters_however_small() -> None:
    model, loss = perceptron(), regress(X.float())
    results = []
    for scale in (1.0, 1e-30, 1e30):
        copied, state = copy.deepcopy(model), {}
        fg.Guess.give(state, copied, {name: w * scale for name, w in a_guess(model).items()})
        step(loss, copied, WITH_REST, state)
        results.append(found(copied))
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(results[2], results[0], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("momentum", [0.0, 0.6])
def test_the_previous_estimates_are_the_next_guess(momentum: float) -> None:
    model, loss = perceptron().double(), regress(X)
    method, state, w = fg.Guess(momentum=momentum), {}, torch.zeros(43, dtype=torch.float64)
    g = flat(true_gradient(model, loss))
    for index in range(3):
        model.zero_grad()
        record = step(loss, model, method, state, seed=index)
        v = flat({name: drawn[0] for name, drawn in fg.Gaussian().draw(trained(model), 1, seeded(index)).items()})
        unit = w / w.norm() if index else w
        rest = v - v @ unit * unit
        torch.testing.assert_close(record.derivatives, torch.stack([g @ unit, g @ rest]), rtol=1e-11, atol=1e-12)
        estimate = g @ unit * unit + g @ rest * rest
        torch.testing.assert_close(flat(found(model)), estimate, rtol=1e-11, atol=1e-12)
        w = momentum * w + estimate
        assert list(state) == [f"guess.{name}" for name in trained(model)]
        for p in model.parameters():
            p.grad.zero_()  # what is done to .grad later does not reach the state
        torch.testing.assert_close(flat(state), w, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("case", EXACT, ids=str)
def test_chunks_make_no_difference_beyond_rounding(case: Case) -> None:
    results = []
    for chunk_size in (None, 1, 2):
        model, loss = case.build()
        state: State = {}
        fg.Guess.give(state, model, a_guess(model))
        record = step(loss, model, fg.Guess("given", per_parameter=True, chunk_size=chunk_size), state)
        count = len(trained(model)) + 1
        assert record.forward_passes == count + {None: 1, 1: count, 2: math.ceil(count / 2)}[chunk_size]
        results.append((record.derivatives, found(model)))
    torch.testing.assert_close(results[1], results[0], rtol=1e-10, atol=1e-11)
    torch.testing.assert_close(results[2], results[0], rtol=1e-10, atol=1e-11)


def test_a_guess_is_a_copy_that_replaces_the_one_before() -> None:
    model, state = perceptron(), {"mine": torch.ones(())}
    w = a_guess(model)
    fg.Guess.give(state, model, w)
    w["0.weight"].zero_()
    assert state["guess.0.weight"].any()
    fg.Guess.give(state, model, {"2.bias": torch.ones(3, dtype=torch.float64), "2.weight": None})
    assert sorted(state) == ["guess.2.bias", "mine"]
    assert state["guess.2.bias"].dtype == torch.float32
    fg.Guess.give(state, model, list(w.values()))
    assert sorted(state) == ["guess.0.bias", "guess.0.weight", "guess.2.bias", "guess.2.weight", "mine"]


def test_names_of_frozen_and_tied_parameters_may_be_among_the_guessed() -> None:
    for make in (frozen, tied):
        model, _ = make()
        state: State = {}
        fg.Guess.give(state, model, {name: torch.ones_like(p) for name, p in model.named_parameters(remove_duplicate=False)})
        assert list(state) == [f"guess.{name}" for name in trained(model)]


def test_a_model_may_have_a_part_called_model() -> None:
    outer = nn.ModuleDict({"model": nn.Linear(4, 1)}).double()
    state: State = {}
    fg.Guess.give(state, outer, {"model.weight": torch.ones(1, 4, dtype=torch.float64)})
    step(lambda m: m["model"](X).mean(), outer, ALONE, state)
    ones = torch.ones(1, 4, dtype=torch.float64)
    torch.testing.assert_close(outer["model"].weight.grad, X.mean(dim=0).sum() / 4 * ones)
    assert not outer["model"].bias.grad.any()


@pytest.mark.parametrize(
    ("direction", "message"),
    [
        ({"weigth": torch.ones(1, 4)}, "names 'weigth', and there is no such parameter: there are bias, weight"),
        ({"weight": torch.ones(4, 1)}, r"guess for weight has shape \(4, 1\) and the parameter \(1, 4\)"),
        ([torch.ones(1, 4)], "the guess has 1 tensors and 2 are trained"),
        (torch.ones(1, 4), "the guess has 1 tensors and 2 are trained"),
    ],
)
def test_a_guess_that_does_not_fit_is_told_and_changes_nothing(direction: Any, message: str) -> None:
    state = {"guess.weight": torch.ones(1, 4)}
    with pytest.raises(ValueError, match=message):
        fg.Guess.give(state, nn.Linear(4, 1), direction)
    assert list(state) == ["guess.weight"]


def test_a_guess_in_the_state_that_does_not_fit_is_told() -> None:
    with pytest.raises(ValueError, match=r"guess for weight has shape \(2, 2\) and the parameter \(1, 4\)"):
        step(lambda m: m(X).mean(), nn.Linear(4, 1).double(), WITH_REST, {"guess.weight": torch.ones(2, 2)})


def test_a_good_guess_trains_with_less_noise_than_none() -> None:
    """The gradient on other examples of the same data as guess: closer to the gradient, over twenty draws of the same directions."""
    x = rows(40, 4)
    target = x.sum(dim=1, keepdim=True)
    model, state = nn.Linear(4, 1).double(), {}

    def loss(m: nn.Module, half: slice) -> Tensor:
        return (m(x[half]) - target[half]).square().mean()

    gaps = []
    for seed in range(20):
        exact = true_gradient(model, lambda m: loss(m, slice(20)))
        guess = true_gradient(model, lambda m: loss(m, slice(20, 40)))
        fg.Guess.give(state, model, guess)
        for method in (WITH_REST, fg.ForwardGradient()):
            model.zero_grad()
            step(lambda m: loss(m, slice(20)), model, method, state, seed)
            gaps.append(float((flat(found(model)) - flat(exact)).norm()))
    assert sum(gaps[::2]) < 0.7 * sum(gaps[1::2])
