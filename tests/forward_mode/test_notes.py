"""What is told of the way that derivatives go: `explain`, the warning of a model that is given up, what has no rule."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.support.cases import Loss, classify, regress, rows, seeded
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import forwardgrad as fg


class ViewWritten(nn.Module):
    """A view looks on while the tensor behind it is written to: this cannot be followed."""

    def forward(self, h: Tensor) -> Tensor:
        h = h * 1.5
        part = h[:, :2]
        F.relu_(h)
        return h + part.sum(1, keepdim=True)


def given_up() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), ViewWritten(), nn.Linear(8, 3)).double()


LOSS = classify(rows(6, 4))
METHODS = [fg.ForwardGradient(), fg.ForwardGradient(2, perturb=fg.Activity()), fg.LearnedFeedback(), fg.LocalLosses(ends=("0.*",))]


# The record ------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS, ids=repr)
def test_an_explanation_names_the_way_of_every_call(method: fg.Estimator) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Hardswish(True), nn.Dropout(0.2), nn.Linear(8, 3)).double()
    found = fg.explain(LOSS, model, method)
    assert (found.way, found.reason) == ("explicit", "")
    assert found.estimator == repr(method)
    assert [section.rows for section in found.sections] == [found.calls, found.layers]
    linear = {row.way: row.times for row in found.calls if row.function == "linear"}
    assert sum(linear.values()) == 2  # behind a block of local losses nothing moves
    assert ("rule" in linear) == (not isinstance(method, fg.LocalLosses))
    text = found.table()
    assert text.startswith(f"{method!r}: explicit\n")
    assert all(row.function in text for row in found.calls)
    assert json.loads(json.dumps(found.to_dict()))["sections"][0]["title"] == "calls"


def test_calls_are_counted_and_those_without_a_rule_say_so() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 3)).double()
    found = {row.function: row for row in fg.explain(lambda m: m(rows(6, 4)).cumsum(0).mean(), model).calls}
    assert (found["linear"].times, found["linear"].way) == (3, "rule")
    assert (found["cumsum"].times, found["cumsum"].way, found["cumsum"].reason) == (1, "dual numbers", "there is no rule for it")


@pytest.mark.parametrize("method", METHODS, ids=repr)
def test_an_explanation_says_why_a_model_was_given_up(method: fg.Estimator) -> None:
    model = given_up()
    found = [fg.explain(LOSS, model, method) for _ in range(2)]
    if isinstance(method, fg.LocalLosses):  # nothing moves behind the block, so all is well
        assert found[0].way == "explicit"
        return
    assert found[0] == found[1]
    assert found[0].way == "dual numbers"
    assert "relu_ writes in place" in found[0].reason
    assert "in module '1' (ViewWritten)" in found[0].reason
    assert {row.way for row in found[0].calls} == {"dual numbers"}


def test_what_needs_no_forward_mode_and_what_is_no_module_is_told() -> None:
    model = nn.Linear(4, 3).double()
    for method in (fg.Backprop(), fg.ZerothOrder()):
        found = fg.explain(LOSS, model, method)
        assert (found.way, found.calls) == ("none", ())
    assert "not a module" in fg.explain(lambda t: (t**2).sum(), torch.ones(3, requires_grad=True)).reason
    with fg.plainly():
        assert "asked for" in fg.explain(LOSS, model).reason
    with pytest.raises(TypeError, match="must be an object"):
        fg.explain(LOSS, model, fg.ForwardGradient)  # type: ignore[arg-type]


@pytest.mark.parametrize("method", [fg.ForwardGradient(2), fg.LearnedFeedback(), fg.ZerothOrder(), fg.Backprop()], ids=repr)
def test_an_explanation_leaves_everything_as_it_was(method: fg.Estimator) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 3)).double()
    model[0].weight.grad = torch.ones_like(model[0].weight)
    generator, state = seeded(4), {}
    if method.stateful:
        fg.estimate_grad_(LOSS, copy.deepcopy(model), method, generator=generator, state=state)
    before, kept = copy.deepcopy(model.state_dict()), copy.deepcopy(state)
    random, own = torch.get_rng_state(), generator.get_state()
    fg.explain(LOSS, model, method, generator=generator, state=state)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    torch.testing.assert_close(state, kept, rtol=0, atol=0)
    assert torch.equal(torch.get_rng_state(), random)
    assert torch.equal(generator.get_state(), own)
    assert torch.equal(model[0].weight.grad, torch.ones_like(model[0].weight))
    assert all(p.grad is None for name, p in model.named_parameters() if name != "0.weight")


# The warning -----------------------------------------------------------------------------------------------------------------------------


def test_a_model_that_is_given_up_is_told_of_once() -> None:
    model = given_up()
    with pytest.warns(
        UserWarning, match=r"Sequential .* relu_ writes in place .* module '1' \(ViewWritten\).*forwardgrad\.explain"
    ) as seen:
        fg.estimate_grad_(LOSS, model, fg.ForwardGradient(), generator=seeded())
    assert [warning.filename for warning in seen] == [__file__]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fg.estimate_grad_(LOSS, model, fg.ForwardGradient(), generator=seeded())
        fg.estimate_grad_(LOSS, model, fg.ForwardGradient(perturb=fg.LowRank()), generator=seeded())
    with pytest.warns(UserWarning, match="relu_ writes in place"):
        fg.estimate_grad_(regress(rows(6, 4)), model, fg.ForwardGradient(), generator=seeded())


@pytest.mark.filterwarnings("ignore:the loss calls next:UserWarning")  # it does, to be another at every evaluation
def test_a_difference_that_random_numbers_make_is_told_as_such() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)).double()

    def loss(m: nn.Module) -> Tensor:
        h = m(rows(6, 4)).t()
        return (h * torch.bernoulli(torch.full_like(h, 0.5))).square().mean() * next(scales)

    scales = iter((1.0, 1.0, 2.0))  # the first is that of the look at a new model
    with pytest.warns(UserWarning, match="another derivative, 0.5 of its length away; the values differ too"):
        fg.estimate_grad_(loss, model, fg.ForwardGradient(), generator=seeded())


# The sentences ---------------------------------------------------------------------------------------------------------------------------


class Twice(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * 2


class Middle(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor], *layers: nn.Module) -> None:
        super().__init__()
        self.layers, self.function = nn.ModuleList(layers), function

    def forward(self, h: Tensor) -> Tensor:
        return self.function(h)


def product(h: Tensor) -> Tensor:
    return h.scatter_reduce(1, torch.zeros_like(h, dtype=torch.int64), h, "prod")


def unbatched(h: Tensor) -> Tensor:
    return torch.ops.aten.rrelu_with_noise(h, torch.zeros_like(h), 0.1, 0.3, True)


def checkpointed() -> Middle:
    layer = nn.Linear(4, 4)
    return Middle(lambda h: checkpoint(layer, h, use_reentrant=True), layer)


REFUSED: dict[str, tuple[Callable[[], nn.Module], Loss | None, str]] = {
    "function": (lambda: Middle(Twice.apply), None, r"autograd function Twice .* in module '1' .*jvp.* ZerothOrder"),
    "reentrant checkpoint": (checkpointed, None, r"in module '1'.*use_reentrant=False .*'use_reentrant': False"),
    "ctc": (
        nn.Identity,
        lambda m: F.ctc_loss(m(rows(6, 4)).unsqueeze(1).log_softmax(-1), torch.tensor([[1, 2]]), [6], [2]),
        "^ctc_loss .* ZerothOrder",
    ),
    "another": (lambda: Middle(product), None, r"^scatter_reduce .* in module '1' .*forwardgrad\.differences.* ZerothOrder"),
}


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad:UserWarning")  # the checkpoint's own
@pytest.mark.parametrize("method", [fg.ForwardGradient(), fg.ForwardGradient(2), fg.ForwardGradient(perturb=fg.LowRank())], ids=repr)
@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_forward_mode_is_one_sentence_with_its_place(name: str, method: fg.Estimator) -> None:
    middle, loss, message = REFUSED[name]
    model = nn.Sequential(nn.Linear(4, 4), middle(), nn.Linear(4, 3)).double()
    with pytest.raises(NotImplementedError, match=message) as caught:
        fg.estimate_grad_(loss or LOSS, model, method, generator=seeded())
    assert "\n" not in str(caught.value)
    assert caught.value.__cause__ is not None  # torch's own words stay with it
    fg.estimate_grad_(loss or LOSS, model, fg.ZerothOrder(), generator=seeded())  # what the sentence promises


@pytest.mark.parametrize("method", [fg.ForwardGradient(), fg.ForwardGradient(2), fg.ForwardGradient(perturb=fg.LowRank())], ids=repr)
@pytest.mark.parametrize("frozen", [False, True])
def test_a_model_that_prepares_itself_for_checkpoints_works(frozen: bool, method: fg.Estimator) -> None:
    """As Hugging Face's gradient_checkpointing_enable() does: a hook asks for gradients of what the embedding gives."""
    torch.manual_seed(0)
    inner = nn.Linear(4, 4)
    middle = Middle(lambda h: checkpoint(inner, h, use_reentrant=False), inner)
    model = nn.Sequential(nn.Linear(4, 4), middle, nn.Linear(4, 3)).double()
    model[0].requires_grad_(not frozen)
    expected = fg.estimate_grad_(LOSS, model, method, generator=seeded()).derivatives
    model[0].register_forward_hook(lambda module, inputs, output: output.requires_grad_(True))
    with fg.plainly():
        plain = fg.estimate_grad_(LOSS, model, method, generator=seeded()).derivatives
    torch.testing.assert_close(plain, expected)
    torch.testing.assert_close(fg.estimate_grad_(LOSS, model, method, generator=seeded()).derivatives, expected)
    assert fg.explain(LOSS, model, method).way == "explicit"


