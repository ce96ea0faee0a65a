"""Ranks whose steps are compiled: a graph measures, and parameters stay equal to the bit even where a rank is without one."""

from __future__ import annotations

import warnings
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.ranks.test_distributed import batches, loss, network, trained
from tests.support.cases import seeded
from tests.support.processes import in_processes

import forwardgrad as fg

METHODS: dict[str, fg.Estimator] = {
    "dense": fg.ForwardGradient(2, clip=0.05),
    "low rank": fg.ForwardGradient(4, perturb=fg.LowRank(), chunk_size=1, clip=0.05),
    "zeroth order, low rank": fg.ZerothOrder(tangents=2, perturb=fg.LowRank(), normalize=True),
}
CASES = [("low rank", "data"), ("zeroth order, low rank", "directions")]
MORE = [("dense", "data"), ("zeroth order, low rank", "data")]
EAGER = fg.ForwardGradient(2, control_variate=0.5)


def compiled(method: fg.Estimator, group: fg.Distributed, limit: float | None = None) -> dict[str, Any]:
    """Six steps, three of each batch's form."""
    model = network()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        options: dict[str, Any] = {"generator": seeded(3), "group": group, "engine": "compile", "compile_limit": limit}
        step = fg.TrainingStep(loss, model, optimizer, method, **options)
        for x, y in batches(group.shard, group.shards) * 2:
            step(x, y)
    return {"model": dict(model.state_dict()), "fallback": step.fallback, "warnings": len(told), "preparing": step.preparing > 0}


def alone(method: fg.Estimator) -> dict[str, torch.Tensor]:
    model = network()
    step = fg.TrainingStep(loss, model, torch.optim.Adam(model.parameters(), lr=0.01), method, generator=seeded(3))
    for x, y in batches() * 2:
        step(x, y)
    return dict(model.state_dict())


Cases = list[tuple[str, str]]


def asked(cases: Cases, rank: int) -> dict[str, Any]:
    groups = {"data": fg.Distributed(check_every=2), "directions": fg.Distributed(directions=2, check_every=2)}
    return {f"{name}, {divided}": compiled(METHODS[name], groups[divided]) for name, divided in cases}


def two(rank: int) -> dict[str, Any]:
    data = fg.Distributed(check_every=2)
    without = compiled(METHODS["low rank"], data, 1e-9 if rank else None)
    return asked(CASES, rank) | {"one without": without, "eager": compiled(EAGER, data)}


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    return in_processes(2, tmp_path_factory.mktemp("compiled"), two, limit=600)


def end_alike(both: list[Any], name: str, divided: str) -> None:
    one, other = (found[f"{name}, {divided}"] for found in both)
    assert [one["fallback"], other["fallback"]] == ["", ""]
    assert [one["preparing"], other["preparing"]] == [True, True]
    bound = 1e-6 if "zeroth" in name else 1e-9
    for key, wanted in alone(METHODS[name]).items():
        assert torch.equal(one["model"][key], other["model"][key])
        assert one["model"][key] == pytest.approx(wanted, rel=bound, abs=bound)


@pytest.mark.full
@pytest.mark.parametrize(("name", "divided"), CASES)
def test_compiled_ranks_end_where_one_process_does(both: list[Any], name: str, divided: str) -> None:
    end_alike(both, name, divided)


@pytest.mark.rest
def test_other_compiled_ranks_end_where_one_process_does(tmp_path: Path) -> None:
    found = in_processes(2, tmp_path, partial(asked, MORE), limit=600)
    for name, divided in MORE:
        end_alike(found, name, divided)


@pytest.mark.full
def test_a_rank_without_a_graph_moves_to_the_same_bits(both: list[Any]) -> None:
    assert both[0]["one without"]["fallback"] == ""
    assert both[1]["one without"]["fallback"].startswith("the compiler had not finished after compile_limit=")
    for key, tensor in both[0]["one without"]["model"].items():
        assert torch.equal(tensor, both[1]["one without"]["model"][key])


@pytest.mark.full
def test_what_does_not_follow_from_numbers_alone_stays_eager_with_a_warning(both: list[Any]) -> None:
    assert [one["eager"]["warnings"] for one in both] == [1, 1]
    assert "does not follow from the derivatives alone" in both[0]["eager"]["fallback"]
    wanted = trained(EAGER, "adam")  # three steps of the six: what is compared is that both ranks agree
    assert wanted["passes"] == 3
    for key, tensor in both[0]["eager"]["model"].items():
        assert torch.equal(tensor, both[1]["eager"]["model"][key])
