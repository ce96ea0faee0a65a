"""What every estimator promises of every model: list of methods × list of cases."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
from collections import Counter
from typing import Any

import pytest
import torch
from tests.support.cases import CASES, EXACT, Case, Loss, perceptron, regress, rows, seeded, trained, true_gradient
from torch import nn
from torch.func import functional_call, jvp

import forwardgrad as fg
from forwardgrad.testing import promises, standing
from forwardgrad.testing.evidence import PromiseEvidence, gather, gradients, packed
from forwardgrad.testing.evidence import estimate as estimated

PASSES: dict[fg.Estimator, int] = {  # K tangent passes, and one primal pass a chunk; two evaluations a tangent of zeroth order
    fg.Backprop(): 1,
    fg.Backprop(checkpoint=True): 2,
    fg.ForwardGradient(): 2,
    fg.ForwardGradient(tangents=3): 4,
    fg.ForwardGradient(tangents=3, law=fg.Sphere(), chunk_size=1): 6,
    fg.ForwardGradient(tangents=3, law=fg.Rademacher(), clip=0.5, chunk_size=2): 5,
    fg.ForwardGradient(tangents=3, law=fg.Orthogonal(), chunk_size=2): 5,
    fg.ForwardGradient(tangents=3, combine="projection"): 4,
    fg.ForwardGradient(tangents=2, control_variate=0.9, chunk_size=1): 4,
    fg.ForwardGradient(perturb=fg.LowRank()): 2,
    fg.ForwardGradient(tangents=3, law=fg.Sphere(), chunk_size=2, perturb=fg.LowRank(3)): 5,
    fg.ForwardGradient(tangents=3, perturb=fg.LowRank(), combine="projection"): 4,
    fg.ForwardGradient(perturb=fg.Sparse(0.5)): 2,
    fg.ForwardGradient(perturb=fg.PerExample()): 2,
    fg.ForwardGradient(tangents=3, law=fg.Rademacher(), chunk_size=2, clip=0.5, perturb=fg.PerExample(), control_variate=0.5): 5,
    fg.ForwardGradient(perturb=fg.Activity()): 2,
    fg.ForwardGradient(tangents=3, law=fg.Sphere(), chunk_size=2, perturb=fg.Activity(masked=False)): 5,
    fg.ForwardGradient(tangents=2, law=fg.Rademacher(), perturb=fg.Activity(), exact_output=True): 3,
    fg.ForwardGradient(perturb=fg.Cheapest()): 2,
    fg.ForwardGradient(tangents=2, perturb=fg.Cheapest({"*bias": "dense", "0.*": "low-rank"}), exact_output=True): 3,
    fg.ForwardGradient(perturb=fg.Informed(2)): 2,
    fg.ForwardGradient(tangents=3, chunk_size=2, perturb=fg.SplitWeights(2, fg.LowRank())): 5,
    fg.LearnedFeedback(): 2,
    fg.LearnedFeedback("average", use="control-variate", tangents=2, masked=False): 3,
    fg.LocalLosses(): 2,
    fg.LocalLosses(head="pooled", similarity=0.5, tangents=2, law=fg.Gaussian()): 3,
    fg.LocalLosses(feedback=True): 2,
    fg.LocalLosses(feedback=True, classes=2): 2,
    fg.FixedFeedback(): 1,
    fg.Readout(): 1,
    fg.ZerothOrder(epsilon=1e-4): 2,
    fg.ZerothOrder(epsilon=1e-4, in_place=True): 2,
    fg.ZerothOrder(epsilon=1e-4, tangents=3, law=fg.Rademacher()): 6,
    fg.ZerothOrder(epsilon=1e-4, tangents=2, sides="one", chunk_size=None, perturb=fg.Sparse(0.5)): 3,
    fg.ZerothOrder(epsilon=1e-4, perturb=fg.LowRank(2)): 2,
    fg.ZerothOrder(epsilon=1e-4, tangents=3, law=fg.Rademacher(), perturb=fg.LowRank(), sides="one", chunk_size=None, normalize=True): 4,
    fg.ZerothOrder(epsilon=1e-4, tangents=3, perturb=fg.LowRank(1, period=2), chunk_size=2, maximize=True): 6,
    fg.ZerothOrder(epsilon=1e-4, tangents=2, perturb=fg.PerExample()): 4,
    fg.Guess(): 3,
    fg.Guess(momentum=0.5, law=fg.Sphere(), chunk_size=1): 4,
    fg.Guess("given", complement=False): 2,
}
METHODS = list(PASSES)
NO_BACKWARD = [method for method in METHODS if not isinstance(method, fg.Backprop)]


LIMITS: dict[type[fg.Estimator], tuple[str, ...]] = {  # what they are tested on: the error of other losses is found, see test_feedback
    fg.LearnedFeedback: ("labels", "reshaped"),
    fg.FixedFeedback: ("labels", "reshaped"),
    fg.LocalLosses: ("labels",),
    fg.Readout: ("labels", "single"),
}


TAGGED = "tagged words"  # a class for every word: in the limits of local losses, see test_tokens for what they refuse of it


def applies(method: fg.Estimator, case: Case) -> bool:
    """Whether the estimator is tested on the case: what it knows of the model's output."""
    if isinstance(method, fg.ZerothOrder) and method.normalize and case.name == "autocast":
        return False  # in bfloat16 its losses may all be one number, which has no spread to divide by
    if isinstance(method, fg.LocalLosses) and case.name == TAGGED:
        return method.similarity == 0
    return type(method) not in LIMITS or case.output in LIMITS[type(method)]


