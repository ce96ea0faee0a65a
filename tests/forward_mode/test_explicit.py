"""The explicit way of forward mode against torch's own dual numbers, and what it refuses to follow."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.estimators.test_contract import METHODS, applies, short
from tests.support.cases import EXACT, GIVEN_UP, Case, Loss, classify, rows, seeded, trained, true_gradient
from torch import Tensor, nn

import forwardgrad as fg
from forwardgrad.diagnostics.memory import peak_bytes
from forwardgrad.factored import dense
from forwardgrad.forward_mode import arbitration
from forwardgrad.forward_mode.arbitration import plainly
from forwardgrad.objective import Objective

FORWARD = [m for m in METHODS if not isinstance(m, (fg.Backprop, fg.ZerothOrder, fg.FixedFeedback, fg.Readout))]
PAIRS = [(method, case) for case in EXACT for method in FORWARD if applies(method, case)]


def ways(model: nn.Module, loss: Loss) -> list[bool]:
    """Of every kind of evaluation of a model, whether it was given up for the plain way."""
    return [known.plain for known in arbitration._known[model].values()]


def both(model: nn.Module, loss: Loss, method: fg.Estimator, steps: int = 2) -> list[tuple[fg.Estimate, list[Tensor | None], nn.Module]]:
    """Record, gradient and model after some estimates, the explicit way and the plain one."""
    found = []
    for way in (False, True):
        one, state, generator = copy.deepcopy(model), {}, seeded(3)
        torch.manual_seed(5)
        for _ in range(steps):
            one.zero_grad()
            if way:
                with plainly():
                    record = fg.estimate_grad_(loss, one, method, generator=generator, state=state)
            else:
                record = fg.estimate_grad_(loss, one, method, generator=generator, state=state)
        found.append((record, [p.grad for p in one.parameters()], one))
    return found


def same(one: Any, other: Any, rtol: float = 1e-9) -> None:
    torch.testing.assert_close(one[0].loss, other[0].loss, rtol=rtol, atol=1e-12)
    torch.testing.assert_close(one[0].derivatives, other[0].derivatives, rtol=rtol, atol=1e-11)
    for g, h in zip(one[1], other[1], strict=True):
        assert (g is None) == (h is None)
        if g is not None:
            torch.testing.assert_close(g, h, rtol=rtol, atol=1e-10 * max(1.0, float(h.abs().max())))
    for b, c in zip(one[2].buffers(), other[2].buffers(), strict=True):
        torch.testing.assert_close(b, c)


@pytest.mark.product
@pytest.mark.product
@pytest.mark.parametrize(("method", "case"), PAIRS, ids=[f"{case}-{short(method)}" for method, case in PAIRS])
def test_both_ways_are_equal(method: fg.Estimator, case: Case) -> None:
    model, loss = case.build()
    same(*both(model, loss, method))


FOLLOWED = ("mlp", "cnn", "cnn channels_last", "tied", "residual", "layer norm", "batch norm train", "batch norm eval", "group norm")


@pytest.mark.parametrize("perturb", [fg.Dense(), fg.LowRank(), fg.PerExample(), fg.Activity()], ids=lambda p: p.name)
@pytest.mark.parametrize("case", [case for case in EXACT if case.name in FOLLOWED], ids=str)
def test_ordinary_models_are_followed(case: Case, perturb: fg.Perturbation) -> None:
    """The fast way is the one that is taken: without this, equality would say nothing."""
    model, loss = case.build()
    for count in (1, 3, 1):
        fg.estimate_grad_(loss, model, fg.ForwardGradient(count, perturb=perturb), generator=seeded())
    assert ways(model, loss) == [False] * len(ways(model, loss)) != []
    assert {len(known.paths) for known in arbitration._known[model].values()} == {1}  # compared once


# Calls with rules, each beside an operation that has none -----------------------------------------------------------------------------


class Body(nn.Module):
    """A model whose middle is a function of a hidden tensor."""

    def __init__(self, middle: Callable[[Tensor], Tensor], shape: tuple[int, ...] = (8,)) -> None:
        super().__init__()
        self.first, self.middle, self.shape = nn.Linear(4, 8), middle, shape
        self.last = nn.LazyLinear(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.middle(self.first(x).unflatten(1, self.shape)).flatten(1))


def in_place(h: Tensor) -> Tensor:
    h = h * 2
    h += h.sin()
    return F.relu_(h)


def view_then_in_place(h: Tensor) -> Tensor:
    h = h * 1.5
    part = h[:, :2]
    F.relu_(h)
    return h + part.sum(1, keepdim=True)


def two_relus_of_one(h: Tensor) -> Tensor:
    h = h.unflatten(1, (2, 2, 2)).tanh()
    one, other = F.relu(h), F.relu(h)
    return F.max_pool2d(one, 2).sum(1, keepdim=True) + other + h


def relu_kept(h: Tensor) -> Tensor:
    h = h.unflatten(1, (2, 2, 2)) * 3
    out = F.relu(h)
    pooled = F.max_pool2d(out, (1, 2))
    return torch.cat([out.flatten(1), pooled.flatten(1), h.flatten(1)], dim=1)


def buffer_written(h: Tensor) -> Tensor:
    out = torch.zeros_like(h)
    out[:, ::2] = h[:, 1::2]
    return out


MIDDLES: dict[str, tuple[Callable[[Tensor], Tensor], bool]] = {  # and whether it can be followed
    "in place": (in_place, True),
    "in place beside a view": (view_then_in_place, False),
    "two rectified": (two_relus_of_one, True),
    "rectified and kept": (relu_kept, True),
    "written into a buffer": (buffer_written, False),
    "gelu": (F.gelu, True),
    "gelu tanh": (lambda h: F.gelu(h, approximate="tanh"), True),
    "silu": (F.silu, True),
    "sigmoid": (torch.sigmoid, True),
    "chunks": (lambda h: torch.cat([part * index for index, part in enumerate(h.chunk(3, 1))], 1), True),
    "largest": (lambda h: torch.cat([h, h.max(1, keepdim=True).values], 1), True),
    "sorted": (lambda h: h.sort(1).values, True),
    "number": (lambda h: 2 + h + 1, True),
    "broadcast": (lambda h: h.mean(0) + h.unsqueeze(1), True),
    "detached": (lambda h: h * h.detach(), True),
    "conv1d": (lambda h: F.conv1d(h.unsqueeze(1), torch.ones(2, 1, 3, dtype=h.dtype)), True),
    "pool": (lambda h: F.max_pool2d(h.view(-1, 1, 2, 4), 2), True),
    "overlapping pool": (lambda h: F.max_pool2d(h.view(-1, 1, 2, 4), 2, 1, 1, ceil_mode=True), True),
}


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("perturb", [fg.Dense(), fg.LowRank(2)], ids=lambda p: p.name)
@pytest.mark.parametrize("name", MIDDLES)
@GIVEN_UP
def test_what_stands_in_the_middle(name: str, perturb: fg.Perturbation, count: int) -> None:
    middle, followed = MIDDLES[name]
    torch.manual_seed(0)
    model, loss = Body(middle).double(), classify(rows(5, 4))
    loss(model)
    one, other = both(model, loss, fg.ForwardGradient(count, perturb=perturb))
    same(one, other)
    assert ways(one[2], loss) == [not followed]


# What passes by unseen ----------------------------------------------------------------------------------------------------------------


class Cube(torch.autograd.Function):
    """A function of the user's own, with a rule for forward mode."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x**3

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_forward(inputs[0])

    @staticmethod
    def jvp(ctx: Any, t: Tensor) -> Tensor:
        return 3 * ctx.saved_tensors[0] ** 2 * t


