"""Reports of studies of one's own: just begun, adaptive, with spaces of every kind, with more comparisons than are drawn."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from tests.support.stored import fail, put, record, reported, row, seeds, tried, undrawn

from forwardgrad.lab.errors import UserError
from forwardgrad.lab.recipes import paper
from forwardgrad.lab.report import figures
from forwardgrad.lab.store.files import read_json, write_json
from forwardgrad.lab.store.store import Store
from forwardgrad.lab.studies.study import Study

DIGITS = "MLP · digits · SGD"


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    monkeypatch.setattr(figures, "curves", undrawn)
    return Store(tmp_path / "out")


def changed(store: Store, name: str, **fields: Any) -> None:
    """The record of a study with other fields in every arm."""
    path = store.root / "studies" / f"{name}.json"
    stored = read_json(path) or {}
    write_json(path, {**stored, "seeds": 3, "arms": [{**arm, **fields} for arm in stored["arms"]]})


def test_a_study_that_has_just_begun_is_shown(store: Store) -> None:
    record(store, paper.demo(2))
    changed(store, "demo", runs=[], chosen={"values": {}, "validation_loss": None, "at_edge": []})
    text = reported(store)
    assert "unfinished" in row(text, "Results", DIGITS, "forward gradient")["outcome"]
    assert row(text, "Tuning", DIGITS, "forward gradient")["grid points"] == "5 (2 epochs each, 5 unfinished)"
    assert text.startswith("# Forward gradients beside backpropagation\n\nNo comparison is finished yet.")


def test_spaces_of_every_kind_are_read(store: Store) -> None:
    study = paper.demo(2, seeds=1)
    record(store, study)
    space = {
        "lr": {"low": 1e-4, "high": 0.1, "log": True},
        "momentum": {"low": 0, "high": 0.9},
        "estimator.law": {"choices": ["gaussian", "sphere"]},
        "anneal": [True, False],
        "batch_size": [8, 16, 32, 64, 128],
    }
    values = {"lr": 0.01, "estimator.law": "sphere", "anneal": True, "batch_size": 16}
    chosen = {"values": values, "validation_loss": 0.3, "at_edge": []}
    trials = [{"values": values, "run": "0" * 12}]
    changed(store, "demo", space=space, trials=trials, sampler="sobol", budget={"trials": 1, "epochs": 2}, chosen=chosen)
    tuning = row(reported(store), "Tuning", DIGITS, "forward gradient")
    assert tuning["searched"] == (
        "lr 0.0001 to 0.1, logarithmic · momentum 0 to 0.9 · estimator.law gaussian, sphere · anneal true, false · "
        "batch_size 8 to 128 (5 values) (sobol)"
    )
    assert tuning["chosen"] == "lr 0.01 · estimator.law sphere · anneal true · batch_size 16"


def test_runs_and_trials_that_failed_are_listed_with_their_reasons(store: Store) -> None:
    study = paper.demo(1, seeds=2)
    record(store, study)
    for arm in study.arms:
        for run in seeds(arm, 2):
            put(store, run, 0.3)
    forward = study.arms[0]
    lost = seeds(forward, 2)[1]
    for name in ("evaluations.csv", "losses.csv.gz"):
        (store.folder(lost.identity) / name).unlink()
    fail(store, lost, "the worker died three times", steps=7)
    fail(store, tried(study, forward)[0][1], "memory was exhausted")
    text = reported(store)
    results = row(text, "Results", DIGITS, "forward gradient")
    assert results["outcome"] == "failed (the worker died three times) (in 1 of 2 runs)"
    assert results["test loss"] == "not finite in 1 of 2 runs (the rest: 0.300)"
    assert results["test accuracy"] == "none in 1 of 2 runs (the rest: 90.00 %)"
    assert row(text, "Tuning", DIGITS, "forward gradient")["grid points"] == "5 (1 epoch each, 1 failed, 4 unfinished)"
    listed = row(text, "Runs that diverged or failed", DIGITS, "failed (the worker died three times)")
    assert (listed["run"], listed["steps"]) == (f"seed 1 ({lost.identity})", "7")
    assert row(text, "Runs that diverged or failed", DIGITS, "failed (memory was exhausted)")["run"].startswith("trial lr 0.001 (")
    assert "Failed: 1 of 2 runs of the forward gradient." in text
    assert "Backpropagation reached the lower test loss in 1 of 1 comparison" in text


def test_more_comparisons_than_are_drawn_are_said(store: Store) -> None:
    (arm, _) = paper.demo(1).arms
    arms = tuple(paper.replace(arm, name=f"arm {n}", group=f"group {n}", space={}) for n in range(8))
    record(store, Study("mine", "A study of my own", arms, 1))
    record(store, Study("theme", "A study with a name of the page's own", arms[:1], 1))
    record(store, Study("a.b", "A study with a dot in its name", arms[:1], 1))
    put(store, arm.run, 0.3)
    text = reported(store)
    ids = re.findall(r' id="([^"]*)"', (store.root / "report.html").read_text())
    assert len(ids) == len(set(ids))
    assert {"theme", "study-theme", "a-b"} <= set(ids)
    text = text[text.index("## A study of my own") : text.index("## A study with a name")]
    assert "The curves of 2 further comparisons are not drawn" in text
    assert text.count("-training.svg)") == 6
    assert row(text, "Results", "group 7", "forward gradient")["test loss"] == "0.300 (n = 1, no interval)"


SPACE = {"lr": {"low": "small", "high": 1}}
CHOSEN = {"values": {"lr": [1]}, "validation_loss": 0.1, "at_edge": [3]}


@pytest.mark.parametrize("fields", [{"space": SPACE}, {"space": {"lr": 3}}, {"chosen": CHOSEN}])
def test_a_record_that_makes_no_sense_is_one_sentence(store: Store, fields: dict[str, Any]) -> None:
    record(store, paper.demo(2))
    changed(store, "demo", **fields)
    with pytest.raises(UserError, match=r"demo\.json is damaged .*: delete"):
        reported(store)
