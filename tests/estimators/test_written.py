"""Losses that write to what is trained, or keep what they computed of it: against backpropagation in float64.

A weight of one number, and directions of ±1: the estimate is then the derivative itself.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.support.cases import seeded
from torch import Tensor, nn
from torch.nn.utils import parametrize

import forwardgrad as fg

X = torch.tensor([[0.5], [-1.0], [2.0]], dtype=torch.float64)
LAW = fg.Rademacher()
METHODS = [
    fg.ZerothOrder(1e-5, law=LAW),
    fg.ZerothOrder(1e-5, tangents=2, law=LAW, chunk_size=2),
    fg.ZerothOrder(1e-5, law=LAW, perturb=fg.LowRank()),
    fg.ZerothOrder(1e-5, tangents=2, law=LAW, chunk_size=2, perturb=fg.LowRank()),
    fg.ForwardGradient(law=LAW),
    fg.ForwardGradient(tangents=2, law=LAW),
    fg.ForwardGradient(law=LAW, perturb=fg.LowRank()),
]


def loss(model: nn.Module) -> Tensor:
    return (model(X) - 1).square().mean()


class Square(nn.Module):
    def forward(self, w: Tensor) -> Tensor:
        return w.square()


def squared() -> tuple[nn.Module, nn.Parameter]:
    model = nn.Linear(1, 1, bias=False, dtype=torch.float64)
    parametrize.register_parametrization(model, "weight", Square())
    (weight,) = model.parameters()
    nn.init.constant_(weight, 0.7)
    return model, weight


@pytest.mark.parametrize("method", METHODS, ids=repr)
def test_a_cache_around_a_step_keeps_no_weight_of_another_evaluation(method: fg.Estimator) -> None:
    model, weight = squared()
    (truth,) = torch.autograd.grad(loss(model), [weight])
    with parametrize.cached():
        before = model.weight
        found = fg.estimate_grad_(loss, model, method, generator=seeded())
        assert model.weight is before
    torch.testing.assert_close(weight.grad, truth, rtol=1e-6, atol=0)
    torch.testing.assert_close(found.loss, loss(model).detach(), rtol=1e-6, atol=0)


class Writing(nn.Module):
    """A layer, or a function without a rule, of a weight that its forward pass writes to."""

    def __init__(self, write: Callable[[nn.Parameter], Any], layer: bool) -> None:
        super().__init__()
        self.weight, self.write, self.layer = nn.Parameter(torch.tensor([[0.9]], dtype=torch.float64)), write, layer

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.write(self.weight)
        return F.linear(x, self.weight) if self.layer else x * self.weight.sin()


def unit(w: nn.Parameter) -> None:
    w.data = torch.renorm(w.data, 2, 0, 0.5)


SETTLED: dict[str, Callable[[nn.Parameter], Any]] = {
    "clamp": lambda w: w.clamp_(-0.2, 0.2),
    "clamp of data": lambda w: w.data.clamp_(-0.2, 0.2),
    "renorm": unit,
    "normalize": lambda w: w.copy_(F.normalize(w, dim=1)),
    "item": lambda w: w.view(-1)[0].fill_(0.6),
    "function": lambda w: nn.init.constant_(w, 0.4),
}
REPEATED: dict[str, Callable[[nn.Parameter], Any]] = {
    "decay": lambda w: w.mul_(0.5),
    "decay of values": lambda w: w.detach().mul_(0.5),
    "decay of data": lambda w: setattr(w, "data", w.data * 0.5),
    "decay of a view": lambda w: w.view(-1).mul_(0.5),
    "out": lambda w: torch.mul(w, 0.5, out=w),
}
FORWARD = [method for method in METHODS if isinstance(method, fg.ForwardGradient)]
ZEROTH = [method for method in METHODS if isinstance(method, fg.ZerothOrder)]


@pytest.mark.parametrize("layer", [True, False], ids=["layer", "function"])
@pytest.mark.parametrize("method", FORWARD, ids=repr)
@pytest.mark.parametrize("name", SETTLED)
def test_forward_mode_follows_a_write_as_backpropagation_does(name: str, method: fg.ForwardGradient, layer: bool) -> None:
    model, other = Writing(SETTLED[name], layer), Writing(SETTLED[name], layer)
    for start in (0.9, -1.5):  # the first step learns the model, the second one goes by what was learned
        for one in (model, other):
            nn.init.constant_(one.weight, start)
        (truth,) = torch.autograd.grad(loss(other), [other.weight])
        model.zero_grad()
        found = fg.estimate_grad_(loss, model, method, generator=seeded())
        torch.testing.assert_close(found.derivatives.abs(), truth.abs().reshape(1).expand(method.tangents), rtol=1e-9, atol=0)
        if isinstance(method.perturb, fg.Dense):  # else reading a weight by itself moves it once more, which adds noise of mean zero
            torch.testing.assert_close(model.weight.grad, truth, rtol=1e-9, atol=0)
        torch.testing.assert_close(model.weight, other.weight, rtol=1e-9, atol=0)


@pytest.mark.parametrize("layer", [True, False], ids=["layer", "function"])
@pytest.mark.parametrize(
    ("method", "name"), [(m, n) for m in ZEROTH for n in (*SETTLED, *REPEATED)] + [(m, n) for m in FORWARD for n in REPEATED], ids=str
)
def test_a_write_that_an_estimate_would_lose_or_repeat_is_refused(method: fg.Estimator, name: str, layer: bool) -> None:
    model = Writing({**SETTLED, **REPEATED}[name], layer)
    with pytest.raises(RuntimeError, match=r"the loss writes to weight.*ahead of the step"):
        fg.estimate_grad_(loss, model, method, generator=seeded())


@pytest.mark.parametrize("sides", ["one", "two"])
def test_a_write_inside_a_transform_is_refused(sides: Any) -> None:
    model = Writing(lambda w: None, layer=False)

    def each(m: nn.Module) -> Tensor:
        assert isinstance(m, Writing)
        moved = torch.func.vmap(lambda row: row * m.weight.sin())(X)
        m.weight.mul_(0.5)
        return moved.square().mean()

    with pytest.raises(RuntimeError, match="the loss writes to weight"):
        fg.estimate_grad_(each, model, fg.ZerothOrder(1e-5, law=LAW, sides=sides), generator=seeded())


@pytest.mark.parametrize("method", METHODS, ids=repr)
@pytest.mark.parametrize("bag", [False, True], ids=["embedding", "bag"])
def test_the_rows_of_an_embedding_are_made_short_before_they_move(method: fg.Estimator, bag: bool) -> None:
    make = nn.EmbeddingBag if bag else nn.Embedding
    model, other = (make(1, 1, max_norm=1.0, dtype=torch.float64) for _ in range(2))
    index = torch.zeros(3, 1, dtype=torch.int64)
    for one in (model, other):
        nn.init.constant_(one.weight, 5.0)

    def looked_up(m: nn.Module) -> Tensor:
        return (m(index).sin().reshape(3, 1) - X).square().mean()

    (truth,) = torch.autograd.grad(looked_up(other), [other.weight])
    fg.estimate_grad_(looked_up, model, method, generator=seeded())
    torch.testing.assert_close(model.weight.grad, truth, rtol=1e-6, atol=0)
    torch.testing.assert_close(model.weight, other.weight, rtol=0, atol=0)


class Counting(nn.Linear):
    """Counts its calls in a buffer."""

    def __init__(self) -> None:
        super().__init__(1, 1, dtype=torch.float64)
        self.register_buffer("once", torch.zeros((), dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        self.once += 1
        return super().forward(x)


@pytest.mark.parametrize("sides", ["one", "two"])
def test_buffers_are_written_once_a_step(sides: Any) -> None:
    model = Counting()
    for _ in range(3):
        fg.estimate_grad_(loss, model, fg.ZerothOrder(1e-5, tangents=2, law=LAW, sides=sides), generator=seeded())
    assert float(model.once) == 3


class Taught(nn.Module):
    """A model with a teacher inside that follows it at every forward pass: a frozen layer, or buffers."""

    def __init__(self, follow: Callable[[Tensor, Tensor], Any], frozen: bool) -> None:
        super().__init__()
        self.own, self.follow = nn.Linear(1, 1, bias=False, dtype=torch.float64), follow
        weight = torch.full((1, 1), 0.4, dtype=torch.float64)
        if frozen:
            self.teacher = nn.Parameter(weight, requires_grad=False)
        else:
            self.register_buffer("teacher", weight)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.follow(self.teacher, self.own.weight)
        return self.own(x) - F.linear(x, self.teacher) / 2


def assigned(teacher: Tensor, w: Tensor) -> None:
    teacher.data = 0.9 * teacher.data + 0.1 * w.data


FOLLOWS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "lerp": lambda teacher, w: teacher.lerp_(w, 0.1),
    "data": lambda teacher, w: teacher.data.mul_(0.9).add_(w.data, alpha=0.1),
    "foreach": lambda teacher, w: torch._foreach_lerp_([teacher], [w], 0.1),
    "assignment": assigned,
}
EVERY = [*METHODS, fg.ForwardGradient(perturb=fg.Activity()), fg.LearnedFeedback(), fg.FixedFeedback(), fg.Guess()]


@pytest.mark.parametrize("method", EVERY, ids=repr)
@pytest.mark.parametrize("name", FOLLOWS)
def test_a_write_to_a_frozen_parameter_is_refused_ahead_of_it(name: str, method: fg.Estimator) -> None:
    model = Taught(FOLLOWS[name], frozen=True)
    with pytest.raises(RuntimeError, match=r"writes to teacher \(.*\), which is frozen, .* or make it a buffer"):
        fg.estimate_grad_(loss, model, method, generator=seeded(), state={})
    assert float(model.teacher) == 0.4


@pytest.mark.parametrize("method", [method for method in FORWARD if isinstance(method.perturb, fg.Dense)], ids=repr)
def test_a_teacher_of_buffers_follows_once_a_step(method: fg.ForwardGradient) -> None:
    model = Taught(FOLLOWS["lerp"], frozen=False)
    for _ in range(2):
        other = 0.9 * model.teacher + 0.1 * model.own.weight.detach()
        (truth,) = torch.autograd.grad((model.own(X) - X * other / 2 - 1).square().mean(), [model.own.weight])
        model.zero_grad()
        fg.estimate_grad_(loss, model, method, generator=seeded())
        torch.testing.assert_close(model.teacher, other, rtol=1e-9, atol=0)
        torch.testing.assert_close(model.own.weight.grad, truth, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("method", FORWARD, ids=repr)
def test_a_write_to_what_is_kept_outside_of_the_model_is_told(method: fg.Estimator) -> None:
    model, total = nn.Linear(1, 1, dtype=torch.float64), torch.zeros((), dtype=torch.float64)

    def counted(m: nn.Module) -> Tensor:
        found = loss(m)
        total.add_(found.detach())
        return found

    with pytest.raises(NotImplementedError, match=r"writes to a tensor that it did not make \(add_\)"):
        fg.estimate_grad_(counted, model, method, generator=seeded())