@pytest.mark.parametrize("beside", [0, 1])
@GIVEN_UP
def test_an_autograd_function_is_not_passed_by(beside: int) -> None:
    torch.manual_seed(0)
    model, loss = Body(lambda h: beside * h + Cube.apply(h)).double(), classify(rows(5, 4))
    loss(model)
    v = fg.Gaussian().draw(dict(model.named_parameters()), 1, seeded(3))
    d = fg.estimate_grad_(loss, model, fg.ForwardGradient(), generator=seeded(3)).derivatives
    cubed = Body(lambda h: beside * h + h**3).double()
    cubed(rows(5, 4))
    cubed.load_state_dict(model.state_dict())
    exact = true_gradient(cubed, loss)
    torch.testing.assert_close(d[0], sum((exact[name] * v[name][0]).sum() for name in exact), rtol=1e-9, atol=1e-12)
    assert ways(model, loss) == [True]


class Scripted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = torch.jit.trace(lambda x: x.sin() * x, torch.zeros(2, 8, dtype=torch.float64), check_trace=False)

    def forward(self, h: Tensor) -> Tensor:
        return self.inner(h)


UNSEEN: dict[str, Callable[[], Callable[[Tensor], Tensor]]] = {"function": lambda: Cube.apply, "traced": Scripted}


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # torch's own
@pytest.mark.parametrize("perturb", [fg.Dense(), fg.LowRank()], ids=lambda p: p.name)
@pytest.mark.parametrize("name", UNSEEN)
@GIVEN_UP
def test_what_passes_by_is_found_however_little_it_does_so_far(name: str, perturb: fg.Perturbation) -> None:
    """A branch that is scaled down at first: no comparison of numbers finds it, and it may grow."""
    torch.manual_seed(0)
    scale, branch = [1e-9], UNSEEN[name]()
    model, loss = Body(lambda h: h + scale[0] * branch(h)).double(), classify(rows(5, 4))
    loss(model)
    for grown in (1e-9, 10.0):
        scale[0] = grown
        same(*both(model, loss, fg.ForwardGradient(perturb=perturb), steps=1))
        fg.estimate_grad_(loss, model, fg.ForwardGradient(perturb=perturb), generator=seeded())
    assert ways(model, loss) == [True]


