"""`estimate_grad_` in use: moments of the estimate, optimizers, plain functions, unusual models and mistakes.

Statistical tests have fixed seeds. A |z| ≥ 4.5 has probability 6.8e-6 for a correct estimator, so a test of m numbers gives a false
alarm for less than m · 6.8e-6 of all seeds (Bonferroni); m is stated in each.
"""

from __future__ import annotations

import copy
import math
import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.support.cases import GIVEN_UP, classify, perceptron, regress, rows, seeded, trained, true_gradient
from torch import Tensor, nn

import forwardgrad as fg

LAWS = [law() for law in fg.LAWS]
SEPARATE = [law for law in LAWS if not law.joint]
CHUNKS = [fg.ForwardGradient(), fg.ForwardGradient(tangents=3), fg.ForwardGradient(tangents=3, chunk_size=1)]
METHODS = [fg.Backprop(), *CHUNKS]


def flat(tensors: dict[str, Tensor]) -> Tensor:
    return torch.cat([t.flatten() for t in tensors.values()])


def gradient(model: nn.Module) -> Tensor:
    return flat({name: p.grad for name, p in trained(model).items()})


@pytest.mark.parametrize("law", SEPARATE, ids=repr)
def test_unbiased(law: fg.Law) -> None:
    model, loss, count = perceptron().double(), classify(rows(6, 4)), 4_000
    g = flat(true_gradient(model, loss))
    fg.estimate_grad_(loss, model, fg.ForwardGradient(tangents=count, law=law, chunk_size=2_000), generator=seeded(1))
    n, square = len(g), g @ g
    variance = {  # of one entry of (g·v)v, from the law's fourth moments
        "gaussian": square + g**2,
        "rademacher": square - g**2,
        "sphere": n / (n + 2) * (square + 2 * g**2) - g**2,
    }[law.name]
    z = (gradient(model) - g) / (variance / count).sqrt()
    assert z.abs().max() < 4.5  # m = 43 a law: false alarms below 0.03 %
    # Σz² of 43 nearly independent normal numbers: mean 43, sd 9.3. Outside 12 to 100 with probability below 1e-5: the variance is right.
    assert 12 < (z @ z) < 100


@pytest.mark.parametrize("count", [1, 5])
def test_unbiased_with_orthogonal_tangents(count: int) -> None:
    g = torch.linspace(-1, 2, 12, dtype=torch.float64)
    at, generator, found = torch.zeros(12, dtype=torch.float64, requires_grad=True), seeded(1), []
    for _ in range(1_000):
        at.grad = None
        fg.estimate_grad_(lambda t: g @ t, at, fg.ForwardGradient(count, fg.Orthogonal(), chunk_size=2), generator=generator)
        found.append(at.grad)
    samples = torch.stack(found)
    z = (samples.mean(dim=0) - g) / samples.std(dim=0) * math.sqrt(1_000)
    assert z.abs().max() < 4.5  # m = 12 a K: false alarms below 0.02 % in all


@pytest.mark.parametrize("chunk_size", [None, 1, 5])
def test_as_many_orthogonal_tangents_as_weights_give_the_gradient_itself(chunk_size: int | None) -> None:
    model, loss = perceptron().double(), classify(rows(6, 4))
    fg.estimate_grad_(loss, model, fg.ForwardGradient(43, fg.Orthogonal(), chunk_size=chunk_size), generator=seeded())
    torch.testing.assert_close(gradient(model), flat(true_gradient(model, loss)), rtol=1e-11, atol=1e-13)
    with pytest.raises(ValueError, match="44 were asked for, with 43 weights"):
        fg.estimate_grad_(loss, model, fg.ForwardGradient(44, fg.Orthogonal(), chunk_size=chunk_size), generator=seeded())


@pytest.mark.parametrize("count", [1, 4])
@pytest.mark.parametrize("law", LAWS, ids=repr)
def test_noise_is_what_the_docstring_says(law: fg.Law, count: int) -> None:
    g = torch.linspace(-1, 2, 12, dtype=torch.float64)
    at, generator, squares = torch.zeros(12, dtype=torch.float64, requires_grad=True), seeded(2), []
    for _ in range(300):
        at.grad = None
        fg.estimate_grad_(lambda t: g @ t, at, fg.ForwardGradient(tangents=count, law=law), generator=generator)
        squares.append(at.grad @ at.grad / (g @ g))
    found = torch.stack(squares)
    expected = law.second_moment(12, count)
    assert abs(found.mean() - expected) < 4.5 * found.std() / math.sqrt(300)  # m = 1 a law and K: eight in all
    assert found.std() / math.sqrt(300) < 0.15 * expected  # or the test would see nothing


