"""Studies carried out: equal budgets in whatever unit, widening, adaptive sampling, and a record that is there before the first run."""

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from tests.lab.studies.test_study import Fake, arm
from tests.support.stored import put

from forwardgrad.lab.errors import UserError
from forwardgrad.lab.store.files import write_table
from forwardgrad.lab.store.run_files import write_result
from forwardgrad.lab.store.schema import read_study
from forwardgrad.lab.store.store import Store
from forwardgrad.lab.studies.length import Length, Pace, paced_alike
from forwardgrad.lab.studies.run import Optimizer, Run
from forwardgrad.lab.studies.space import LogUniform, Range, Whole
from forwardgrad.lab.studies.study import Study, check
from forwardgrad.lab.tuning.campaign import run_study

RATES = {"lr": LogUniform(1e-3, 1.0)}


def near(best: float) -> Fake:
    """The validation loss grows with the distance of the rate from the best one, in decades."""
    return Fake(lambda run: abs(math.log10(run.optimizer.lr / best)))


def test_every_arm_is_tried_at_as_many_points_of_its_range(tmp_path: Path) -> None:
    fake = near(0.03)
    arms = (arm("a", **RATES), arm("b", **RATES, momentum=(0.0, 0.5, 0.9)), arm("fixed"))
    record = run_study(Study("s", "S", arms, 2, trials=7, sampler="halton"), Store(tmp_path), fake, "command")
    trials, finals = fake.calls
    assert len(trials) == len({run.identity for run in trials}) == 14
    assert len(finals) == 6
    first, second, fixed = record["arms"]
    assert [len(each["trials"]) for each in (first, second, fixed)] == [7, 7, 0]
    assert first["budget"] == second["budget"] == {"trials": 7, "epochs": 10}
    assert first["space"] == {"lr": {"low": 1e-3, "high": 1.0, "log": True}}
    assert first["sampler"] == "halton"
    assert "budget" not in fixed
    best = min(first["trials"], key=lambda trial: abs(math.log10(trial["values"]["lr"] / 0.03)))
    assert first["chosen"]["values"] == best["values"]
    assert read_study(tmp_path / "studies" / "s.json") == record


def test_the_record_is_there_before_the_first_run_and_between_the_phases(tmp_path: Path) -> None:
    store, seen = Store(tmp_path), []

    def execute(runs: Sequence[Run]) -> dict[str, dict[str, Any]]:
        seen.append(read_study(tmp_path / "studies" / "s.json"))
        return Fake(lambda _: 1.0)(runs)

    run_study(Study("s", "S", (arm(lr=(0.1, 0.2, 0.3)),), 4), store, execute, "command")
    planned, tuned = (record["arms"][0] for record in seen)
    assert (len(planned["trials"]), planned["runs"], planned["chosen"]["values"], seen[0]["seeds"]) == (3, [], {}, 4)
    assert (len(tuned["runs"]), tuned["chosen"]["values"]) == (4, {"lr": 0.1})


def test_an_arm_whose_best_lies_beyond_its_space_finds_it_and_the_others_get_as_many_trials(tmp_path: Path) -> None:
    fake = near(50.0)
    inside = dataclasses.replace(arm("inside"), space={"lr": (10.0, 50.0)})
    beyond = dataclasses.replace(arm("beyond"), space={"lr": (0.1, 1.0)})
    elsewhere = dataclasses.replace(arm("elsewhere"), space={"lr": (25.0, 50.0, 100.0)}, group="another")
    record = run_study(Study("s", "S", (inside, beyond, elsewhere), widen=2), Store(tmp_path), fake, "c")
    by_name = {each["name"]: each for each in record["arms"]}
    assert by_name["beyond"]["chosen"]["values"] == {"lr": 100.0}
    assert by_name["beyond"]["chosen"]["at_edge"] == []  # 1000 was tried in the second round
    assert [len(by_name[name]["trials"]) for name in ("inside", "beyond", "elsewhere")] == [6, 6, 3]
    assert by_name["inside"]["budget"]["trials"] == 6


