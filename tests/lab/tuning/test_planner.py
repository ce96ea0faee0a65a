"""The runs of a study, planned: the same for carrying it out and for counting its cost."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from tests.lab.studies.test_study import Fake, arm

from forwardgrad.lab.errors import UserError
from forwardgrad.lab.store.store import Store
from forwardgrad.lab.studies.length import Length, Pace
from forwardgrad.lab.studies.run import Run
from forwardgrad.lab.studies.study import Study
from forwardgrad.lab.tuning import campaign, cost
from forwardgrad.lab.tuning.planner import Planner

TIMED = Study("s", "S", (arm("a", lr=(0.1, 0.2)),), seeds=3, tuning=Length(seconds=2.0), training=Length(forward_passes=60))


def test_a_pace_is_measured_once_and_what_a_record_has_not_again(tmp_path: Path) -> None:
    asked: list[Run] = []

    def measure(run: Run) -> Pace:
        asked.append(run)
        return Pace(0.1, 3)

    store = Store(tmp_path)
    campaign.run_study(TIMED, store, Fake(lambda run: run.optimizer.lr), "command", pace=measure)
    assert len(asked) == 1
    planner = Planner(TIMED, store, measure)
    assert [run.steps for _, run in planner.trials(TIMED.arms[0], [{"lr": 0.1}, {"lr": 0.2}])] == [20, 20]
    assert [(run.seed, run.steps) for run in planner.finals(TIMED.arms[0], {"lr": 0.1})] == [(0, 20), (1, 20), (2, 20)]
    assert len(asked) == 1


def test_what_is_counted_is_what_is_carried_out(tmp_path: Path) -> None:
    ran: list[Run] = []

    def execute(runs: Sequence[Run]) -> dict[str, dict[str, Any]]:
        ran.extend(runs)
        return Fake(lambda run: run.optimizer.lr)(runs)

    pace = lambda run: Pace(0.1, 3)  # noqa: E731
    (counted,) = cost.costs(Planner(TIMED, Store(tmp_path / "counted"), pace))
    campaign.run_study(TIMED, Store(tmp_path / "run"), execute, "command", pace=pace)
    assert (counted.trials, counted.finals) == (2, 3)
    assert counted.trials + counted.finals == len(ran)
    assert counted.steps == sum(run.steps or 0 for run in ran)


def test_a_study_with_a_mistake_is_not_planned(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no hyperparameter is called 'rate'"):
        Planner(Study("s", "S", (arm("a", rate=(0.1, 0.2)),)), Store(tmp_path))
