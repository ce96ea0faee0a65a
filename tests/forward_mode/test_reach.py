"""Parameters that a loss uses where no estimator sees them: they are followed, or refused by name, and never left out in silence."""

from __future__ import annotations

import ctypes
import functools
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tests.support.cases import classify, rows, seeded, trained, true_gradient
from torch import Tensor, nn

import forwardgrad as fg

X, LOSS = rows(6, 5), classify(rows(6, 5))
BLIND = [
    fg.ZerothOrder(),
    fg.ZerothOrder(tangents=2, chunk_size=None),
    fg.ZerothOrder(perturb=fg.Sparse(0.5)),
    fg.ZerothOrder(perturb=fg.LowRank()),
    fg.ZerothOrder(perturb=fg.PerExample()),
    fg.ForwardGradient(perturb=fg.LowRank()),
    fg.ForwardGradient(perturb=fg.Activity()),
    fg.ForwardGradient(perturb=fg.PerExample()),
    fg.ForwardGradient(perturb=fg.Informed()),
    fg.ForwardGradient(2, perturb=fg.SplitWeights(2)),
    fg.LearnedFeedback(),
    fg.LocalLosses(),
    fg.FixedFeedback(),
]
"""What knows a parameter only where a torch function is handed it."""
DENSE = [fg.ForwardGradient(), fg.ForwardGradient(perturb=fg.Sparse(0.5)), fg.Guess()]


