"""How directions are put together, and errors at the output: projection, control variates, exact outputs, choices layer by layer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.support.cases import EXACT, Case, Loss, classify, convolutional, padded, perceptron, rows, seeded, trained, true_gradient
from torch import Tensor, nn

import forwardgrad as fg
from forwardgrad.calls.passes import Pass, perturbed_pass
from forwardgrad.diagnostics.moments import Moments
from forwardgrad.directions.laws import fork
from forwardgrad.factored import dense
from forwardgrad.forward_mode.rules import losses
from forwardgrad.objective import Objective
from forwardgrad.perturbations.activity import ActivityUse
from forwardgrad.perturbations.base import Entered
from forwardgrad.perturbations.dense import DenseUse
from forwardgrad.perturbations.low_rank import LowRankUse
from forwardgrad.perturbations.norms import PerExampleNorm
from forwardgrad.perturbations.per_example import PerExampleUse

X = rows(6, 4)


def step(loss: Loss, model: nn.Module, method: fg.Estimator, state: dict[str, Tensor] | None = None, seed: int = 0) -> dict[str, Tensor]:
    """The estimate of one step, by the names that the model has."""
    model.zero_grad()
    torch.manual_seed(7)
    fg.estimate_grad_(loss, model, method, generator=seeded(seed), state={} if state is None else state)
    return {name: p.grad for name, p in trained(model).items() if p.grad is not None}


def evaluate(loss: Loss, model: nn.Module, perturb: fg.Perturbation, count: int = 1, seed: int = 0, **options: Any) -> Pass:
    with torch.no_grad():
        seeds = fork(seeded(seed), count)
        return perturbed_pass(Objective(loss, model), perturb, fg.Gaussian(), seeds, torch.device("cpu"), **options)


def flat(tensors: dict[str, Tensor]) -> Tensor:
    return torch.cat([t.flatten() for t in tensors.values()])


# Projection --------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 5, 43])
@pytest.mark.parametrize("perturb", [fg.Dense(), fg.LowRank(2)], ids=lambda p: p.name)
def test_the_projection_is_the_closest_point_of_the_span(perturb: fg.Perturbation, count: int) -> None:
    model, loss = perceptron().double(), classify(X)
    g = flat(true_gradient(model, loss))
    found = flat(step(loss, model, fg.ForwardGradient(count, perturb=perturb, combine="projection")))
    if isinstance(perturb, fg.Dense):
        v = torch.cat([t.flatten(1) for t in fg.Gaussian().draw(trained(model), count, seeded()).values()], dim=1)
    else:
        passed, identity = evaluate(loss, model, perturb, count), torch.eye(count, dtype=torch.float64)
        v = torch.stack(
            [torch.cat([dense(t).flatten() for e in passed.entered for t in e.gradient(k.unsqueeze(1)).values()]) for k in identity]
        )
    closest = v.T @ torch.linalg.lstsq(v.T, g.unsqueeze(1)).solution.squeeze(1)
    torch.testing.assert_close(found, closest, rtol=1e-6, atol=1e-8)
    assert (found - g).norm() <= g.norm() * (1 + 1e-12)
    if count == len(g):  # as many directions as weights: all of the gradient
        torch.testing.assert_close(found, g, rtol=1e-6, atol=1e-8)


# Control variates --------------------------------------------------------------------------------------------------------------------

CONTROLLED = [fg.Dense(), fg.LowRank(), fg.PerExample()]
STEERED = ("mlp", "batch norm train", "group norm", "padded embedding", "tied")


def predicted(model: nn.Module, b: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"average.model.{name}": b[name].clone() for name in trained(model)}


@pytest.mark.parametrize("perturb", CONTROLLED, ids=lambda p: p.name)
@pytest.mark.parametrize("case", [case for case in EXACT if case.name in STEERED], ids=str)
def test_a_control_variate_is_unbiased_for_any_prediction(case: Case, perturb: fg.Perturbation) -> None:
    """17 comparisons of the model and of each tensor with |z| < 4.5, some 1,500 in all: correct code fails under 1 seed of 100."""
    model, loss = case.build()
    exact, generator, objective = true_gradient(model, loss), seeded(3), Objective(loss, model)
    method = fg.ForwardGradient(64, perturb=perturb, control_variate=0.5)
    b = {name: torch.ones_like(g) for name, g in exact.items()}
    moments = Moments(list(exact), list(exact.values()))
    for _ in range(6):
        with torch.no_grad():
            moments.add(*(list(method.estimate(objective, generator, predicted(model, b))[1].values()) for _ in range(2)))
    for part in moments.parts():
        assert part.z < 4.5, part


@pytest.mark.parametrize("perturb", CONTROLLED, ids=lambda p: p.name)
def test_what_a_control_variate_predicts_right_makes_no_noise(perturb: fg.Perturbation) -> None:
    """One layer, and b = g is what every example says: no noise at all; the error of an estimate is as long as g − b is."""
    model, loss = nn.Linear(4, 3).double(), lambda m: F.cross_entropy(m(X[:1].expand(6, 4)), torch.ones(6, dtype=torch.int64))
    method, g = fg.ForwardGradient(perturb=perturb, control_variate=0.5), true_gradient(model, loss)
    noise = []
    for part in (0.0, 0.5, 1.0):
        b = {name: part * t for name, t in g.items()}
        errors = [flat(step(loss, model, method, predicted(model, b), seed)) - flat(g) for seed in range(40)]
        noise.append(float(torch.stack(errors).square().sum(1).mean()))
    assert noise[1] == pytest.approx(noise[0] / 4)
    assert noise[2] < 1e-25


def test_the_average_of_estimates_is_the_next_prediction() -> None:
    model, loss, state = perceptron().double(), classify(X), {}
    method, m = fg.ForwardGradient(control_variate=0.8), torch.zeros(43, dtype=torch.float64)
    g = flat(true_gradient(model, loss))
    for seed in range(3):
        found = flat(step(loss, model, method, state, seed))
        v = torch.cat([t.flatten() for t in fg.Gaussian().draw(trained(model), 1, seeded(seed)).values()])
        torch.testing.assert_close(found, m + (g @ v - m @ v) * v, rtol=1e-10, atol=1e-12)
        m = 0.8 * m + 0.2 * found
        torch.testing.assert_close(flat(state), m, rtol=1e-10, atol=1e-12)


class Switched(nn.Module):
    """One of two layers, as it is told."""

    def __init__(self) -> None:
        super().__init__()
        self.layers, self.which = nn.ModuleList([nn.Linear(4, 3), nn.Linear(4, 3)]), 0

    def forward(self, x: Tensor) -> Tensor:
        return self.layers[self.which](x)


@pytest.mark.parametrize("perturb", [fg.LowRank(), fg.PerExample()], ids=lambda p: p.name)
def test_what_the_loss_does_not_use_has_no_gradient_whatever_was_predicted(perturb: fg.Perturbation) -> None:
    model, loss, state = Switched().double(), classify(X), {}
    method = fg.ForwardGradient(perturb=perturb, control_variate=0.5)
    step(loss, model, method, state)
    model.which = 1
    assert sorted(step(loss, model, method, state)) == ["layers.1.bias", "layers.1.weight"]


# Errors at the output ----------------------------------------------------------------------------------------------------------------

LABELS, Z = torch.tensor([0, 2, 1, 2, 0, 1]), rows(6, 3)
CHANCES, WEIGHT = rows(6, 3).softmax(1), torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64)
IMAGE = torch.tensor([[0, 1], [2, 2]])
CROSS_ENTROPY: dict[str, tuple[Tensor, Tensor, dict[str, Any]]] = {
    "plain": (Z, LABELS, {}),
    "weights": (Z, LABELS, {"weight": WEIGHT}),
    "smoothing": (Z, LABELS, {"label_smoothing": 0.2}),
    "smoothing and weights": (Z, LABELS, {"label_smoothing": 0.2, "weight": WEIGHT}),
    "ignored": (Z, LABELS, {"ignore_index": 2}),
    "ignored, smoothed, weighted": (Z, LABELS, {"ignore_index": 2, "label_smoothing": 0.1, "weight": WEIGHT}),
    "ignored by default": (Z, torch.tensor([0, -100, 1, 2, -100, 1]), {}),
    "chances": (Z, CHANCES, {}),
    "chances, smoothed, weighted": (Z, CHANCES, {"label_smoothing": 0.3, "weight": WEIGHT}),
    "positions": (rows(2, 3, 2), IMAGE, {"weight": WEIGHT}),
    "chances of positions": (rows(2, 3, 2), rows(2, 3, 2).softmax(1), {}),
    "one example": (rows(3), torch.tensor(1), {"weight": WEIGHT, "label_smoothing": 0.1}),
    "one example's chances": (rows(3), rows(3).softmax(0), {}),
}
ERRORS: dict[str, tuple[Any, Tensor, Tensor, dict[str, Any]]] = {
    **{f"cross-entropy, {name}": (F.cross_entropy, *given) for name, given in CROSS_ENTROPY.items()},
    "squared error": (F.mse_loss, Z, rows(6, 3).cos(), {}),
    "squared error of one": (F.mse_loss, rows(3), rows(3).cos(), {}),
    "binary": (F.binary_cross_entropy_with_logits, Z, (rows(6, 3) > 0).double(), {}),
    "binary with chances": (F.binary_cross_entropy_with_logits, Z, CHANCES, {}),
    "binary, weighted": (F.binary_cross_entropy_with_logits, Z, CHANCES, {"weight": WEIGHT, "pos_weight": 2 * WEIGHT}),
    "binary of probabilities": (F.binary_cross_entropy, CHANCES, (rows(6, 3) > 0).double(), {"weight": WEIGHT}),
    "absolute error": (F.l1_loss, Z, rows(6, 3).cos(), {}),
    "smooth": (F.smooth_l1_loss, Z, rows(6, 3).cos(), {"beta": 0.3}),
    "smooth without an edge": (F.smooth_l1_loss, Z, rows(6, 3).cos(), {"beta": 0.0}),
    "huber": (F.huber_loss, Z, rows(6, 3).cos(), {"delta": 0.3}),
    "log-probabilities": (F.nll_loss, Z, LABELS, {}),
    "log-probabilities, weighted and ignored": (F.nll_loss, Z, LABELS, {"weight": WEIGHT, "ignore_index": 2}),
    "log-probabilities of positions": (F.nll_loss, rows(2, 3, 2), IMAGE, {"weight": WEIGHT}),
}


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize(("function", "z", "target", "options"), ERRORS.values(), ids=ERRORS)
def test_errors_in_closed_form_are_those_of_autograd(function: Any, z: Tensor, target: Tensor, options: Any, reduction: str) -> None:
    known = losses.bind(function, (z, target), {**options, "reduction": reduction})
    assert known is not None
    leaf = z.clone().requires_grad_()
    (expected,) = torch.autograd.grad(function(leaf, target, **options, reduction=reduction).mean(), leaf)
    torch.testing.assert_close(known.error(z), expected, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize(
    ("function", "target", "options"),
    [
        (F.mse_loss, Z[:, :1], {}),
        (F.mse_loss, Z, {"weight": Z.abs()}),
        (F.huber_loss, Z, {"weight": Z.abs()}),
        (F.cross_entropy, LABELS, {"size_average": False}),
        (F.poisson_nll_loss, Z.exp(), {}),
    ],
)
def test_what_has_no_closed_form_is_not_taken_for_one(function: Any, target: Tensor, options: Any) -> None:
    assert losses.bind(function, (Z, target), options) is None


def test_errors_of_outputs_of_low_precision_are_in_float32() -> None:
    z = rows(6, 3, dtype=torch.bfloat16)
    known = losses.bind(F.cross_entropy, (z, LABELS), {})
    assert known is not None
    exact = (z.double().softmax(1) - F.one_hot(LABELS)) / 6
    torch.testing.assert_close(known.error(z), exact.float(), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("perturb", [fg.Activity(), fg.Activity(masked=False), fg.Cheapest()], ids=repr)
@pytest.mark.parametrize("case", [case for case in EXACT if case.output in ("labels", "single")], ids=str)
def test_an_exact_output_is_the_exact_gradient_of_the_last_layer(case: Case, perturb: fg.Perturbation) -> None:
    model, loss = case.build()
    exact = true_gradient(model, loss)
    found = step(loss, model, fg.ForwardGradient(perturb=perturb, exact_output=True))
    last = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)][-1]
    own = [name for name in exact if name.rpartition(".")[0] == last and case.name != "tied"]  # tied: used by the embedding as well
    assert own or case.name == "tied"
    for name in own:
        torch.testing.assert_close(found[name], exact[name], rtol=1e-10, atol=1e-13)


CHANGED: list[Loss] = [
    lambda m: F.cross_entropy(2 * m(X), LABELS),
    lambda m: 2 * F.cross_entropy(m(X), LABELS),
    lambda m: (y := m(X)).square().mean() + F.cross_entropy(y, LABELS),
    lambda m: F.cross_entropy(y := m(X), LABELS) + y.square().mean(),
]


def test_an_output_that_is_changed_or_used_again_is_exact_and_the_next_loss_finds_the_model_as_ever() -> None:
    """What is learned of a model is remembered for later steps, but not for another loss or perturbation."""
    fresh, used, method = perceptron().double(), perceptron().double(), fg.ForwardGradient(perturb=fg.Activity(), exact_output=True)
    used.load_state_dict(fresh.state_dict())
    for loss in CHANGED:
        exact = true_gradient(used, loss)
        assert evaluate(loss, used, fg.Activity(), exact_output=True).exact
        found = step(loss, used, method)
        torch.testing.assert_close(found["2.weight"], exact["2.weight"], rtol=1e-10, atol=1e-13)
        assert (found["0.weight"] - exact["0.weight"]).norm() > 0.01
        torch.testing.assert_close(step(loss, used, method), found, rtol=0, atol=0)
    torch.testing.assert_close(step(classify(X), used, method), step(classify(X), fresh, method), rtol=0, atol=0)
    assert len(evaluate(classify(X), used, fg.Activity(), exact_output=True).exact) == 1


def test_both_of_two_heads_are_exact() -> None:
    model = nn.ModuleList([nn.Linear(4, 5), nn.Linear(5, 3), nn.Linear(5, 2)]).double()

    def loss(m: nn.ModuleList) -> Tensor:
        h = m[0](X).relu()
        return F.cross_entropy(m[1](h), LABELS) + 0.5 * F.mse_loss(m[2](h), X[:, :2])

    exact = true_gradient(model, loss)
    found = step(loss, model, fg.ForwardGradient(perturb=fg.Activity(), exact_output=True))
    for name in ("1.weight", "1.bias", "2.weight", "2.bias"):
        torch.testing.assert_close(found[name], exact[name], rtol=1e-10, atol=1e-13)


# Layer by layer ----------------------------------------------------------------------------------------------------------------------


def kinds(model: nn.Module, loss: Loss, overrides: dict[str, str]) -> dict[str, type[Entered]]:
    found = evaluate(loss, model.double(), fg.Cheapest(overrides))
    return {name.removeprefix("model."): type(entered) for entered in found.entered for name in entered.names}


def test_the_cheapest_is_weights_where_there_are_fewer_than_active_units() -> None:
    wide = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(32, 3))  # 18 weights or 16 units; 96 weights or 1.5
    image = nn.Sequential(nn.Conv2d(1, 2, 3), nn.GroupNorm(1, 2), nn.ReLU(), nn.Flatten(), nn.Linear(72, 3))  # 18 or 36 units
    expected = {"0.weight": ActivityUse, "0.bias": ActivityUse, "3.weight": ActivityUse, "3.bias": ActivityUse}
    assert kinds(wide, classify(rows(3, 1, 6, 6)), {}) == expected
    expected = {
        "0.weight": PerExampleUse,
        "0.bias": PerExampleUse,
        "1.weight": PerExampleNorm,
        "1.bias": PerExampleNorm,
        "4.weight": ActivityUse,
    }
    assert kinds(image, classify(rows(3, 1, 8, 8)), {}) == {**expected, "4.bias": ActivityUse}


def test_overrides_count_in_their_order_and_by_the_names_of_weights() -> None:
    given = {"0.weight": "low-rank", "model.3.*": "dense", "*": "per-example", "6.weight": "activity"}
    found = kinds(convolutional(), classify(rows(3, 1, 6, 6)), given)
    assert [found[f"{i}.weight"] for i in (0, 3, 6)] == [LowRankUse, DenseUse, PerExampleUse]
    assert kinds(padded()[0], classify(torch.tensor([[0, 1], [2, 2]])), {"0.*": "low-rank"})["0.weight"] is LowRankUse
