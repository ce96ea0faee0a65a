"""Learned and fixed feedback, and the read-out: against update formulas written by hand, exact Jacobians and backpropagation.

Statistical tests have fixed seeds and compare 17 directions of the model and of each tensor with |z| < 4.5, some 400 numbers in all:
correct code fails under 1 seed of 350.
"""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.support.cases import CASES, EXACT, Case, Loss, classify, perceptron, regress, rows, seeded, trained, true_gradient
from torch import Tensor, nn

import forwardgrad as fg
from forwardgrad.calls.passes import Pass, perturbed_pass
from forwardgrad.diagnostics.moments import Moments, Part
from forwardgrad.directions.laws import fork
from forwardgrad.objective import Objective
from forwardgrad.perturbations.activity import Activity, ActivityUse

State = dict[str, Tensor]
X, LABELS = rows(6, 4), torch.arange(6) % 3
FIRST = "feedback.0.model.0.weight"


def step(loss: Loss, model: nn.Module, method: fg.Estimator, state: State, seed: int = 0) -> dict[str, Tensor]:
    model.zero_grad()
    torch.manual_seed(7)
    fg.estimate_grad_(loss, model, method, generator=seeded(seed), state=state)
    return {name: p.grad for name, p in trained(model).items() if p.grad is not None}


def linear() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 4), nn.Linear(4, 3)).double()


def a_pass(model: nn.Module, seed: int, tangents: int = 1) -> tuple[Pass, Tensor]:
    """The pass that a step from this seed makes, and what the output did by hand: ẏ = J u."""
    with torch.no_grad():
        found = perturbed_pass(
            Objective(classify(X), model), Activity(), fg.Rademacher(), fork(seeded(seed), tangents), torch.device("cpu"), exact_output=True
        )
    places = [point for point in found.entered if isinstance(point, ActivityUse) and not point.exact]
    h = model[0](X).detach().relu()
    (u,) = [point.moves(len(X)) for point in places]
    return found, (u * (h > 0)) @ model[2].weight.detach().T


