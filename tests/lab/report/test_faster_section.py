"""The report on the race against the clock, from stores made up for it: thresholds, times, ratios, the claim, and what forbids one."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from tests.support.stored import put, reported, row

from forwardgrad.lab.recipes.faster import faster
from forwardgrad.lab.report import document
from forwardgrad.lab.store.files import read_json, write_json, write_table
from forwardgrad.lab.store.run_files import read_result, write_result
from forwardgrad.lab.store.store import Store
from forwardgrad.lab.studies.run import Run
from forwardgrad.lab.tuning.campaign import run_study

NN = "NN · MNIST"
TABLE = "Time to the threshold"
LOCAL = "local losses with learned feedback"
CLAIM = "Local losses with learned feedback reach backpropagation's accuracy"
STEPS = 1000
Paced = Callable[[Run], tuple[float, float]]  # the milliseconds of a run's step, and the validation accuracy that it ends at


def raced(store: Store, paced: Paced, *, changed: Callable[[Run], dict[str, Any]] = lambda _: {}, **options: Any) -> None:
    """A race on the NN whose runs gain in accuracy evenly, from none at all to that of their end, seen every 100 of 1,000 steps."""

    def execute(runs: Sequence[Run]) -> dict[str, Any]:
        for run in runs:
            pace, end = paced(run)
            put(store, run, 0.1, steps=STEPS, accuracy=end)
            folder = store.folder(run.identity)
            rows = [[step, step / 200, step * pace / 1000, 0.5, end * step / STEPS] for step in range(100, STEPS + 1, 100)]
            header = ["step", "epoch", "seconds", "validation_loss", "validation_accuracy"]
            write_table(folder / "evaluations.csv", header, rows)
            result = {**(read_result(folder) or {}), "seconds": STEPS * pace / 1000, "compile_seconds": 7.0, **changed(run)}
            write_result(folder, result)
        return {run.identity: store.result(run.identity) for run in runs}

    for study in faster(["nn"], **options):
        run_study(study, store, execute, "forwardgrad reproduce faster --rows nn")


def paces(backprop: float, local: float, ends: float = 0.98) -> Paced:
    """A millisecond more for every seed, in both arms."""
    return lambda run: ((backprop if run.estimator["name"] == "backprop" else local) + run.seed, ends)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "out")


def test_the_time_to_the_threshold_is_that_of_the_first_evaluation_there(store: Store) -> None:
    raced(store, paces(20, 10))
    text = reported(store)
    group = f"{NN}: threshold 98.00 %"  # which steps of 9.8 % see at the end alone
    backprop, local, ratio = (row(text, TABLE, group, arm) for arm in ("backpropagation", LOCAL, "local losses / backpropagation"))
    assert backprop["seconds to it"] == "22.5 s (20.0 s, 21.0 s, 22.0 s, 23.0 s, 24.0 s, 25.0 s)"
    assert local["steps to it"] == "1,000 (1,000, 1,000, 1,000, 1,000, 1,000, 1,000; within 100)"
    assert (local["arrived"], local["compiling"]) == ("6 of 6", "7.00 s")
    ratios = sorted(one / other for one in range(10, 16) for other in range(20, 26))
    low, high = ratios[5], ratios[30]  # six and six: U ≤ 5 is the critical value at 5 % in any table
    assert ratio["seconds to it"] == f"{12.5 / 22.5:.3f} × (95 % interval {low:.3f} to {high:.3f})"
    assert ratio["steps to it"] == "1.00 × (95 % interval 1.00 to 1.00)"
    assert ratio["test accuracy"] == "+0.00 points (+0.00 to +0.00, n = 6)"


def test_the_section_opens_with_its_figure_and_then_says_what_it_comes_to(store: Store) -> None:
    raced(store, paces(20, 10))
    document.write(store)
    text = (store.root / "report.md").read_text()
    section = text[text.index("## Time to backpropagation's accuracy") :].splitlines()
    assert section[2].startswith("![Validation accuracy against training time, NN · MNIST: every run of both arms.")
    assert section[6].startswith(f"- {NN}: {LOCAL} come to 98 % of the validation split, in 0.556 times the time (95 % interval")
    page = (store.root / "report.html").read_text()
    assert '<figure id="faster-race"' in page
    assert (store.root / "figures" / "faster-race.svg").exists()


def test_runs_of_every_seed_are_drawn_with_the_threshold(store: Store) -> None:
    raced(store, paces(20, 10))
    document.write(store)
    svg = (store.root / "figures" / "faster-race.svg").read_text()
    lines = re.findall(r"stroke: (#[0-9a-fA-F]{6}); stroke-opacity: 0.75", svg)
    assert (lines.count("#0072b2"), lines.count("#009e73")) == (6, 6)


@pytest.mark.parametrize(
    ("local", "status"), [(10, "confirmed"), (18, "not decided by this budget"), (30, "refuted")], ids=["sooner", "about the goal", "later"]
)
def test_the_claim_is_decided_by_its_interval(store: Store, local: float, status: str) -> None:
    raced(store, paces(20, local))
    text = reported(store)
    assert f"- **{status}**: Local losses with learned feedback reach backpropagation's accuracy in at most 0.8 of the time: {NN}" in text
    assert ("- What would decide it: `forwardgrad reproduce faster --rows nn`" in text) == (status == "not decided by this budget")


def test_a_run_that_never_arrives_takes_for_ever(store: Store) -> None:
    raced(store, lambda run: (10.0, 0.97 if run.estimator["name"] == "local" and run.seed < 4 else 0.98))
    text = reported(store)
    local = row(text, TABLE, f"{NN}: threshold 98.00 %", LOCAL)
    assert local["arrived"] == "2 of 6"
    assert local["seconds to it"] == "not reached (never, never, never, never, 10.0 s, 10.0 s)"
    assert f"{NN}: 2 of 6 runs of {LOCAL} come to 98 % of the validation split" in text
    assert "**confirmed**" not in text


def test_a_run_that_was_lost_takes_for_ever_in_either_arm(store: Store) -> None:
    gone = {"status": "diverged", "reason": "the loss was not finite", "diverged_at": STEPS}
    raced(store, paces(20, 10), changed=lambda run: gone if run.test and run.seed == 2 and run.estimator["name"] == "backprop" else {})
    backprop = row(reported(store), TABLE, f"{NN}: threshold 98.00 %", "backpropagation")
    assert (backprop["arrived"], backprop["seconds to it"]) == ("5 of 6", "23.5 s (20.0 s, 21.0 s, never, 23.0 s, 24.0 s, 25.0 s)")


def test_arms_that_race_to_different_accuracies_are_not_compared(store: Store) -> None:
    raced(store, paces(20, 10))
    path = store.root / "studies" / "faster.json"
    record = read_json(path) or {}
    record["arms"][1]["target"] = 0.97
    write_json(path, record)
    text = reported(store)
    assert f"{NN}: not decided yet" in text
    assert f"**confirmed**: {CLAIM} in at most" not in text


def test_the_second_finish_is_just_below_where_backpropagation_ends(store: Store) -> None:
    """Backpropagation ends at 0.981, so 0.979 is the finish, which runs of either arm see at their last step."""
    raced(store, lambda run: (20.0, 0.981) if run.estimator["name"] == "backprop" else (20.0, 1.0))
    text = reported(store)
    group = f"{NN}: threshold 97.90 %, 0.2 points below the mean at which backpropagation ends"
    backprop, local, ratio = (row(text, TABLE, group, arm) for arm in ("backpropagation", LOCAL, "local losses / backpropagation"))
    assert (backprop["arrived"], backprop["steps to it"][:5], local["steps to it"][:5]) == ("6 of 6", "1,000", "1,000")
    assert ratio["seconds to it"] == "1.00 × (95 % interval 1.00 to 1.00)"
    assert f"**refuted**: {CLAIM} less 0.2 points in at most 0.8 of the time: {NN}" in text


def test_each_arm_says_what_it_chose(store: Store) -> None:
    """The seconds of a trial grow with its epochs and fall with its batch, and one rate is best for each arm."""
    best = {"backprop": 1e-3, "local": 2e-3}

    def paced(run: Run) -> tuple[float, float]:
        good = run.optimizer.lr == best[run.estimator["name"]] and run.epochs > 2
        return 10.0 * run.epochs * 64 / run.batch_size, 0.99 if good else 0.975

    raced(store, paced)
    group = f"{NN}: threshold 98.00 %"
    chosen = [row(reported(store), TABLE, group, arm)["chosen"] for arm in ("backpropagation", LOCAL)]
    assert chosen == ["0.001 (on the edge of its grid) (3 epochs, batches of 256)", "0.002 (3 epochs, batches of 256)"]


def test_where_backpropagation_does_not_arrive_no_ratio_is_made_of_it(store: Store) -> None:
    raced(store, lambda run: (10.0, 0.97 if run.estimator["name"] == "backprop" and run.seed < 4 else 0.98))
    text = reported(store)
    assert "and half of backpropagation's runs or more never do (95 % interval" in text
    ratio = row(text, TABLE, f"{NN}: threshold 98.00 %", "local losses / backpropagation")
    assert ratio["seconds to it"].startswith("not reached by backpropagation (")
    assert "in 0 times" not in text


UNFAIR = [
    ({"replicas": 6}, "shared by 6 runs at once"),
    ({"fallback": "a module has hooks"}, "steps were not compiled (a module has hooks)"),
]


@pytest.mark.parametrize(("field", "words"), UNFAIR, ids=["one program", "eager steps"])
def test_seconds_that_say_nothing_decide_nothing(store: Store, field: dict[str, Any], words: str) -> None:
    raced(store, paces(20, 10), changed=lambda run: field if run.estimator["name"] == "local" else {})
    text = reported(store)
    assert f"Not comparable: {LOCAL}: {words}." in text
    assert "**confirmed**" not in text


def test_seconds_of_different_machines_decide_nothing(store: Store) -> None:
    raced(store, paces(20, 10))
    for path in store.root.glob("runs/*/environment.json"):
        if (read_json(path.with_name("run.json")) or {})["estimator"]["name"] == "local":
            write_json(path, {**(read_json(path) or {}), "threads": 8})
            write_result(path.parent, read_result(path.parent) or {})
    text = reported(store)
    assert "Not comparable: different threads." in text
    assert "**confirmed**" not in text


def test_three_seeds_give_ninety_per_cent_and_decide_nothing(store: Store) -> None:
    raced(store, paces(20, 10), seeds=3)
    text = reported(store)
    ratio = row(text, TABLE, f"{NN}: threshold 98.00 %", "local losses / backpropagation")
    assert ratio["seconds to it"] == f"{11 / 21:.3f} × (least to greatest of all pairs: a 90 % interval {10 / 22:.3f} to {12 / 20:.3f})"
    assert "3 and 3 runs give an interval of at most 90 %: 4 runs an arm are needed." in text


def test_short_runs_show_a_ratio_and_decide_nothing(store: Store) -> None:
    raced(store, paces(20, 10), small=True)
    text = reported(store)
    assert "The runs are too short (shortened: 1 of 2 epochs)." in text
    assert "in 0.556 times the time (95 % interval" in text