def scripted(of: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return torch.jit.script(of)


@functools.cache
def fused() -> Any:
    return scripted(_fused)


def _fused(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return torch.tanh(torch.matmul(x, weight.t()) + bias)


class Model(nn.Module):
    def __init__(self, first: Callable[[Model, Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(5, 4).double(), nn.Linear(4, 3).double()
        self.half = self.first.weight[:2]
        self.constant = self.first.weight.detach()[:2]
        self.spare = nn.Parameter(torch.ones(2, dtype=torch.float64))
        self.fused = first

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.last(self.fused(self, x))
        return out


def below() -> Model:
    return Model(lambda m, x: fused()(x, m.first.weight, m.first.bias))


def partly() -> Model:
    """A parameter that is used in the open, too."""
    return Model(lambda m, x: fused()(x, m.first.weight, m.first.bias) + m.first(x))


def address() -> Model:
    def read(m: Model, x: Tensor) -> Tensor:
        memory = (ctypes.c_double * 20).from_address(m.first.weight.data_ptr())
        return x @ torch.from_numpy(np.ctypeslib.as_array(memory).reshape(4, 5).copy()).t() + m.first.bias

    return Model(read)


def view() -> Model:
    return Model(lambda m, x: torch.cat([F.linear(x, m.half), F.linear(x, m.first.weight[2:])], 1) + m.first.bias)


@pytest.fixture(autouse=True)
def alike() -> None:
    torch.manual_seed(0)


def estimated(model: nn.Module, method: fg.Estimator, loss: Any = LOSS) -> dict[str, Tensor | None]:
    model.zero_grad()
    fg.estimate_grad_(loss, model, method, generator=seeded(), state={})
    return {name: p.grad for name, p in trained(model).items()}


@pytest.mark.parametrize("method", BLIND, ids=repr)
def test_what_runs_below_torch_functions_is_refused_by_name_and_again(method: fg.Estimator) -> None:
    for make, name in ((below, "first.bias, first.weight"), (partly, "first.bias, first.weight"), (address, "first.weight")):
        model = make()
        for _ in range(2):
            with pytest.raises(RuntimeError, match=f"uses the trained {name}.*below torch's functions"):
                estimated(model, method)


@pytest.mark.parametrize("method", [*BLIND, *DENSE], ids=repr)
def test_a_view_that_was_made_earlier_is_refused_by_name(method: fg.Estimator) -> None:
    with pytest.raises(RuntimeError, match=r"uses the trained first\.weight as another tensor that shares its memory"):
        estimated(view(), method)


@pytest.mark.parametrize("method", [method for method in BLIND if not isinstance(method, fg.ZerothOrder)], ids=repr)
def test_trained_parameters_of_a_scripted_module_are_refused(method: fg.Estimator) -> None:
    with pytest.raises(RuntimeError, match="parameters of the scripted module '0' cannot be exchanged"):
        estimated(nn.Sequential(scripted(nn.Linear(5, 4).double()), nn.Linear(4, 3).double()), method)


def with_frozen(part: nn.Module, *, first: bool) -> nn.Module:
    for p in part.parameters():
        p.requires_grad_(False)
    before = [] if first else [nn.Linear(5, 5).double()]
    return nn.Sequential(*before, part, nn.Linear(4, 4).double(), nn.Tanh(), nn.Linear(4, 3).double())


@pytest.mark.filterwarnings("ignore:derivatives of Sequential")
@pytest.mark.parametrize("method", BLIND, ids=repr)
def test_frozen_parameters_of_a_scripted_module_are_not(method: fg.Estimator) -> None:
    torch.manual_seed(1)
    plain = nn.Linear(5, 4).double()
    model, other = (with_frozen(part, first=True) for part in (scripted(plain), plain))
    other.load_state_dict(model.state_dict())
    found, expected = estimated(model, method), estimated(other, method)
    for (name, g), one in zip(found.items(), expected.values(), strict=True):
        torch.testing.assert_close(g, one, rtol=1e-6, atol=1e-9, msg=name)


@pytest.mark.filterwarnings("ignore:derivatives of Sequential")
@pytest.mark.parametrize(
    "method", [fg.ZerothOrder(1e-5), fg.ZerothOrder(1e-5, perturb=fg.LowRank()), fg.ForwardGradient(perturb=fg.LowRank())]
)
def test_derivatives_go_through_a_frozen_scripted_module(method: fg.Estimator) -> None:
    """One direction: ĝ·∇f = d², whatever it is. Buffers of a scripted module are written once a step."""
    part = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Tanh()).double()
    model = with_frozen(scripted(part), first=False)
    exact = true_gradient(model, LOSS)
    record = fg.estimate_grad_(LOSS, model, method, generator=seeded())
    along = sum(float((p.grad * exact[name]).sum()) for name, p in trained(model).items())
    assert along == pytest.approx(float(record.derivatives) ** 2, rel=1e-5)
    assert int(dict(model.named_buffers())["1.1.num_batches_tracked"]) == 1


@pytest.mark.filterwarnings("ignore:derivatives of Sequential")
@pytest.mark.parametrize("method", [fg.ForwardGradient(perturb=fg.Activity()), fg.LearnedFeedback()], ids=repr)
def test_what_moves_inside_and_meets_a_scripted_module_is_refused_by_name(method: fg.Estimator) -> None:
    model = with_frozen(scripted(nn.Sequential(nn.Linear(5, 4), nn.Tanh()).double()), first=False)
    with pytest.raises(RuntimeError, match=r"scripted module '1' are others at every evaluation.*perturb=LowRank\(\) or Dense\(\)"):
        estimated(model, method)


def test_local_losses_end_ahead_of_a_scripted_module() -> None:
    """Nothing moves through it, so it need not be followed: the steps are those of the module that it was made from."""
    x, y = torch.randn(6, 5, dtype=torch.float64, generator=seeded()), torch.arange(6) % 3
    torch.manual_seed(1)
    plain = nn.Sequential(nn.Linear(5, 4), nn.Tanh()).double()
    models = [with_frozen(part, first=False) for part in (scripted(plain), plain)]
    models[1].load_state_dict(models[0].state_dict())
    found = []
    for model in models:
        state: dict[str, torch.Tensor] = {}
        for seed in range(3):
            model.zero_grad()
            fg.estimate_grad_(
                lambda model: F.cross_entropy(model(x), y), model, fg.LocalLosses(feedback=True), generator=seeded(seed), state=state
            )
        found.append({name: p.grad for name, p in trained(model).items()})
    torch.testing.assert_close(found[0], found[1], rtol=1e-9, atol=1e-12)


def computed() -> Model:
    """What was computed of a parameter before the step is a constant in the step, and not for backpropagation."""
    model = Model(lambda m, x: m.first(x) * m.half)
    model.half = model.first.bias.exp()
    return model


@pytest.mark.parametrize("method", [*BLIND, *DENSE], ids=repr)
def test_what_was_computed_of_a_parameter_earlier_is_refused_by_name(method: fg.Estimator) -> None:
    with pytest.raises(RuntimeError, match=r"uses the trained first\.bias as another tensor that shares its memory or was computed of it"):
        estimated(computed(), method)


@pytest.mark.parametrize("method", [*BLIND, *DENSE], ids=repr)
def test_a_view_that_is_looked_at_alone_is_not_refused(method: fg.Estimator) -> None:
    def first(m: Model, x: Tensor) -> Tensor:
        m.norm = m.half.detach().norm() + m.half.sum()  # for a log
        return m.first(x)

    model, other = Model(first), Model(lambda m, x: m.first(x))
    other.load_state_dict(model.state_dict())
    found, expected = estimated(model, method), estimated(other, method)
    torch.testing.assert_close([g for g in found.values() if g is not None], [g for g in expected.values() if g is not None])


@pytest.mark.parametrize("perturb", [fg.Dense(), fg.LowRank(), fg.Activity(), fg.PerExample()], ids=repr)
def test_replicas_of_an_ensemble_are_looked_at_as_well(perturb: fg.Perturbation) -> None:
    def loss(m: nn.Module, x: Tensor) -> Tensor:
        return F.cross_entropy(m(x), torch.arange(6) % 3)

    for make in (below, address, view) if not isinstance(perturb, fg.Dense) else (view, computed):
        ensemble = fg.Ensemble([make(), make()])
        with pytest.raises(RuntimeError, match="the loss uses the trained first"):
            fg.estimate_grads_(
                loss, ensemble, (torch.stack([X, X]),), fg.ForwardGradient(perturb=perturb), generators=[seeded(1), seeded(2)]
            )


@pytest.mark.parametrize("method", [fg.ForwardGradient(perturb=fg.LowRank()), fg.ZerothOrder()], ids=repr)
def test_the_first_step_of_a_compiled_training_is_looked_at_as_well(method: fg.Estimator) -> None:
    for make in (below, address, view):
        model = make()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        step = fg.TrainingStep(lambda m: LOSS(m), model, optimizer, method, generator=seeded(), engine="compile")
        with pytest.raises(RuntimeError, match="the loss uses the trained first"):
            step()


@pytest.mark.filterwarnings("ignore:derivatives of Model")
def test_dense_forward_gradients_follow_scripted_functions_as_backpropagation_does() -> None:
    for make in (below, partly):
        model = make()
        model.spare.requires_grad_(False)
        exact = true_gradient(model, LOSS)
        count = sum(p.numel() for p in trained(model).values())
        found = estimated(model, fg.ForwardGradient(count, law=fg.Orthogonal()))
        for name, g in exact.items():
            torch.testing.assert_close(found[name], g, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("method", [*BLIND, *DENSE], ids=repr)
def test_what_is_not_used_or_is_a_constant_for_backpropagation_stays_silent(method: fg.Estimator) -> None:
    """A spare parameter, a detached part of a parameter, and an address that is asked for of a parameter in the open."""

    def first(m: Model, x: Tensor) -> Tensor:
        if isinstance(method, fg.ZerothOrder):  # forward mode has none
            assert m.first.weight.data_ptr() != m.last.weight.data_ptr()
        return m.first(x).tanh() + F.pad(F.linear(x, m.constant), (0, 2))

    model, random = Model(first), torch.get_rng_state()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = estimated(model, method)
    assert found["last.weight"] is not None
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())
    assert torch.equal(torch.get_rng_state(), random)


def test_the_look_is_made_once_and_leaves_buffers_and_random_numbers_as_one_pass_does() -> None:
    model, calls = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 3)).double(), []

    def loss(m: nn.Module) -> Tensor:
        calls.append(torch.get_rng_state())
        return F.cross_entropy(m(X), torch.arange(6) % 3)

    for _ in range(2):
        estimated(model, fg.ZerothOrder(), loss)
    assert len(calls) == 1 + 2 * 2
    assert torch.equal(calls[0], calls[1])
    assert torch.equal(calls[1], calls[2])
    assert int(model[1].num_batches_tracked) == 2


def test_a_loss_that_takes_its_batch_from_an_iterator_is_named_once() -> None:
    """Each evaluation would see another batch: the difference of two losses is no derivative."""
    model, batches = nn.Linear(5, 3).double(), iter([rows(6, 5) for _ in range(20)])

    def loss(m: nn.Module) -> Tensor:
        return F.cross_entropy(m(next(batches)), torch.arange(6) % 3)

    with pytest.warns(UserWarning, match=r"calls next\(\) and batches is an iterator.*Take the batch ahead of the step"):
        estimated(model, fg.ZerothOrder(), loss)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        estimated(model, fg.ZerothOrder(), loss)
        taken = next(batches)
        estimated(model, fg.ZerothOrder(), lambda m: F.cross_entropy(m(taken), torch.arange(6) % 3))