def learns(method: fg.Estimator, module: nn.Module, model: nn.Module) -> bool:
    """Whether the parameters of a module get a gradient: not everything does where errors are sent by a matrix, or not at all."""
    if isinstance(method, fg.Readout):
        return module is [m for m in model.modules() if isinstance(m, nn.Linear)][-1]
    even = isinstance(module, nn.Conv2d) and module.kernel_size == (2, 2) and module.padding == "same"  # has no rule
    ruled = type(module) in (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Embedding) and not even
    return ruled or not isinstance(method, fg.FixedFeedback)


def short(method: fg.Estimator) -> str:
    """The name, and the fields that are not what they are by default."""
    fields = {field.name: (getattr(method, field.name), field.default) for field in dataclasses.fields(method)}
    given = ",".join(f"{name}={value!r}" for name, (value, default) in fields.items() if value != default)
    return f"{method.name}({given.replace(' ', '')})"


PAIRS = [(method, case) for case in CASES for method in METHODS if applies(method, case)]
LOCAL = [method for method in METHODS if isinstance(method, fg.LocalLosses)]
OUTSIDE = [(method, case) for case in CASES for method in LOCAL if case.name != TAGGED and not applies(method, case)]


def named(which: list[tuple[fg.Estimator, Case]]) -> list[str]:
    return [f"{case}-{short(method)}" for method, case in which]


methods = pytest.mark.parametrize("method", METHODS, ids=short)
no_backward = pytest.mark.parametrize("method", NO_BACKWARD, ids=short)
cases = pytest.mark.parametrize("case", CASES, ids=str)


ROUGH = ("bfloat16", "autocast")


def fitting(method: fg.Estimator, model: nn.Module) -> fg.Estimator:
    """The method with numbers that fit the precision of the model."""
    if isinstance(method, fg.ZerothOrder) and next(model.parameters()).dtype == torch.bfloat16:
        return dataclasses.replace(method, epsilon=0.1)  # anything much smaller drowns in the rounding of the loss to 8 bits
    return method


def estimate(method: fg.Estimator, model: nn.Module, loss: Loss, seed: int = 0) -> fg.Estimate:
    return estimated(fitting(method, model), model, loss, seed)


def tolerance(method: fg.Estimator, exact: float) -> float:
    """How far the loss and the buffers may be from those of an ordinary pass: the mean of two evaluations at ±ε is off by O(ε²)."""
    return 1e3 * method.epsilon**2 if isinstance(method, fg.ZerothOrder) else exact


def test_every_estimator_and_every_perturbation_is_tested() -> None:
    assert {type(method) for method in METHODS} == set(fg.ESTIMATORS)
    assert {type(method.perturb) for method in METHODS if isinstance(method, fg.ForwardGradient)} == set(fg.PERTURBATIONS)


