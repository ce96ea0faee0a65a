"""fg.check: correct estimators pass, planted faults are found and named, and the model is afterwards what it was.

Statistics have fixed seeds. A correct estimator is faulted in less than 1 of 1,000 checks (`fg.check` says how); that a planted fault is
missed is less likely still, as each lies far above its threshold.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.estimators.test_contract import METHODS, applies, short
from tests.support.cases import CASES, Loss, classify, perceptron, rows, seeded
from torch import Generator, Tensor, nn

import forwardgrad as fg
from forwardgrad.diagnostics.checks.bias import convicted
from forwardgrad.diagnostics.moments import Moments
from forwardgrad.forward_mode.derivative import directional_derivatives
from forwardgrad.objective import Objective

LAYER = "2.weight"


def found(check: fg.Check) -> dict[str, str]:
    return {finding.name: finding.found for finding in check.faults}


def deep() -> tuple[nn.Module, Loss]:
    """Several layers of equal shape, and buffers."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layers = [nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3)]
        return nn.Sequential(*layers).double(), classify(rows(16, 6))


@dataclass(frozen=True)
class Own(fg.Estimator):
    """A forward gradient with a fault."""

    name = "own"

    fault: str = ""
    tangents: int = 1

    @property
    def unbiased(self) -> bool:
        return True

    def tangents_of(self, parameters: Mapping[str, Tensor], generator: Generator) -> dict[str, Tensor]:
        seed = int(torch.randint(2**31, (1,), generator=generator))
        sources = {
            "same shape": lambda p: seeded(seed + p.numel()),
            "one seed": lambda p: seeded(seed),
            "same step": lambda p: seeded(p.data_ptr()),
            "one layer": lambda p: seeded(5) if p is parameters[f"model.{LAYER}"] else generator,
            "global": lambda p: torch.default_generator,
        }
        count = 1 if self.fault == "same tangents" else self.tangents
        drawn = {}
        for name, p in parameters.items():
            source = sources.get(self.fault, lambda p: generator)(p)
            drawn[name] = torch.randn(count, *p.shape, dtype=p.dtype, generator=source).expand(self.tangents, *p.shape)
        return drawn

    def estimate(self, objective: Objective, generator: Generator | None, state: dict[str, Tensor]) -> Any:
        assert generator is not None
        tangents = self.tangents_of(objective.parameters, generator)
        if self.fault == "buffers":
            directional_derivatives(objective, tangents)
        loss, d = directional_derivatives(objective, tangents)
        gradients: dict[str, Tensor | None] = {name: torch.tensordot(d / self.tangents, v, dims=1) for name, v in tangents.items()}
        layer, parameter = f"model.{LAYER}", objective.parameters[f"model.{LAYER}"]
        if self.fault == "scale":
            gradients[layer] = 0.9 * gradients[layer]
        elif self.fault in ("missing", "zero"):
            gradients[layer] = None if self.fault == "missing" else torch.zeros_like(parameter)
        elif self.fault == "shape":
            gradients[layer] = gradients[layer].flatten()
        elif self.fault == "saves":
            with torch.enable_grad():
                objective.live()
        elif self.fault == "writes .grad":
            parameter.grad = gradients[layer]
        elif self.fault == "writes weights":
            parameter.data.add_(0.1)
        elif self.fault == "loss":
            loss = 2 * loss
        return fg.Estimate(loss, d, self.tangents + 1), gradients


@pytest.mark.parametrize("tangents", [1, 4])
def test_the_estimator_without_a_fault_passes(tangents: int) -> None:
    model, loss = deep()
    found = fg.check(loss, model, Own(tangents=tangents), repeats=200)
    assert found.passed, str(found)
    assert {finding.name for finding in found.findings if finding.status == "note"} == {"slow paths"}  # batch norm in training
    assert found.repeats == 200