@pytest.mark.parametrize("clip", [0.2, 1.0, 5.0])
def test_a_clip_keeps_the_expected_direction_and_shortens_by_erf(clip: float) -> None:
    g, count = torch.linspace(-0.5, 1, 12, dtype=torch.float64), 20_000
    at = torch.zeros(12, dtype=torch.float64, requires_grad=True)
    record = fg.estimate_grad_(lambda t: g @ t, at, fg.ForwardGradient(tangents=count, clip=clip), generator=seeded(3))
    v = fg.Gaussian().draw({"tensor 0": at}, count, seeded(3))["tensor 0"]
    torch.testing.assert_close(record.derivatives, v @ g)  # before the clip
    factor = math.erf(clip / (float(g.norm()) * math.sqrt(2)))
    assert 0.05 < factor <= 1
    error = ((v @ g).clamp(-clip, clip)[:, None] * v).std(dim=0) / math.sqrt(count)
    assert ((at.grad - factor * g) / error).abs().max() < 4.5  # m = 12 a clip: false alarms below 0.03 % in all


OPTIMIZERS = [
    lambda ps: torch.optim.SGD(ps, 0.01, momentum=0.5, nesterov=True),
    lambda ps: torch.optim.Adam(ps, 0.02),
    lambda ps: torch.optim.AdamW(ps, 0.02, foreach=True),
]


@pytest.mark.parametrize("method", METHODS, ids=repr)
@pytest.mark.parametrize("make", OPTIMIZERS)
def test_trains_with_any_optimizer_scheduler_and_gradient_clip(make: Any, method: fg.Estimator) -> None:
    model, x = nn.Linear(4, 1).double(), rows(20, 4)
    with torch.no_grad():
        model.weight.zero_()
        model.bias.zero_()
    optimizer, generator = make(model.parameters()), seeded(4)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.999)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        step = fg.estimate_grad_(lambda m: (m(x) - x.sum(dim=1, keepdim=True)).square().mean(), model, method, generator=generator)
        norm = nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        assert gradient(model).norm() <= 5.0 + 1e-9
        assert norm.isfinite()
        optimizer.step()
        scheduler.step()
        losses.append(float(step.loss))
    assert min(losses[-5:]) < 0.7 * losses[0]


@pytest.mark.parametrize("method", METHODS, ids=repr)
def test_accumulation_over_half_batches_is_the_sum(method: fg.Estimator) -> None:
    model, x = perceptron().double(), rows(8, 4)
    parts = []
    for half in x.chunk(2):
        alone = copy.deepcopy(model)
        fg.estimate_grad_(regress(half), alone, method, generator=seeded(6))
        parts.append(gradient(alone))
    for half in x.chunk(2):
        fg.estimate_grad_(regress(half), model, method, generator=seeded(6))
    torch.testing.assert_close(gradient(model), parts[0] + parts[1])
    whole = copy.deepcopy(model)
    whole.zero_grad()
    fg.estimate_grad_(regress(x), whole, method, generator=seeded(6))  # the same directions: linear in the gradient
    torch.testing.assert_close(gradient(whole), (parts[0] + parts[1]) / 2)


def beale(t: Tensor) -> Tensor:
    x, y = t
    return (1.5 - x + x * y) ** 2 + (2.25 - x + x * y**2) ** 2 + (2.625 - x + x * y**3) ** 2


def rosenbrock(x: Tensor, y: Tensor) -> Tensor:
    return (1 - x) ** 2 + 100 * (y - x**2) ** 2


@pytest.mark.parametrize("method", CHUNKS, ids=repr)
def test_functions_of_one_tensor_and_of_several(method: fg.ForwardGradient) -> None:
    t = torch.tensor([1.0, 1.5], dtype=torch.float64, requires_grad=True)
    record = fg.estimate_grad_(beale, t, method, generator=seeded(1))
    u = torch.tensor([1.5**k - 1 for k in (1, 2, 3)], dtype=torch.float64)  # by hand: f = Σ (cₖ + x·uₖ)², uₖ = yᵏ − 1
    r = torch.tensor([1.5, 2.25, 2.625], dtype=torch.float64) + u
    slope = torch.tensor([1.0, 3.0, 6.75], dtype=torch.float64)  # ∂uₖ/∂y = k·yᵏ⁻¹
    g = torch.stack([2 * r @ u, 2 * r @ slope])
    v = method.law.draw({"t": t}, method.tangents, seeded(1))["t"]
    torch.testing.assert_close(record.loss, r @ r)
    torch.testing.assert_close(record.derivatives, v @ g)
    torch.testing.assert_close(t.grad, (v @ g) @ v / method.tangents)

    x, y = torch.tensor(-1.2, requires_grad=True), torch.tensor(1.0, requires_grad=False)
    record = fg.estimate_grad_(rosenbrock, [x, y], method, generator=seeded(1))
    v = method.law.draw({"x": x}, method.tangents, seeded(1))["x"]
    torch.testing.assert_close(record.derivatives, v * (-2 * 2.2 + 400 * 1.2 * (1 - 1.44)), rtol=1e-5, atol=1e-4)
    assert x.grad.shape == ()
    assert y.grad is None


