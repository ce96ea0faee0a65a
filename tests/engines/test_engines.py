"""Steps as graphs: equal to eager steps, and eager where there is no graph to be had."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.estimators.test_contract import METHODS, applies, short
from tests.support.cases import CASES, Case, rows, seeded
from torch import Tensor, nn

import forwardgrad as fg
from forwardgrad.engines import compiled

Optimizers = Callable[[nn.Module], torch.optim.Optimizer]
RANK_1 = fg.ForwardGradient(perturb=fg.LowRank())


READS = {"branching"}  # cases that read the value of a tensor,
DRAWS = {"batch norm average", "module list", "penalty", "one example", "loss an example", "autocast"}  # that make their batch themselves


@pytest.fixture
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """The graph as it is: the same operations, run one by one."""
    monkeypatch.setattr(compiled, "compiled", lambda traced, inputs: traced.graph)


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.05)


def network(dropout: float = 0.0) -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(dropout), nn.Linear(8, 3))


def small() -> nn.Module:
    torch.manual_seed(1)
    return nn.Linear(4, 3)


def loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(model(x), y)


X, Y = rows(12, 4, dtype=torch.float32), torch.arange(12) % 3


EPOCHS = [(X, Y), (X, Y), (X[:7], Y[:7])] * 2  # the last batch of an epoch is smaller


def batches(step: fg.TrainingStep) -> list[fg.Estimate]:
    return [step(x, y) for x, y in EPOCHS]


def outcome(step: fg.TrainingStep, records: list[fg.Estimate]) -> dict[str, Any]:
    found: dict[str, Any] = {name: t.detach().clone() for name, t in step.model.state_dict().items()}
    found |= {f"state {name}": t for name, t in step.state.items()}
    found["losses"], found["derivatives"] = torch.stack([r.loss for r in records]), torch.cat([r.derivatives for r in records])
    found["passes"], found["global"] = [r.forward_passes for r in records], torch.get_rng_state()
    found["generator"] = None if step.generator is None else step.generator.get_state()
    return found


def compare(
    make: Callable[[], nn.Module],
    method: fg.Estimator,
    optimizer: Optimizers = sgd,
    *,
    run: Callable[[fg.TrainingStep], list[fg.Estimate]] = batches,
    loss: Callable[..., Tensor] = loss,
    graphs: int,
    close: float = 1e-5,
) -> fg.TrainingStep:
    """Eager steps and compiled ones from the same start: the same numbers, with so many graphs made on the way."""
    found = []
    for engine in ("eager", "compile"):
        model = make()
        torch.manual_seed(7)
        step = fg.TrainingStep(loss, model, optimizer(model), method, generator=seeded(3), state={}, engine=engine)  # type: ignore[arg-type]
        found.append(outcome(step, run(step)))
    assert len(made(step)) == graphs
    torch.testing.assert_close(found[1], found[0], rtol=close, atol=close)
    assert torch.equal(found[1]["generator"], found[0]["generator"])
    assert torch.equal(found[1]["global"], found[0]["global"])
    return step


def made(step: fg.TrainingStep) -> dict[Any, Any]:
    """The graphs of a step."""
    graphs: dict[Any, Any] = step._take.__self__._runs  # type: ignore[attr-defined]
    return graphs


def by_case(case: Case, method: fg.Estimator, graphs: int = 1) -> None:
    close = 1e-9 if case.exact else 2e-2
    if isinstance(method, fg.LocalLosses):  # a graph corrects the moments of Adam in float32
        close = 1e-6
    built = case.build()[1]
    take = lambda step: [step() for _ in range(3)]  # noqa: E731
    slow = lambda model: torch.optim.SGD(model.parameters(), lr=1e-3)  # noqa: E731  # one of the losses is an exponential
    compare(lambda: case.build()[0], method, slow, run=take, loss=built, graphs=graphs, close=close)


@pytest.mark.some(8)
@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize(
    "method",
    [
        pytest.param(method, marks=pytest.mark.full if number % 2 else ())
        for number, method in enumerate(METHODS)
        if method != fg.Backprop(checkpoint=True) and not getattr(method, "in_place", False)
    ],
    ids=short,
)
def test_every_estimator_takes_the_same_steps_in_a_graph(method: fg.Estimator) -> None:
    by_case(next(case for case in CASES if case.name == "batch norm train"), method)


@pytest.mark.some(8)
@pytest.mark.product
@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("method", [fg.Backprop(), RANK_1], ids=short)
@pytest.mark.parametrize("case", [case for case in CASES if case.name not in READS | DRAWS], ids=str)
def test_every_model_takes_the_same_steps_in_a_graph(method: fg.Estimator, case: Case) -> None:
    assert applies(method, case)
    by_case(case, method)


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("name", sorted(READS | DRAWS))
@pytest.mark.parametrize("method", [fg.Backprop(), RANK_1], ids=short)
def test_a_model_that_is_no_graph_steps_eagerly(method: fg.Estimator, name: str) -> None:
    with pytest.warns(UserWarning, match=r"falls back to eager steps: (a value is read|the loss or the model draws|a shape)"):
        by_case(next(case for case in CASES if case.name == name), method, graphs=0)


def scheduled(step: fg.TrainingStep, given: Sequence[tuple[Tensor, Tensor]] = EPOCHS) -> list[fg.Estimate]:
    schedule = torch.optim.lr_scheduler.ExponentialLR(step.optimizer, 0.5)
    records = []
    for x, y in given:
        records.append(step(x, y))
        schedule.step()
    return records


def groups(model: nn.Module) -> torch.optim.Optimizer:
    first, *rest = model.parameters()
    return torch.optim.SGD([{"params": [first], "lr": 0.2}, {"params": rest}], lr=0.05)


OPTIMIZERS: dict[str, Optimizers] = {
    "sgd": sgd,
    "two groups": groups,
    "momentum": lambda model: torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=0.01),
    "adam": lambda model: torch.optim.Adam(model.parameters(), lr=0.05, eps=1e-3),  # one gradient is zero but for its rounding
    "nesterov": lambda model: fg.Nesterov(model.parameters(), 0.05, 0.9),
    "tensor": lambda model: torch.optim.SGD(model.parameters(), lr=torch.tensor(0.05), foreach=False),
}


@pytest.mark.some(5)
@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("method", [fg.Backprop(), RANK_1], ids=short)
@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS.keys())
def test_every_optimizer_moves_as_it_does_eagerly_on_a_schedule_and_on_smaller_batches(optimizer: Optimizers, method: fg.Estimator) -> None:
    compare(network, method, optimizer, run=scheduled, graphs=2)


@pytest.mark.usefixtures("uncompiled")
def test_a_capturable_optimizer_moves_inside_the_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["torch.optim.adam"], "_get_capturable_supported_devices", lambda *_, **__: ["cpu"])
    adam: Optimizers = lambda model: torch.optim.Adam(model.parameters(), torch.tensor(0.05), capturable=True)  # noqa: E731
    step = compare(network, RANK_1, adam, run=scheduled, graphs=2)
    before, [state] = step.model[0].weight.clone(), {kept["step"] for kept in list(step.optimizer.state.values())[:1]}  # type: ignore[index, union-attr]
    monkeypatch.setattr(step.optimizer, "step", None)  # what would move outside
    step(X, Y)
    assert float(state) == 7
    assert not torch.equal(before, step.model[0].weight)  # type: ignore[index, union-attr]


def rmsprop(model: nn.Module) -> torch.optim.Optimizer:
    """One whose arithmetic is not known here."""
    return torch.optim.RMSprop(model.parameters(), lr=0.001)


@pytest.mark.usefixtures("uncompiled")
def test_gradients_are_left_for_those_that_want_them_and_cleared_where_the_graph_has_used_them() -> None:
    for optimizer, there in ((OPTIMIZERS["sgd"], False), (OPTIMIZERS["momentum"], False), (rmsprop, True)):
        step = compare(network, RANK_1, optimizer, graphs=2)
        assert [p.grad is not None for p in step.model.parameters()] == [there] * 6


@pytest.mark.usefixtures("uncompiled")
def test_what_changes_between_steps_is_noticed() -> None:
    def run(step: fg.TrainingStep) -> list[fg.Estimate]:
        records = [step(X, Y), step(X, Y)]
        step.model.eval()
        records += [step(X, Y)]
        step.model.train()
        step.model[0].weight.requires_grad_(False)  # type: ignore[index, union-attr]
        records += [step(X, Y)]
        step.model[4] = nn.Linear(8, 3, dtype=torch.float32)  # type: ignore[operator]
        nn.init.constant_(step.model[4].weight, 0.1)  # type: ignore[index, union-attr]
        nn.init.zeros_(step.model[4].bias)  # type: ignore[index, union-attr]
        records += [step(X, Y)]
        step.model[3].p = 0.5  # type: ignore[index, union-attr]
        return [*records, step(X, Y), step(X.repeat(2, 1)[:12], Y)]

    compare(network, RANK_1, run=run, graphs=5)


@pytest.mark.usefixtures("uncompiled")
def test_a_step_under_autocast_is_another_than_one_without() -> None:
    def run(step: fg.TrainingStep) -> list[fg.Estimate]:
        with torch.autocast("cpu", torch.bfloat16):
            records = [step(X, Y), step(X, Y)]
        return [*records, step(X, Y), step(X, Y)]

    compare(network, fg.Backprop(), run=run, graphs=2, close=2e-2)


@pytest.mark.usefixtures("uncompiled")
def test_a_model_put_in_the_place_of_another_is_the_one_that_moves() -> None:
    def run(step: fg.TrainingStep) -> list[fg.Estimate]:
        records, first = [step(X, Y), step(X, Y)], step.model
        before = [p.clone() for p in first.parameters()]
        step.model = network()
        step.optimizer = sgd(step.model)
        records += [step(X, Y), step(X, Y)]
        assert all(map(torch.equal, before, first.parameters()))
        return records

    compare(network, RANK_1, run=run, graphs=1)  # of the same kind, it needs no graph of its own


@pytest.mark.full
def test_scripted_parts_are_told_or_followed_but_no_crash() -> None:
    model = nn.Sequential(torch.jit.script(nn.Linear(4, 3)))
    step = fg.TrainingStep(loss, model, sgd(model), fg.Backprop(), engine="compile")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = [float(step(X, Y).loss) for _ in range(2)]
    assert found[1] < found[0]


@pytest.mark.usefixtures("uncompiled")
def test_one_tensor_given_twice_is_not_two() -> None:
    def twice(model: nn.Module, one: Tensor, other: Tensor) -> Tensor:
        return (model(one) * model(other)).square().mean()

    compare(small, RANK_1, loss=twice, run=lambda step: [step(X, X), step(X, X), step(X, 2 * X), step(X, 3 * X)], graphs=2)


@pytest.mark.usefixtures("uncompiled")
def test_what_a_loss_reads_from_elsewhere_may_be_written_to() -> None:
    def run(step: fg.TrainingStep) -> list[fg.Estimate]:
        records = [step(X, Y), step(X, Y)]
        weight.fill_(2.0)
        return [*records, step(X, Y), weight.fill_(1.0) is weight and step(X, Y)]

    weight = torch.ones(3)
    compare(small, RANK_1, loss=lambda m, x, y: (m(x) * weight).square().mean(), run=run, graphs=1)


@pytest.mark.usefixtures("uncompiled")
def test_dropout_draws_the_bits_of_the_eager_step() -> None:
    compare(lambda: network(0.4), RANK_1, graphs=2)


@pytest.mark.usefixtures("uncompiled")
def test_a_step_that_sets_the_global_generator_back_is_found_out() -> None:
    with pytest.warns(UserWarning, match="differ from the eager step's by"):
        compare(lambda: network(0.4), fg.ForwardGradient(tangents=2, chunk_size=1), graphs=0, close=0)


def spoilt(share: float) -> Any:
    """A compiler whose function moves the parameters too far by a small share."""

    def compiler(traced: Any, inputs: list[Tensor]) -> Any:
        def function(*given: Tensor) -> Any:
            before = [t.clone() for t in given[:4]]
            found = traced.graph(*given)
            for t, b in zip(given[:4], before, strict=True):
                t += share * (t - b)
            return found

        return function

    return compiler


def test_a_function_that_computes_something_else_is_never_used(monkeypatch: pytest.MonkeyPatch) -> None:
    def make() -> nn.Module:
        torch.manual_seed(1)
        return nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3))

    far: Optimizers = lambda model: torch.optim.SGD(model.parameters(), lr=0.5)  # noqa: E731  # moves well above the rounding of θ
    monkeypatch.setattr(compiled, "compiled", spoilt(1e-3))
    with pytest.warns(UserWarning, match="the parameters differ from the eager step's by"):
        compare(make, RANK_1, far, graphs=0, close=0)
    monkeypatch.setattr(compiled, "compiled", spoilt(2e-5))
    compare(make, RANK_1, far, graphs=2, close=1e-3)


@pytest.mark.parametrize(
    ("make", "method", "reason"),
    [
        (network, fg.Backprop(checkpoint=True), "checkpoint=True computes activations twice on purpose"),
        (lambda: hooked(network()), RANK_1, "a module has hooks"),
    ],
    ids=["checkpoint", "hooks"],
)
def test_why_there_is_no_graph_is_told_once(make: Callable[[], nn.Module], method: fg.Estimator, reason: str) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        compare(make, method, graphs=0, close=0)
    assert [reason in str(warning.message) for warning in caught] == [True]


def hooked(model: nn.Module) -> nn.Module:
    model[0].register_forward_hook(lambda module, inputs, output: output * 2)  # type: ignore[index, operator]
    return model


@pytest.mark.usefixtures("uncompiled")
def test_there_are_only_so_many_graphs() -> None:
    def run(step: fg.TrainingStep) -> list[fg.Estimate]:
        return [step(X[:count], Y[:count]) for count in (*range(2, 13), *range(2, 13))]

    with pytest.warns(UserWarning, match="there are 8 graphs already"):
        compare(network, fg.Backprop(), run=run, graphs=8)


def test_without_a_compiler_steps_are_eager() -> None:
    import torch._inductor.config as config

    changes = {"force_disable_caches": True, "cpp.cxx": ("no-such-compiler",)}
    with config.patch(changes), pytest.warns(UserWarning, match=r"engine='compile' falls back to eager steps: .*[Cc]ompiler"):
        compare(network, RANK_1, graphs=0, close=0)


def test_an_unknown_engine_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown engine 'jit': choose one of eager, compile, graph"):
        fg.TrainingStep(loss, network(), sgd(network()), RANK_1, engine="jit")  # type: ignore[arg-type]


def test_a_captured_graph_needs_a_gpu() -> None:
    model = network()
    step = fg.TrainingStep(loss, model, sgd(model), RANK_1, generator=seeded(), engine="graph")
    with pytest.warns(UserWarning, match="falls back to eager steps: a CUDA graph needs all parameters and buffers on a GPU"):
        records = batches(step)
    other = network()
    eager = fg.TrainingStep(loss, other, sgd(other), RANK_1, generator=seeded())
    assert [float(r.loss) for r in records] == [float(r.loss) for r in batches(eager)]


def whole(step: fg.TrainingStep) -> list[fg.Estimate]:
    """On a schedule, with batches of one size: a graph for each size is tested without the compiler, which takes seconds for each."""
    return scheduled(step, [(X, Y)] * 4)


@pytest.mark.full
@pytest.mark.parametrize(
    ("method", "graphs"),
    [(fg.Backprop(), 2), (RANK_1, 1), (fg.ForwardGradient(tangents=2), 1), (fg.LocalLosses(), 1)],
    ids=lambda value: short(value) if isinstance(value, fg.Estimator) else None,
)
def test_compiled_steps_are_those_of_the_eager_engine(method: fg.Estimator, graphs: int) -> None:
    """Zeroth order is in test_compiled_zeroth_order.py."""
    dropout = 0.3 if method in (fg.Backprop(), RANK_1) else 0.0  # of several tangents the compiler draws other masks
    compare(lambda: network(dropout), method, run=whole if graphs == 1 else scheduled, graphs=graphs)


@pytest.mark.full
def test_a_compiled_step_hands_its_gradient_to_an_optimizer_that_looks_ahead() -> None:
    compare(network, RANK_1, OPTIMIZERS["nesterov"], run=whole, graphs=1)


@pytest.mark.full
def test_a_compiled_step_under_autocast() -> None:
    def halved(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return loss(model, x, y)

    step = compare(network, fg.Backprop(), loss=halved, run=whole, graphs=1, close=2e-2)
    assert step(X, Y).loss.dtype == torch.float32
