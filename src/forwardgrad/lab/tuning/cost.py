"""Counts what a study will cost before it starts: a timed warm-up gives the pace of every arm, the planner gives the runs."""

from __future__ import annotations

import dataclasses
import functools
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from forwardgrad.estimators import Backprop
from forwardgrad.lab import environment
from forwardgrad.lab.data import Dataset, Split
from forwardgrad.lab.execution import Place
from forwardgrad.lab.studies import BACKWARD, FURTHER, Arm, Pace, Run
from forwardgrad.lab.training import Schedule, Training, builders, losses_on
from forwardgrad.lab.tuning.planner import Planner

WARM_UP = 3  # untimed steps
TIMED = 12  # steps whose median counts ...
LONGEST = 5.0  # ... or as many as begin within so many seconds, three at least
EXAMPLES = 1000  # that an evaluation is timed on, at most


def measure_pace(run: Run, device: str = "cpu", data_dir: Path | None = None, threads: int | None = None) -> Pace:
    """What a step of this run takes on this machine as it is now: seconds (the median of timed steps), forward passes (their mean).

    `threads` is how many a run will have. A backward pass counts as two forward passes.

    Raises UserError as training does.
    """
    on = environment.device(device)
    run = dataclasses.replace(run, steps=WARM_UP + TIMED)
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        return _measure(run, on, data_dir)
    finally:
        torch.set_num_threads(before)


def _measure(run: Run, on: torch.device, data_dir: Path | None) -> Pace:
    dataset = builders.dataset(run, on, data_dir)
    with torch.random.fork_rng([on.index or 0] if on.type == "cuda" else []):
        training = Training.begin(run, dataset, on, data_dir=data_dir)
        state = training.state
        training.advance(WARM_UP)
        seconds: list[float] = []
        passes, began = state.passes, time.perf_counter()
        while len(seconds) < TIMED and (len(seconds) < 3 or time.perf_counter() - began < LONGEST):
            start = time.perf_counter()
            training.advance(state.step + 1)
            seconds.append(time.perf_counter() - start)
        some = Split(dataset.validation.inputs[:EXAMPLES], dataset.validation.labels[:EXAMPLES])
        start = time.perf_counter()
        losses_on(training, some)
        evaluation = (time.perf_counter() - start) * 1000 / len(some)
    made = (state.passes - passes) / len(seconds) + (BACKWARD if isinstance(state.estimator, Backprop) else 0)
    return Pace(statistics.median(seconds), made, evaluation)


@dataclass(frozen=True)
class Cost:
    """What an arm of a study will take on one worker: runs, steps, seconds of trials and of final runs, forward passes.

    `further` trials come on top where spaces are widened.
    """

    arm: str
    trials: int
    finals: int
    steps: int
    tuning: float
    training: float
    forward_passes: float
    further: int = 0
    further_seconds: float = 0.0


def costs(planner: Planner, data_dir: Path | None = None) -> list[Cost]:
    """The cost of every arm, from the pace of its runs. A pace is measured for each setting that changes what a step costs.

    Where points are not known beforehand, and for final runs, the arm's own run stands for all.
    """

    @functools.cache
    def sizes(name: str) -> tuple[Dataset, int, int]:
        dataset = builders.dataset(next(arm.run for arm in planner.study.arms if arm.run.data == name), torch.device("cpu"), data_dir)
        return dataset, len(dataset.validation), len(dataset.test)

    return [_cost(planner, arm, sizes) for arm in planner.study.arms]


def _cost(planner: Planner, arm: Arm, sizes: Callable[[str], tuple[Dataset, int, int]]) -> Cost:
    study = planner.study
    points = study.points(arm) or [{} for _ in range(study.budget(arm))]
    trials = [run for _, run in planner.trials(arm, points)]
    finals = planner.finals(arm, {})
    tuning, training = (_sum(planner, runs, sizes) for runs in (trials, finals))
    further = study.widen * FURTHER if trials else 0
    more = _sum(planner, trials[:1] * further, sizes)[1]
    steps, passes = tuning[0] + training[0], tuning[2] + training[2]
    return Cost(arm.name, len(trials), len(finals), steps, tuning[1], training[1], passes, further, more)


def _sum(planner: Planner, runs: Iterable[Run], sizes: Callable[[str], tuple[Dataset, int, int]]) -> tuple[int, float, float]:
    steps, seconds, passes = 0, 0.0, 0.0
    for run in runs:
        dataset, validation, test = sizes(run.data)
        pace, schedule = planner.pace(run), Schedule.of(run, len(dataset.train))
        examples = (len(schedule.evaluations) + 1) * validation + (test if run.test else 0)
        steps += schedule.total
        seconds += schedule.total * pace.seconds + examples / 1000 * pace.evaluation
        passes += schedule.total * pace.forward_passes
    return steps, seconds, passes


def cost_table(found: list[Cost], place: Place) -> str:
    """The costs in plain text, and how long all of it takes: first the trials, then the final runs, as many at a time as fit."""
    head = ("arm", "trials", "final runs", "steps", "forward passes", "time")
    rows = [(c.arm, str(c.trials), str(c.finals), f"{c.steps:,}", f"{c.forward_passes:,.0f}", clock(c.tuning + c.training)) for c in found]
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    lines = [
        "  ".join(cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True)))
        for row in (head, *rows)
    ]
    trials, finals = sum(c.trials for c in found), sum(c.finals for c in found)
    tuning, training = sum(c.tuning for c in found), sum(c.training for c in found)
    lasts = tuning / place.at_a_time(trials) + training / place.at_a_time(finals)
    most = place.at_a_time(max(trials, finals))
    lines.append(f"{trials + finals} runs, {clock(tuning + training)} of work: about {clock(lasts)} with {most} at a time")
    if more := sum(c.further_seconds for c in found):
        further = sum(c.further for c in found)
        longer = clock(more / place.at_a_time(further))
        lines.append(f"up to {further} further trials where a winner lies on the edge of its space: {longer} more")
    return "\n".join(lines)


def clock(seconds: float) -> str:
    """A duration for people.

    >>> clock(42.2), clock(125), clock(7300)
    ('42 s', '2 min 5 s', '2 h 1 min')
    """
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
