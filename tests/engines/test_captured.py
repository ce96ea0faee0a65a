"""What runs on a GPU: captured graphs, and what is drawn inside them; the rest is as on the processor."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.engines.test_engines import OPTIMIZERS, X, Y, loss, made, network, outcome
from tests.estimators.test_contract import short
from tests.support.cases import seeded
from torch import Tensor, nn

import forwardgrad as fg
from forwardgrad.directions import evaluation
from forwardgrad.directions.evaluation import Directions
from forwardgrad.directions.laws import StreamSeeds, fork
from forwardgrad.directions.plan import drawn, planned
from forwardgrad.engines import captured

on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here: captured graphs are tested where torch.cuda.is_available()")
DEVICE = "cuda"
RANK_1 = fg.ForwardGradient(perturb=fg.LowRank())
DRAWING = [
    fg.ForwardGradient(),
    fg.ForwardGradient(tangents=3, law=fg.Rademacher()),
    fg.ForwardGradient(tangents=2, law=fg.Sphere(), chunk_size=1),
    RANK_1,
    fg.ForwardGradient(tangents=3, perturb=fg.LowRank(2), chunk_size=2),
    fg.ForwardGradient(perturb=fg.PerExample(), law=fg.Rademacher()),
    fg.ForwardGradient(tangents=2, perturb=fg.Activity()),
    fg.Guess(),
]
OTHERS = [
    fg.Backprop(),
    fg.ForwardGradient(tangents=2, law=fg.Orthogonal()),
    fg.ZerothOrder(),
    fg.LearnedFeedback(),
    fg.LocalLosses(feedback=True),
]


def convolutional() -> nn.Module:
    torch.manual_seed(1)
    layers = [nn.Conv2d(3, 8, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(72, 5)]
    return nn.Sequential(*layers)


def steps(engine: Any, make: Any, method: fg.Estimator, optimizer: Any, batches: list[tuple[Tensor, Tensor]]) -> tuple[Any, Any]:
    model = make().to(DEVICE)
    torch.manual_seed(7)
    generator = torch.Generator(DEVICE).manual_seed(3)
    step = fg.TrainingStep(loss, model, optimizer(model), method, generator=generator, state={}, engine=engine)
    schedule = torch.optim.lr_scheduler.ExponentialLR(step.optimizer, 0.9)
    records = []
    for x, y in batches:
        records.append(step(x.to(DEVICE), y.to(DEVICE)))
        schedule.step()
    return outcome(step, records), step


def same(make: Any, method: fg.Estimator, optimizer: Any, batches: list[tuple[Tensor, Tensor]], close: float) -> fg.TrainingStep:
    """Eager steps and captured ones from the same start; with each shape of batch there is a graph."""
    wanted, _ = steps("eager", make, method, optimizer, batches)
    found, step = steps("graph", make, method, optimizer, batches)
    assert len(made(step)) == len({len(x) for x, _ in batches})
    torch.testing.assert_close(found, wanted, rtol=close, atol=close)
    assert torch.equal(found["generator"], wanted["generator"])
    return step


def plain() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3))


EPOCHS = [(X, Y), (X, Y), (X[:7], Y[:7])] * 3


@on_gpu
@pytest.mark.parametrize("optimizer", ["sgd", "momentum", "adam", "capturable"])
@pytest.mark.parametrize("method", [fg.Backprop(), RANK_1, fg.ForwardGradient(tangents=2), fg.ZerothOrder(), fg.Guess()], ids=short)
def test_captured_steps_are_those_of_the_eager_engine(method: fg.Estimator, optimizer: str) -> None:
    makers = {**OPTIMIZERS, "capturable": lambda m: torch.optim.Adam(m.parameters(), torch.tensor(0.05, device="cuda"), capturable=True)}
    make = plain if optimizer in ("adam", "capturable") else network  # Adam would make steps of the rounding of a bias before a norm
    same(make, method, makers[optimizer], EPOCHS, 1e-2 if isinstance(method, fg.ZerothOrder) else 1e-4)


@on_gpu
@pytest.mark.parametrize("method", [*DRAWING, *OTHERS], ids=short)
def test_every_estimator_takes_the_same_steps_in_a_captured_graph(method: fg.Estimator, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a compiler: the same kernels, captured."""
    monkeypatch.setattr(captured, "compiled", lambda traced, inputs: traced.graph)
    inside: list[int] = []
    whole = captured.capture

    def counted(*args: Any) -> Any:
        inside.append(len(args[3].in_graph()))
        return whole(*args)

    monkeypatch.setattr(captured, "capture", counted)
    step = same(plain, method, OPTIMIZERS["sgd"], EPOCHS, 1e-2 if isinstance(method, fg.ZerothOrder) else 1e-4)
    assert all(count > 0 for count in inside) or method not in DRAWING
    derivatives = [float(d) for d in step(X.to(DEVICE), Y.to(DEVICE)).derivatives]
    assert len(set(derivatives)) == len(derivatives)  # no direction is drawn twice


