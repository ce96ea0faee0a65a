"""Several processes: independent ones train as alone, DistributedDataParallel averages, and what would drift apart is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed
import torch.nn.functional as F
from tests.support.cases import seeded
from tests.support.processes import in_processes
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import forwardgrad as fg


def network() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 3))


def loss_of(rank: int) -> Callable[[nn.Module], Tensor]:
    x = torch.randn(6, 4, generator=seeded(rank))
    return lambda model: F.cross_entropy(model(x), torch.arange(6) % 3)


def gradients(model: nn.Module) -> list[Tensor]:
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def said(call: Callable[[], object]) -> str:
    try:
        call()
    except RuntimeError as error:
        return str(error)
    return ""


def two(rank: int) -> Any:
    model, loss, forward = network(), loss_of(rank), fg.ForwardGradient()
    wrapped, optimizer = DistributedDataParallel(model), torch.optim.SGD(model.parameters(), lr=0.1)
    twin = network()
    step = fg.TrainingStep(lambda m: loss(m), twin, torch.optim.SGD(twin.parameters(), lr=0.1), forward, generator=seeded(rank))
    compiled = fg.TrainingStep(lambda m: loss(m), wrapped, optimizer, fg.Backprop(), engine="compile")
    ensemble = fg.Ensemble([network(), network()])
    x = torch.ones(2, 3, 4)
    found = {
        "alone": said(lambda: fg.estimate_grad_(loss, model, forward, generator=seeded())),
        "backprop": said(lambda: fg.estimate_grad_(loss, model, fg.Backprop())),
        "step": said(step),
        "ensemble": said(lambda: fg.estimate_grads_(lambda m, x: m(x).sum(), ensemble, (x,), fg.Backprop())),
        "wrapped": said(lambda: fg.estimate_grad_(loss, wrapped, forward, generator=seeded())),
        "inside": said(lambda: fg.estimate_grad_(lambda m: loss(m[0]), nn.Sequential(wrapped), fg.Backprop())),
        "compiled": said(compiled),
    }
    untouched = all(p.grad is None for p in model.parameters())
    with fg.independent_ranks():
        found["wrapped, independent"] = said(lambda: fg.estimate_grad_(loss, wrapped, forward, generator=seeded()))
        for _ in range(3):
            step()
    found["after"] = said(step)
    loss(wrapped).backward()
    exact = gradients(model)
    model.zero_grad()
    reduced = []
    for method in (fg.Backprop(), fg.Backprop(checkpoint=True)):
        fg.estimate_grad_(loss, wrapped, method)
        reduced.append(gradients(model))
        model.zero_grad()
    return {"said": found, "untouched": untouched, "exact": exact, "reduced": reduced, "trained": dict(twin.state_dict())}


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    return in_processes(2, tmp_path_factory.mktemp("processes"), two)


def test_two_processes_are_refused_until_they_are_said_to_be_independent(both: list[Any]) -> None:
    first, second = both
    for rank, found in enumerate((first, second)):
        for what in ("alone", "backprop", "step", "ensemble", "after"):
            assert "2 processes" in found["said"][what], what
            assert "independent_ranks" in found["said"][what], what
        for what in ("wrapped", "inside", "compiled", "wrapped, independent"):
            assert "DistributedDataParallel averages gradients over its 2 processes" in found["said"][what], what
        assert found["untouched"]
        twin = network()
        alone = fg.TrainingStep(
            loss_of(rank), twin, torch.optim.SGD(twin.parameters(), lr=0.1), fg.ForwardGradient(), generator=seeded(rank)
        )
        for _ in range(3):
            alone()
        assert all(map(torch.equal, twin.state_dict().values(), found["trained"].values()))
    assert not torch.equal(first["trained"]["0.weight"], second["trained"]["0.weight"])


def test_backpropagation_through_a_wrapped_module_is_averaged_as_torch_does(both: list[Any]) -> None:
    first = both[0]
    for found in both:
        for reduced in found["reduced"]:
            assert all(map(torch.equal, reduced, first["exact"]))
    assert len(first["exact"]) == len(list(network().parameters()))


def one(rank: int) -> Any:
    found = {}
    for method in (fg.Backprop(), fg.ZerothOrder(), fg.LearnedFeedback(), *(fg.ForwardGradient(perturb=p()) for p in fg.PERTURBATIONS)):
        plain, model, loss = network(), network(), loss_of(rank)
        fg.estimate_grad_(loss, plain, method, generator=seeded(), state={})
        fg.estimate_grad_(loss, DistributedDataParallel(model), method, generator=seeded(), state={})
        found[repr(method)] = (gradients(plain), gradients(model), dict(plain.state_dict()), dict(model.state_dict()))
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
    from torch.distributed.tensor import distribute_module

    mesh = init_device_mesh("cpu", (1,))
    whole = FullyShardedDataParallel(network(), device_id=torch.device("cpu"), sharding_strategy=None, use_orig_params=True)
    parts = fully_shard(network(), mesh=mesh)
    divided = distribute_module(network(), mesh)
    refused = [said(lambda m=m: fg.estimate_grad_(loss_of(0), m, generator=seeded())) for m in (whole, parts, divided)]
    return {"found": found, "refused": refused}


@pytest.mark.full
@pytest.mark.filterwarnings("ignore:FSDP")
def test_one_process_trains_a_wrapped_module_as_the_module_and_no_sharded_one(tmp_path: Path) -> None:
    (found,) = in_processes(1, tmp_path, one)
    for method, (plain, wrapped, before, after) in found["found"].items():
        assert plain, method
        assert all(map(torch.equal, plain, wrapped)), method
        assert all(map(torch.equal, before.values(), after.values())), method
    whole, parts, divided = found["refused"]
    assert "FSDP" in whole
    assert "FSDP" in parts
    assert "a parameter is divided among processes" in divided