def test_a_winner_still_on_the_edge_is_flagged_and_impossible_values_are_not_tried(tmp_path: Path) -> None:
    fake = Fake(lambda run: -run.optimizer.momentum)
    study = Study("s", "S", (arm(momentum=(0.5, 0.8)),), widen=3)
    (found,) = run_study(study, Store(tmp_path), fake, "c")["arms"]
    assert found["chosen"]["at_edge"] == ["momentum"]
    values = [trial["values"]["momentum"] for trial in found["trials"]]
    assert len(values) == len(set(values)) == 8  # two further ones a round
    assert max(values) == found["chosen"]["values"]["momentum"] < 1  # 1.28, a stride beyond 0.8, is no momentum


def test_widening_tries_only_what_the_estimator_takes_and_keeps_whole_numbers_whole(tmp_path: Path) -> None:
    forward = dataclasses.replace(arm().run, estimator={"name": "forward"})
    fake = Fake(lambda run: -float(run.estimator["tangents"]) if run.estimator["tangents"] < 40 else 0.0)
    wide = dataclasses.replace(arm("w"), run=forward, space={"estimator.tangents": (8, 16, 32)})
    (found,) = run_study(Study("s", "S", (wide,), widen=1), Store(tmp_path), fake, "c")["arms"]
    assert [trial["values"]["estimator.tangents"] for trial in found["trials"]] == [8, 16, 32, 64, 128]
    clipped = dataclasses.replace(arm("c"), run=forward, space={"estimator.clip": Range(0.1, 1.0)})
    small = Fake(lambda run: run.estimator["clip"])
    (found,) = run_study(Study("t", "T", (clipped,), trials=8, sampler="halton", widen=1), Store(tmp_path), small, "c")["arms"]
    assert len(found["trials"]) == 10
    assert all(trial["values"]["estimator.clip"] > 0 for trial in found["trials"])


def test_where_one_arm_cannot_be_widened_no_arm_gets_more_trials(tmp_path: Path) -> None:
    words = dataclasses.replace(arm("words"), space={"anneal": (True, False)})
    record = run_study(Study("s", "S", (arm("rates", lr=(0.1, 1.0)), words), widen=2), Store(tmp_path), near(50.0), "c")
    assert [len(each["trials"]) for each in record["arms"]] == [2, 2]
    assert record["arms"][0]["chosen"]["at_edge"] == ["lr"]


def test_seconds_and_forward_passes_become_steps_by_the_pace_of_each_arm_measured_once(tmp_path: Path) -> None:
    slow = dataclasses.replace(arm("slow", lr=(0.1, 0.2)), run=dataclasses.replace(arm().run, estimator={"name": "forward"}))
    arms = (arm("quick", lr=(0.1, 0.2)), slow)
    asked: list[Run] = []

    def pace(run: Run) -> Pace:
        asked.append(run)
        return Pace(0.01, 3) if run.estimator["name"] == "backprop" else Pace(0.04, 2)

    fake = Fake(lambda _: 1.0)
    study = Study("s", "S", arms, 2, Length(seconds=1.0), Length(forward_passes=600))
    record = run_study(study, Store(tmp_path), fake, "command", pace=pace)
    trials, finals = fake.calls
    assert [run.steps for run in trials] == [100, 100, 25, 25]
    assert [(run.seed, run.steps) for run in finals] == [(0, 200), (0, 300), (1, 200), (1, 300)]  # a seed of every arm, then the next
    assert len(asked) == 2
    assert record["arms"][0]["budget"] == {"trials": 2, "seconds": 1.0}
    again = Fake(lambda _: 1.0)
    run_study(study, Store(tmp_path), again, "command", pace=lambda run: pytest.fail("measured again"))
    assert [[run.identity for run in runs] for runs in again.calls] == [[run.identity for run in runs] for runs in fake.calls]


