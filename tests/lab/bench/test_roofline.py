"""Operations and bytes against counts by hand, and the draws of a step against the step's own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import forwardgrad as fg
from forwardgrad.directions import laws
from forwardgrad.directions.plan import planned
from forwardgrad.lab.bench import optimizers, random_numbers, roofline
from forwardgrad.lab.bench.arms import ARMS, NAMED, ArmStep, BenchArm
from forwardgrad.lab.bench.cases import BenchCase, build_case
from forwardgrad.lab.bench.optimizers import OptimizerName
from forwardgrad.lab.bench.roofline import Ceilings, Count, count

N, IN, OUT = 7, 5, 3
X = torch.ones(N, IN)


def linear() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(IN, OUT)


def estimated(estimator: fg.Estimator) -> Count:
    model, generator = linear(), torch.Generator().manual_seed(0)
    loss = lambda model: F.cross_entropy(model(X), torch.zeros(N, dtype=torch.long))  # noqa: E731
    fg.estimate_grad_(loss, model, estimator, generator=generator)  # compared with dual numbers here
    return count(lambda: fg.estimate_grad_(loss, model, estimator, generator=generator))


def test_a_plain_linear_layer() -> None:
    model = linear()
    with torch.no_grad():
        found = count(lambda: model(X))
    assert found == Count(2 * N * IN * OUT, 4 * (N * IN + IN * OUT + OUT + N * OUT))


def test_operations_of_backpropagation() -> None:
    assert estimated(fg.Backprop()).flops == 2 * (2 * N * IN * OUT)  # output and ∂/∂W; the input needs no gradient


def test_operations_of_a_dense_tangent() -> None:
    assert estimated(fg.ForwardGradient()).flops == 2 * (2 * N * IN * OUT)  # the output, and x·Ẇᵀ; the input does not move


def test_operations_of_a_tangent_of_rank_one() -> None:
    found = estimated(fg.ForwardGradient(perturb=fg.LowRank(1))).flops
    assert found == 2 * N * IN * OUT + 2 * N * IN + 2 * N * 2 * OUT  # the output; x·b; that and ones times a and the bias's direction


def test_operations_of_a_convolution() -> None:
    layer = nn.Conv2d(2, 4, 3, padding=1)
    images = torch.ones(5, 2, 6, 6)
    with torch.no_grad():
        assert count(lambda: layer(images)).flops == 2 * 5 * 36 * 4 * (2 * 9)


@pytest.mark.parametrize(("name", "read", "written"), [("momentum", 3, 2), ("adam", 4, 3), ("adamw", 4, 3)])
def test_an_optimizer_reads_and_writes_what_it_has_a_parameter(name: OptimizerName, read: int, written: int) -> None:
    """The parameter, its gradient and the moments are read, all but the gradient are written; and a counter of steps for each of two."""
    model = linear()
    optimizer = optimizers.made(name, model.parameters())
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    found = count(optimizer.step)
    numbers = IN * OUT + OUT
    counters = 0 if name == "momentum" else 4 * 2 * 4  # each read and written by the count and by the kernel, 4 times 4 bytes at most
    assert 4 * (read + written) * numbers <= found.bytes <= 4 * (read + written) * numbers + counters


def test_a_product_with_a_vector_counts() -> None:
    a, v, b = torch.ones(4, 6), torch.ones(6), torch.ones(4)
    assert count(lambda: a.mv(v)) == Count(48, 4 * (24 + 6 + 4))
    assert count(lambda: torch.addmv(b, a, v)).flops == 48
    assert count(lambda: v.dot(v)).flops == 12


def test_bytes_of_what_moves_and_of_what_does_not() -> None:
    a, b = torch.ones(10, 10), torch.ones(10, 10)
    assert count(lambda: a + b).bytes == 3 * 400
    assert count(lambda: a.add_(b)).bytes == 3 * 400  # read, read, written
    assert count(lambda: a * a).bytes == 2 * 400  # one tensor twice is read once
    assert count(lambda: a.t()[:5].reshape(-1).detach().view(5, 10)).bytes == 2 * 200  # reshape copies here, the others do not
    assert count(lambda: torch.empty(1000)).bytes == 0
    assert count(lambda: a + torch.ones(()).expand(10, 10)).bytes == 4 + 2 * 400 + 4  # made, then read once for all rows


def test_the_bound_is_the_greater_of_the_two() -> None:
    limits = Ceilings(flops_per_second=100.0, bytes_per_second=10.0)
    assert limits.bound(Count(200, 10)) == (2.0, "products")
    assert limits.bound(Count(200, 50)) == (5.0, "bytes")


def test_limits_are_measured() -> None:
    found = roofline.ceilings(torch.device("cpu"), product=64, numbers=1 << 12, repeats=2)
    assert 1e5 < found.flops_per_second < 1e15
    assert 1e5 < found.bytes_per_second < 1e15


class Entries(TorchDispatchMode):
    """Counts random numbers: the entries that random operators return."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if torch.Tag.nondeterministic_seeded in func.tags:
            self.count += sum(leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, Tensor))
        return result


