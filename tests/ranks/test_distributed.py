"""Ranks that train one model end where one process does that has the whole batch and all directions, and send a few numbers for it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.support.cases import seeded
from tests.support.processes import in_processes
from torch import Tensor, nn

import forwardgrad as fg

STEPS, EXAMPLES = 3, 12
NUMBERS: dict[str, fg.Estimator] = {
    "dense": fg.ForwardGradient(4),
    "dense, in chunks, clipped": fg.ForwardGradient(4, clip=0.05, chunk_size=1),
    "orthogonal": fg.ForwardGradient(4, law=fg.Orthogonal()),
    "projected": fg.ForwardGradient(4, combine="projection"),
    "control variate": fg.ForwardGradient(4, control_variate=0.9),
    "low rank": fg.ForwardGradient(4, perturb=fg.LowRank()),
    "low rank, kept, in chunks": fg.ForwardGradient(4, perturb=fg.LowRank(2, period=2), chunk_size=1),
    "sparse": fg.ForwardGradient(4, perturb=fg.Sparse(0.5)),
    "zeroth order": fg.ZerothOrder(tangents=4),
    "zeroth order, one side, normalized": fg.ZerothOrder(tangents=4, sides="one", normalize=True, chunk_size=None),
    "zeroth order, low rank": fg.ZerothOrder(tangents=4, perturb=fg.LowRank(), chunk_size=2),
    "zeroth order, low rank, kept": fg.ZerothOrder(tangents=4, perturb=fg.LowRank(period=2), maximize=True),
}
OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.02),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01),
}


def network(seed: int = 0) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers = [nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(48, 8), nn.Tanh(), nn.Linear(8, 3)]
        return nn.Sequential(*layers).double()


def batches(shard: int = 0, shards: int = 1) -> list[tuple[Tensor, Tensor]]:
    """The batches of some steps, or one part of each."""
    generator, each = seeded(7), EXAMPLES // shards
    made = [(torch.randn(EXAMPLES, 1, 6, 6, generator=generator).double(), torch.arange(EXAMPLES) % 3) for _ in range(STEPS)]
    return [(x[shard * each :][:each], y[shard * each :][:each]) for x, y in made]


def loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(model(x), y)


def trained(method: fg.Estimator, optimizer: str = "sgd", group: fg.Distributed | None = None, **options: Any) -> dict[str, Any]:
    model = network()
    made = OPTIMIZERS[optimizer](model.parameters())
    step = fg.TrainingStep(loss, model, made, method, generator=seeded(3), group=group, **options)
    before = group.sent if group else 0
    parts = batches(group.shard, group.shards) if group else batches()
    records = [step(x, y) for x, y in parts]
    found: dict[str, Any] = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found |= {"loss": torch.stack([r.loss for r in records]), "derivatives": torch.stack([r.derivatives for r in records])}
    return {"found": found, "sent": group.sent - before if group else 0, "passes": records[-1].forward_passes}


def by_numbers(group: fg.Distributed) -> dict[str, Any]:
    every = {f"{name}, {how}": trained(method, how, group) for name, method in NUMBERS.items() for how in OPTIMIZERS}
    return every


def two(rank: int) -> dict[str, Any]:
    return {"data": by_numbers(fg.Distributed(check_every=1)), "directions": by_numbers(fg.Distributed(directions=2, check_every=None))}


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    return in_processes(2, tmp_path_factory.mktemp("ranks"), two, limit=600)


@pytest.mark.parametrize("how", OPTIMIZERS)
@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize("split", ["data", "directions"])
def test_two_ranks_end_where_one_process_does(both: list[Any], split: str, name: str, how: str) -> None:
    alone = trained(NUMBERS[name], how)["found"]
    first, second = (one[split][f"{name}, {how}"]["found"] for one in both)
    assert all(torch.equal(first[key], second[key]) for key in first)
    # a difference has the rounding of losses over epsilon in it, and Adam divides by the size of what it is given
    bound = 1e-7 if "zeroth" in name else 1e-10
    for key, wanted in alone.items():
        assert first[key] == pytest.approx(wanted, rel=bound, abs=bound), key


GRADIENTS: dict[str, fg.Estimator] = {
    "backpropagation": fg.Backprop(),
    "split weights": fg.ForwardGradient(4, perturb=fg.SplitWeights(2)),
    "read-out": fg.Readout(),
    "fixed feedback": fg.FixedFeedback(),
    "local losses": fg.LocalLosses(feedback=True),
}
LOGGED = fg.ForwardGradient(4, perturb=fg.LowRank())
OWN_DRAWS: dict[str, fg.Estimator] = {
    "activities": fg.ForwardGradient(perturb=fg.Activity()),
    "by example": fg.ForwardGradient(perturb=fg.PerExample()),
    "zeroth order by example": fg.ZerothOrder(perturb=fg.PerExample()),
    "informed": fg.ForwardGradient(perturb=fg.Informed()),
    "learned feedback": fg.LearnedFeedback(),
    "local losses without feedback": fg.LocalLosses(),
    "deep blocks": fg.LocalLosses(feedback=True, ends=("3.weight",)),
}


def accumulated(group: fg.Distributed | None) -> list[Tensor]:
    """Two estimates added up before a step, with gradients clipped."""
    model, generator = network(), seeded(3)
    for x, y in (batches(group.shard, group.shards) if group else batches())[:2]:
        fg.estimate_grad_(lambda m, x=x, y=y: loss(m, x, y), model, fg.ForwardGradient(2), generator=generator, group=group)
    nn.utils.clip_grad_norm_(model.parameters(), 0.1)
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def logged(group: fg.Distributed, path: Path) -> dict[str, Tensor]:
    """Steps of ranks of which the first keeps a log."""
    model = network()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    log = fg.StepLog(path) if group.rank == 0 else None
    step = fg.TrainingStep(loss, model, optimizer, LOGGED, generator=seeded(3), group=group, log=log)
    for x, y in batches(group.shard, group.shards):
        step(x, y)
    if log is not None:
        log.close()
    return dict(model.state_dict())


def gone_on(group: fg.Distributed, folder: Path) -> dict[str, Any]:
    """Steps of ranks that each keep a log, are ended before the last of them, and go on from what is left of the logs."""
    path = folder / f"steps-{group.rank}.log"
    parts = batches(group.shard, group.shards)

    def take(after: int, until: int) -> dict[str, Tensor]:
        model, generator = network(), seeded(3)
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        done = fg.replay(path, model, optimizer, generator=generator, group=group)
        assert done == after
        log = fg.StepLog(path, since=done if path.exists() else None)
        step = fg.TrainingStep(loss, model, optimizer, LOGGED, generator=generator, group=group, log=log)
        for x, y in parts[done:until]:
            step(x, y)
        return dict(model.state_dict())

    take(0, STEPS - 1)
    data = path.read_bytes()
    if group.rank == 0:
        path.unlink()
    elif group.rank == 1:
        path.write_bytes(data[:-1])  # a step less
    elif group.rank == 2:
        path.write_bytes(data[:40] + b"?" + data[41:])
    return {"ends": take(STEPS - 1, STEPS), "steps": fg.replay(path, other := network(), torch.optim.Adam(other.parameters()))}


def four(folder: Path, rank: int) -> dict[str, Any]:
    data, grid = fg.Distributed(check_every=2), fg.Distributed(directions=2, check_every=2)
    return {
        "place": (grid.rank, grid.size, grid.shard, grid.shards),
        "grid": {name: trained(NUMBERS[name], "adam", grid) for name in ("dense", "low rank", "zeroth order, low rank")},
        "gradients": {name: trained(method, "adam", data) for name, method in GRADIENTS.items()},
        "own": {name: trained(method, "sgd", data) for name, method in OWN_DRAWS.items()},
        "accumulated": accumulated(data),
        "replayed": followed(data),
        "logged": logged(grid, folder / "steps.log"),
        "gone on": gone_on(grid, folder),
    }


def followed(group: fg.Distributed | None) -> dict[str, Tensor]:
    model = network()
    optimizer = fg.ReplayedSGD(model.parameters(), lr=0.01)
    step = fg.TrainingStep(loss, model, optimizer, fg.ZerothOrder(tangents=2), generator=seeded(3), group=group)
    for x, y in batches(group.shard, group.shards) if group else batches():
        step(x, y)
    return dict(model.state_dict())


@pytest.fixture(scope="module")
def everything(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    folder = tmp_path_factory.mktemp("four")
    return [folder, *in_processes(4, folder, partial(four, folder), limit=600)]


@pytest.fixture
def all_four(everything: list[Any]) -> list[Any]:
    return everything[1:]


@pytest.mark.full
@pytest.mark.parametrize("name", ["dense", "low rank", "zeroth order, low rank"])
def test_a_grid_of_ranks_divides_both(all_four: list[Any], name: str) -> None:
    assert [one["place"] for one in all_four] == [(0, 4, 0, 2), (1, 4, 0, 2), (2, 4, 1, 2), (3, 4, 1, 2)]
    alone = trained(NUMBERS[name], "adam")["found"]
    for key, wanted in alone.items():
        assert all(torch.equal(one["grid"][name]["found"][key], all_four[0]["grid"][name]["found"][key]) for one in all_four)
        assert all_four[0]["grid"][name]["found"][key] == pytest.approx(wanted, rel=1e-7, abs=1e-7)


@pytest.mark.parametrize("name", GRADIENTS)
def test_gradients_that_follow_from_the_batch_are_averaged_to_those_of_the_whole_batch(all_four: list[Any], name: str) -> None:
    alone = trained(GRADIENTS[name], "adam")["found"]
    for key, wanted in alone.items():
        assert all(torch.equal(one["gradients"][name]["found"][key], all_four[0]["gradients"][name]["found"][key]) for one in all_four)
        assert all_four[0]["gradients"][name]["found"][key] == pytest.approx(wanted, rel=1e-8, abs=1e-8)


@pytest.mark.parametrize("name", OWN_DRAWS)
def test_ranks_with_draws_of_their_own_take_one_step(all_four: list[Any], name: str) -> None:
    found = [one["own"][name]["found"] for one in all_four]
    assert all(torch.equal(one[key], found[0][key]) for one in found for key in found[0])
    assert any(not torch.equal(found[0][key], tensor) for key, tensor in network().state_dict().items())


def test_accumulated_and_clipped_gradients_are_those_of_one_process(all_four: list[Any]) -> None:
    for one in all_four:
        for got, wanted in zip(one["accumulated"], accumulated(None), strict=True):
            assert got == pytest.approx(wanted, rel=1e-10, abs=1e-12)


def test_momentum_from_seeds_follows_agreed_numbers(all_four: list[Any]) -> None:
    for one in all_four:
        for key, wanted in followed(None).items():
            assert one["replayed"][key] == pytest.approx(wanted, rel=1e-7, abs=1e-7)


def test_a_new_rank_has_the_parameters_from_the_log_of_another(everything: list[Any]) -> None:
    folder, *ranks = everything
    model = network()
    assert fg.replay(folder / "steps.log", model, torch.optim.Adam(model.parameters())) == STEPS
    for key, tensor in model.state_dict().items():
        assert all(torch.equal(one["logged"][key], tensor) for one in ranks)


def test_ranks_go_on_from_the_log_that_is_furthest(all_four: list[Any]) -> None:
    for one in all_four:
        assert one["gone on"]["steps"] == STEPS
        assert all(torch.equal(one["gone on"]["ends"][key], tensor) for key, tensor in one["logged"].items())