@on_gpu
@pytest.mark.parametrize("method", [fg.Backprop(), RANK_1, fg.ForwardGradient(tangents=2), fg.LocalLosses(feedback=True)], ids=short)
def test_convolutions_cut_to_ten_bits_are_no_reason_to_fall_back(method: fg.Estimator) -> None:
    torch.manual_seed(2)
    images, labels = torch.rand(32, 3, 12, 12), torch.arange(32) % 5
    same(convolutional, method, lambda m: torch.optim.SGD(m.parameters(), lr=0.01), [(images, labels)] * 6, 2e-2)


@on_gpu
@pytest.mark.parametrize("method", [fg.Backprop(), fg.ForwardGradient(), RANK_1], ids=short)
def test_captured_steps_go_on_from_a_checkpoint_to_the_same_bits(method: fg.Estimator) -> None:
    def begun() -> tuple[nn.Module, torch.Generator, fg.TrainingStep]:
        model, generator = network().to(DEVICE), torch.Generator(DEVICE).manual_seed(3)
        pieces = loss, model, torch.optim.SGD(model.parameters(), lr=0.05), method
        return model, generator, fg.TrainingStep(*pieces, generator=generator, engine="graph")

    x, y = X.to(DEVICE), Y.to(DEVICE)
    model, generator, step = begun()
    for _ in range(4):
        step(x, y)
    kept = {name: t.clone() for name, t in model.state_dict().items()}, generator.get_state()
    wanted = [step(x, y).loss for _ in range(4)]
    model, generator, step = begun()
    model.load_state_dict(kept[0])
    generator.set_state(kept[1])
    assert [float(step(x, y).loss) for _ in range(4)] == [float(one) for one in wanted]


