"""The race against the clock: its arms, what holds them equal, its budgets and rows, and what its commands add up to."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from tests.support.stored import tried

from forwardgrad.estimators import from_config
from forwardgrad.lab.errors import UserError
from forwardgrad.lab.recipes.faster import LOCAL, TIMED, faster
from forwardgrad.lab.statistics.speedup import fewest_a_side
from forwardgrad.lab.store.files import write_json
from forwardgrad.lab.store.results import studies
from forwardgrad.lab.store.store import Store
from forwardgrad.lab.studies.run import Run, to_json
from forwardgrad.lab.tuning.campaign import run_study


@pytest.mark.parametrize("small", [False, True])
def test_two_arms_differ_in_the_estimator_alone(small: bool) -> None:
    for study in faster(small=small):
        backprop, local = study.arms
        assert (backprop.kind, local.kind) == ("backprop", "local")
        assert backprop.space == local.space
        assert len(backprop.space["lr"]) >= 2  # type: ignore[arg-type]
        assert (study.tuning, study.chosen_by) == (None, "time")
        assert dataclasses.replace(local.run, estimator=backprop.run.estimator) == backprop.run
        assert (local.run.engine, local.run.optimizer.name, local.run.optimizer.anneal) == ("compile", "adam", True)
        assert local.run.estimator == LOCAL
        from_config(local.run.estimator)
        trials = [[(run.epochs, run.optimizer.lr, run.batch_size, run.seed) for _, run in tried(study, arm)] for arm in study.arms]
        assert trials[0] == trials[1]
        assert len(set(trials[0])) == study.budget(backprop)


@pytest.mark.parametrize("small", [False, True])
def test_seeds_suffice_for_an_interval_and_evaluations_for_some_per_cent(small: bool) -> None:
    examples = {"mnist": 50_000, "cifar10": 40_000}
    for study in faster(small=small):
        assert study.seeds >= fewest_a_side()
        for arm in study.arms:
            for _, run in tried(study, arm):
                assert run.evaluate_every is not None
                assert run.evaluate_every / (examples[run.data] / run.batch_size * run.epochs) < (0.13 if run.batch_size > 128 else 0.07)


def test_networks_are_chosen_by_name_and_a_small_budget_has_one() -> None:
    assert [study.arms[0].run.model for study in faster()] == list(TIMED) == ["nn", "cnn", "cifar-cnn"]
    assert [study.arms[0].run.model for study in faster(["cifar-cnn", "nn"])] == ["nn", "cifar-cnn"]
    (small,) = faster(small=True)
    assert (small.arms[0].run.model, small.arms[0].run.epochs, small.target, small.seeds) == ("nn", 1, 0.97, 6)
    (short,) = faster(["nn"], epochs=1, seeds=3)
    assert {run.epochs for _, run in tried(short, short.arms[0])} == {1}
    assert (short.seeds, "epochs" in short.arms[0].space) == (3, False)


@pytest.mark.parametrize("row", ["nn-local", "cifar", ""])
def test_a_row_that_is_no_network_is_refused(row: str) -> None:
    with pytest.raises(UserError, match="choose from nn, cnn, cifar-cnn"):
        faster([row])


def test_networks_add_up_to_one_record_and_a_small_budget_is_another(tmp_path: Path) -> None:
    store = Store(tmp_path / "out")

    def execute(runs: Sequence[Run]) -> dict[str, dict[str, Any]]:
        for run in runs:
            store.folder(run.identity).mkdir(exist_ok=True)
            write_json(store.folder(run.identity) / "run.json", to_json(run))
        return {run.identity: {"status": "finished", "validation_loss": run.optimizer.lr, "validation_accuracy": 0.9} for run in runs}

    for study in faster(["nn", "cnn"]):
        run_study(study, store, execute, "forwardgrad reproduce faster")
    (found,) = studies(store)
    assert [(arm.name, arm.planned, arm.shortened) for arm in found.arms] == [
        ("nn-backprop", 6, None),
        ("nn-local", 6, None),
        ("cnn-backprop", 6, None),
        ("cnn-local", 6, None),
    ]
    elsewhere = Store(tmp_path / "small")
    store = elsewhere
    (study,) = faster(small=True)
    run_study(study, store, execute, "forwardgrad reproduce faster --budget small")
    assert {arm.shortened for arm in studies(store)[0].arms} == {"shortened: 1 of 2 epochs"}