def test_several_tangents_where_torch_cannot_batch_are_told_what_to_do() -> None:
    model = nn.Sequential(nn.Linear(4, 4), Middle(unbatched), nn.Linear(4, 3)).double()
    with pytest.raises(
        NotImplementedError, match=r"rrelu.* several tangents at once in module '1' \(Middle\): use tangents=1 or chunk_size=1"
    ):
        fg.estimate_grad_(LOSS, model, fg.ForwardGradient(2), generator=seeded())


def test_a_mistake_of_the_users_stays_its_own() -> None:
    def loss(m: nn.Module) -> Tensor:
        raise RuntimeError("forward went wrong")

    with pytest.raises(RuntimeError, match=r"^forward went wrong$"):
        fg.estimate_grad_(loss, nn.Linear(2, 2), fg.ForwardGradient(), generator=seeded())


# What scores a layer ------------------------------------------------------------------------------------------------------------------


def test_layers_are_told_with_what_scores_them() -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3)).double()
    x, y = rows(6, 4), torch.arange(6) % 3
    found = fg.explain(lambda m: F.cross_entropy(m(x), y), model, fg.ForwardGradient(perturb=fg.Activity(), exact_output=True))
    told = [(row.layer, row.moves, row.scored, row.reason) for row in found.layers]
    assert told == [
        ("0.weight, 0.bias", "activities", "by the whole loss", "examples meet"),
        ("1.weight, 1.bias", "weights of every example", "by example", "examples lie along dimension 0 of (6, 5)"),
        ("3.weight, 3.bias", "nothing", "exactly", "the error at the output is known"),
    ]
    assert "by the whole loss" in found.table()
    with pytest.warns(UserWarning, match="scored by the whole loss"):  # it was told, and is said where nobody asked
        fg.estimate_grad_(
            lambda m: F.cross_entropy(m(x), y), model, fg.ForwardGradient(perturb=fg.Activity(), exact_output=True), generator=seeded()
        )
