"""The study of the paper's explosion, and its report from a store made up for it: runs that walk, explode, or are held."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from tests.support import stored
from tests.support.stored import put, reported, row

from forwardgrad.estimators import from_config
from forwardgrad.lab.errors import UserError
from forwardgrad.lab.recipes import noise
from forwardgrad.lab.recipes import paper as recipes
from forwardgrad.lab.recipes.noise import EPOCHS, LABELS
from forwardgrad.lab.report import document, figures
from forwardgrad.lab.statistics import walk
from forwardgrad.lab.store.files import write_table
from forwardgrad.lab.store.run_files import read_result, write_result
from forwardgrad.lab.store.store import Store
from forwardgrad.lab.studies.run import Run
from forwardgrad.lab.tuning.campaign import run_study

GROUP, TABLE = "CNN · CIFAR-10 · SGD", "The walk of the parameters"


def test_the_papers_rate_is_the_papers_own_run() -> None:
    (paper,) = noise.noise(["paper-x1"]).arms
    (row13,) = recipes.table1(["13"]).arms
    assert paper.run.identity == row13.run.identity


def test_rows_are_the_usual_ones_or_those_named() -> None:
    names = lambda rows: [arm.name for arm in noise.noise(rows).arms]  # noqa: E731
    assert names(None) == ["paper-x5", "paper-x10", "weight-decay-x10", "anneal-x10", "cap-x10", "low-rank-x10"]
    assert names(["cap", "cap-x1"]) == ["cap-x1", "cap-x10"]
    assert names(["paper"]) == ["paper-x5", "paper-x10"]
    with pytest.raises(UserError, match="no row 'x10' on noise: choose from paper-x1, "):
        noise.noise(["x10"])


def test_every_arm_is_the_papers_row_but_for_its_rate_and_its_remedy() -> None:
    every = [f"{remedy}-x{factor}" for remedy in LABELS for factor in EPOCHS]
    for arm in noise.noise(every).arms:
        remedy, factor = arm.name.rsplit("-x", 1)
        options = arm.run.optimizer
        from_config(arm.run.estimator)
        assert arm.run.estimator["clip"] == 1.0
        assert options.lr == pytest.approx(0.000433 * int(factor))
        assert (options.weight_decay > 0, options.anneal, options.cap is not None) == (
            remedy == "weight-decay",
            remedy == "anneal",
            remedy == "cap",
        )
        assert (arm.run.estimator.get("perturb") == "low-rank") == (remedy == "low-rank")
        if options.cap:
            assert 1.25 < math.exp(arm.run.epochs * 625 * options.cap**2 / 2) < 1.35


def walked(store: Store, rows: list[str], exploding: Sequence[str], seeds: int = 1) -> None:
    """A study of noise whose runs take 1,250 steps with |d| = 0.5; those of `exploding` leave 2.3 at step 301 and explode at step 401."""
    study = noise.noise(rows, seeds=seeds)
    names = {run.optimizer: arm.name for arm in study.arms for run in [arm.run]}

    def execute(runs: Sequence[Run]) -> dict[str, Any]:
        for run in runs:
            put(store, run, 2.3, steps=1250, accuracy=0.1)
            folder = store.folder(run.identity)
            stored = read_result(folder) or {}
            explodes = names[run.optimizer] in exploding
            loss = [2.5 if 300 < step <= 400 else 50.0 if step > 400 else 2.3 for step in range(1, 1251)] if explodes else [2.3] * 1250
            write_table(folder / "losses.csv.gz", ["step", "loss", "derivative"], ([i + 1, v, 0.5] for i, v in enumerate(loss)))
            growth = walk.growth([0.5] * 1250, run.optimizer, clip=1.0, parameters=17_967_690, norm=40.85, planned=1250)
            seen = [[step, 1.01 * growth[step - 1], 0.01] for step in range(100, 1201, 100)]
            write_table(folder / "walk.csv", ["step", "norm_growth", "relative_step"], seen)
            write_result(folder, {**stored, "parameters": 17_967_690, "initial_norm": 40.85})
        return {run.identity: store.result(run.identity) for run in runs}

    run_study(study, store, execute, "forwardgrad reproduce noise")


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "out")


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Figures without drawing: what would have been drawn."""
    drawn: list[Any] = []
    monkeypatch.setattr(figures, "curves", lambda name, rows, **_: drawn.append(rows) or stored.undrawn(name, rows))
    return drawn