def test_numbers_of_an_optimizer_change_no_pace_and_what_adds_work_does() -> None:
    def paced(**options: Any) -> str:
        return paced_alike(dataclasses.replace(arm().run, optimizer=Optimizer(**{"name": "mine:Optimizer", "lr": 0.1, **options})))

    assert paced(options={"beta": 0.5, "fast": True}) == paced(options={"beta": 0.9, "fast": True}, lr=0.2)
    others = [paced(options={"beta": 0.5, "fast": False}), paced(cap=0.1), paced(weight_decay=0.1), paced()]
    assert len({paced(options={"beta": 0.5, "fast": True}), *others}) == 5


def test_hyperparameters_of_the_run_and_the_estimator_can_be_searched(tmp_path: Path) -> None:
    forward = dataclasses.replace(arm().run, estimator={"name": "forward"})
    wide = dataclasses.replace(arm("w"), run=forward, space={"estimator.tangents": (1, 2), "batch_size": (16, 32)})
    fake = Fake(lambda run: run.batch_size / run.estimator["tangents"])
    (found,) = run_study(Study("s", "S", (wide,)), Store(tmp_path), fake, "c")["arms"]
    assert found["chosen"]["values"] == {"estimator.tangents": 2, "batch_size": 16}
    assert {run.batch_size for run in fake.calls[1]} == {16}
    assert len({paced_alike(run) for run in fake.calls[0]}) == 4


@pytest.mark.parametrize(
    "wrong",
    [
        {"rate": (1, 2)},
        {"seed": (1, 2)},
        {"estimators.tangents": (1, 2)},
        {"momentum": (0.5, 1.5)},
        {"lr": ()},
        {"lr": ([0.1], [0.2])},
        {"lr": (0.1, 2.0), "weight_decay": (0.0, 0.6)},
    ],
)
def test_a_space_of_what_there_is_not_is_refused_before_anything_runs(wrong: dict[str, Any]) -> None:
    with pytest.raises(
        UserError, match=r"no hyperparameter is called|momentum must lie|has no value|give numbers|the weight decay must be"
    ):
        check(Study("s", "S", (dataclasses.replace(arm(), space=wrong),)))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"seeds": 0}, "the number of seeds must be a whole number and at least 1"),
        ({"trials": 0}, "the number of trials must be a whole number and at least 1"),
        ({"seeds": "3"}, "must be a whole number and at least 1, not '3'"),
        ({"seeds": True}, "must be a whole number"),
        ({"tuning": 20}, r"tuning is a length, such as Length\(epochs=2\), not 20"),
        ({"trials": 3}, "a grid is tried as a whole"),
        ({"widen": -1}, "rounds of widening must be a whole number and at least 0"),
        ({"sampler": "sobol"}, "unknown sampler 'sobol'"),
        ({"sampler": "halton"}, "say how many trials"),
        ({"name": "../up"}, "the name of a study"),
        ({"arms": ()}, "there is no arm"),
    ],
)
def test_a_study_that_is_none_is_refused(change: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        dataclasses.replace(Study("s", "S", (arm(),)), **change)


@pytest.mark.parametrize("given", [{}, {"epochs": 1, "steps": 2}, {"seconds": 0}, {"steps": -1}, {"seconds": float("inf")}])
def test_a_length_that_is_none_is_refused(given: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="length"):
        Length(**given)


def test_optuna_is_asked_for_every_point_and_asks_the_same_again(tmp_path: Path) -> None:
    import optuna

    space = {"lr": LogUniform(1e-3, 1.0), "momentum": (0.0, 0.9), "batch_size": Whole(8, 64, log=True)}
    arms = (dataclasses.replace(arm("a"), space=space), dataclasses.replace(arm("b"), space=space))
    study = Study("s", "S", arms, 2, trials=18, sampler="optuna")
    fake = near(0.03)
    record = run_study(study, Store(tmp_path), fake, "command")
    assert [len(each["trials"]) for each in record["arms"]] == [18, 18]
    assert [len(runs) for runs in fake.calls] == [8, 8, 8, 8, 4, 4]  # four an arm at a time, then the final runs
    assert record["arms"][0]["chosen"]["validation_loss"] < 0.2
    again = near(0.03)
    assert run_study(study, Store(tmp_path), again, "command") == record
    storage = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(str(tmp_path / "studies" / "s.journal")))
    kept = optuna.load_study(study_name="s/a", storage=storage)
    assert len(kept.trials) == 18
    assert kept.best_value == record["arms"][0]["chosen"]["validation_loss"]