@GIVEN_UP
def test_a_new_path_is_compared_before_it_is_trusted() -> None:
    """A branch that is first taken late, with a function that passes by unseen."""
    torch.manual_seed(0)
    late = [False]
    model = Body(lambda h: Cube.apply(h.sin()) if late[0] else h.tanh()).double()
    loss = classify(rows(5, 4))
    loss(model)
    fg.estimate_grad_(loss, model, fg.ForwardGradient(), generator=seeded())
    assert ways(model, loss) == [False]
    late[0] = True
    found = fg.estimate_grad_(loss, model, fg.ForwardGradient(), generator=seeded(1)).derivatives
    with plainly():
        plain = fg.estimate_grad_(loss, model, fg.ForwardGradient(), generator=seeded(1)).derivatives
    torch.testing.assert_close(found, plain)
    assert ways(model, loss) == [True]


def test_a_mistake_of_the_users_is_told_and_does_not_cost_the_fast_way() -> None:
    model, x = nn.Sequential(nn.Linear(4, 3)).double(), rows(5, 4)
    wrong = [True]

    def loss(m: nn.Module) -> Tensor:
        if wrong[0]:
            raise ZeroDivisionError("the user's own")
        return m(x).square().mean()

    with pytest.raises(ZeroDivisionError, match="own"):
        fg.estimate_grad_(loss, model, fg.ForwardGradient(perturb=fg.LowRank()), generator=seeded())
    wrong[0] = False
    fg.estimate_grad_(loss, model, fg.ForwardGradient(perturb=fg.LowRank()), generator=seeded())
    assert ways(model, loss) == [False]


# Memory -------------------------------------------------------------------------------------------------------------------------------


def deep(layers: int, width: int = 32) -> nn.Sequential:
    return nn.Sequential(*(part for _ in range(layers) for part in (nn.Linear(width, width), nn.ReLU())), nn.Linear(width, 1))


def held(layers: int, count: int) -> tuple[int, int]:
    """Peak bytes of a step of rank one, and of a plain forward pass."""
    model, x = deep(layers), torch.randn(64, 32)
    optimizer, method = torch.optim.SGD(model.parameters(), 1e-3), fg.ForwardGradient(count, perturb=fg.LowRank())
    step = fg.TrainingStep(lambda m, x: m(x).square().mean(), model, optimizer, method, generator=seeded())
    step(x)  # compared with the plain way here
    peak = peak_bytes(lambda: step(x), [x.device])
    assert all(p.grad is None for p in model.parameters())
    with torch.no_grad():
        return peak, peak_bytes(lambda: model(x), [x.device])


