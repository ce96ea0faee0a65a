"""The zeroth-order estimate against backpropagation and formulas, and the mode that moves parameters without writing to them.

Statistical tests have fixed seeds. A |z| ≥ 4.5 has probability 6.8e-6 for a correct estimator, so a test of m numbers gives a false
alarm for less than m · 6.8e-6 of all seeds (Bonferroni); m is stated in each.
"""

from __future__ import annotations

import copy
import math
import weakref
from typing import Any, ClassVar, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from tests.support.cases import EXACT, Case, Loss, Tied, normalised, perceptron, regress, rows, seeded, trained, true_gradient
from torch import Generator, Tensor, nn

import forwardgrad as fg
from forwardgrad.estimators.whole_weights import WholeWeights
from forwardgrad.objective import Objective

X = rows(5, 4)
LAWS = [fg.Gaussian(), fg.Rademacher()]


def step(loss: Any, at: Any, method: fg.Estimator, seed: int = 0) -> fg.Estimate:
    torch.manual_seed(7)
    return fg.estimate_grad_(loss, at, method, generator=seeded(seed))


def direction(model: nn.Module, loss: Loss, law: fg.Law | None = None) -> dict[str, Tensor]:
    """The direction of one step from seed 0, read off an estimate: ĝ = d·v."""
    model = copy.deepcopy(model)
    record = step(loss, model, fg.ZerothOrder(law=law or fg.Gaussian()))
    return {name: p.grad / record.derivatives for name, p in trained(model).items()}


def error(case: Case, epsilon: float) -> tuple[float, float]:
    """d − ∇f·v for the direction v of seed 0, and ∇f·v."""
    model, loss = case.build()
    exact = true_gradient(model, loss)
    record = step(loss, model, fg.ZerothOrder(epsilon))
    v = {name: p.grad / record.derivatives for name, p in trained(model).items() if p.grad is not None}
    slope = sum(float((exact[name] * part).sum()) for name, part in v.items())
    return float(record.derivatives) - slope, slope


@pytest.mark.parametrize("case", EXACT, ids=str)
def test_derivative_is_that_of_backpropagation_along_the_direction_of_the_estimate(case: Case) -> None:
    gap, slope = error(case, 1e-5)  # ε² of third derivatives, and 1e-16/ε of rounding
    assert abs(gap) < 1e-7 * (1 + abs(slope))
    assert slope != 0


@pytest.mark.parametrize("case", [case for case in EXACT if case.name in ("layer norm", "attention function", "lstm", "penalty")], ids=str)
def test_error_falls_with_the_square_of_the_step(case: Case) -> None:
    assert error(case, 1e-3)[0] / error(case, 1e-4)[0] == pytest.approx(100, rel=0.05)


@pytest.mark.some(1)
@pytest.mark.parametrize("law", LAWS, ids=repr)
def test_unbiased_for_a_quadratic_loss_and_as_noisy_as_the_forward_gradient(law: fg.Law) -> None:
    a, b = torch.linspace(-1, 2, 6, dtype=torch.float64), torch.zeros(2, 3, dtype=torch.float64)
    at = [a.requires_grad_(), b.requires_grad_()]
    g = torch.cat([2 * a.detach(), torch.full((6,), 3.0, dtype=torch.float64)])
    generator, samples, method = seeded(1), [], fg.ZerothOrder(epsilon=0.7, tangents=2, law=law)
    for _ in range(1_000):
        a.grad = b.grad = None
        fg.estimate_grad_(lambda a, b: a.square().sum() + 3 * b.sum(), at, method, generator=generator)
        samples.append(torch.cat([a.grad, b.grad.flatten()]))
    found = torch.stack(samples)
    z = (found.mean(dim=0) - g) / found.std(dim=0) * math.sqrt(1_000)
    assert z.abs().max() < 4.5  # m = 12 a law: false alarms below 0.02 % in all
    noise = found.square().sum(dim=1) / (g @ g)
    assert abs(noise.mean() - law.second_moment(12, 2)) < 4.5 * noise.std() / math.sqrt(1_000)  # m = 1 a law


