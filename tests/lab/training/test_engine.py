"""Runs of the laboratory whose steps are graphs: the same results, and no others after a kill."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from tests.support.interrupted import killed_and_resumed

from forwardgrad.engines import compiled
from forwardgrad.lab import store
from forwardgrad.lab.studies.run import Optimizer, Run
from forwardgrad.lab.training import loop

CAPPED = Optimizer("sgd", 0.05, decay=1e-3, weight_decay=0.01, cap=0.05)
RUN = Run("digits", "mlp", {"name": "forward", "perturb": {"name": "low-rank", "rank": 1}}, CAPPED, epochs=2)


def losses(folder: Path) -> list[float]:
    found: list[float] = store.read_table(folder / "losses.csv.gz")["loss"]
    return found


@pytest.fixture
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "compiled", lambda traced, inputs: traced.graph)


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
        loop.train(dataclasses.replace(RUN, engine="graph"), tmp_path / "graph")
    loop.train(RUN, tmp_path / "eager")
    assert losses(tmp_path / "graph") == losses(tmp_path / "eager")