@pytest.mark.parametrize("count", [1, 2])
def test_a_step_of_rank_one_holds_the_same_at_every_depth(count: int) -> None:
    """Neither activations, nor directions, nor gradients add up: what is held is of the size of two layers."""
    (shallow, _), (high, plain) = held(8, count), held(64, count)
    assert high <= 1.05 * shallow
    assert high <= (1.5 + count) * plain


@pytest.mark.parametrize("perturb", [fg.Dense(), fg.LowRank(), fg.Activity()], ids=lambda p: p.name)
def test_what_a_step_returns_holds_nothing_of_it(perturb: fg.Perturbation) -> None:
    """Neither directions nor tangents: losses may be collected for as long as training lasts."""
    model, loss = deep(2), classify(torch.randn(8, 32), classes=1)
    model[0].register_forward_hook(lambda module, inputs, output: seen.append(output))
    seen: list[Tensor] = []
    record = fg.estimate_grad_(loss, model, fg.ForwardGradient(perturb=perturb), generator=seeded())
    assert not record.loss.__dict__
    for output in seen:  # a hook may keep what it sees
        track = output.__dict__.get("_forwardgrad_track")
        assert track is None or not track.owner.moving


# An estimate in parts -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "case"), [(m, c) for m, c in PAIRS if c.name in ("mlp", "tied", "padded embedding", "cnn channels_last")]
)
def test_parts_add_up_to_the_estimate(method: fg.Estimator, case: Case) -> None:
    model, loss = case.build()
    record, whole = method.estimate(Objective(loss, model), seeded(), {})
    other, parts = method.parts(Objective(loss, model), seeded(), {})
    total: dict[str, Tensor] = {}
    for name, part in parts:
        value = dense(part).clone()
        total[name] = value if name not in total else total[name] + value
    assert torch.equal(record.derivatives, other.derivatives)
    assert record.forward_passes == other.forward_passes
    assert total.keys() == {name for name, gradient in whole.items() if gradient is not None}
    for name, gradient in total.items():
        torch.testing.assert_close(gradient, whole[name], rtol=1e-10, atol=1e-12)


@pytest.mark.product
@pytest.mark.parametrize("method", [m for m in FORWARD if isinstance(m, fg.ForwardGradient)], ids=short)
@pytest.mark.parametrize("name", ["cnn", "cnn channels_last", "tied"])
def test_plain_descent_by_parts_is_sgd(name: str, method: fg.Estimator) -> None:
    (case,) = [case for case in EXACT if case.name == name]
    torch.manual_seed(0)
    first, loss = case.build()
    results = []
    for whole in (True, False):
        model = copy.deepcopy(first)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.01)
        schedule, generator, state = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5), seeded(), {}
        step = fg.TrainingStep(loss, model, optimizer, method, generator=generator, state=state)
        for _ in range(2):
            if whole:
                optimizer.zero_grad()
                fg.estimate_grad_(loss, model, method, generator=generator, state=state)
                optimizer.step()
            else:
                step()
            schedule.step()
        results.append(trained(model))
    for key, value in results[0].items():
        torch.testing.assert_close(value, results[1][key], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("count", [1, 3])
def test_a_call_that_gives_whole_numbers_alone_keeps_the_faster_way(count: int) -> None:
    torch.manual_seed(0)
    model, x = nn.Linear(4, 3).double(), rows(6, 4)

    def loss(model: nn.Module) -> Tensor:
        h = model(x)
        return h.gather(1, h.to(torch.int64).abs() % 3).square().sum()

    objective = Objective(loss, model)
    tangents = {name: torch.randn(count, *p.shape, dtype=p.dtype, generator=seeded()) for name, p in objective.parameters.items()}
    _, d = fg.directional_derivatives(objective, tangents)
    exact = torch.autograd.grad(loss(model), list(model.parameters()))
    wanted = sum((g * v).flatten(1).sum(1) for g, v in zip(exact, tangents.values(), strict=True))
    torch.testing.assert_close(d, wanted, rtol=1e-10, atol=1e-12)
    assert ways(model, loss) == [False]