@pytest.mark.some(1)
@pytest.mark.parametrize("law", LAWS, ids=repr)
def test_bias_is_that_of_the_third_derivatives(law: fg.Law) -> None:
    """f = Σ aᵢxᵢ³ at 0, where ∂ᵢᵢᵢf = 6aᵢ and ∇f = 0: the formula gives 3ε²aᵢ (Gaussian) and ε²aᵢ (Rademacher)."""
    a, epsilon = torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64), 0.5
    x, generator, samples = torch.zeros(3, dtype=torch.float64, requires_grad=True), seeded(2), []
    for _ in range(4_000):
        x.grad = None
        fg.estimate_grad_(lambda x: a @ x**3, x, fg.ZerothOrder(epsilon, law=law), generator=generator)
        samples.append(x.grad)
    found = torch.stack(samples)
    spread = found.std(dim=0) / math.sqrt(4_000)
    bias = (3 if law == fg.Gaussian() else 1) * epsilon**2 * a
    assert ((found.mean(dim=0) - bias) / spread).abs().max() < 4.5  # m = 3 a law
    assert (found.mean(dim=0) / spread).abs().max() > 10  # and it shows


@pytest.mark.parametrize("law", LAWS, ids=repr)
def test_directions_are_the_same_at_every_look_and_new_for_every_part_tangent_and_step(law: fg.Law) -> None:
    t = [torch.zeros(40, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    objective, generator = Objective(lambda a, b: a.sum() + b.sum(), t), seeded(3)
    both = [WholeWeights(objective, law, 2, generator) for _ in range(2)]
    parts = [drawn.part(k, name) for drawn in both for k in (0, 1) for name in objective.parameters]
    again = [drawn.part(k, name) for drawn in both for k in (0, 1) for name in objective.parameters]
    assert all(torch.equal(v, w) for v, w in zip(parts, again, strict=True))
    correlations = torch.corrcoef(torch.stack(parts)).fill_diagonal_(0)
    assert correlations.abs().max() < 0.8  # |r| of 40 independent pairs has sd 0.16


def test_combined_directions_are_the_weighted_sum() -> None:
    t = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    drawn = WholeWeights(Objective(lambda t: t.sum(), t), fg.Gaussian(), 3, seeded())
    weights = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    expected = sum(w * drawn.part(k, "tensor 0") for k, w in enumerate(weights))
    torch.testing.assert_close(drawn.combine("tensor 0", weights), expected)


class Fails(Exception):
    """What a user's loss raises."""


@pytest.mark.parametrize("when", ["first", "second", "never"])
def test_live_parameters_are_never_written_to_even_when_the_loss_fails(when: str) -> None:
    model, calls = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 3)), []
    state, versions = copy.deepcopy(model.state_dict()), [p._version for p in model.parameters()]

    def loss(m: nn.Module) -> Tensor:
        calls.append(m(X.float()).square().mean())
        if when == ("look", "first", "second", "")[min(len(calls), 4) - 1]:  # a first look at a model, then its step
            raise Fails
        return calls[-1]

    if when == "never":
        step(loss, model, fg.ZerothOrder(tangents=2))
    else:
        with pytest.raises(Fails):
            step(loss, model, fg.ZerothOrder(tangents=2))
        assert all(p.grad is None for p in model.parameters())
        torch.testing.assert_close(model.state_dict(), state, rtol=0, atol=0)
    assert [p._version for p in model.parameters()] == versions
    assert all(torch.equal(p, state[name]) for name, p in model.named_parameters())
    assert calls[0] != calls[-1] or when == "first"
    assert torch.equal(model[0](X.float()), F.linear(X.float(), state["0.weight"], state["0.bias"]))  # nothing is exchanged any more