# Learning ----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rate", [None, 0.5])
def test_feedback_of_a_linear_model_becomes_its_jacobian(rate: float | None) -> None:
    """Of a linear model the Jacobian is the same for every example, so nothing is left to be noise but the other layer's moves."""
    model, state = linear(), {}
    for seed in range(250):
        found = step(classify(X), model, fg.LearnedFeedback(rate=rate), state, seed)
    w1, w2 = (model[i].weight.detach() for i in (1, 2))
    torch.testing.assert_close(state[FIRST], w2 @ w1, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(state["feedback.1.model.1.weight"], w2, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found, true_gradient(model, classify(X)), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("tangents", [1, 3])
@pytest.mark.parametrize("rule", ["lms", "average"])
def test_one_step_of_learning_is_its_formula(rule: Any, tangents: int) -> None:
    model, rate = perceptron().double(), 0.3
    b, state = rows(3, 5), {}
    step(classify(X), model, fg.LearnedFeedback(), state)
    state[FIRST].copy_(b)
    step(classify(X), model, fg.LearnedFeedback(rule, rate=rate, tangents=tangents), state, seed=4)
    found, moved = a_pass(model, 4, tangents)
    u = found.entered[0].moves(len(X))
    active = (model[0](X) > 0).expand(tangents, -1, -1)
    assert torch.equal(u != 0, active)
    count, units = active.sum((0, 1)), active.sum() / (tangents * len(X))
    if rule == "average":
        expected = (1 - rate) * b + rate * torch.einsum("kbc,kbq->cq", moved, u) / count.clamp(min=1)
    else:
        expected = b + rate * torch.einsum("kbc,kbq->cq", moved - u @ b.T, u) / (count + units + 1)
    torch.testing.assert_close(state[FIRST], expected, rtol=1e-6, atol=1e-6)
    assert int(state["step"]) == 2


# Use ---------------------------------------------------------------------------------------------------------------------------------


def test_direct_use_sends_the_error_through_the_feedback() -> None:
    model, state, b = perceptron().double(), {}, rows(3, 5)
    step(classify(X), model, fg.LearnedFeedback(), state)
    state[FIRST].copy_(b)
    found = step(classify(X), model, fg.LearnedFeedback(), state)
    h = model[0](X).detach()
    error = (model(X).detach().softmax(1) - F.one_hot(LABELS)) / 6
    sent = error @ b * (h > 0)
    expected = {"0.weight": sent.T @ X, "0.bias": sent.sum(0), "2.weight": error.T @ h.relu(), "2.bias": error.sum(0)}
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def parts(case: Case, method: fg.Estimator, state: State, count: int = 12) -> list[Part]:
    """Estimates with the memory held still, against backpropagation."""
    model, loss = case.build()
    exact, generator, objective = true_gradient(model, loss), seeded(11), Objective(loss, model)
    moments = Moments(list(exact), list(exact.values()))
    for _ in range(count // 2):
        with torch.no_grad():
            copies = ({name: t.clone() for name, t in state.items()} for _ in range(2))
            moments.add(*(list(method.estimate(objective, generator, copied)[1].values()) for copied in copies))
    return moments.parts()


def learned(case: Case, steps: int, wrong: bool = False) -> State:
    model, loss = case.build()
    state: State = {}
    for seed in range(steps):
        step(loss, model, fg.LearnedFeedback(), state, seed)
    for name, t in state.items():
        if wrong and name.startswith("feedback"):
            t.add_(rows(*t.shape))
    return state


STEERED = ["mlp", "cnn", "overlapping pools", "tied", "batch norm train", "layer norm classes", "attention classes", "padded embedding"]


@pytest.mark.some(4)
@pytest.mark.parametrize("case", [case for case in CASES if case.name in [*STEERED, "tagged words", "residual"]], ids=str)
def test_a_control_variate_is_unbiased_whatever_the_feedback(case: Case) -> None:
    method = fg.LearnedFeedback(use="control-variate", tangents=64)
    assert method.unbiased
    for part in parts(case, method, learned(case, 1, wrong=True)):
        assert part.z < 4.5, part


def test_direct_use_is_biased_by_what_is_not_learned_and_says_so() -> None:
    """Before learning nothing reaches the first layer; afterwards what is left is that the examples' Jacobians differ."""
    case = next(case for case in CASES if case.name == "cnn")
    method = fg.LearnedFeedback()
    assert not method.unbiased
    before, after = parts(case, method, {}, 10), parts(case, method, learned(case, 400), 10)
    assert before[0].p < 1e-6
    assert after[0].p < 1e-6
    named = [{part.name: part for part in found} for found in (before, after)]
    assert [named[0]["0.weight"].length.value, named[0]["0.weight"].bias.value] == pytest.approx([0.0, 1.0])
    assert named[1]["0.weight"].length.value > 0.5
    assert 1e-4 < named[1]["0.weight"].bias.value < 0.5
    assert named[0]["6.weight"].p == named[1]["6.weight"].p == 1.0  # the last layer's gradient is exact


@pytest.mark.full
def test_a_right_prediction_leaves_less_noise_than_none() -> None:
    case = next(case for case in CASES if case.name == "mlp")
    method = fg.LearnedFeedback(use="control-variate")
    noise = [parts(case, method, state, 100)[0].variance for state in ({}, learned(case, 300))]
    assert noise[1].high < noise[0].low


def test_no_gradient_is_given_while_the_feedback_warms_up() -> None:
    model, state, method = perceptron().double(), {}, fg.LearnedFeedback(warm_up=2)
    for seed in range(2):
        assert step(classify(X), model, method, state, seed) == {}
    assert state[FIRST].any()
    usual: State = {}
    for seed in range(2):
        step(classify(X), perceptron_like(model), fg.LearnedFeedback(), usual, seed)
    torch.testing.assert_close(state, usual, rtol=0, atol=0)
    assert sorted(step(classify(X), model, method, state)) == sorted(trained(model))
    assert not method.unbiased
    assert not fg.LearnedFeedback(use="control-variate", warm_up=1).unbiased


def perceptron_like(model: nn.Module) -> nn.Module:
    other = perceptron().double()
    other.load_state_dict(model.state_dict())
    return other


# Memory ------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [fg.LearnedFeedback(), fg.LearnedFeedback("average", warm_up=1), fg.FixedFeedback()], ids=repr)
def test_the_state_goes_through_a_file(method: fg.Estimator) -> None:
    model, state = perceptron().double(), {}
    for seed in range(2):
        step(classify(X), model, method, state, seed)
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    again = torch.load(file, weights_only=True)
    assert again.keys() == state.keys()
    found = [step(classify(X), model, method, memory, 9) for memory in (state, again)]
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=0)
    torch.testing.assert_close(state, again, rtol=0, atol=0)


@pytest.mark.parametrize("method", [fg.LearnedFeedback(), fg.FixedFeedback()], ids=lambda method: method.name)
def test_the_state_of_another_model_is_told(method: fg.Estimator) -> None:
    state: State = {}
    step(classify(X), perceptron().double(), method, state)
    other = nn.Sequential(nn.Linear(4, 7), nn.ReLU(), nn.Linear(7, 3)).double()
    with pytest.raises(ValueError, match=r"the state holds feedback of shape \(3, 5\) for model.0.weight, but this batch needs \(3, 7\)"):
        step(classify(X), other, method, state)


# Fixed feedback and the read-out -----------------------------------------------------------------------------------------------------


def test_fixed_feedback_is_direct_feedback_alignment() -> None:
    torch.manual_seed(3)
    model, state = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).double(), {}
    found = step(classify(X), model, fg.FixedFeedback(), state)
    first, second = state[FIRST].clone(), state["feedback.1.model.2.weight"].clone()
    h = model[0](X).detach()
    z = model[2](h.relu()).detach()
    error = (model(X).detach().softmax(1) - F.one_hot(LABELS)) / 6
    sent, later = error @ first * (h > 0), error @ second  # Tanh is not a place of its own: the derivative there is taken for one
    expected = {"0.weight": sent.T @ X, "0.bias": sent.sum(0), "2.weight": later.T @ h.relu(), "2.bias": later.sum(0)}
    expected |= {"4.weight": error.T @ z.tanh(), "4.bias": error.sum(0)}
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    assert step(classify(X), model, fg.FixedFeedback(), state, seed=5)["0.weight"].equal(found["0.weight"])
    torch.testing.assert_close(state[FIRST], first, rtol=0, atol=0)


def test_entries_of_fixed_feedback_have_the_variance_of_one_over_the_outputs() -> None:
    """2,000 normal entries: the relative error of their variance has the standard deviation √(2/2000) = 0.032, and 0.15 is 4.7 of it."""
    state: State = {}
    step(classify(X, 4), nn.Sequential(nn.Linear(4, 500), nn.ReLU(), nn.Linear(500, 4)).double(), fg.FixedFeedback(), state)
    assert float(state[FIRST].var() * 4) == pytest.approx(1.0, abs=0.15)


LAST = [case for case in EXACT if case.output in ("labels", "single") and case.name != "tied"]  # tied: the first layer's weight as well


@pytest.mark.parametrize("case", LAST, ids=str)
def test_the_read_out_is_the_exact_gradient_of_the_last_layer(case: Case) -> None:
    model, loss = case.build()
    exact, found = true_gradient(model, loss), step(loss, model, fg.Readout(), {})
    last = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)][-1]
    torch.testing.assert_close(found, {name: g for name, g in exact.items() if name.rpartition(".")[0] == last}, rtol=1e-10, atol=1e-13)


