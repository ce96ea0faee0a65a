"""When a run is looked at: counts of steps alone decide, by hand on small schedules."""

import dataclasses

import pytest

from forwardgrad.lab.studies.run import Optimizer, Run
from forwardgrad.lab.training.schedule import Schedule

RUN = Run("digits", "logistic", {"name": "backprop"}, Optimizer("sgd", 0.1), epochs=3)


def test_epochs_or_steps_say_how_long_a_run_is() -> None:
    assert Schedule.of(RUN, 1077) == Schedule(per_epoch=17, total=51)
    assert Schedule.of(Run("digits", "logistic", {"name": "backprop"}, Optimizer("sgd", 0.1), steps=20), 1077) == Schedule(17, 20)
    assert Schedule.of(dataclasses.replace(RUN, evaluate_every=5), 1077) == Schedule(17, 51, 5)


@pytest.mark.parametrize(
    ("schedule", "evaluations"),
    [
        (Schedule(17, 51), {17, 34, 51}),
        (Schedule(17, 40), {17, 34, 40}),
        (Schedule(300, 600), {50, 100, 200, 300, 600}),
        (Schedule(300, 70), {50, 70}),
        (Schedule(1, 250), {*range(3, 250, 3), 250}),
        (Schedule(17, 50, 20), {20, 40, 50}),
        (Schedule(17, 40, 20), {20, 40}),
    ],
    ids=[
        "every epoch",
        "and the end",
        "early ones",
        "shorter than an epoch",
        "a hundred at most",
        "as the run says",
        "as the run says, once at the end",
    ],
)
def test_a_run_is_evaluated_early_after_epochs_and_at_its_end(schedule: Schedule, evaluations: set[int]) -> None:
    assert schedule.evaluations == evaluations


def test_every_step_that_is_looked_at_comes_and_no_other() -> None:
    schedule, step, looks = Schedule(130, 390), 0, []
    while step < schedule.total:
        step = schedule.next_look(step)
        looks.append(step)
    assert looks == [50, 100, 130, 200, 260, 300, 390]
    assert [look for look in looks if schedule.is_checked(look)] == [100, 200, 300, 390]


def test_late_steps_are_measured_more_seldom_but_at_every_evaluation() -> None:
    schedule = Schedule(1700, 3400)
    assert [step for step in range(900, 3401, 100) if schedule.is_measured(step)] == [900, 1000, 1500, 1700, 2000, 2500, 3000, 3400]


def test_epochs_follow_one_another() -> None:
    schedule = Schedule(17, 51)
    assert [schedule.epoch(step) for step in (0, 16, 17, 50)] == [0, 0, 1, 2]
    assert [schedule.end_of_epoch(step) for step in (0, 16, 17, 50)] == [17, 17, 34, 51]