@pytest.mark.parametrize("method", METHODS, ids=repr)
def test_gradients_are_tensors_of_their_own(method: fg.Estimator) -> None:
    a, b = (torch.ones(3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    for _ in range(2):  # reverse mode answers one tensor for both, and an expanded one: neither may end up in .grad
        fg.estimate_grad_(lambda a, b: (a + b).sum(), [a, b], method, generator=seeded())
    assert a.grad.untyped_storage().data_ptr() != b.grad.untyped_storage().data_ptr()
    nn.utils.clip_grad_norm_([a, b], 1.0)
    if isinstance(method, fg.Backprop):
        torch.testing.assert_close(torch.cat([a.grad, b.grad]).norm(), torch.tensor(1.0, dtype=torch.float64), rtol=1e-5, atol=0)


@pytest.mark.parametrize("method", METHODS, ids=repr)
def test_a_tensor_given_twice_is_refused(method: fg.Estimator) -> None:
    t = torch.tensor([2.0, 3.0], dtype=torch.float64, requires_grad=True)
    with pytest.raises(ValueError, match="twice"):  # .grad would hold the gradient of both places two times over
        fg.estimate_grad_(lambda a, b: (a * b).sum(), [t, t], method, generator=seeded())
    assert t.grad is None


class Counter(nn.Module):
    """Buffers that are exchanged for new tensors rather than written to."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 2)
        self.register_buffer("calls", torch.tensor(0))
        self.register_buffer("average", torch.zeros(2))

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.layer(x)
        self.calls = self.calls + 1
        self.average = 0.9 * self.average + 0.1 * hidden.detach().mean(dim=0)
        return hidden


@pytest.mark.parametrize("method", METHODS, ids=repr)
def test_buffers_that_a_model_exchanges_are_updated_once(method: fg.Estimator) -> None:
    model = Counter().double()
    plain = copy.deepcopy(model)
    for _ in range(2):
        plain(rows(5, 4))
        fg.estimate_grad_(regress(rows(5, 4)), model, method, generator=seeded())
    torch.testing.assert_close(dict(model.named_buffers()), dict(plain.named_buffers()))


class Positions(nn.Module):
    """A constant buffer that is expanded in memory, so that nothing can be written to it."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 2)
        self.register_buffer("positions", torch.arange(2).expand(5, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + self.positions


@pytest.mark.parametrize("method", METHODS, ids=repr)
def test_a_buffer_that_is_expanded_in_memory(method: fg.Estimator) -> None:
    model = Positions().double()
    fg.estimate_grad_(regress(rows(5, 4)), model, method, generator=seeded())
    assert gradient(model).any()
    assert model.positions.tolist() == [[0, 1]] * 5


@pytest.mark.parametrize("method", METHODS, ids=repr)
def test_a_loss_that_is_a_module_keeps_its_own_state(method: fg.Estimator) -> None:
    class Criterion(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("calls", torch.tensor(0))
            self.scale = nn.Parameter(torch.tensor(2.0))

        def forward(self, model: nn.Module) -> Tensor:
            self.calls += 1
            return self.scale * F.cross_entropy(model(rows(6, 4)), torch.arange(6) % 3)

    model, criterion = perceptron().double(), Criterion()
    fg.estimate_grad_(criterion, model, method, generator=seeded())
    assert int(criterion.calls) == 1
    assert criterion.scale.grad is None  # not what is trained
    assert gradient(model).any()


@pytest.mark.parametrize("method", METHODS, ids=repr)
def test_a_loss_may_name_the_model_instead_of_its_argument(method: fg.Estimator) -> None:
    model, x = perceptron().double(), rows(6, 4)
    other = copy.deepcopy(model)
    fg.estimate_grad_(lambda _: model(x).square().mean(), model, method, generator=seeded())
    fg.estimate_grad_(lambda m: m(x).square().mean(), other, method, generator=seeded())
    assert torch.equal(gradient(model), gradient(other))


@pytest.mark.parametrize("method", [*METHODS, fg.ForwardGradient(tangents=3, chunk_size=2)], ids=repr)
def test_autocast_around_the_call_leaves_gradients_in_the_precision_of_the_parameters(method: fg.Estimator) -> None:
    found = []
    for outside in (True, False):
        torch.manual_seed(0)
        model = perceptron()
        with torch.autocast("cpu", torch.bfloat16, enabled=outside):

            def loss(m: nn.Module) -> Tensor:
                with torch.autocast("cpu", torch.bfloat16):
                    return F.cross_entropy(m(rows(6, 4, dtype=torch.float32)), torch.arange(6) % 3)

            fg.estimate_grad_(loss, model, method, generator=seeded())
        assert gradient(model).dtype == torch.float32
        found.append(gradient(model))
    torch.testing.assert_close(found[0], found[1], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("method", CHUNKS, ids=repr)
@GIVEN_UP
def test_a_loss_may_hold_a_gradient_taken_by_torch_func(method: fg.ForwardGradient) -> None:
    model, x = nn.Linear(4, 2).double(), rows(5, 4)

    def loss(m: nn.Module) -> Tensor:
        return torch.func.grad(lambda inputs: m(inputs).tanh().sum())(x).square().sum()

    record = fg.estimate_grad_(loss, model, method, generator=seeded())
    v = method.law.draw(trained(model), method.tangents, seeded())
    products = sum((g * v[name]).reshape(method.tangents, -1).sum(dim=1) for name, g in true_gradient(model, loss).items())
    torch.testing.assert_close(record.derivatives, products)


@pytest.mark.parametrize("method", METHODS, ids=repr)
def test_parameters_that_the_loss_does_not_use(method: fg.Estimator) -> None:
    model = nn.ModuleDict({"used": nn.Linear(4, 1), "idle": nn.Linear(2, 2)}).double()
    fg.estimate_grad_(lambda m: m["used"](rows(5, 4)).square().mean(), model, method, generator=seeded())
    assert model["used"].weight.grad.any()
    assert (model["idle"].weight.grad is None) == isinstance(method, fg.Backprop)  # forward mode cannot know: mean 0, not nothing


LINE = rows(5, 4)
ELSEWHERE = torch.ones(2, requires_grad=True)
MISTAKES: list[tuple[str, Any, type[Exception], str]] = [
    ("nothing to train", lambda kw: kw["at"].requires_grad_(False), ValueError, "no parameter has requires_grad=True"),
    ("not a leaf", lambda kw: kw.update(at=LINE.clone().requires_grad_() * 2), ValueError, "not a leaf"),
    ("complex", lambda kw: kw.update(at=torch.ones(2, dtype=torch.complex64, requires_grad=True)), TypeError, "real floating-point"),
    ("no tensors", lambda kw: kw.update(at=[1.0, 2.0]), TypeError, "expected a module, a tensor, or a list or tuple of tensors"),
    ("a number", lambda kw: kw.update(at=5), TypeError, "expected a module, a tensor, or a list or tuple of tensors"),
    ("none", lambda kw: kw.update(at=None), TypeError, "expected a module, a tensor, or a list or tuple of tensors"),
    ("an iterator", lambda kw: kw.update(at=kw["at"].parameters()), TypeError, "expected a module, a tensor, or"),
    ("an empty list", lambda kw: kw.update(at=[]), ValueError, "no parameter has requires_grad=True"),
    ("the loss's value", lambda kw: kw.update(loss=torch.ones(())), TypeError, "must be a function of the model.*not a Tensor"),
    ("loss of rows", lambda kw: kw.update(loss=lambda m: m(LINE)), ValueError, r"not shape \(5, 1\): reduce it"),
    ("loss of no tensor", lambda kw: kw.update(loss=lambda m: 1.0), TypeError, "must return a tensor, not float"),
    ("detached", lambda kw: kw.update(loss=lambda m: m(LINE).mean().detach()), RuntimeError, "carries no tangent|does not require grad"),
    ("another model", lambda kw: kw.update(loss=lambda m: ELSEWHERE.sum()), RuntimeError, "does not depend"),
]


@pytest.mark.parametrize("method", METHODS[:3], ids=repr)
@pytest.mark.parametrize(("spoil", "error", "message"), [m[1:] for m in MISTAKES], ids=[m[0] for m in MISTAKES])
def test_mistakes_are_told_and_change_nothing(spoil: Any, error: type[Exception], message: str, method: fg.Estimator) -> None:
    model = nn.Linear(4, 1).double()
    model.weight.grad = torch.ones_like(model.weight)
    arguments = {"loss": lambda m: m(LINE).square().mean(), "at": model}
    spoil(arguments)
    with pytest.raises(error) as told:
        fg.estimate_grad_(arguments["loss"], arguments["at"], method, generator=seeded())
    assert re.search(message, str(told.value))
    assert torch.equal(model.weight.grad, torch.ones_like(model.weight))
    assert model.bias.grad is None


def test_directions_need_a_generator_and_backpropagation_does_not() -> None:
    model = nn.Linear(4, 1).double()
    with pytest.raises(ValueError, match="need an explicit generator"):
        fg.estimate_grad_(lambda m: m(LINE).mean(), model)
    assert model.weight.grad is None
    fg.estimate_grad_(lambda m: m(LINE).mean(), model, fg.Backprop())
    torch.testing.assert_close(model.weight.grad[0], LINE.mean(dim=0))
