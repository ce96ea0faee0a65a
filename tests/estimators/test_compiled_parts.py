"""Models and losses of which `torch.compile` made a part: they run as they were written while an estimate is made, and only then."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.support.cases import classify, rows, seeded, trained, true_gradient
from torch import Tensor, nn

import forwardgrad as fg

# the compiler's own warning, of what it looks at itself
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")

X, LOSS = rows(6, 4), classify(rows(6, 4))
METHODS = [
    *(fg.ForwardGradient(2, perturb=kind()) for kind in fg.PERTURBATIONS),
    *(fg.ZerothOrder(1e-4, perturb=p) for p in (fg.Dense(), fg.LowRank(), fg.PerExample(), fg.Sparse(0.5))),
    fg.ZerothOrder(1e-4, tangents=2, chunk_size=None, perturb=fg.LowRank()),
    fg.ZerothOrder(1e-4, in_place=True),
    *(fg.Backprop(), fg.Backprop(checkpoint=True), fg.Guess(), fg.FixedFeedback(), fg.LearnedFeedback(), fg.LocalLosses(), fg.Readout()),
]


class Backend:
    """What a compiler hands its graphs to, which runs them as they are."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        self.graphs += 1
        return graph.forward


class WithFunction(nn.Module):
    def __init__(self, function: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.scale, self.block, self.function = nn.Parameter(torch.tensor(0.7)), block(), function

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.block(self.function(x, self.scale))
        return out


def block() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 5), nn.Sequential(nn.Linear(5, 5), nn.Tanh()), nn.Linear(5, 3))


def part(backend: Backend | None) -> nn.Module:
    model = block()
    if backend is not None:
        model[1] = torch.compile(model[1], backend=backend)
    return model


def whole(backend: Backend | None) -> Any:
    return block() if backend is None else torch.compile(block(), backend=backend)


def itself(backend: Backend | None) -> nn.Module:
    model = block()
    if backend is not None:
        model.compile(backend=backend)
    return model


def function(backend: Backend | None) -> nn.Module:
    def scaled(x: Tensor, scale: Tensor) -> Tensor:
        return torch.tanh(x * scale)

    return WithFunction(scaled if backend is None else torch.compile(scaled, backend=backend))


def built(make: Callable[[Backend | None], nn.Module], backend: Backend | None) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return make(backend).double()


def estimated(model: nn.Module, method: fg.Estimator) -> tuple[fg.Estimate, list[Tensor | None]]:
    state: dict[str, Tensor] = {}
    for seed in range(2):  # some know nothing in their first step
        model.zero_grad()
        record = fg.estimate_grad_(LOSS, model, method, generator=seeded(seed), state=state)
    return record, [p.grad for p in model.parameters()]


@pytest.mark.product
@pytest.mark.parametrize("make", [part, whole, itself, function], ids=lambda make: make.__name__)
@pytest.mark.parametrize("method", METHODS, ids=repr)
def test_an_estimate_of_a_compiled_model_is_that_of_the_model_as_it_was_written(
    method: fg.Estimator, make: Callable[[Backend | None], nn.Module]
) -> None:
    backend = Backend()
    model = built(make, backend)
    record, found = estimated(model, method)
    reference, expected = estimated(built(make, None), method)
    torch.testing.assert_close(record.derivatives, reference.derivatives, rtol=1e-6, atol=1e-9)
    for one, other in zip(found, expected, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-8)
    assert backend.graphs == (type(method) is fg.Backprop and not method.checkpoint)  # whose pass is an ordinary one
    torch.compiler.reset()


@pytest.mark.parametrize("make", [part, whole, itself, function], ids=lambda make: make.__name__)
def test_derivatives_through_compiled_parts_are_those_of_backpropagation(make: Callable[[Backend | None], nn.Module]) -> None:
    model, exact = built(make, Backend()), true_gradient(built(make, None), LOSS)
    count = sum(p.numel() for p in trained(model).values())
    fg.estimate_grad_(LOSS, model, fg.ForwardGradient(count, law=fg.Orthogonal()), generator=seeded())
    for p, g in zip(model.parameters(), exact.values(), strict=True):
        torch.testing.assert_close(p.grad, g, rtol=1e-9, atol=1e-12)


def test_a_model_is_compiled_again_after_an_estimate_and_after_one_that_failed() -> None:
    backend = Backend()
    model = built(part, backend)
    fg.estimate_grad_(LOSS, model, generator=seeded())
    with pytest.raises(ZeroDivisionError):
        fg.estimate_grad_(lambda m: m(X).sum() / (1 // 0), model, generator=seeded())
    assert backend.graphs == 0
    model(X)
    assert backend.graphs == 1
    torch.compiler.reset()


def test_threads_that_estimate_at_once_leave_the_compiler_as_it_was() -> None:
    backend, meet = Backend(), threading.Barrier(2, timeout=30)
    models = [built(part, backend) for _ in range(2)]
    first_out = threading.Event()

    def run(index: int) -> None:
        def loss(m: nn.Module) -> Tensor:
            if not waited[index]:
                waited[index] = True
                meet.wait()
                if index:  # the thread that came second goes on when the first one has left
                    first_out.wait(30)
            return LOSS(m)

        fg.estimate_grad_(loss, models[index], fg.ZerothOrder(), generator=seeded())
        first_out.set()

    waited = [False, False]
    threads = [threading.Thread(target=run, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert backend.graphs == 0
    models[0](X)
    assert backend.graphs == 1
    torch.compiler.reset()


@pytest.mark.full
def test_a_whole_step_with_a_compiled_part_is_compiled_as_one() -> None:
    ends = []
    for backend, engine in ((None, "eager"), (Backend(), "compile")):
        model = built(part, backend)
        step = fg.TrainingStep(
            lambda m, x: F.cross_entropy(m(x), torch.arange(6) % 3),
            model,
            torch.optim.SGD(model.parameters(), lr=0.1),
            fg.ForwardGradient(perturb=fg.Activity()),
            generator=seeded(),
            engine=engine,
        )
        for _ in range(3):
            step(X)
        ends.append([p.detach() for p in model.parameters()])
    torch.testing.assert_close(*ends)


@pytest.mark.parametrize("wrapped", ["partial", "step"])
def test_losses_that_share_a_wrapper_are_told_apart(wrapped: str) -> None:
    """What is remembered of a model is remembered by the code of the loss: that of a wrapped one is inside its wrapper."""
    model = built(part, None)
    view = model[2].bias[:2]

    def estimate(loss: Callable[..., Tensor]) -> None:
        if wrapped == "step":
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            fg.TrainingStep(loss, model, optimizer, fg.ZerothOrder(), generator=seeded())(1)
            return
        fg.estimate_grad_(functools.partial(loss, power=1), model, fg.ZerothOrder(), generator=seeded())

    estimate(lambda m, power: m(X).square().mean() * power)
    with pytest.raises(RuntimeError, match=r"uses the trained 2\.bias as another tensor"):
        estimate(lambda m, power: m(X).mean() * view.sum() * power)