PLANTED = [
    (Own("same shape"), 60, "between parameters", "2.weight and 5.weight"),
    (Own("same shape", tangents=8), 60, "between parameters", "2.weight and 5.weight"),
    (Own("one seed"), 60, "between parameters", "0.weight, 2.weight and 5.weight"),
    (Own("same step"), 20, "between steps", "its directions never change"),
    (Own("one layer"), 60, "between steps", LAYER),
    (Own("one layer", tangents=4), 60, "between steps", LAYER),
    (Own("same tangents", tangents=3), 60, "between tangents", "1 and 2, 1 and 3 and 2 and 3"),
    (Own("missing"), 10, "missing", LAYER),
    (Own("zero"), 10, "missing", LAYER),
    (Own("scale", tangents=64), 1200, "bias", f"{LAYER} (length 0.9"),
    (Own("buffers"), 10, "buffers", "3.running_mean, 3.running_var and 3.num_batches_tracked"),
    (Own("global"), 10, "global random state", "draws from it"),
    (Own("saves"), 10, "backward pass", "bytes were saved"),
    (Own("writes .grad"), 10, "parameters", f"{LAYER}.grad"),
    (Own("writes weights"), 10, "parameters", LAYER),
    (Own("shape"), 10, "estimate", f"{LAYER} has shape (64,), not (8, 8)"),
    (Own("loss"), 10, "loss", "the record says"),
]


@pytest.mark.parametrize(("estimator", "repeats", "name", "words"), PLANTED, ids=[f"{e.fault} {e.tangents}" for e, *_ in PLANTED])
def test_a_planted_fault_is_found_and_named(estimator: Own, repeats: int, name: str, words: str) -> None:
    model, loss = deep()
    before, gradients = copy.deepcopy(model.state_dict()), [p.grad for p in model.parameters()]
    check = fg.check(loss, model, estimator, repeats=repeats)
    assert not check.passed
    assert name in found(check), str(check)
    if name == "bias":
        assert LAYER in found(check)[name]
        assert "0.weight" not in found(check)[name]
    else:
        assert words in found(check)[name], found(check)[name]
    torch.testing.assert_close(dict(model.state_dict()), dict(before), rtol=0, atol=0)
    assert [p.grad for p in model.parameters()] == gradients


SOME = [CASES[i] for i in (0, 1, 3, 6, 10, 13)]  # mlp, cnn, tied, batch norm, attention with dropout, lstm
PAIRS = [(method, case) for case in SOME for method in METHODS if applies(method, case)]


@pytest.mark.some(14)
@pytest.mark.filterwarnings("ignore:directions are evaluated one after another:UserWarning")  # vmap cannot follow an LSTM
@pytest.mark.product
@pytest.mark.parametrize(("method", "case"), PAIRS, ids=[f"{case}-{short(method)}" for method, case in PAIRS])
def test_every_estimator_of_the_library_passes_and_leaves_the_model_as_it_was(method: fg.Estimator, case: Any) -> None:
    """20 estimates each: what is planted above is found in as many or in 60, and bias is `test_quality`'s, which has many more."""
    model, loss = case.build()
    for i, p in enumerate(model.parameters()):
        p.grad = torch.full_like(p, 3.0) if i % 2 else None
    twin, generator, state = copy.deepcopy(model), seeded(3), dict[str, Tensor]()
    torch.manual_seed(7)
    random, own = torch.get_rng_state(), generator.get_state()
    check = fg.check(loss, model, method, generator=generator, state=state if method.stateful else None, repeats=20)
    assert check.passed, str(check)
    assert torch.equal(torch.get_rng_state(), random)
    assert torch.equal(generator.get_state(), own)
    assert state == {}
    torch.testing.assert_close(dict(model.state_dict()), dict(twin.state_dict()), rtol=0, atol=0)
    for i, p in enumerate(model.parameters()):
        assert (p.grad is not None) == bool(i % 2)
        assert p.grad is None or torch.equal(p.grad, torch.full_like(p, 3.0))


@pytest.mark.full
def test_bias_is_not_seen_where_there_is_none() -> None:
    """200 streams of 100 estimates of one Gaussian tangent, and where a tensor moves in one step of twenty. A false alarm has a chance of
    1e-4 in each (`forwardgrad.diagnostics.checks.bias`), two of them of less than 1e-3 over all."""
    generator, alarms = seeded(1), 0
    g = [rows(4), rows(3, 5).flatten()]
    for stream in range(200):
        moments = Moments(["a", "b"], g)
        for _ in range(50):
            pair = []
            for _ in range(2):
                v = [torch.randn(len(t), dtype=torch.float64, generator=generator) for t in g]
                moves = 20.0 * (torch.rand((), generator=generator) < 0.05) if stream % 2 else 1.0
                pair.append([moves * sum(t @ w for t, w in zip(g, v, strict=True)) * w for w in v])
            moments.add(*pair)
        alarms += bool(convicted(moments, moments.parts(), 1e-6))
    assert alarms < 2


