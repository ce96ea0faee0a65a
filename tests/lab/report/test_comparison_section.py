"""The comparison of arms in a report, from stores made up for it: verdicts, tables and figures of any number of arms."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path

import pytest
from tests.support.stored import put, record, reported, row, seeds, tried

from forwardgrad.lab.recipes import paper
from forwardgrad.lab.report import figures
from forwardgrad.lab.report.blocks.tables import Table
from forwardgrad.lab.report.figures.drawing import Drawing
from forwardgrad.lab.report.sections import comparison, comparison_verdict
from forwardgrad.lab.report.sections.studies import Picture
from forwardgrad.lab.store import results
from forwardgrad.lab.store.files import read_json, write_json
from forwardgrad.lab.store.results import StudyResult
from forwardgrad.lab.store.run_files import write_result
from forwardgrad.lab.store.schema import read_study
from forwardgrad.lab.store.store import Store
from forwardgrad.lab.studies.study import Study

GROUP = "MLP · digits · SGD"
LOST = None
Losses = Sequence[float | None]


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    monkeypatch.setattr(figures, "curves", lambda name, rows, **_: Drawing(f'<svg id="{name}"></svg>', bytes))
    return Store(tmp_path / "out")


def three_arms(n: int, **changes: object) -> Study:
    """The demonstration's two arms, and a third of a user's own."""
    study = paper.demo(epochs=4, seeds=n)
    forward, backprop = study.arms
    run = dataclasses.replace(forward.run, estimator={**forward.run.estimator, "tangents": 3})
    mine = dataclasses.replace(forward, name="digits-mine", kind="mine", label="my estimator", run=run)
    return dataclasses.replace(study, name="own", title="A study of one's own", arms=(forward, backprop, mine), **changes)


def trained(store: Store, study: Study, *losses: Losses) -> StudyResult:
    """The study with these test losses, arm by arm and seed by seed; None is a run that diverged. Accuracies are 1 − loss/10."""
    record(store, study)
    for arm, row_ in zip(study.arms, losses, strict=True):
        for run, loss in zip(seeds(arm, len(row_)), row_, strict=True):
            lost = "the loss is not finite" if loss is None else None
            put(store, run, loss, diverged=lost, accuracy=0.1 if loss is None else 1 - loss / 10)
    return next(found for found in results.studies(store) if found.name == study.name)


def searched(store: Store, study: Study, *losses: Losses) -> None:
    """Trials with these validation losses, arm by arm; None is one that diverged."""
    for arm, row_ in zip(study.arms, losses, strict=True):
        for (_, run), loss in zip(tried(study, arm), row_, strict=False):
            put(store, run, loss, diverged="the loss is not finite" if loss is None else None)


FORWARD = [0.40, 0.42, 0.41, 0.44, 0.43, 0.45, 0.46]
BACKPROP = [0.20, 0.21, 0.24, 0.22, 0.23, 0.25, 0.20]
MINE = [0.30, 0.31, 0.33, 0.36, 0.30, 0.38, 0.32]


def test_seven_seeds_decide_between_three_arms(store: Store) -> None:
    found = trained(store, three_arms(7), FORWARD, BACKPROP, MINE)
    (said,) = comparison_verdict.verdicts(found)
    # mean gap to the runner-up 0.3286 − 0.2214 = 0.107; every seed the same way: p = 2/2⁷, and Holm over three pairs makes 3·2/2⁷ = 0.047
    assert said.startswith(
        f"{GROUP}: backpropagation has the lowest mean test loss, 0.221. It lies 0.107 below my estimator (95 % interval"
    )
    assert said.endswith(": decided (p = 0.047 by Holm, lower in 100 % of all pairs of runs).")
    cells = row(reported(store), "Arms beside one another", GROUP, "my estimator")
    assert (cells["arm"], cells["p"], cells["p by Holm"]) == ("backpropagation", "0.016 (n = 7, least 0.016)", "0.047 (3 comparisons)")
    assert cells["decided"] == "decided"


def test_the_best_arm_is_set_beside_backpropagation_too(store: Store) -> None:
    (said,) = comparison_verdict.verdicts(trained(store, three_arms(7), MINE, FORWARD, BACKPROP))
    assert "my estimator has the lowest mean test loss" in said
    assert "It lies 0.107 below forward gradient" in said  # the runner-up
    assert "It lies 0.209 below backpropagation" in said  # 0.4300 − 0.2214


def test_few_seeds_decide_nothing_and_say_how_many_would(store: Store) -> None:
    found = trained(store, three_arms(3), FORWARD[:3], BACKPROP[:3], MINE[:3])
    (said,) = comparison_verdict.verdicts(found)
    assert "too narrow at so few seeds): not decided by this budget, because 3 shared seeds give no p below 0.75 in 3 comparisons" in said
    assert "and it takes 7 (p = 0.75 by Holm" in said
    loss = row(reported(store), "Test loss and accuracy over seeds", GROUP, "my estimator")["loss, mean"]
    assert loss.startswith("0.313 (")
    assert loss.endswith("n = 3: too narrow)")


def test_an_interval_that_spans_zero_decides_nothing(store: Store) -> None:
    alike = [0.21, 0.20, 0.22, 0.24, 0.24, 0.23, 0.22]
    (said,) = comparison_verdict.verdicts(trained(store, three_arms(7), FORWARD, BACKPROP, alike))
    assert "not decided by this budget, because the interval of the difference spans zero" in said


def test_one_seed_decides_nothing_and_has_no_tables_of_spread(store: Store) -> None:
    found = trained(store, three_arms(1), FORWARD[:1], BACKPROP[:1], MINE[:1])
    (said,) = comparison_verdict.verdicts(found)
    assert said.endswith("It lies 0.100 below my estimator: not decided by this budget, because one seed says nothing of spread.")
    assert comparison.typical(found) is None
    assert comparison.times_to_targets(found) == []


def test_lost_runs_count_as_infinitely_bad(store: Store) -> None:
    found = trained(store, three_arms(7), FORWARD, BACKPROP, [LOST, 0.01, 0.01, LOST, 0.01, 0.01, 0.01])
    (said,) = comparison_verdict.verdicts(found)
    assert "backpropagation has the lowest mean test loss" in said  # though five of the third arm's runs end far lower
    cells = row(reported(store), "Test loss and accuracy over seeds", GROUP, "my estimator")
    assert cells["lost"] == "2 of 7"
    assert cells["loss, mean"] == "not finite (a loss is not finite, no interval)"
    assert cells["loss, median"] == "0.0100 (0.0100 to ∞, n = 7)"
    assert cells["accuracy, mean"].startswith("not finite")
    assert cells["accuracy, median"] == "99.90 % (0.00 to 99.90 %, n = 7)"
    pair = next(pair for pair in comparison_verdict.pairs(found.arms) if {pair.first.kind, pair.second.kind} == {"backprop", "mine"})
    assert (pair.first.kind, pair.test.statistic, pair.lost, pair.lead.value) == ("backprop", "signed ranks", (0, 2), math.inf)
    assert pair.ahead.value == pytest.approx(2 / 7)
    assert pair.undecided


def test_arms_that_all_lost_runs_are_ranked_by_how_many(store: Store) -> None:
    some, more = [LOST, *BACKPROP[1:]], [LOST, LOST, LOST, *MINE[3:]]
    (said,) = comparison_verdict.verdicts(trained(store, three_arms(7), more, some, [LOST] * 7))
    assert "every arm lost runs; backpropagation lost the fewest, its median being 0.230. It lost 1 run, forward gradient 3 of 7" in said
    (said,) = comparison_verdict.verdicts(trained(store, three_arms(2), *[[LOST, 0.1]] * 3))
    assert said.endswith("half of the runs or more of every arm diverged or failed, so none is best.")


def test_a_failed_run_without_files_counts_as_lost(store: Store) -> None:
    study = three_arms(2)
    trained(store, study, FORWARD[:2], BACKPROP[:2], MINE[:2])
    folder = store.folder(seeds(study.arms[1], 2)[1].identity)
    for path in folder.iterdir():
        if path.name != "run.json":
            path.unlink()
    nothing = dict.fromkeys(("diverged_at", "validation_loss", "validation_accuracy", "test"))
    counts = {"steps": 0, "epochs": 0.0, "parameters": 0, "seconds": 0.0}
    failed = {"status": "failed", "reason": "out of memory", **nothing, **counts}
    write_result(folder, failed)
    (found,) = results.studies(store)
    (said,) = comparison_verdict.verdicts(found)
    assert "my estimator has the lowest mean test loss" in said
    assert "It lost no run, backpropagation 1 of 2" in said
    (table,) = comparison.times_to_targets(found)
    assert [cell.text for cell in table.groups[0][1][1]][:2] == ["backpropagation", "not reached"]


def test_unfair_and_unfinished_arms_are_named(store: Store) -> None:
    study = three_arms(2)
    longer = dataclasses.replace(study.arms[1], run=dataclasses.replace(study.arms[1].run, epochs=9))
    study = dataclasses.replace(study, arms=(study.arms[0], longer, study.arms[2]))
    found = trained(store, study, FORWARD[:2], BACKPROP[:2], MINE[:2])
    (said,) = comparison_verdict.verdicts(found)
    assert "It is not comparable with my estimator (different epochs). It is not comparable" not in said
    assert said.endswith("It is not comparable with my estimator (different epochs).")
    (store.folder(seeds(longer, 2)[0].identity) / "result.json").unlink()
    (found,) = results.studies(store)
    assert "my estimator has the lowest mean test loss" in comparison_verdict.verdicts(found)[0]
    empty = dataclasses.replace(found, arms=found.arms[:1])
    assert comparison_verdict.verdicts(empty) == [f"{GROUP}: only one arm is finished, so nothing is compared yet."]


def test_what_was_searched_over_may_differ(store: Store) -> None:
    study = three_arms(2)
    larger = dataclasses.replace(study.arms[1], run=dataclasses.replace(study.arms[1].run, batch_size=64))
    found = trained(store, dataclasses.replace(study, arms=(study.arms[0], larger, study.arms[2])), FORWARD[:2], BACKPROP[:2], MINE[:2])
    assert comparison_verdict.unequal(found.arms[0], found.arms[1]) == ["batch size"]
    found.arms[1].record["space"] = {"batch_size": [32, 64]}
    assert comparison_verdict.unequal(found.arms[0], found.arms[1]) == []


def test_of_many_pairs_those_with_the_best_and_with_backpropagation_are_shown(store: Store) -> None:
    study = three_arms(2)
    mine = study.arms[2]
    further = [dataclasses.replace(mine, name=f"mine-{i}", kind=f"mine-{i}", label=f"mine {i}",
                                   run=dataclasses.replace(mine.run, estimator={**mine.run.estimator, "tangents": 4 + i}))
               for i in range(3)]  # fmt: skip
    losses = [[0.1 * i, 0.1 * i + 0.01] for i in range(1, 7)]
    found = trained(store, dataclasses.replace(study, arms=(*study.arms, *further)), *losses)
    table = comparison.paired({GROUP: comparison_verdict.pairs(found.arms)})
    assert table is not None
    shown = table.groups[0][1]
    assert len(shown) == 9  # 5 with the best, 4 more with backpropagation, of 15
    assert all(cells[0].text == "forward gradient" or "backpropagation" in (cells[0].text, cells[1].text) for cells in shown)
    assert {cells[4].sub for cells in shown} == {"15 comparisons"}


def test_targets_have_intervals_and_misses_are_infinite(store: Store) -> None:
    trained(store, three_arms(7), FORWARD, BACKPROP, [0.3] * 5 + [LOST] * 2)
    text = reported(store)
    forward = row(text, "Steps and seconds to a loss on digits", GROUP, "forward gradient")
    assert forward["to loss 0.5"] == "400 steps [400 to 400] (800 ms [800 to 800 ms])"  # 0.4 + 1.9/2⁴ > 0.5 after 200 steps
    assert forward["to loss 0.3"] == "not reached"
    assert "to loss 0.1" not in forward  # which no arm reached
    mine = row(text, "Steps and seconds to a loss on digits", GROUP, "my estimator")
    assert mine["to loss 0.5"] == "200 steps [200 to ∞] (400 ms [400 ms to ∞], by 5 of 7 runs)"


def test_the_search_is_told_with_its_lost_trials(store: Store) -> None:
    study = three_arms(1)
    trained(store, study, *[[0.3]] * 3)
    searched(store, study, [0.5, 0.44, 0.4, 0.42, LOST], [0.9, 0.5, 0.3, 0.25, 0.2], [LOST, 0.4, LOST, LOST])
    text = reported(store)
    forward = row(text, "What the search bought", GROUP, "forward gradient")
    assert (forward["trials"], forward["lost"]) == ("5", "1")
    # 0.4 at 0.01 and, within 1.2 times it, 0.44 and 0.42 on either side: half a decade each way
    assert (forward["good rates"], forward["width"]) == ("0.00316 to 0.0316 (best 0.0100)", "1.00 (of 5 rates)")
    # medians, because the group lost trials: of one trial 0.44, as (2/5) ≤ ½; of five 0.4, as (4/5)⁵ ≤ ½
    assert forward["best of 1"].startswith("0.440 (0.400 to ")
    assert forward["best of all"].startswith("0.400 (")
    mine = row(text, "What the search bought", GROUP, "my estimator")
    assert (mine["trials"], mine["lost"]) == ("5 (1 unfinished)", "3")
    assert mine["best of 1"].startswith("not finite")
    backprop = row(text, "What the search bought", GROUP, "backpropagation")
    assert backprop["width"] == "no other rate (at least, of 5 rates)"


def test_a_trial_that_was_lost_counts_so_whatever_it_measured(store: Store) -> None:
    study = three_arms(1)
    trained(store, study, *[[0.3]] * 3)
    searched(store, study, *[[0.5, 0.4, 0.3]] * 3)
    put(store, tried(study, study.arms[0])[1][1], 0.01, diverged="the loss stayed above 46.1 for 500 steps")
    forward = row(reported(store), "What the search bought", GROUP, "forward gradient")
    assert (forward["lost"], forward["good rates"]) == ("1", "0.0100")
    assert forward["best of all"].startswith("0.300 (")


def test_searched_rates_that_are_no_numbers_are_left_out(store: Store) -> None:
    study = three_arms(1)
    trained(store, study, *[[0.3]] * 3)
    searched(store, study, *[[0.5, 0.4, 0.3, 0.4, 0.5]] * 3)
    path = store.root / "studies" / "own.json"
    stored = read_study(path)
    for trial, values in zip(stored["arms"][0]["trials"], ({"lr": "0.1"}, {"lr": True}, {}, {"lr": 0}, {"lr": 0.02}), strict=True):
        trial["values"] = values
    stored["arms"][0]["space"] = {"lr": {"low": 0.001, "high": 0.1, "log": True}}
    write_json(path, stored)
    (found,) = results.studies(store)
    table = comparison.searched({GROUP: comparison.searches(found.arms)})
    assert table is not None
    assert [cell.text for cell in table.groups[0][1][0]][-2:] == ["0.0200", "no other rate"]


def test_figures_show_bands_and_lost_trials(tmp_path: Path) -> None:
    store = Store(tmp_path / "out")
    study = three_arms(1)
    trained(store, study, *[[0.3]] * 3)
    searched(store, study, [0.5, 0.44, 0.4, 0.42, LOST], [0.9, 0.5, 0.3, 0.25, 0.2], [LOST] * 5)
    (found,) = results.studies(store)
    pictures = {block.name: block for block in comparison.blocks(found) if isinstance(block, Picture)}
    assert set(pictures) == {"own-0-budget", "own-0-rates"}
    assert "median, because trials were lost" in pictures["own-0-budget"].caption
    again = {block.name: block for block in comparison.blocks(found) if isinstance(block, Picture)}
    assert {name: picture.drawing.svg for name, picture in again.items()} == {name: each.drawing.svg for name, each in pictures.items()}
    for picture in pictures.values():
        assert "nan" not in picture.drawing.svg.lower()
        assert len(picture.drawing.svg) < 100_000


def test_a_profile_needs_three_tasks_with_the_same_arms(store: Store) -> None:
    study = paper.table1(rows=["nn"], epochs=1, seeds=2)  # three optimizers, two arms each
    # 0.29 + 2.01/2⁴ > 0.3 after 200 steps and 0.29 + 2.01/2⁸ < 0.3 after 400; 0.1 + 2.2/2⁴ = 0.24 after 200
    found = trained(store, study, *[[0.29, 0.29], [0.1, 0.1]] * 2, [0.9, 0.9], [0.9, 0.9])
    profiles = comparison.profiles(found)
    assert set(profiles) == {"steps", "seconds"}
    assert profiles["steps"]["backprop"].share == (1.0,)
    # on the first two tasks the target is 0.3, for which the first arm takes twice as long; on the third both reach 1.0 at once
    assert profiles["steps"]["forward"].share == (1 / 3, 1.0)
    assert profiles["steps"]["forward"].within == (1.0, 2.0)
    assert profiles["steps"]["forward"].score == pytest.approx((1 + 2 * 2 / 3) / 3)
    two = dataclasses.replace(found, arms=found.arms[:4])
    assert comparison.profiles(two) == {}
    assert "1 being the fastest everywhere: in steps: forward gradient 0.778, backpropagation 1.00; in seconds" in reported(store)


def test_seconds_that_runs_shared_are_no_profile(store: Store) -> None:
    study = paper.table1(rows=["nn"], epochs=1, seeds=1)
    trained(store, study, *[[0.2]] * 6)
    path = store.folder(study.arms[0].run.identity) / "result.json"
    write_json(path, {**(read_json(path) or {}), "replicas": 2})
    (found,) = results.studies(store)
    assert set(comparison.profiles(found)) == {"steps"}


def test_a_study_without_the_paper_s_arms_is_headed_by_its_verdict(store: Store) -> None:
    study = three_arms(7)
    found = trained(store, dataclasses.replace(study, arms=study.arms[1:]), BACKPROP, MINE)
    (said,) = comparison_verdict.verdicts(found)
    text = reported(store)
    assert f"- **A study of one's own.** {said}" in text
    assert text.count(said) == 2  # in the list of verdicts, and once in its own part
    assert "No fair comparison" not in text
    trained(store, study, FORWARD, BACKPROP, MINE)
    text = reported(store)
    assert (
        text.index("Backpropagation reached the lower test loss") < text.index("has the lowest mean test loss") < text.index("### Results")
    )


def test_the_verdict_comes_first_and_the_tables_after_it(store: Store) -> None:
    found = trained(store, three_arms(2), FORWARD[:2], BACKPROP[:2], MINE[:2])
    said, *blocks = comparison.blocks(found)
    assert said == tuple(comparison_verdict.verdicts(found))
    assert len(said) == 1
    assert [block.caption for block in blocks if isinstance(block, Table)] == [
        "Test loss and accuracy over seeds", "Arms beside one another, over shared seeds", "Steps and seconds to a loss on digits",
    ]  # fmt: skip
