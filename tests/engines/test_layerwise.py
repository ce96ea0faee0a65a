"""Steps in which blocks learn while the pass goes on: those of the whole model, to the bit where no compiler rounds otherwise."""

from __future__ import annotations

import copy
import gc
import weakref
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.engines.test_engines import made, uncompiled  # noqa: F401  # a fixture
from tests.support.cases import seeded
from tests.support.layerwise import Optimizers, Taken, batch, both, perceptron, same, take
from torch import Tensor, nn

import forwardgrad as fg
from forwardgrad.diagnostics import peak_bytes

ROUNDING = 1e-5  # a graph corrects the moments of the classifiers' Adam in float32, and the optimizer's may enlarge what is small


def optimizer(kind: type[torch.optim.Optimizer], **settings: Any) -> Optimizers:
    return lambda model: kind(model.parameters(), **{"lr": 0.02, **settings})  # type: ignore[call-arg]


def groups(model: nn.Module) -> torch.optim.Optimizer:
    first, *rest = model.parameters()
    return torch.optim.AdamW([{"params": [first], "lr": 0.05, "amsgrad": True}, {"params": rest, "weight_decay": 0.0}], lr=0.02)


def one_left_out(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adam(list(model.parameters())[1:], lr=0.02)


SGD, ADAM, ADAMW = torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW
OPTIMIZERS: dict[str, Optimizers] = {
    "sgd": optimizer(SGD),
    "weight decay": optimizer(SGD, weight_decay=0.1),
    "momentum": optimizer(SGD, momentum=0.9, weight_decay=0.1, dampening=0.2),
    "nesterov": optimizer(SGD, momentum=0.9, nesterov=True),
    "maximize": optimizer(SGD, momentum=0.5, maximize=True),
    "adam": optimizer(ADAM),
    "adam with decay": optimizer(ADAM, weight_decay=0.1, betas=(0.8, 0.9), eps=1e-4),
    "adamw": optimizer(ADAMW, weight_decay=0.1),
    "amsgrad": optimizer(ADAMW, amsgrad=True, maximize=True),
    "fused": optimizer(ADAM, fused=True),
    "foreach": optimizer(ADAM, foreach=True),
    "rate as a tensor": optimizer(ADAM, lr=torch.tensor(0.02)),
    "two groups": groups,
    "one left out": one_left_out,
}


@pytest.mark.parametrize(("name", "make"), OPTIMIZERS.items(), ids=OPTIMIZERS)
def test_an_eager_step_is_that_of_the_whole_model_to_the_bit(name: str, make: Optimizers) -> None:
    """With plain SGD up to rounding: a weight's update is one product that adds, and its gradient is never there."""
    one, other = both(optimizer=make)
    same(one, other, 1e-12 if name in ("sgd", "weight decay") else 0.0)
    assert one.early == 5
    assert one.empty
    assert one.said == []


def test_the_optimizer_remembers_what_torch_lets_it_remember() -> None:
    """The state is that of plain torch, whose `step` is given the gradients of the whole model."""
    one = take(optimizer=OPTIMIZERS["amsgrad"], steps=4)
    model, method, state = perceptron(), fg.LocalLosses(feedback=True), dict[str, Tensor]()
    plain, generator = OPTIMIZERS["amsgrad"](model), seeded(1)
    for number in range(4):
        x, y = batch(number)
        fg.estimate_grad_(lambda m, x=x, y=y: F.cross_entropy(m(x), y), model, method, generator=generator, state=state)  # type: ignore[misc]
        plain.step()
        plain.zero_grad()
    found, wanted = one.step.optimizer.state_dict(), plain.state_dict()
    assert found["param_groups"] == wanted["param_groups"]
    assert found["state"].keys() == wanted["state"].keys()
    for index, slots in wanted["state"].items():
        assert found["state"][index].keys() == slots.keys()
        assert all(torch.equal(found["state"][index][name], value) for name, value in slots.items())
    assert all(map(torch.equal, one.step.model.parameters(), model.parameters()))


def test_hooks_around_a_step_are_called_once_with_the_whole_gradient() -> None:
    calls: list[bool] = []

    def hooked(model: nn.Module) -> torch.optim.Optimizer:
        made = optimizer(ADAM)(model)
        made.register_step_post_hook(lambda *_: calls.append(all(p.grad is not None for p in model.parameters())))
        return made

    one = take(optimizer=hooked, steps=3)
    assert calls == [True] * 3
    assert one.early == 0


def scheduled(kind: Any, **settings: Any) -> Any:
    schedules: dict[int, Any] = {}

    def between(number: int, step: fg.TrainingStep) -> None:
        if number == 0:
            schedules[id(step)] = kind(step.optimizer, **settings)
        else:
            schedules[id(step)].step()

    return between


def loaded(number: int, step: fg.TrainingStep) -> None:
    if number == 3:
        step.optimizer.load_state_dict(copy.deepcopy(step.optimizer.state_dict()))


def frozen(number: int, step: fg.TrainingStep) -> None:
    step.model.get_parameter("2.weight").requires_grad_(number not in (3, 4))


def begun_late(number: int, step: fg.TrainingStep) -> None:
    step.model.get_parameter("2.weight").requires_grad_(number > 3)


def uneven(number: int, step: fg.TrainingStep) -> None:
    if number == 3:
        step.optimizer.state[step.model.get_parameter("2.weight")]["step"].add_(4)


def forgotten(number: int, step: fg.TrainingStep) -> None:
    if number == 4:
        del step.optimizer.state[step.model.get_parameter("2.weight")]


COSINE, CYCLE = torch.optim.lr_scheduler.CosineAnnealingLR, torch.optim.lr_scheduler.OneCycleLR
# Name: what is asked of `take`, the graphs that are made, and whether the last step leaves no gradient.
COMPILED: dict[str, tuple[dict[str, Any], int, bool]] = {
    **{name: ({"optimizer": make}, 1, True) for name, make in OPTIMIZERS.items() if name not in ("weight decay", "foreach", "maximize")},
    "schedule": ({"between": scheduled(COSINE, T_max=10)}, 1, True),
    "schedule of momentum": (
        {"optimizer": OPTIMIZERS["momentum"], "between": scheduled(CYCLE, max_lr=0.1, total_steps=12)},
        1,
        False,
    ),
    "loaded": ({"between": loaded}, 2, True),
    "frozen for a while": ({"between": frozen}, 4, False),
    "begun late": ({"between": begun_late}, 2, False),
    "uneven counts": ({"between": uneven}, 2, False),
    "forgotten": ({"between": forgotten}, 2, False),
}


@pytest.mark.some(6)
@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("name", COMPILED)
def test_a_graph_is_the_eager_step_of_the_whole_model(name: str) -> None:
    options, graphs, empty = COMPILED[name]
    one, other = both(engine="compile", steps=8, **options)
    same(one, other, ROUNDING)
    assert one.said == []
    assert len(made(one.step)) == graphs
    assert one.empty == empty


@pytest.mark.full
@pytest.mark.parametrize("name", ["fused"])  # the others as graphs without the compiler, above
def test_a_compiled_step_is_the_eager_step_of_the_whole_model(name: str) -> None:
    one, other = both(engine="compile", optimizer=OPTIMIZERS[name])
    same(one, other, ROUNDING)
    assert one.said == []
    assert len(made(one.step)) == 1
    assert one.empty


def normed() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3)]
    return nn.Sequential(*layers).double()