class Custom(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * x

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


class Product(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.scatter_reduce(1, torch.zeros_like(x, dtype=torch.int64), x, "prod")


def ctc(model: nn.Module) -> Tensor:
    lengths = torch.tensor([8, 8]), torch.tensor([2, 2])
    return F.ctc_loss(model(rows(8, 2, 4)).log_softmax(2), torch.tensor([[1, 2], [3, 1]]), *lengths)


RULELESS: dict[str, tuple[nn.Module, Loss, str]] = {
    "scatter_reduce": (
        nn.Sequential(nn.Linear(4, 3), Product()),
        lambda m: m(rows(6, 4)).mean(),
        "scatter_reduce has no rule for forward mode in torch in module '1' (Product)",
    ),
    "ctc": (nn.Linear(4, 5), ctc, "ctc_loss has no rule"),
    "custom": (nn.Linear(4, 3), lambda m: Custom.apply(m(rows(6, 4))).mean(), "the autograd function Custom has no rule for forward mode"),
}


@pytest.mark.parametrize("method", [fg.ForwardGradient(), fg.ForwardGradient(tangents=2, perturb=fg.Activity())], ids=short)
@pytest.mark.parametrize("case", RULELESS)
def test_what_has_no_forward_rule_is_named_with_what_works(case: str, method: fg.Estimator) -> None:
    model, loss, words = RULELESS[case]
    check = fg.check(loss, copy.deepcopy(model).double(), method, repeats=10)
    (fault,) = check.faults
    assert fault.name == "forward rule"
    assert words in fault.found
    assert "with forwardgrad.differences()" in fault.remedy
    assert "fg.ZerothOrder(), which needs no derivative and works here" in fault.remedy
    assert "\n" not in fault.found + fault.remedy


def test_an_error_of_the_loss_or_the_estimator_is_a_finding() -> None:
    model = perceptron().double()
    (fault,) = fg.check(lambda m: m(rows(6, 3)).mean(), model, fg.ForwardGradient(), repeats=10).faults
    assert fault.name == "forward pass"
    (fault,) = fg.check(lambda m: m(rows(6, 4)).exp().mean(), model, fg.LocalLosses(), repeats=10).faults
    assert (fault.name, "needs" in fault.found) == ("estimate", True)
    (fault,) = fg.check(lambda m: m(rows(6, 4)).detach().mean(), model, fg.ForwardGradient(), repeats=10).faults
    assert "carries no tangent" in fault.found


@pytest.mark.parametrize(
    ("behind", "status", "words"),
    [
        (lambda h: h.cumsum(1), "note", "torch's dual numbers carry cumsum (there is no rule for it): right, and slower than a rule"),
        (lambda h: h.tanh(), "ok", "no call goes through torch's dual numbers"),
    ],
)
def test_slow_paths_are_told(behind: Callable[[Tensor], Tensor], status: str, words: str) -> None:
    found = fg.check(lambda m: F.mse_loss(behind(m(rows(6, 4))), rows(6, 3)), perceptron().double(), fg.ForwardGradient(), repeats=10)
    (row,) = [finding for finding in found.findings if finding.name == "slow paths"]
    assert (row.status, row.found) == (status, words)


def test_layers_that_are_scored_by_the_whole_loss_are_named() -> None:
    model, loss = deep()
    rows_of = {
        perturb.name: {finding.name: finding for finding in fg.check(loss, model, fg.ForwardGradient(perturb=perturb), repeats=10).findings}
        for perturb in (fg.Activity(), fg.LowRank())
    }
    row = rows_of["activity"]["examples"]
    assert (row.status, row.found.startswith("examples meet: 0.weight, 0.bias and 2.weight, 2.bias are scored by")) == ("note", True), row
    assert rows_of["low-rank"]["examples"].status == "ok"


def test_parts_that_are_not_the_estimate_are_found() -> None:
    """An estimator that overrides one and inherits the other: the step of plain SGD would not be that of `estimate_grad_`."""

    class Doubled(fg.ForwardGradient):
        def estimate(self, objective: Objective, generator: Generator | None, state: dict[str, Tensor]) -> Any:
            record, gradients = super().estimate(objective, generator, state)
            return record, {name: None if g is None else 2 * g for name, g in gradients.items()}

    model, loss = deep()
    assert "by 0.5 of its norm" in found(fg.check(loss, model, Doubled(), repeats=10))["parts"]


def test_a_loss_under_which_saved_tensors_cannot_be_seen_is_told_in_a_note() -> None:
    """torch.func.grad inside the loss refuses the hooks that count what is saved."""

    def loss(model: nn.Module) -> Tensor:
        return torch.func.grad(lambda x: model(x).square().sum())(rows(6, 4)).square().mean()

    check = fg.check(loss, perceptron().double(), fg.ForwardGradient(), repeats=10)
    assert check.passed, str(check)
    (row,) = [finding for finding in check.findings if finding.name == "backward pass"]
    assert (row.status, "torch.func" in row.found) == ("note", True)


def test_a_lie_about_bias_on_a_model_is_found_in_the_layer_that_has_it() -> None:
    """A clip shortens the estimate; one layer's alone is clipped here, and the estimator says that it is unbiased."""

    class Clipped(Own):
        def estimate(self, objective: Objective, generator: Generator | None, state: dict[str, Tensor]) -> Any:
            record, gradients = super().estimate(objective, generator, state)
            layer = gradients[f"model.{LAYER}"]
            return record, {**gradients, f"model.{LAYER}": layer.clamp(-0.05, 0.05)}

    model, loss = deep()
    assert LAYER in found(fg.check(loss, model, Clipped(), repeats=600))["bias"]


MISTAKES: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"estimator": "forward"}, TypeError, "the estimator must be an object such as ForwardGradient"),
    ({"seconds": 0}, ValueError, "seconds must be a number above 0, not 0"),
    ({"repeats": 11}, ValueError, "repeats must be an even number of at least 10, not 11"),
    ({"repeats": 8}, ValueError, "repeats must be an even number of at least 10, not 8"),
    ({"warm_up": 0}, ValueError, "warm_up must be a whole number"),
    ({"loss": 3}, TypeError, "the loss must be a function"),
    ({"at": nn.ReLU()}, ValueError, "nothing to train"),
]


