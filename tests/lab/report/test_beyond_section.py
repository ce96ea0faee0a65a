"""The report on what goes beyond the paper, from stores made up for it: rows, gaps to backpropagation, goals met and missed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from tests.support.stored import put, record, reported, row, seeds, undrawn

from forwardgrad.lab.recipes import paper
from forwardgrad.lab.recipes.beyond import beyond
from forwardgrad.lab.report import document, figures
from forwardgrad.lab.report.figures import plots
from forwardgrad.lab.store.files import read_json, write_json
from forwardgrad.lab.store.store import Store
from forwardgrad.lab.studies.run import Precision, Run
from forwardgrad.lab.tuning.campaign import run_study

NN, CIFAR = "NN · MNIST", "CNN · CIFAR-10"
Reached = Callable[[Run], float]  # the test accuracy of a run


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    monkeypatch.setattr(figures, "curves", undrawn)
    return Store(tmp_path / "out")


def trained(store: Store, rows: list[str], reached: Reached, precision: Precision = "float32", **options: Any) -> None:
    """A study beyond the paper whose runs take 1,000 steps, all loss 0.1 and the accuracy that `reached` says."""

    def execute(runs: Sequence[Run]) -> dict[str, Any]:
        for run in runs:
            put(store, run, 0.1, steps=1000, accuracy=reached(run))
            path = store.folder(run.identity) / "result.json"
            write_json(path, {**(read_json(path) or {}), "forward_passes": 2000, "peak_bytes": 5_000_000})
        return {run.identity: store.result(run.identity) for run in runs}

    run_study(beyond(rows, **options).computed(precision), store, execute, "forwardgrad reproduce beyond")


def by_name(**accuracies: float) -> Reached:
    """An accuracy for each estimator; seed s has s tenths of a point more, whatever the arm."""
    return lambda run: accuracies[run.estimator["name"].replace("-", "_")] + run.seed / 1000


def test_an_arm_has_a_row_with_its_gap_and_what_it_took(store: Store) -> None:
    trained(store, ["nn-backprop", "nn-feedback", "nn-fixed-feedback"], by_name(backprop=0.98, feedback=0.979, fixed_feedback=0.97))
    text = reported(store)
    feedback = row(text, f"{NN}: every arm", NN, "learned feedback (feedback(rule=lms, use=direct))")
    assert feedback["test accuracy"] == "98.00 % (97.75 to 98.25 %, n = 3)"
    assert feedback["test loss"] == "0.100 (0.100 to 0.100, n = 3)"
    assert feedback["gap"] == "\N{MINUS SIGN}0.10 (\N{MINUS SIGN}0.10 to \N{MINUS SIGN}0.10, n = 3)"  # paired: what seeds share drops out
    assert feedback["steps"] == "1,000 (2,000 passes)"
    assert feedback["training time"] == "2.00 s (2.00 ms a step)"
    assert feedback["peak memory"] == "5.00 MB"
    assert (feedback["forward-only"], feedback["epochs"], feedback["outcome"]) == ("yes", "5", "finished")
    backprop = row(text, f"{NN}: every arm", NN, "backpropagation (backprop)")
    assert (backprop["gap"], backprop["forward-only"]) == ("–", "no")


def test_the_best_comes_first(store: Store) -> None:
    trained(store, ["nn-readout", "nn-feedback", "nn-backprop"], by_name(backprop=0.98, feedback=0.95, readout=0.96))
    text = reported(store)
    table = text[text.index(f"### {NN}: every arm") :]
    assert sorted(("last layer alone (", "learned feedback (", "backpropagation ("), key=table.index) == [
        "backpropagation (",
        "last layer alone (",
        "learned feedback (",
    ]


def test_goals_are_met_or_missed_by_the_best_arm_without_a_backward_pass(store: Store) -> None:
    trained(store, ["nn-backprop", "nn-feedback", "nn-readout", "nn-linear"], by_name(backprop=0.98, feedback=0.9785, readout=0.9))
    text = reported(store)
    assert f"{NN}: the best arm without a backward pass is learned feedback, 97.95 % of the test split, 0.15 points below" in text
    assert "backpropagation's 98.10 %. Goal, at most 0.2 points below in at most 10 epochs: met. " in text
    assert "0.41, in at most a twentieth of its 39,100 steps: met, seen after 200." in text


def test_a_missed_goal_is_said(store: Store) -> None:
    trained(store, ["cifar-cnn-backprop", "cifar-cnn-local"], by_name(backprop=0.75, local=0.71), epochs=4)
    text = reported(store)
    best = f"{CIFAR}: the best arm without a backward pass is local losses with learned feedback, 71.10 % of the test split"
    assert f"{best} (shortened: 4 of 30 epochs), " in text
    assert "Goal, at most 5 points below: met. Goal, at least 70.0 %: met." in text
    trained(store, ["cifar-cnn-local"], by_name(local=0.69), epochs=4)
    text = reported(store)
    assert "Goal, at most 5 points below: missed. Goal, at least 70.0 %: missed." in text


def test_arms_on_other_terms_are_not_compared(store: Store) -> None:
    trained(store, ["nn-backprop"], by_name(backprop=0.98))
    trained(store, ["nn-feedback"], by_name(feedback=0.97), epochs=4)
    text = reported(store)
    assert (
        row(text, f"{NN}: every arm", NN, "learned feedback (feedback(rule=lms, use=direct))")["gap"] == "not comparable (different epochs)"
    )
    assert "it is not comparable with backpropagation (different epochs), so the goals are not decided." in text
    assert "1 of 2 arms trained for fewer epochs than the full study's (shortened: 4 of 5 epochs)" in text


def test_arms_of_other_precision_are_not_compared(store: Store) -> None:
    trained(store, ["nn-backprop"], by_name(backprop=0.98))
    trained(store, ["nn-readout"], by_name(readout=0.9), precision="bfloat16")
    found = row(reported(store), f"{NN}: every arm", NN, "last layer alone (readout)")
    assert found["gap"] == "not comparable (different precision)"
    assert found["learning rate"].endswith("(bfloat16, on the edge of its grid)")


def test_a_backpropagation_still_missing_decides_nothing(store: Store) -> None:
    trained(store, ["nn-feedback"], by_name(feedback=0.97))
    assert "97.10 % of the test split; backpropagation is not finished, so the goals are not decided." in reported(store)


def test_pairs_are_of_the_seeds_that_both_have(store: Store) -> None:
    trained(store, ["nn-backprop"], by_name(backprop=0.98), seeds=3)
    trained(store, ["nn-feedback"], by_name(feedback=0.97), seeds=1)
    text = reported(store)
    gap = row(text, f"{NN}: every arm", NN, "learned feedback (feedback(rule=lms, use=direct))")["gap"]
    assert gap == "\N{MINUS SIGN}1.00 (n = 1, no interval)"


def test_runs_that_did_not_count_memory_have_none(store: Store) -> None:
    trained(store, ["nn-backprop"], by_name(backprop=0.98), seeds=1)
    for path in store.root.glob("runs/*/result.json"):
        write_json(path, {name: value for name, value in (read_json(path) or {}).items() if name not in ("peak_bytes", "forward_passes")})
    cells = row(reported(store), f"{NN}: every arm", NN, "backpropagation (backprop)")
    assert (cells["peak memory"], cells["steps"]) == ("–", "1,000 (passes not counted)")


def test_the_papers_rows_stand_below_as_published_and_as_trained_here(store: Store) -> None:
    trained(store, ["nn-backprop"], by_name(backprop=0.98), seeds=1)
    study = paper.table1(rows=["1"], epochs=2)
    record(store, study)
    put(store, seeds(study.arms[0], 1)[0], 0.4)
    text = reported(store)
    name = "forward gradient, SGD (forward(tangents=1, law=gaussian, clip=1.0, chunk_size=none))"
    published = row(text, f"{NN}: every arm", "Table I as published", name)
    assert (published["test loss"], published["epochs"], published["forward-only"]) == ("0.332 (last 16 images)", "50", "yes")
    ours = row(text, f"{NN}: every arm", "Table I as trained here", name)
    assert (ours["test loss"], ours["test accuracy"]) == ("0.400 (n = 1, no interval)", "90.00 % (n = 1, no interval)")
    assert ours["epochs"] == "2 (shortened: 2 of 50 epochs)"


def test_every_kind_of_arm_has_a_look_of_its_own_on_page_and_plot(tmp_path: Path) -> None:
    store = Store(tmp_path / "out")
    trained(store, ["nn"], lambda run: 0.9, seeds=1)
    document.write(store)
    page = (store.root / "report.html").read_text()
    kinds = {arm.kind for arm in beyond(["nn"]).arms}
    looks = plots.LOOKS | plots.FURTHER
    assert kinds <= looks.keys()
    assert len({(look["color"], str(look["linestyle"])) for look in looks.values()}) == len(looks)
    assert all(f'class="{kind} dot"' in page and f"td.{kind} {{ --dot: var(--" in page for kind in kinds)
    assert '<figure id="beyond-0"' in page