def test_points_where_optuna_sees_a_run_diverge_are_told_as_failed(tmp_path: Path) -> None:
    import optuna

    fake = Fake(lambda run: None if run.optimizer.lr > 0.1 else run.optimizer.lr)
    study = Study("s", "S", (dataclasses.replace(arm(), space=RATES),), trials=12, sampler="optuna")
    record = run_study(study, Store(tmp_path), fake, "command")
    assert record["arms"][0]["chosen"]["values"]["lr"] <= 0.1
    storage = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(str(tmp_path / "studies" / "s.journal")))
    states = [trial.state.name for trial in optuna.load_study(study_name="s/a", storage=storage).trials]
    assert set(states) == {"COMPLETE", "FAIL"}


def test_the_stored_record_is_plain_json(tmp_path: Path) -> None:
    run_study(Study("s", "S", (arm("a", **RATES),), trials=3, sampler="halton"), Store(tmp_path), near(0.1), "c")
    assert json.loads((tmp_path / "studies" / "s.json").read_text())["arms"][0]["name"] == "a"


@pytest.mark.parametrize("sampler", ["grid", "optuna"])
def test_trials_are_chosen_by_what_the_study_compares(tmp_path: Path, sampler: Any) -> None:
    """Loss, accuracy and time each have another winner; of equal accuracies the lesser loss decides."""
    # loss, accuracy at the end, seconds to 0.9 (the run of 0.4 never comes there, and that of 0.1 not with the margin)
    ends = {0.1: (0.5, 0.901, 1.0), 0.2: (0.9, 0.95, 3.0), 0.3: (0.8, 0.95, 4.0), 0.35: (1.0, 0.93, 2.0), 0.4: (0.6, 0.89, 9.0)}

    def chosen(by: Any, **options: Any) -> tuple[float, Any]:
        store = Store(tmp_path / by)

        def execute(runs: Sequence[Run]) -> dict[str, dict[str, Any]]:
            for run in runs:
                loss, accuracy, seconds = ends[run.optimizer.lr]
                put(store, run, loss, accuracy=accuracy)
                rows = [[1, 1, seconds / 2, loss, 0.5], [2, 2, seconds, loss, accuracy], [3, 3, 9 * seconds, loss, accuracy]]
                header = ["step", "epoch", "seconds", "validation_loss", "validation_accuracy"]
                write_table(store.folder(run.identity) / "evaluations.csv", header, rows)
                write_result(store.folder(run.identity), store.result(run.identity) or {})
            return {run.identity: store.result(run.identity) or {} for run in runs}

        trials = 16 if sampler == "optuna" else None
        study = Study("s", "S", (arm(lr=tuple(ends)),), 1, trials=trials, sampler=sampler, chosen_by=by, **options)
        run_study(study, store, execute, "command")
        (found,) = read_study(store.root / "studies" / "s.json")["arms"]
        return found["chosen"]["values"]["lr"], found.get("chosen_by")

    assert chosen("loss") == (0.1, None)
    assert chosen("accuracy") == (0.3, "accuracy")
    assert chosen("time", target=0.9, margin=0.01) == (0.35, "time")


def test_time_needs_a_target_and_a_target_time() -> None:
    with pytest.raises(UserError, match=r"way to choose a trial.*loss, accuracy, time"):
        Study("s", "S", (arm(lr=(0.1,)),), chosen_by="end")  # type: ignore[arg-type]
    for options in ({"chosen_by": "time"}, {"target": 0.9}):
        with pytest.raises(UserError, match="give both, or none"):
            Study("s", "S", (arm(lr=(0.1,)),), **options)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="a share of the validation split"):
        Study("s", "S", (arm(lr=(0.1,)),), chosen_by="time", target=98.0)
