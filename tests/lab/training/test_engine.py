"""Runs of the laboratory whose steps are graphs: the same results, and no others after a kill."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.support.interrupted import killed_and_resumed

from forwardgrad import training_step
from forwardgrad.engines import compiled, graphs
from forwardgrad.lab import store
from forwardgrad.lab.studies.run import Optimizer, Run
from forwardgrad.lab.training import builders, loop
from forwardgrad.lab.training.training import Training

CAPPED = Optimizer("sgd", 0.05, decay=1e-3, weight_decay=0.01, cap=0.05)
RUN = Run("digits", "mlp", {"name": "forward", "perturb": {"name": "low-rank", "rank": 1}}, CAPPED, epochs=2)


def losses(folder: Path) -> list[float]:
    found: list[float] = store.read_table(folder / "losses.csv.gz")["loss"]
    return found


@pytest.fixture
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "compiled", lambda traced, inputs: traced.graph)


@pytest.mark.full
@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize(
    "optimizer", [CAPPED, Optimizer("nesterov", 0.02, momentum=0.9), Optimizer("adam", 1e-3, anneal=True)], ids=lambda o: o.name
)
@pytest.mark.parametrize("estimator", [RUN.estimator, {"name": "backprop"}, {"name": "feedback"}], ids=lambda e: e["name"])
def test_a_run_in_graphs_is_the_run(tmp_path: Path, optimizer: Optimizer, estimator: dict[str, Any]) -> None:
    run = dataclasses.replace(RUN, optimizer=optimizer, estimator=estimator)
    results = {engine: loop.train(dataclasses.replace(run, engine=engine), tmp_path / engine) for engine in ("eager", "compile")}
    assert losses(tmp_path / "compile") == pytest.approx(losses(tmp_path / "eager"), rel=1e-3)
    assert results["compile"]["forward_passes"] == results["eager"]["forward_passes"]
    assert results["compile"]["peak_bytes"] is None
    assert store.read_json(tmp_path / "compile" / "run.json")["engine"] == "compile"


@pytest.mark.usefixtures("uncompiled")
def test_a_killed_run_in_graphs_goes_on_to_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = dataclasses.replace(RUN, engine="compile")
    loop.train(run, tmp_path / "undisturbed")
    killed_and_resumed(run, tmp_path / "killed", monkeypatch, step=20)
    assert losses(tmp_path / "killed") == losses(tmp_path / "undisturbed")


def test_a_run_that_cannot_be_captured_is_the_eager_one(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="engine='graph' falls back to eager steps"):
        result = loop.train(dataclasses.replace(RUN, engine="graph"), tmp_path / "graph")
    assert "GPU" in result["fallback"]
    assert "fallback" not in loop.train(RUN, tmp_path / "eager")
    assert losses(tmp_path / "graph") == losses(tmp_path / "eager")


class Clock:
    """Stands for time.perf_counter: a millisecond passes between two looks, and what else a test lets pass."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 1e-3
        return self.now


def test_making_graphs_is_no_training_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()

    def slowly(traced: Any, inputs: Any) -> Callable[..., Any]:
        clock.now += 100.0
        return traced.graph  # type: ignore[no-any-return]

    monkeypatch.setattr(compiled, "compiled", slowly)
    for module in (graphs, training_step, time):
        monkeypatch.setattr(module, "perf_counter", clock)
    result = loop.train(dataclasses.replace(RUN, engine="compile", evaluate_every=5), tmp_path / "run")
    assert 200 <= result["compile_seconds"] < 201  # two kinds of batch: the last of an epoch is smaller
    assert 0 < result["seconds"] < 1
    assert store.read_table(tmp_path / "run" / "evaluations.csv")["step"] == [5, 10, 15, 20, 25, 30, 34]
    assert max(store.read_table(tmp_path / "run" / "evaluations.csv")["seconds"]) <= result["seconds"]


@pytest.mark.usefixtures("uncompiled")
def test_a_run_goes_on_from_a_checkpoint_that_did_not_count_the_making_of_graphs() -> None:
    run = dataclasses.replace(RUN, engine="compile")
    training = Training.begin(run, builders.dataset(run, torch.device("cpu"), None), torch.device("cpu"))
    training.advance_timed(3)
    content = training.state.counts()
    assert content.pop("preparing") > 0
    training.state.preparing = 0.0
    training.state.set_counts(content)
    assert (training.state.step, training.state.preparing) == (3, 0.0)
