"""The part of a report on the race against the clock: accuracy against seconds, and the time to backpropagation's accuracy. No torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from forwardgrad.lab.report import figures
from forwardgrad.lab.report.blocks import (
    NONE,
    Block,
    Cell,
    Picture,
    Section,
    Table,
    arm_cells,
    count,
    duration,
    exact,
    failures,
    has_curve,
    number,
    percent,
    study_tables,
)
from forwardgrad.lab.report.claims import MINUS, goals, speed
from forwardgrad.lab.report.sections import learning
from forwardgrad.lab.statistics import TimeRatio, stats
from forwardgrad.lab.store import ArmResult, Done, StudyResult

MEANING = (
    ("arm", "what supplies the gradient; the last row sets local losses over backpropagation"),
    (
        "chosen",
        "learning rate of Adam, annealed to zero along a cosine, epochs and batch size: of as many trials in both arms the one that was "
        "at the threshold first, with a tenth of a point to spare",
    ),
    ("arrived", "runs whose validation accuracy was seen at the threshold, of all; one that never was, or was lost, takes for ever"),
    (
        "seconds, steps to it",
        "to the first evaluation at or above the threshold: median over seeds, below it every run. Last row: the ratio of the medians and "
        "the exact interval of the rank-sum test over seeds, which assumes that one arm's times are the other's times a factor",
    ),
    ("a step", "seconds of training over steps, mean over seeds and its 95 % t interval. Last row: where batches are of one size"),
    ("compiling", "seconds in which steps were compiled and compared with eager ones, which no other column counts: mean over seeds"),
    (
        "test accuracy",
        "over the whole test split at the end, mean over seeds and its 95 % t interval. Last row: points above or below, paired by seed",
    ),
)
HEADS = ("arm", "chosen", "arrived", "seconds to it", "steps to it", "a step", "compiling", "test accuracy", "outcome")
CLOCK = (
    "The clock counts the steps of training alone: no evaluation, no compiling, no loading. Runs that are trained at the same time slow "
    "one another; runs of one seed are trained one after another in both arms, with as many threads."
)


def faster_section(study: StudyResult) -> Section:
    """Opens with the figure; then what it comes to, the table, the claim on each network, and how the arms were tuned."""
    races, said = speed.races(study), speed.verdicts(study)
    blocks: list[Block] = []
    if any(run for race in races for arm in race.arms for run in arm.done):
        blocks.append(_picture(study.name, races))
    blocks += [
        tuple(said),
        CLOCK,
        Table(HEADS, tuple((_title(race), _rows(race)) for race in speed.all_races(study)), "Time to the threshold", MEANING),
    ]
    blocks.append(speed.judge(study))
    blocks += [table for table in (study_tables.tuning(study), failures.lost_runs(study)) if table]
    return Section(study.name, study.title, " ".join(said), tuple(blocks))


def _title(race: speed.Race) -> str:
    threshold = race.threshold
    if threshold is None:
        return race.title
    how = "" if race.slack is None else f", {100 * race.slack:g} points below the mean at which backpropagation ends"
    return f"{race.title}: threshold {percent(threshold)}{how}"


def _rows(race: speed.Race) -> tuple[tuple[Cell, ...], ...]:
    rows = [tuple(make(race, arm) for make in MAKERS) for arm in race.arms]
    seconds, steps = race.ratio("seconds"), race.ratio("step")
    if seconds is None or steps is None:
        return tuple(rows)
    note = Cell("local losses / backpropagation", f"not comparable: {race.unfair}" if race.unfair else "", "warn" if race.unfair else "")
    return (*rows, (note, NONE, NONE, _ratio(seconds), _ratio(steps), _step_ratio(race), NONE, _gap(race), NONE))


def _chosen(_: speed.Race, arm: ArmResult) -> Cell:
    if not arm.run:
        return NONE
    edge = "lr" in arm.record["chosen"]["at_edge"]
    rate = f"{exact(arm.run['optimizer']['lr'])}{' (on the edge of its grid)' if edge else ''}"
    return Cell(rate, f"{count(arm.run['epochs'], 'epoch')}, batches of {arm.run['batch_size']}", "warn" if edge else "")


def _arrived(race: speed.Race, arm: ArmResult) -> Cell:
    times = race.arrivals(arm, "seconds")
    there = sum(map(math.isfinite, times))
    return Cell(f"{there} of {len(times)}", tone="warn" if there < len(times) else "") if times else NONE


def _arrivals(column: str, words: Callable[[float], str]) -> Callable[[speed.Race, ArmResult], Cell]:
    def make(race: speed.Race, arm: ArmResult) -> Cell:
        times = race.arrivals(arm, column)
        if not times:
            return NONE
        each = ", ".join(words(time) if math.isfinite(time) else "never" for time in times)
        known = f"within {speed.spacing(arm.done):,.0f}" if column == "step" else arm.shared
        middle = stats.median(times)
        return Cell(words(middle) if math.isfinite(middle) else "not reached", "; ".join(filter(None, (each, known))))

    return make


def _compiling(_: speed.Race, arm: ArmResult) -> Cell:
    spent = [float(run.result["compile_seconds"]) for run in arm.done if "compile_seconds" in run.result]
    if why := speed.fallback(arm):
        return Cell("eager steps", why, "warn")
    return Cell(duration(sum(spent) / len(spent))) if spent else NONE


MAKERS: tuple[Callable[[speed.Race, ArmResult], Cell], ...] = (
    lambda _, arm: arm_cells.arm_cell(arm),
    _chosen,
    _arrived,
    _arrivals("seconds", lambda time: f"{number(time)} s"),
    _arrivals("step", lambda step: f"{step:,.0f}"),
    lambda _, arm: arm_cells.per_step(arm),
    _compiling,
    lambda _, arm: arm_cells.accuracy(arm),
    lambda _, arm: arm_cells.outcome(arm),
)  # one for each of HEADS


def _ratio(found: TimeRatio) -> Cell:
    value = f"{number(found.value)} ×" if math.isfinite(found.value) else "not reached"
    value = value if found.value else "not reached by backpropagation"
    return Cell(value, speed.interval_words(found), "" if found.decides else "warn")


def _step_ratio(race: speed.Race) -> Cell:
    if len({arm.run["batch_size"] for arm in race.arms}) > 1:
        return NONE
    means = [stats.estimate([run.seconds_per_step for run in arm.done]).mean for arm in race.arms]
    return Cell(f"{number(means[1] / means[0])} ×") if means[0] > 0 else NONE


def _gap(race: speed.Race) -> Cell:
    assert race.backprop is not None
    assert race.local is not None
    found = goals.gap(race.local, race.backprop)
    if found is None:
        return NONE
    ends = "no interval" if found.low is None or found.high is None else f"{found.low:+.2f} to {found.high:+.2f}, n = {found.n}"
    return Cell(f"{found.mean:+.2f} points".replace("-", MINUS), ends.replace("-", MINUS))


def _picture(name: str, races: Sequence[speed.Race]) -> Picture:
    tracks = [_track(race) for race in races]
    drawing = figures.race(f"{name}-race", tracks, xlabel="training time (seconds)", ylabel="validation accuracy (%)")
    caption = (
        f"Validation accuracy against training time, {', '.join(race.title for race in races)}: every run of both arms. Dashed: the "
        "threshold. Marks: the first evaluation there. The beginning lies below the frame. Compiling and evaluating are not in the time."
    )
    return Picture(f"{name}-race", drawing, caption)


def _track(race: speed.Race) -> figures.RacePanel:
    racers = tuple(_racer(race, arm) for arm in race.arms if any(map(_drawn, arm.done)))
    finish = race.threshold
    short = next((arm.shortened for arm in race.arms if arm.shortened), "") or ""
    return figures.RacePanel(race.title, racers, None if finish is None else 100 * finish, short if racers else "unfinished")


def _racer(race: speed.Race, arm: ArmResult) -> figures.Racer:
    drawn = [run for run in arm.done if _drawn(run)]
    curves = [(run.evaluations["seconds"], run.evaluations["step"], _percent(run)) for run in drawn]
    arrived = []
    for run in drawn if race.threshold is not None else ():
        at = speed.arrival(run, "seconds", race.threshold or 0.0)
        arrived += [(at, value) for place, value in zip(run.evaluations["seconds"], _percent(run), strict=True) if place == at]
    runs = tuple((at, heights) for at, _, heights in curves)
    return figures.Racer(arm.kind, arm.label, runs, tuple(arrived), learning.along(curves))


def _drawn(run: Done) -> bool:
    return has_curve(run) and bool(run.evaluations["step"])


def _percent(run: Done) -> list[float]:
    return [100 * accuracy for accuracy in run.evaluations["validation_accuracy"]]