@pytest.mark.parametrize(("method", "case"), OUTSIDE, ids=named(OUTSIDE))
def test_a_loss_outside_the_limits_is_told_and_gives_no_gradient(method: fg.Estimator, case: Case) -> None:
    model, loss = case.build()
    with pytest.raises(ValueError, match=r"needs .*(F\.cross_entropy|the error at the model's output)"):
        estimate(method, model, loss)
    assert gradients(model) == {}


@pytest.fixture(scope="module")
def promised(request: pytest.FixtureRequest) -> PromiseEvidence:
    """What the tests of a method and a case look at: the estimates take most of their time, and are made once for all of them."""
    method, case = request.param
    assert torch.is_grad_enabled()
    return gather(fitting(method, case.build()[0]), case)


pytestmark = pytest.mark.filterwarnings("ignore:directions are evaluated one after another under this loss:UserWarning")

EACH, MORE, IN_ALL = 2, 4, 10
"""How many pairs each method and each case is met in by `make test`, by that and `make test-full`, and by `make test-all`."""


def marked(pairs: list[tuple[fg.Estimator, Case]]) -> list[Any]:
    """The pairs up to IN_ALL, marked by how many came before them: whole pairs, as the tests of a pair share its estimates."""
    met: Counter[str] = Counter()
    marks: dict[str, Any] = {}
    for name in sorted(named(pairs), key=lambda name: hashlib.sha256(name.encode()).digest()):
        case, _, method = name.partition("-")
        fewest = min(met[case], met[method])
        if fewest < IN_ALL:
            marks[name] = () if fewest < EACH else pytest.mark.full if fewest < MORE else pytest.mark.rest
        met.update([case, method])
    return [pytest.param(pair, id=name, marks=marks[name]) for pair, name in zip(pairs, named(pairs), strict=True) if name in marks]


every_pair = pytest.mark.parametrize("promised", marked(PAIRS), indirect=True, scope="module")


@every_pair
def test_fills_grad_and_adds_to_it(promised: PromiseEvidence) -> None:
    model = promised.same.model
    reached = {id(p) for module in model.modules() if learns(promised.estimator, module, model) for p in module.parameters(recurse=False)}
    assert all(isinstance(p, nn.Parameter) for p in model.parameters())
    promises.fills_grad_and_adds_to_it(promised, lambda p: id(p) in reached)


@every_pair
def test_same_seed_same_bits(promised: PromiseEvidence) -> None:
    promises.repeats_bit_for_bit(promised)
    first, other = promises.numbers(promised.first), promises.numbers(promised.other)
    equal = all(torch.equal(a, b) for a, b in zip(first, other, strict=True))
    if not isinstance(promised.estimator, fg.LocalLosses):  # its classifiers are zeros at first, and so are its estimates
        assert equal == isinstance(promised.estimator, (fg.Backprop, fg.Readout))


@every_pair
def test_the_loss_and_the_global_generator_are_those_of_one_ordinary_forward_pass(promised: PromiseEvidence) -> None:
    method, case, record = promised.estimator, promised.case, promised.first.record
    close = tolerance(method, 1e-12) if case.exact else 0.2 if isinstance(method, fg.ZerothOrder) and case.name in ROUGH else None
    promises.passes_as_an_ordinary_forward_pass(promised, close)
    assert record.derivatives.shape == (getattr(method, "tangents", 1 + method.complement if isinstance(method, fg.Guess) else 0),)
    assert record.forward_passes == PASSES[dataclasses.replace(method, epsilon=1e-4) if isinstance(method, fg.ZerothOrder) else method]


@every_pair
def test_buffers_are_updated_as_by_one_ordinary_forward_pass(promised: PromiseEvidence) -> None:
    promises.updates_buffers_once(promised, tolerance(promised.estimator, 1e-13))


@every_pair
def test_nothing_is_saved_for_a_backward_pass(promised: PromiseEvidence) -> None:
    if isinstance(promised.estimator, fg.Backprop):
        assert promised.first.saved is not None
        assert promised.first.saved[1] > 0  # the counter counts
    else:
        promises.saves_nothing_for_a_backward_pass(promised)
        assert promised.first.saved == promised.added.saved == (0, 0)