class Watched(fg.Gaussian):
    """Gaussian directions that tell how many bytes of them were alive whenever another was drawn."""

    alive: ClassVar[list[weakref.ref[Tensor]]] = []
    most: ClassVar[list[int]] = []

    def fill_(self, tangent: list[Tensor], generator: Generator) -> None:
        super().fill_(tangent, generator)
        self.alive.extend(weakref.ref(part) for part in tangent)
        self.most.append(sum(part.nbytes for ref in self.alive if (part := ref()) is not None))


@pytest.fixture
def watched() -> Watched:
    Watched.alive.clear()
    Watched.most.clear()
    return Watched()


def test_no_more_than_one_layer_is_held_beside_the_live_parameters(watched: Watched) -> None:
    model = nn.Sequential(*(nn.Linear(30, 30) for _ in range(8)))
    layer, x, drawn = 4 * (30 * 30 + 30), torch.ones(2, 30), []

    def loss(m: nn.Module) -> Tensor:
        value = m(x).square().mean()
        drawn.append(len(watched.most))
        return value

    step(loss, model, fg.ZerothOrder(law=watched))
    assert drawn == [0, 16, 32]  # a first look at the model, and each parameter moved once an evaluation
    assert max(watched.most[:32]) == layer
    assert len(watched.most) == 48  # and drawn once more for the gradient, of which it is a part


@pytest.mark.parametrize("tangents", [1, 2])
def test_a_step_of_plain_sgd_holds_no_gradient_either(watched: Watched, tangents: int) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(30, 30) for _ in range(8)))
    layer, x, twin = 4 * (30 * 30 + 30), torch.ones(2, 30), copy.deepcopy(model)
    method, optimizer = fg.ZerothOrder(law=watched, tangents=tangents), torch.optim.SGD(model.parameters(), 0.1)
    fg.TrainingStep(lambda m: m(x).square().mean(), model, optimizer, method, generator=seeded())()
    assert len(watched.most) == 3 * tangents * 16
    assert max(watched.most) <= max(layer, min(tangents, 2) * 4 * 900 + 4 * 30)  # of several tangents the sum, and what is added to it
    record = fg.estimate_grad_(lambda m: m(x).square().mean(), twin, method, generator=seeded())
    torch.testing.assert_close(list(model.parameters()), [q - 0.1 * q.grad for q in twin.parameters()])
    assert record.forward_passes == 2 * tangents


def test_directions_of_large_parameters_are_the_same_streams_at_every_look() -> None:
    model = nn.Linear(300, 250).double()
    x = rows(3, 300)
    v = direction(model, lambda m: m(x).sin().sum())
    assert abs(float(v["weight"].mean())) * 75_000**0.5 < 4.5
    assert abs(float(v["weight"].var()) - 1) * (75_000 / 2) ** 0.5 < 4.5
    values = []
    for sign in (1, -1):
        moved = copy.deepcopy(model).requires_grad_(False)
        for name, p in moved.named_parameters():
            p.add_(v[name], alpha=sign * 1e-3)
        values.append(moved(x).sin().sum())
    record = step(lambda m: m(x).sin().sum(), copy.deepcopy(model), fg.ZerothOrder(1e-3))
    torch.testing.assert_close(record.derivatives[0], (values[0] - values[1]) / 2e-3, rtol=1e-9, atol=1e-9)


def test_asking_for_the_form_of_a_parameter_does_not_draw_it(watched: Watched) -> None:
    model = nn.Linear(4, 2).double()

    def loss(m: nn.Module) -> Tensor:
        w = m.weight
        assert (w.shape, w.size(0), w.dim(), w.ndim, len(w), w.numel(), torch.numel(w)) == ((2, 4), 2, 2, 2, 2, 8, 8)
        assert (w.dtype, w.device, w.requires_grad, w.is_leaf, w.grad) == (torch.float64, torch.device("cpu"), True, True, None)
        assert (w.is_contiguous(), w.is_floating_point(), torch.is_floating_point(w), w.stride()) == (True, True, True, (4, 1))
        return w.new_zeros(()) + torch.zeros_like(w).sum()

    with pytest.raises(RuntimeError, match="does not depend on any trainable parameter"):
        step(loss, model, fg.ZerothOrder(law=watched))
    assert watched.most == []


