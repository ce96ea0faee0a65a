"""docs/results.md is true: its lines read a small real store with polars, duckdb and pandas, and its tables name every column there is."""

from __future__ import annotations

import ast
import dataclasses
import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from forwardgrad.lab.execution.dispatch import execute
from forwardgrad.lab.execution.place import Place
from forwardgrad.lab.store.files import read_table
from forwardgrad.lab.store.packing import pack
from forwardgrad.lab.store.progress import Progress
from forwardgrad.lab.store.store import Store
from forwardgrad.lab.studies.length import Length
from forwardgrad.lab.studies.run import Optimizer, Run
from forwardgrad.lab.studies.study import Arm, Study
from forwardgrad.lab.tuning.campaign import run_study

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "results.md"
BLOCKS = re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(), re.DOTALL)
BACKPROP = Run("digits", "logistic", {"name": "backprop"}, Optimizer("sgd", 0.5), 2)
FORWARD = dataclasses.replace(BACKPROP, estimator={"name": "forward", "clip": 1.0}, optimizer=Optimizer("sgd", 0.01))
STUDY = Study(
    "small",
    "Small",
    (
        Arm("backprop", "digits", "backprop", "backpropagation", BACKPROP, {"lr": (0.1, 0.5)}),
        Arm("forward", "digits", "forward", "forward gradient", FORWARD, {"lr": (0.01, 0.1)}),
    ),
    seeds=2,
    tuning=Length(epochs=1),
)
EXPLODES = dataclasses.replace(BACKPROP, model="mlp", optimizer=Optimizer("sgd", 1e20), epochs=10)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """A tuned study, and a run that diverged."""
    store, quiet = Store(tmp_path_factory.mktemp("at") / "results"), Progress(quiet=True)
    run_study(STUDY, store, lambda runs: execute(runs, store, Place(), quiet), "forwardgrad reproduce small")
    assert execute([EXPLODES], store, Place(), quiet)[EXPLODES.identity]["status"] == "diverged"
    return store


def lines_that_make(name: str) -> list[Any]:
    found = [block for block in BLOCKS if re.search(rf"^{name} = ", block, re.MULTILINE)]
    return [pytest.param(block, id=re.findall(r"import (polars|duckdb|pandas)", block)[0]) for block in found]


def made(block: str, name: str, store: Store, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The rows that a block of the document makes of the store; one statement but for imports and names of columns."""
    statements = [statement for statement in ast.parse(block).body if not isinstance(statement, (ast.Import, ast.ImportFrom))]
    assert len(statements) == 1 + ("names = " in block)
    monkeypatch.chdir(store.root.parent)
    names: dict[str, Any] = {}
    exec(compile(block, DOCUMENT.name, "exec"), names)
    frame = names[name].df() if hasattr(names[name], "df") else names[name]
    rows = frame.to_dicts() if hasattr(frame, "to_dicts") else frame.to_dict("records")
    return [{column: value for column, value in row.items() if column not in ("path", "filename")} for row in rows]


def assert_the_tables(rows: list[dict[str, Any]], store: Store, file: str) -> None:
    """The rows are those of every run's table, with the run beside them, and nothing else."""
    wanted = {}
    for folder in (store.root / "runs").iterdir():
        table = read_table(folder / file)
        for values in zip(*table.values(), strict=True):
            wanted[folder.name, int(values[0])] = dict(zip(table, values, strict=True))
    assert {(row["run"], row["step"]) for row in rows} == wanted.keys()
    assert len(rows) == len(wanted) > 0
    for row in rows:
        known = wanted[row["run"], row["step"]]
        for column in row.keys() - {"run"}:
            assert number(row[column]) == pytest.approx(number(known.get(column)), rel=1e-12, nan_ok=True)
        assert row.keys() - {"run"} >= known.keys()


def number(value: Any) -> float:
    return math.nan if value is None else float(value)


@pytest.mark.parametrize("block", lines_that_make("evaluations"))
def test_evaluations(block: str, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    assert_the_tables(made(block, "evaluations", store, monkeypatch), store, "evaluations.csv")


@pytest.mark.parametrize("block", lines_that_make("losses"))
def test_losses(block: str, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    assert_the_tables(made(block, "losses", store, monkeypatch), store, "losses.csv.gz")


@pytest.mark.parametrize("block", lines_that_make("results"))
def test_results(block: str, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = {row["run"]: row for row in made(block, "results", store, monkeypatch)}
    wanted = {path.parent.name: json.loads(path.read_text()) for path in store.root.glob("runs/*/result.json")}
    assert rows.keys() == wanted.keys()
    for run, result in wanted.items():
        for name in ("status", "steps", "seconds", "parameters", "forward_passes"):
            assert rows[run][name] == result[name]
        assert number(rows[run]["validation_loss"]) == pytest.approx(number(result["validation_loss"]), nan_ok=True)
        if "optimizer.lr" in rows[run]:
            described = json.loads((store.folder(run) / "run.json").read_text())
            assert (rows[run]["optimizer.lr"], rows[run]["test"]) == (described["optimizer"]["lr"], described["test"])
            accuracy = rows[run].get("test.accuracy", math.nan)
        else:
            test = rows[run]["test"]
            accuracy = test["accuracy"] if isinstance(test, dict) else rows[run].get("test.accuracy", math.nan)
            assert number(accuracy) == pytest.approx(number((result["test"] or {}).get("accuracy")), nan_ok=True)


def test_all_three_libraries_read_all_three_tables() -> None:
    for name in ("evaluations", "results", "losses"):
        assert {"polars", "duckdb", "pandas"} <= {parameters.id for parameters in lines_that_make(name)}


@pytest.mark.parametrize("block", lines_that_make("finals"))
def test_final_runs(block: str, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = made(block, "finals", store, monkeypatch)
    assert [(row["study"], row["arm"], row["seed"]) for row in rows] == [("small", a, s) for a in ("backprop", "forward") for s in (0, 1)]
    assert all((store.folder(row["run"]) / "result.json").exists() for row in rows)


@pytest.mark.parametrize("block", lines_that_make("packed"))
def test_packed_runs(block: str, store: Store, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    shutil.copytree(store.root, tmp_path / "results")
    pack(there := Store(tmp_path / "results"))
    assert_the_tables(made(block, "packed", there, monkeypatch), store, "evaluations.csv")


def test_every_column_and_every_field_is_explained(store: Store) -> None:
    told = set(re.findall(r"`([\w.]+)`", DOCUMENT.read_text()))
    for folder in (store.root / "runs").iterdir():
        for file in ("evaluations.csv", "walk.csv", "losses.csv.gz"):
            assert read_table(folder / file).keys() <= told
        result = json.loads((folder / "result.json").read_text())
        assert result.keys() <= told
        assert {f"test.{name}" for name in result["test"] or {}} <= told
        assert json.loads((folder / "run.json").read_text()).keys() - {"schema"} <= told
        assert {path.name for path in folder.iterdir()} <= set(re.findall(r"[\w.]+", DOCUMENT.read_text()))
    (arm, _) = json.loads((store.root / "studies" / "small.json").read_text())["arms"]
    assert arm.keys() <= told