@pytest.mark.parametrize(("wrong", "kind", "words"), MISTAKES, ids=[words for _, _, words in MISTAKES])
def test_a_mistake_is_one_sentence(wrong: dict[str, Any], kind: type[Exception], words: str) -> None:
    model, loss = deep()
    with pytest.raises(kind, match=words):
        fg.check(**({"loss": loss, "at": model, "estimator": fg.ForwardGradient(), "repeats": 10} | wrong))


def test_the_findings_are_rows_text_and_plain_values() -> None:
    model, loss = deep()
    check = fg.check(loss, model, fg.ForwardGradient(tangents=2), repeats=10)
    again = json.loads(json.dumps(check.to_dict()))
    assert again["passed"] is True
    assert [row["name"] for row in again["findings"]] == [finding.name for finding in check.findings]
    assert [part["name"] for part in again["parts"]] == ["all", *dict(model.named_parameters())]
    assert str(check) == check.table()
    assert check.table().startswith("ForwardGradient(tangents=2): passed (10 estimates")
    assert all(finding.found in check.table() and finding.remedy in check.table() for finding in check.findings)


def test_plain_tensors_are_checked_and_compile_is_only_for_modules() -> None:
    xy = torch.tensor([3.0, 4.0, 1.0], dtype=torch.float64, requires_grad=True)
    check = fg.check(lambda t: (t**2).sum() / 2, xy, fg.ForwardGradient(), repeats=20, compile=True)
    assert check.passed
    assert check.findings[-1].found == "only the step of a module is compiled"


@pytest.mark.full
def test_a_step_compiles_or_the_finding_says_why_not() -> None:
    model, loss = perceptron().double(), classify(rows(6, 4))
    last = fg.check(loss, model, fg.ForwardGradient(), repeats=10, compile=True).findings[-1]
    assert (last.name, last.status) == ("compile", "ok"), last
    last = fg.check(loss, model, fg.Backprop(checkpoint=True), repeats=10, compile=True).findings[-1]
    assert (last.status, "checkpoint=True" in last.found) == ("note", True), last