def test_the_counter_sees_what_forward_mode_would_save_with_live_parameters_and_gradients_enabled() -> None:
    model, loss = perceptron().double(), regress(rows(6, 4))
    live = dict(model.named_parameters())
    tangents = {name: torch.ones_like(p) for name, p in live.items()}
    _, saved = packed(lambda: jvp(lambda ps: (functional_call(model, ps, rows(6, 4)) - 0.5).square().mean(), (live,), (tangents,)))
    assert saved is not None
    assert saved[1] > 0
    assert packed(lambda: fg.estimate_grad_(loss, model, generator=seeded()))[1] == (0, 0)


CHUNKED = [fg.Dense(), fg.LowRank(2), fg.PerExample(), fg.Activity(), fg.Cheapest(), fg.Informed(), fg.SplitWeights(3, fg.LowRank())]


@pytest.mark.some(10)
@pytest.mark.product
@pytest.mark.parametrize("perturb", CHUNKED, ids=lambda p: p.name)
@pytest.mark.parametrize("case", EXACT, ids=str)
def test_chunks_make_no_difference_beyond_rounding(case: Case, perturb: fg.Perturbation) -> None:
    found = []
    for chunk_size in (None, 1, 2, 3, 4):
        model, loss = case.build()
        record = estimate(fg.ForwardGradient(tangents=3, clip=2.0, chunk_size=chunk_size, perturb=perturb), model, loss)
        found.append((record.derivatives, gradients(model)))
    for chunked in found[1:]:
        torch.testing.assert_close(chunked, found[0], rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("case", EXACT, ids=str)
def test_estimate_is_the_mean_of_clipped_derivatives_times_tangents(case: Case) -> None:
    model, loss = case.build()
    exact, clip = true_gradient(model, loss), 0.3
    tangents = fg.Gaussian().draw(trained(model), 3, seeded(5))
    d = sum((exact[name] * v).reshape(3, -1).sum(dim=1) for name, v in tangents.items())
    expected = {name: torch.tensordot(d.clamp(-clip, clip), v, dims=1) / 3 for name, v in tangents.items()}
    record = estimate(fg.ForwardGradient(tangents=3, clip=clip), model, loss, seed=5)
    torch.testing.assert_close(record.derivatives, d, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(gradients(model), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("checkpoint", [False, True])
@cases
def test_backprop_is_loss_backward(case: Case, checkpoint: bool) -> None:
    model, loss = case.build()
    plain = copy.deepcopy(model)
    torch.manual_seed(7)
    loss(plain).mean().backward()
    estimate(fg.Backprop(checkpoint), model, loss)
    torch.testing.assert_close(gradients(model), gradients(plain), rtol=0, atol=0)


@pytest.mark.some(8)
@cases
def test_estimators_can_take_turns(case: Case) -> None:
    """None leaves anything behind that another, or plain torch, would trip over."""
    (model, loss), (fresh, _) = case.build(), case.build()
    for method in METHODS:
        if applies(method, case) and not getattr(method, "in_place", False):  # which moves a parameter's last bit
            estimate(method, model, loss)
    model.zero_grad()
    estimate(fg.Backprop(), model, loss)
    estimate(fg.Backprop(), fresh, loss)
    torch.testing.assert_close(gradients(model), gradients(fresh))
    assert list(model.state_dict()) == list(copy.deepcopy(model).state_dict())


@methods
def test_what_is_remembered_is_in_the_state(method: fg.Estimator) -> None:
    standing.remembers_in_the_state(method, *CASES[0].build())


@methods
@pytest.mark.parametrize("outer", standing.CONTEXTS)
def test_the_context_of_the_caller_makes_no_difference(method: fg.Estimator, outer: str) -> None:
    standing.ignores_the_callers_context(method, CASES[0], outer)


@pytest.mark.parametrize("method", [m for m in NO_BACKWARD if type(m) not in LIMITS], ids=short)
def test_live_parameters_outside_what_is_trained_are_not_recorded_either(method: fg.Estimator) -> None:
    standing.records_nothing_outside_what_is_trained(method)


@methods
def test_the_form_of_an_estimate_and_what_it_leaves_in_a_model(method: fg.Estimator) -> None:
    promises.returns_what_grad_needs(method, CASES[0])
    standing.leaves_no_trace(method, CASES[0])