@pytest.mark.usefixtures("uncompiled")
def test_a_bias_whose_gradient_is_rounding_alone_does_not_end_a_graph() -> None:
    """Behind it stands batch normalisation. Adam moves it by noise, and by other noise in a graph."""
    one, other = both(normed, engine="compile")
    same(one, other, ROUNDING)
    assert one.said == []
    assert len(made(one.step)) == 1


def narrow(number: int) -> tuple[Any, ...]:
    x, y = batch(number)
    return x.float(), y


def single() -> nn.Module:
    return perceptron().float()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.usefixtures("uncompiled")
def test_steps_under_autocast(dtype: torch.dtype) -> None:
    def loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype):
            return F.cross_entropy(model(x), y)

    options: dict[str, Any] = {"loss": loss, "batch": narrow, "optimizer": OPTIMIZERS["momentum"]}
    one, other = both(single, **options)
    same(one, other)
    assert one.early == 5
    graph = take(single, engine="compile", **options)
    same(graph, other, 1e-3)
    assert graph.said == []


class Recording(nn.Module):
    """A block that remembers, weakly, every output that it made."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layer = nn.Linear(width, width)
        self.made: list[weakref.ref[Tensor]] = []

    def forward(self, x: Tensor) -> Tensor:
        h = self.layer(x)
        out = F.relu(h)
        self.made += [weakref.ref(h), weakref.ref(out)]
        return out


class Stack(nn.Module):
    """Blocks that look, when one begins, how many outputs of those two and more before it are still there."""

    def __init__(self, count: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks, self.last = nn.ModuleList([Recording(6) for _ in range(count)]), nn.Linear(6, 3)
        self.held: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        for index, block in enumerate(self.blocks):
            x = block(x)
            earlier = [one for other in list(self.blocks)[: max(0, index - 1)] for one in other.made]
            self.held.append(sum(one() is not None for one in earlier))
        out: Tensor = self.last(x)
        return out


@pytest.mark.parametrize("make", [optimizer(SGD), optimizer(ADAM)], ids=["sgd", "adam"])
def test_no_output_of_a_block_outlives_it(make: Optimizers) -> None:
    def forgetting(number: int, step: fg.TrainingStep) -> None:
        step.model.held.clear()  # type: ignore[union-attr, operator]
        for block in step.model.blocks:  # type: ignore[union-attr]
            block.made.clear()
        gc.collect()  # what the first step, which is one of the whole model, left in a cycle

    def last_of(taken: Taken) -> list[int]:
        held: Any = taken.step.model.held
        return list(held)

    one, other = both(lambda: Stack(6).double(), make, steps=3, between=forgetting)
    assert last_of(one) == [0] * 6
    assert last_of(other)[-1] > 0


def peak(depth: int) -> int:
    torch.manual_seed(0)
    layers = [layer for _ in range(depth) for layer in (nn.Linear(256, 256), nn.ReLU())]
    model = nn.Sequential(*layers, nn.Linear(256, 10))
    x, y = torch.randn(512, 256), torch.arange(512) % 10
    sgd = torch.optim.SGD(model.parameters(), lr=0.01)
    method, loss = fg.LocalLosses(feedback=True), lambda m, x, y: F.cross_entropy(m(x), y)
    step = fg.TrainingStep(loss, model, sgd, method, generator=seeded(0))
    for _ in range(2):
        step(x, y)
    return peak_bytes(lambda: step(x, y), [x.device])


def test_what_a_step_needs_does_not_grow_with_depth() -> None:
    """Eight and thirty-two equal layers: half a megabyte of activities each, of which none may stay."""
    assert peak(32) < 1.05 * peak(8)
