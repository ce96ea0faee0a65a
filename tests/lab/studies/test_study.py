"""Studies: equal budgets, selection on validation, fresh seeds; and the recipes against the paper's Table I."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from forwardgrad.lab.errors import UserError
from forwardgrad.lab.recipes import paper
from forwardgrad.lab.store.store import Store
from forwardgrad.lab.studies.length import Length
from forwardgrad.lab.studies.run import Optimizer, Run
from forwardgrad.lab.studies.study import TUNING_SEED, Arm, Study, logspace
from forwardgrad.lab.tuning.campaign import run_study

RUN = Run("digits", "logistic", {"name": "backprop"}, Optimizer("sgd", 0.5), epochs=20)


def arm(name: str = "a", **space: tuple[float, ...]) -> Arm:
    return Arm(name, "group", "backprop", name, RUN, space)


class Fake:
    """Executes nothing: the validation loss is a function of the run, and every call is kept."""

    def __init__(self, loss: Any) -> None:
        self.loss, self.calls = loss, []  # type: ignore[var-annotated]

    def __call__(self, runs: Sequence[Run]) -> dict[str, dict[str, Any]]:
        self.calls.append(list(runs))
        return {
            run.identity: {"status": "finished" if (v := self.loss(run)) is not None else "diverged", "validation_loss": v} for run in runs
        }


def test_the_best_point_on_validation_is_trained_on_fresh_seeds(tmp_path: Path) -> None:
    fake = Fake(lambda run: abs(run.optimizer.lr - 0.02) + run.optimizer.decay)
    study = Study("s", "S", (arm(lr=(0.01, 0.02, 0.03), decay=(0.0, 1e-5)),), seeds=3, tuning=Length(epochs=4))
    record = run_study(study, Store(tmp_path), fake, "command")
    trials, finals = fake.calls
    assert len(trials) == 6
    assert all(run.epochs == 4 and run.seed == TUNING_SEED and not run.test for run in trials)
    assert [run.seed for run in finals] == [0, 1, 2]
    assert all(run.optimizer == Optimizer("sgd", 0.02) and run.epochs == 20 and run.test for run in finals)
    assert record["arms"][0]["chosen"] == {"values": {"lr": 0.02, "decay": 0.0}, "validation_loss": 0.0, "at_edge": []}
    assert record["arms"][0]["runs"] == [run.identity for run in finals]


def test_a_winner_on_the_edge_is_flagged(tmp_path: Path) -> None:
    fake = Fake(lambda run: -run.optimizer.lr)
    record = run_study(Study("s", "S", (arm(lr=(0.01, 0.02, 0.03)),)), Store(tmp_path), fake, "command")
    assert record["arms"][0]["chosen"]["at_edge"] == ["lr"]


def test_diverged_points_are_never_chosen(tmp_path: Path) -> None:
    fake = Fake(lambda run: None if run.optimizer.lr > 0.015 else 3.0)
    record = run_study(Study("s", "S", (arm(lr=(0.01, 0.02, 0.03)),)), Store(tmp_path), fake, "command")
    assert record["arms"][0]["chosen"]["values"] == {"lr": 0.01}
    nothing = run_study(Study("t", "T", (arm(lr=(0.02, 0.03)),)), Store(tmp_path), Fake(lambda _: None), "command")
    assert nothing["arms"][0]["chosen"] == {"values": {}, "validation_loss": None, "at_edge": []}
    assert nothing["arms"][0]["no_winner"] == "all 2 trials diverged"


def test_unequal_budgets_are_refused() -> None:
    with pytest.raises(UserError, match="unequal tuning budgets"):
        Study("s", "S", (arm("a", lr=(0.1, 0.2)), arm("b", lr=(0.1, 0.2, 0.3))))


def test_arms_of_an_earlier_call_are_kept(tmp_path: Path) -> None:
    fake, store = Fake(lambda _: 1.0), Store(tmp_path)
    run_study(Study("s", "S", (arm("a"), arm("b"))), store, fake, "first")
    record = run_study(Study("s", "S", (arm("b"), arm("c"))), store, fake, "second")
    assert [(a["name"], a["command"]) for a in record["arms"]] == [("a", "first"), ("b", "second"), ("c", "second")]


def test_logspace_gives_the_papers_grid() -> None:
    assert logspace(-4, -3, 4) == (0.0001, 0.000215443, 0.000464159, 0.001)


PUBLISHED = """
forward  nn        sgd      0.000464 1e-5 0     0    0      50  0.332
backprop nn        sgd      0.1      0    0     0    0      50  0.000
forward  nn        nesterov 0.000320 1e-5 0.367 0    0      50  0.270
backprop nn        nesterov 0.1      0    0.5   0    0      50  0.000
forward  nn        adam     0.0005   5e-5 0     0.99 0.999  50  0.283
backprop nn        adam     0.0001   0    0     0.9  0.999  50  0.000
forward  cnn       sgd      0.000398 1e-5 0     0    0      50  0.548
backprop cnn       sgd      0.1      0    0     0    0      50  0.000
forward  cnn       nesterov 0.0001   1e-4 0.9   0    0      50  0.559
backprop cnn       nesterov 0.01     0    0.783 0    0      50  0.000
forward  cnn       adam     0.00025  1e-4 0     0.9  0.9999 50  0.669
backprop cnn       adam     0.000236 0    0     0.9  0.999  50  0.000
forward  cifar-cnn sgd      0.000433 1e-6 0     0    0      100 6.955
backprop cifar-cnn sgd      0.01     1e-4 0     0    0      100 1.685
"""


def test_table1_is_the_papers() -> None:
    rows = [line.split() for line in PUBLISHED.strip().splitlines()]
    assert len(rows) == len(paper.TABLE1) == 14
    for row, (kind, model, name, *numbers) in zip(paper.TABLE1, rows, strict=True):
        lr, decay, momentum, beta1, beta2, epochs, loss = map(float, numbers)
        optimizer = row.run.optimizer
        assert (row.kind, row.run.model, optimizer.name) == (kind, model, name)
        assert (optimizer.lr, optimizer.decay, optimizer.momentum) == (lr, decay, momentum)
        if name == "adam":
            assert (optimizer.beta1, optimizer.beta2) == (beta1, beta2)
        assert row.published is not None
        assert (row.run.epochs, row.published.epochs, row.published.test_loss) == (epochs, epochs, loss)
        assert row.run.batch_size == 64
        assert row.run.data == ("cifar10" if model == "cifar-cnn" else "mnist")
        clip = 1.0 if kind == "forward" and name != "adam" else None
        assert row.run.estimator.get("clip") == clip


def test_rows_are_chosen_by_number_and_by_name() -> None:
    names = lambda *rows: [a.name for a in paper.table1(list(rows)).arms]  # noqa: E731
    assert names("nn") == [a.name for a in paper.TABLE1[:6]]
    assert names("cnn") == [a.name for a in paper.TABLE1[6:12]]
    assert names("13", "nn-adam-backprop") == ["nn-adam-backprop", "cifar-cnn-sgd-forward"]
    for wrong in ("0", "15", "mlp", "n"):
        with pytest.raises(UserError, match="Table I"):
            names(wrong)


def test_a_search_gives_both_arms_the_same_number_of_points() -> None:
    study = paper.table1(retune=True)
    for arm in study.arms:
        assert study.budget(arm) >= 12
        assert arm.space == paper.grid(arm)
    assert {study.budget(a) for a in study.arms if a.run.model == "cifar-cnn"} == {12}
    assert paper.table1(["nn-sgd-forward"], retune=True).arms[0].space["lr"] == logspace(-4, -3, 4)


def test_shortening_changes_the_runs_and_not_what_was_published() -> None:
    (row,) = paper.table1(["13"], epochs=2).arms
    assert row.run.epochs == 2
    assert row.published == paper.Published(100, 6.955)


def test_baydin_uses_one_learning_rate_for_both_arms_and_tunes_them_alike() -> None:
    study = paper.baydin()
    arms = study.arms
    same, tuned = [a for a in arms if not a.space], [a for a in arms if a.space]
    assert len(same) == len(tuned) == 4
    assert {(a.run.optimizer.lr, a.run.optimizer.decay) for a in same} == {(2e-4, 1e-4)}
    assert {study.budget(a) for a in tuned} == {7}
    assert all(dataclasses.replace(a.run.optimizer, lr=1.0) == dataclasses.replace(same[0].run.optimizer, lr=1.0) for a in arms)