@pytest.mark.parametrize("arm", [arm for arm in ARMS if arm.engine == "eager"], ids=lambda arm: arm.name)
def test_the_draws_of_a_step_draw_as_much_as_the_step(arm: BenchArm) -> None:
    torch.manual_seed(0)
    step = ArmStep(arm, build_case(BenchCase("mlp-2x8", 4, "contiguous"), torch.device("cpu")))
    step()
    before = {kind: kind.fill_ for kind in fg.LAWS}
    made = random_numbers.of_an_eager_step(step)
    assert {kind: kind.fill_ for kind in fg.LAWS} == before
    with Entries() as taken:
        step()
    with Entries() as again:
        random_numbers.total(made)()
    assert again.count == taken.count
    assert bool(made) == (arm.name not in ("plain", "backprop", "backprop-checkpoint", "fixed-feedback"))


def test_a_dense_gaussian_step_draws_a_number_a_weight() -> None:
    torch.manual_seed(0)
    built = build_case(BenchCase("mlp-2x8", 4, "contiguous"), torch.device("cpu"))
    forward = next(arm for arm in ARMS if arm.name == "forward")
    made = random_numbers.of_an_eager_step(ArmStep(forward, built))
    with Entries() as again:
        random_numbers.total(made)()
    assert again.count == built.parameters


@pytest.mark.parametrize("name", ["forward", "low-rank", "low-rank-k2", "per-example", "activity"])
def test_a_step_that_is_a_graph_draws_each_number_once(name: str) -> None:
    """Low-rank factors and moves of activities are drawn again by an eager step, which does not keep them."""
    torch.manual_seed(0)
    step = ArmStep(NAMED[name], build_case(BenchCase("mlp-2x8", 4, "contiguous"), torch.device("cpu")))
    made = random_numbers.of_a_graph(step, captured=False)
    with planned() as plan, Entries() as planning:
        step()
    with Entries() as again:
        random_numbers.total(made)()
    with Entries() as once:
        plan.again()
    assert 0 < again.count == once.count
    assert (once.count < planning.count) == name.startswith(("low-rank", "activity"))


@pytest.mark.parametrize("name", ["forward", "zeroth-order"])
def test_streams_of_a_graph_are_made_by_a_compiled_function_and_once(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(laws, "_WORTH_A_STREAM", 100)
    calls = []
    monkeypatch.setattr(torch, "compile", lambda function, dynamic: lambda seeds: calls.append(function(seeds)))
    made = random_numbers.of_a_graph(
        ArmStep(NAMED[name], build_case(BenchCase("mlp-2x8", 4, "contiguous"), torch.device("cpu"))), captured=False
    )
    random_numbers.total(made)()
    assert [tuple(found.shape) for found in calls] == [(1, 784 * 8)]