def test_an_explosion_is_timed_and_its_walk_compared(store: Store, undrawn: list[Any]) -> None:
    walked(store, ["paper-x10"], exploding=["paper-x10"])
    text = reported(store)
    cells = row(text, TABLE, GROUP, "the paper's, rate × 10")
    assert cells["left 2.3"] == "306"  # the mean of 20 is more than 0.05 off with six at 2.5
    assert cells["exploded"] == "401"  # one loss of 50 among 20
    assert cells["expected"] == "400 (1/100 of the paper's)"
    rates = walk.rates(noise.noise(["paper-x10"]).arms[0].run.optimizer, 1200, 1250)
    told = math.sqrt(1 + 17_967_690 * sum((rate * 0.5 / 40.85) ** 2 for rate in rates))
    assert cells["norm, a random walk's"] == f"{told:.3g}"
    assert cells["norm, measured"] == f"{1.01 * told:.3g}"
    assert "At 10 times the paper's learning rate the loss left 2.3 at step 306 and exploded at step 401; " in text
    assert "does so after 400." in text
    assert "(at most 1.00 % apart)" in text
    (norms,), (losses,) = undrawn[0], undrawn[1]
    line, dots = norms[0].lines
    assert (line.computed, dots.computed) == (False, True)
    assert line.curve.at[0] == pytest.approx(100 * 100, rel=1e-3)  # 100 steps at ten times the rate: 10,000 of the paper's
    assert losses[0].lines[0].curve.at[-1] == pytest.approx(1250 * 100, rel=0.01)


@pytest.mark.usefixtures("undrawn")
def test_remedies_are_told_apart_by_whether_they_held(store: Store) -> None:
    walked(store, ["weight-decay-x10", "cap-x10", "anneal-x10"], exploding=["anneal-x10"])
    text = reported(store)
    assert "Without an explosion: weight decay, rate × 10 (norm × " in text
    assert "Exploded all the same: annealed to zero, rate × 10 (norm × " in text
    assert row(text, TABLE, GROUP, "capped steps, rate × 10")["exploded"] == "never"
    assert "no better than guessing" in text


@pytest.mark.usefixtures("undrawn")
def test_a_run_that_kept_no_walk_has_a_row_without_it(store: Store) -> None:
    walked(store, ["paper-x10"], exploding=["paper-x10"])
    for path in store.root.glob("runs/*/walk.csv"):
        path.unlink()
        write_table(path.parent / "losses.csv.gz", ["step", "loss"], [[1, 2.3], [2, 2.3]])
        write_result(path.parent, read_result(path.parent) or {})
    cells = row(reported(store), TABLE, GROUP, "the paper's, rate × 10")
    assert (cells["norm, measured"], cells["norm, a random walk's"], cells["exploded"]) == ("–", "–", "never")


@pytest.mark.usefixtures("undrawn")
def test_a_study_that_has_only_begun_is_reported(store: Store) -> None:
    run_study(noise.noise(["paper"]), store, lambda runs: {}, "forwardgrad reproduce noise")
    text = reported(store)
    assert "No arm is finished yet." in text
    assert row(text, TABLE, GROUP, "the paper's, rate × 10")["exploded"] == "–"


@pytest.mark.usefixtures("undrawn")
def test_fewer_epochs_than_the_whole_walk_count_as_shortened(store: Store) -> None:
    begun = noise.noise(["paper-x10"], epochs=1)
    run_study(begun, store, lambda runs: {}, "command")
    put(store, begun.arms[0].run, 2.3, steps=625)
    assert "(shortened: 1 of 2 epochs)" in row(reported(store), TABLE, GROUP, "the paper's, rate × 10")["steps"]


def test_norms_and_losses_are_drawn(store: Store) -> None:
    walked(store, ["paper-x5", "paper-x10", "cap"], exploding=["paper-x10"])
    document.write(store)
    page = (store.root / "report.html").read_text()
    assert '<figure id="noise-norm" data-read>' in page
    assert '<figure id="noise-loss" data-read>' in page