CLOSED = [(F.mse_loss, rows(6, 3).cos()), (F.binary_cross_entropy_with_logits, (rows(6, 3) > 0).double())]


@pytest.mark.parametrize(("function", "target"), CLOSED, ids=["mse", "bce"])
def test_other_losses_with_a_closed_form_work_as_well(function: Any, target: Tensor) -> None:
    model, loss = linear(), lambda m: function(m(X), target)
    exact = true_gradient(model, loss)
    found = step(loss, model, fg.Readout(), {})
    torch.testing.assert_close(found, {name: exact[name] for name in ("2.weight", "2.bias")}, rtol=1e-10, atol=1e-13)
    state: State = {}
    for seed in range(250):
        found = step(loss, model, fg.LearnedFeedback(), state, seed)
    torch.testing.assert_close(found, exact, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", [fg.LearnedFeedback(), fg.FixedFeedback(), fg.Readout()], ids=lambda method: method.name)
def test_a_loss_without_a_known_error_is_told(method: fg.Estimator) -> None:
    """One of more numbers than it is worth a forward derivative each: 700 examples of 3 outputs."""
    with pytest.raises(ValueError, match=r"let the loss end in F\.cross_entropy, F\.mse_loss or another loss function of torch"):
        step(regress(rows(700, 4)), perceptron().double(), method, {})


@pytest.mark.parametrize(
    "loss", [regress(X), lambda m: F.nll_loss(m(X).log_softmax(1), LABELS), lambda m: F.cross_entropy(m(X) / 2, LABELS) / 4]
)
def test_the_error_of_a_loss_of_few_numbers_is_found_by_its_derivatives(loss: Loss) -> None:
    model = perceptron().double()
    exact = true_gradient(model, loss)
    for method in (fg.LearnedFeedback(), fg.FixedFeedback(), fg.Readout()):
        found = step(loss, model, method, {})
        for name in ("2.weight", "2.bias"):
            torch.testing.assert_close(found[name], exact[name], rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("method", [fg.FixedFeedback(), fg.Readout()], ids=lambda method: method.name)
def test_a_penalty_that_trains_nothing_is_told(method: fg.Estimator) -> None:
    def loss(m: nn.Module) -> Tensor:
        return F.cross_entropy(m(X), LABELS) + m[0].weight.square().sum()

    with pytest.warns(UserWarning, match=r"such as a penalty on weights, trains nothing\. Use the optimizer's weight_decay"):
        step(loss, perceptron().double(), method, {})


@pytest.mark.some(1)
@pytest.mark.parametrize("use", ["direct", "control-variate"])
def test_a_penalty_on_weights_goes_by_its_own_derivative(use: Any) -> None:
    """Its part of the estimate has mean 6 W. Over 4,000 directions its length along that has a standard error of about √(2/4,000) and what
    the rest of the loss adds, 0.05 at most: correct code fails under fewer than one seed in a million."""
    model, weights = perceptron().double(), perceptron().double()
    weights.load_state_dict(model.state_dict())
    penalty = 3.0
    plain, both = (
        (lambda m: F.cross_entropy(m(X), LABELS)),
        (lambda m: F.cross_entropy(m(X), LABELS) + penalty * m[0].weight.square().sum()),
    )
    method = fg.LearnedFeedback(use=use, tangents=4_000, rate=1e-9)
    found = [step(loss, m, method, {}, 3)["0.weight"] for loss, m in ((both, model), (plain, weights))]
    wanted = 2 * penalty * model[0].weight.detach()
    assert (found[0] - found[1] - wanted).norm() < 0.5 * wanted.norm()
    assert float((found[0] - found[1]).flatten() @ wanted.flatten() / wanted.square().sum()) == pytest.approx(1, abs=0.3)
