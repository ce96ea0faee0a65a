"""The study beyond the paper: its arms and rows, what calls at different times add up to, and which runs count as shortened."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from tests.support.stored import tried

from forwardgrad.estimators import from_config
from forwardgrad.lab.errors import UserError
from forwardgrad.lab.recipes.beyond import METHODS, NETWORKS, SHORT, beyond
from forwardgrad.lab.store.files import write_json
from forwardgrad.lab.store.results import studies
from forwardgrad.lab.store.store import Store
from forwardgrad.lab.studies.run import Run, to_json
from forwardgrad.lab.tuning.campaign import run_study


def names(rows: list[str] | None) -> list[str]:
    return [arm.name for arm in beyond(rows).arms]


def test_a_network_stands_for_its_usual_arms_and_for_no_other_network() -> None:
    assert names(["nn"]) == [f"nn-{method}" for method in METHODS]
    assert names(["cnn"]) == [f"cnn-{method}" for method in METHODS if method in SHORT]
    assert names(None) == [*names(["nn"]), *names(["cnn"]), *names(["cifar-cnn"])]


def test_every_arm_can_be_chosen_by_its_name_alone() -> None:
    for model in NETWORKS:
        for method in METHODS:
            assert names([f"{model}-{method}"]) == [f"{model}-{method}"]
    assert names(["cifar-cnn-zeroth", "nn-linear"]) == ["nn-linear", "cifar-cnn-zeroth-order"]


@pytest.mark.parametrize("row", ["feedback", "nn-", "", "cifar"])
def test_a_row_that_does_not_exist_is_refused(row: str) -> None:
    with pytest.raises(UserError, match=r"no row .* choose from nn, cnn, cifar-cnn"):
        beyond([row])


def test_every_arm_can_be_built_and_has_four_rates_of_its_own_and_an_annealed_adam() -> None:
    study = beyond([f"{model}-{method}" for model in NETWORKS for method in METHODS])
    arms = study.arms
    assert len(arms) == len(NETWORKS) * len(METHODS)
    for arm in arms:
        from_config(arm.run.estimator)
        assert list(arm.space) == ["lr"]
        assert len(set(arm.space["lr"])) == 4
        assert (arm.run.optimizer.name, arm.run.optimizer.anneal) == ("adam", True)
        assert all(run.optimizer.anneal and run.epochs == 2 and not run.test for _, run in tried(study, arm))
    shared = 4  # the linear classifier on MNIST is one run for both networks there
    assert len({run.identity for arm in arms for _, run in tried(study, arm)}) == 4 * len(arms) - shared


def test_trials_are_no_longer_than_the_runs() -> None:
    assert beyond(["nn"], epochs=1).tuning.epochs == 1
    assert beyond(["nn"]).tuning.epochs == 2
    assert beyond(["nn"], tuning_epochs=3).tuning.epochs == 3


def pretend(store: Store) -> Any:
    """Executes nothing, but begins every run in the store; all are alike."""

    def execute(runs: Sequence[Run]) -> dict[str, dict[str, Any]]:
        for run in runs:
            store.folder(run.identity).mkdir(exist_ok=True)
            write_json(store.folder(run.identity) / "run.json", to_json(run))
        return {run.identity: {"status": "finished", "validation_loss": 1.0} for run in runs}

    return execute


def test_calls_at_different_times_add_up_to_one_study(tmp_path: Path) -> None:
    store = Store(tmp_path / "out")
    run_study(beyond(["nn-backprop", "cnn-local"]), store, pretend(store), "first")
    run_study(beyond(["nn-local"], seeds=1), store, pretend(store), "second")
    (study,) = studies(store)
    assert [(arm.name, arm.record["command"], arm.planned) for arm in study.arms] == [
        ("nn-backprop", "first", 3),
        ("cnn-local", "first", 3),
        ("nn-local", "second", 1),
    ]
    assert [arm.name for arm in study.groups["NN · MNIST"]] == ["nn-backprop", "nn-local"]


SHORTENED = [
    ("nn-local", 4, "shortened: 4 of 5 epochs"),
    ("nn-local", 5, None),
    ("nn-local", None, None),
    ("cifar-cnn-local", 10, "shortened: 10 of 30 epochs"),
]


@pytest.mark.parametrize(("row", "epochs", "label"), SHORTENED)
def test_fewer_epochs_than_the_full_study_count_as_shortened(row: str, epochs: int | None, label: str | None, tmp_path: Path) -> None:
    store = Store(tmp_path / "out")
    run_study(beyond([row], epochs=epochs), store, pretend(store), "command")
    assert studies(store)[0].arms[0].shortened == label