class Pair(NamedTuple):
    one: Tensor
    other: Tensor


class Several(list[Tensor]):
    pass


WAYS: list[tuple[str, Any]] = [
    ("transposed", lambda m: (X @ m.weight.T).sin().sum()),
    ("data", lambda m: (X @ m.weight.data.t()).sin().sum() + m.bias.detach().sum()),
    ("slice", lambda m: m.weight[0].sin().sum() + m.bias[1:].sum()),
    ("view", lambda m: m.weight.view(-1).sin().sum()),
    ("list", lambda m: torch.cat([m.weight, m.bias[:, None]], dim=1).sin().sum()),
    ("named tuple", lambda m: torch.stack(Pair(m.bias, m.bias)).cos().sum()),
    ("own list", lambda m: torch.cat(Several([m.bias, m.bias])).cos().sum()),
    ("keyword", lambda m: F.linear(X, weight=m.weight, bias=m.bias).sin().sum()),
    ("numbers", lambda m: torch.tensor(math.sin(float(m.weight.data[0, 0]) + m.bias.tolist()[0]), dtype=torch.float64)),
    ("operators", lambda m: (1 + m.weight * 2 - m.weight**3).sum()),
    ("einsum", lambda m: torch.einsum("bi,oi->bo", X, m.weight).sin().sum()),
    ("twice", lambda m: torch.dot(m.bias, m.bias).sin()),
    ("vmap", lambda m: torch.vmap(lambda row: m(row).sin().sum(), randomness="same")(X).sum()),
    ("functional call", lambda m: torch.func.functional_call(m, {name: p * 2 for name, p in m.named_parameters()}, (X,)).sin().sum()),
]


@pytest.mark.parametrize("loss", [way for _, way in WAYS], ids=[name for name, _ in WAYS])
def test_every_way_to_use_a_parameter_sees_it_moved(loss: Any) -> None:
    """The same loss with the parameters of a copy moved by hand, along the direction of the estimate."""
    model, epsilon = nn.Linear(4, 2).double(), 1e-3
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.linspace(-1, 1, p.numel(), dtype=p.dtype).view(p.shape))
    v = direction(model, lambda m: m(X).square().mean())
    values = []
    for sign in (1, -1):
        moved = copy.deepcopy(model).requires_grad_(False)
        for name, p in moved.named_parameters():
            p.add_(v[name], alpha=sign * epsilon)
        values.append(loss(moved))
    record = step(loss, model, fg.ZerothOrder(epsilon))
    torch.testing.assert_close(record.derivatives[0], (values[0] - values[1]) / (2 * epsilon), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(record.loss, (values[0] + values[1]) / 2, rtol=1e-13, atol=0)
    assert record.derivatives[0] != 0


def test_buffers_are_the_mean_of_those_after_the_two_evaluations() -> None:
    model, loss = normalised(train=True)
    model, epsilon = model.double(), 0.1
    v = direction(model, loss)
    after = []
    for sign in (1, -1):
        moved = copy.deepcopy(model).requires_grad_(False)
        for name, p in moved.named_parameters():
            p.add_(v[name], alpha=sign * epsilon)
        loss(moved)
        after.append(dict(moved.named_buffers()))
    step(loss, model, fg.ZerothOrder(epsilon))
    buffers = dict(model.named_buffers())
    for name in ("1.running_mean", "1.running_var"):
        torch.testing.assert_close(buffers[name], (after[0][name] + after[1][name]) / 2, rtol=1e-12, atol=0)
    assert not torch.allclose(after[0]["1.running_mean"], after[1]["1.running_mean"], rtol=1e-3)
    assert int(buffers["1.num_batches_tracked"]) == 1


def test_a_buffer_of_extreme_constants_keeps_its_bits() -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 2)
            self.register_buffer("mask", torch.tensor([-math.inf, torch.finfo(torch.float64).min, 5e-324, 0.1], dtype=torch.float64))

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x) + self.mask[3]

    model = Masked().double()
    before = model.mask.clone()
    step(regress(X), model, fg.ZerothOrder())
    assert torch.equal(model.mask, before)