@on_gpu
@pytest.mark.parametrize("perturb", [fg.Dense(), fg.LowRank(1), fg.LowRank(3)], ids=str)
def test_on_a_gpu_a_derivative_is_that_of_backpropagation_along_the_direction(perturb: Any) -> None:
    """ĝ = d·V says what V was; ∇f comes from backpropagation in float64 on the processor."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    F.cross_entropy(model(X.double()), Y).backward()  # type: ignore[no-untyped-call]
    exact = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    model.zero_grad()
    model.to(DEVICE)
    x, y, generator = X.double().to(DEVICE), Y.to(DEVICE), torch.Generator(DEVICE).manual_seed(0)
    for _ in range(5):
        model.zero_grad()
        step = fg.estimate_grad_(
            lambda model: F.cross_entropy(model(x), y), model, fg.ForwardGradient(perturb=perturb), generator=generator
        )
        d = step.derivatives[0].cpu()
        direction = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).cpu() / d
        torch.testing.assert_close(direction @ exact, d, rtol=1e-9, atol=1e-12)


@on_gpu
@pytest.mark.parametrize("method", DRAWING[:7], ids=short)
def test_on_a_gpu_replicas_of_an_ensemble_are_models_alone(method: fg.Estimator) -> None:
    torch.manual_seed(1)
    models = [nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)).double().to(DEVICE) for _ in range(3)]
    x, y = torch.stack([X.double() * k for k in (1, 2, 3)]).to(DEVICE), torch.stack([Y] * 3).to(DEVICE)
    generators = lambda: [torch.Generator(DEVICE).manual_seed(seed) for seed in range(3)]  # noqa: E731
    wanted = []
    for model, generator, images, labels in zip(models, generators(), x, y, strict=True):
        model.zero_grad()
        fg.estimate_grad_(lambda model, images=images, labels=labels: loss(model, images, labels), model, method, generator=generator)
        wanted.append([p.grad for p in model.parameters()])
        model.zero_grad()
    ensemble = fg.Ensemble(models)
    for _ in range(2):  # what the first evaluation draws inside vmap the second one draws beforehand
        for model in models:
            model.zero_grad()
        fg.estimate_grads_(loss, ensemble, (x, y), method, generators=generators())
        torch.testing.assert_close([[p.grad for p in model.parameters()] for model in models], wanted, rtol=1e-9, atol=1e-12)


class Running:
    """A generator on a GPU as far as directions ask for one: numbers that count up, and an offset."""

    device = torch.device("cuda")

    def __init__(self, device: Any) -> None:
        self.seed, self.offset = 0, 0

    def manual_seed(self, seed: int) -> Running:
        self.seed, self.offset = seed, 0
        return self

    def get_offset(self) -> int:
        return self.offset

    def set_offset(self, offset: int) -> None:
        self.offset = offset


class Counting(fg.Gaussian):
    """Number i of a stream is its seed plus i."""

    def fill_(self, tangent: list[Tensor], generator: Any) -> None:
        for part in tangent:
            part.copy_(torch.arange(part.numel()).view(part.shape) + generator.seed + generator.offset)
            generator.offset += part.numel()


def test_on_a_gpu_places_are_drawn_from_running_streams_in_the_order_they_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluation, "Generator", Running)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    like = torch.zeros(())
    seeds = StreamSeeds([1000, 2000])

    def begun() -> list[Callable[[], Tensor]]:
        found = Directions(Counting(), [], torch.device("cpu"))
        found._count, found._sources = 2, evaluation._Running.of(seeds, torch.device("cuda"))
        return [found.plan((size,), like) for size in (2, 3, 2)]

    first, second, third = begun()
    assert second().tolist() == [[1000, 1001, 1002], [2000, 2001, 2002]]
    assert first().tolist() == [[1003, 1004], [2003, 2004]]
    assert second().tolist() == [[1000, 1001, 1002], [2000, 2001, 2002]]  # again the same, and what follows is not disturbed
    first, second, third = begun()  # an evaluation that is made again
    assert third().tolist() == [[1005, 1006], [2005, 2006]]
    assert first().tolist() == [[1003, 1004], [2003, 2004]]


def test_draws_go_into_a_graph_where_the_host_draws_nothing_later() -> None:
    gpu, other = (SimpleNamespace(device=torch.device("cuda")) for _ in range(2))
    with planned() as plan:
        for make, on in [
            (lambda: [1], [gpu]),  # 0: seeds, on the host
            (lambda: torch.zeros(1), [gpu]),  # 1: the host draws from the same generator later
            (lambda: torch.zeros(1), [other]),  # 2
            (lambda: [2], [gpu]),  # 3
            (lambda: torch.zeros(1), [gpu, other]),  # 4
            (lambda: torch.zeros(1), [seeded()]),  # 5: a generator of the processor
            (lambda: torch.zeros(1), None),  # 6: nobody knows
            (lambda: torch.zeros(1), [gpu]),  # 7
        ]:
            drawn(make, on=on)  # type: ignore[arg-type, type-var]
    assert plan.in_graph() == {7}
    plan.draws.pop(6)
    assert plan.in_graph() == {2, 4, 6}
    assert len(plan.again()) == 5


def test_seeds_come_from_the_host_and_directions_can_be_drawn_in_a_graph() -> None:
    generator = seeded()
    with planned() as plan:
        fork(generator, 2)
        fg.Gaussian().draw({"a": torch.zeros(3)}, 1, generator)
        fg.Orthogonal().draw({"a": torch.zeros(3)}, 2, generator)
    assert [draw.on for draw in plan.draws] == [(generator,), (generator,), None]  # a decomposition is no matter for a graph