def test_a_parameter_that_the_loss_never_uses_is_given_no_gradient() -> None:
    model = nn.ModuleDict({"used": nn.Linear(4, 1), "idle": nn.Linear(2, 2)}).double()
    step(lambda m: m["used"](X).square().mean(), model, fg.ZerothOrder())
    assert model["used"].weight.grad.any()
    assert model["idle"].weight.grad is None


@pytest.mark.parametrize("tie", [False, True])
def test_padding_row_of_an_embedding_has_no_derivative_as_in_backpropagation(tie: bool) -> None:
    model = Tied().double() if tie else nn.Sequential(nn.Embedding(6, 4), nn.Flatten()).double()
    embedding = model.embedding if tie else model[0]
    embedding.padding_idx = 2
    words = torch.tensor([[0, 1], [2, 2]])

    def loss(m: nn.Module) -> Tensor:
        return (m(words) - 1).exp().mean()

    exact = true_gradient(model, loss)
    name = "embedding.weight" if tie else "0.weight"
    assert exact[name][2].any() == tie  # the output layer that shares the weight still trains the row
    record = step(loss, model, fg.ZerothOrder(1e-5))
    v = {name: p.grad / record.derivatives for name, p in trained(model).items()}
    torch.testing.assert_close(record.derivatives[0], sum((exact[name] * part).sum() for name, part in v.items()), rtol=1e-6, atol=1e-8)


def test_losses_without_any_derivative_rule_can_be_trained() -> None:
    model, y = perceptron().double(), torch.arange(5) % 3
    record = step(lambda m: F.multi_margin_loss(m(X), y).detach(), model, fg.ZerothOrder(1e-5))
    exact = true_gradient(model, lambda m: F.multi_margin_loss(m(X), y))
    v = {name: p.grad / record.derivatives for name, p in trained(model).items()}
    torch.testing.assert_close(record.derivatives[0], sum((exact[name] * part).sum() for name, part in v.items()), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("law", LAWS, ids=repr)
def test_a_tensor_alone_and_a_loss_that_is_the_tensor(law: fg.Law) -> None:
    t = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    record = step(lambda t: t, t, fg.ZerothOrder(0.5, tangents=3, law=law))
    torch.testing.assert_close(t.grad, (record.derivatives**2).mean())  # d = v
    torch.testing.assert_close(record.loss, torch.tensor(2.0, dtype=torch.float64))


@pytest.mark.full
def test_trains_as_far_as_the_forward_gradient_with_as_many_directions() -> None:
    losses = {}
    for method in (fg.ZerothOrder(tangents=4), fg.ForwardGradient(tangents=4)):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = nn.Linear(4, 1).double()
        optimizer, generator = torch.optim.SGD(model.parameters(), 0.02), seeded(4)
        for _ in range(300):
            optimizer.zero_grad()
            record = fg.estimate_grad_(lambda m: (m(X) - X.sum(dim=1, keepdim=True)).square().mean(), model, method, generator=generator)
            optimizer.step()
        losses[method.name] = float(record.loss)
    assert losses["zeroth-order"] < 0.01
    assert losses["forward"] < 0.01


def test_a_scripted_part_is_refused() -> None:
    with pytest.warns(DeprecationWarning, match="torch.jit"):
        scripted = torch.jit.script(nn.Linear(4, 3))
    with pytest.raises(ValueError, match="parameters of the scripted module '0' cannot be exchanged"):
        step(lambda m: m(X.float()).mean(), nn.Sequential(scripted, nn.Linear(3, 1)), fg.ZerothOrder())
