"""How soon local losses with learned feedback come to backpropagation's accuracy, from the study `faster`. Loads without torch."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

from forwardgrad.lab.report.blocks import Judged, Observation, count, duration, exact, has_curve, lost, number, percent
from forwardgrad.lab.report.claims import findings
from forwardgrad.lab.report.claims.evidence import status
from forwardgrad.lab.statistics import TimeRatio, fewest_a_side, stats, time_ratio
from forwardgrad.lab.store import ArmResult, Done, StudyResult

SHARE = 0.8  # of backpropagation's time
SLACK = 0.002  # of accuracy below where backpropagation ends
EQUAL_PLACES = ("device", "threads", "torch", "batched")  # what seconds of two runs have to share to be compared


@dataclass(frozen=True)
class Race:
    """The two arms of a network, one of them perhaps not there.

    They race to the target that the study gave, or with `slack` to so much below the mean accuracy at which backpropagation's own runs end.
    """

    title: str
    backprop: ArmResult | None
    local: ArmResult | None
    slack: float | None = None

    @property
    def arms(self) -> tuple[ArmResult, ...]:
        return tuple(arm for arm in (self.backprop, self.local) if arm is not None)

    @cached_property
    def threshold(self) -> float | None:
        """The validation accuracy that the arms race to; None where the arms have no target, or different ones, or nothing has ended."""
        if self.slack is not None:
            return None if self.ending is None else self.ending - self.slack
        targets = {arm.record.get("target") for arm in self.arms}
        return targets.pop() if len(targets) == 1 else None

    @cached_property
    def ending(self) -> float | None:
        """The mean validation accuracy at which backpropagation's runs end; None where one was lost, or there are none."""
        if self.backprop is None or not self.backprop.complete or any(lost(run) or not has_curve(run) for run in self.backprop.done):
            return None
        ends = [float(run.evaluations["validation_accuracy"][-1]) for run in self.backprop.done]
        return sum(ends) / len(ends) if ends else None

    def arrivals(self, arm: ArmResult, column: str) -> list[float]:
        """The "seconds" or the "step" of every run's first evaluation at the threshold; infinite for one that never is, or was lost."""
        target = self.threshold
        return [] if target is None else [arrival(run, column, target) for run in arm.done]

    def ratio(self, column: str) -> TimeRatio | None:
        """Local losses over backpropagation, None where one of the two has no times."""
        if self.backprop is None or self.local is None or self.threshold is None or not all(arm.complete for arm in self.arms):
            return None
        return time_ratio(self.arrivals(self.local, column), self.arrivals(self.backprop, column))

    @cached_property
    def unfair(self) -> str:
        """Why seconds of the two arms cannot be compared, empty where they can."""
        if self.backprop is None or self.local is None or not self.backprop.done or not self.local.done:
            return "an arm is missing"
        unequal = findings.unequal((self.local, self.backprop))
        if self.local.run.get("engine", "eager") != self.backprop.run.get("engine", "eager"):
            unequal.append("engine")
        runs = [run for arm in self.arms for run in arm.done]
        unequal += [what for what in EQUAL_PLACES if len({str(run.environment.get(what)) for run in runs}) > 1]
        reasons = [f"different {', '.join(unequal)}"] if unequal else []
        reasons += [f"{arm.label}: {arm.shared}" for arm in self.arms if arm.shared]
        reasons += [f"{arm.label}: steps were not compiled ({why})" for arm in self.arms if (why := fallback(arm))]
        return "; ".join(reasons)


def races(study: StudyResult, slack: float | None = None) -> list[Race]:
    """The race on every network of the study."""
    found = []
    for title, arms in study.groups.items():
        first = {kind: next((arm for arm in arms if arm.kind == kind), None) for kind in ("backprop", "local")}
        found.append(Race(title, first["backprop"], first["local"], slack))
    return found


def all_races(study: StudyResult) -> list[Race]:
    """Every race on every network: to the target, and to just below where backpropagation ends."""
    return [race for both in zip(races(study), races(study, SLACK), strict=True) for race in both]


def arrival(run: Done, column: str, target: float) -> float:
    """Where a run's validation accuracy was first seen at a target."""
    table = run.evaluations if has_curve(run) and not lost(run) else {}
    return stats.first_at_or_above(table.get(column, []), table.get("validation_accuracy", []), target)


def fallback(arm: ArmResult) -> str:
    """Why steps of an arm were eager that should have been compiled, empty where none were."""
    return next((str(run.result["fallback"]) for run in arm.done if run.result.get("fallback")), "")


def judge(study: StudyResult) -> tuple[Judged, ...]:
    """The claims on each network."""
    return tuple(_judged(race, study) for race in all_races(study))


def _judged(race: Race, study: StudyResult) -> Judged:
    seconds, steps = race.ratio("seconds"), race.ratio("step")
    short = next((arm.shortened for arm in race.arms if arm.shortened), "")
    decides = bool(seconds and seconds.decides and not race.unfair and not short)
    yes = decides and bool(seconds and seconds.high is not None and seconds.high <= SHARE)
    no = decides and bool(seconds and seconds.low is not None and seconds.low > SHARE)
    model = race.arms[0].name.rpartition("-")[0]
    less, end = ("", "") if race.slack is None else (f" less {_points(race.slack)}", "-end")
    return Judged(
        f"{study.name}-{model}{end}",
        f"Local losses with learned feedback reach backpropagation's accuracy{less} in at most {exact(SHARE)} of the time: {race.title}",
        "this project",
        status(yes, no),
        _readings(race, seconds, steps),
        f"training seconds to the first evaluation at {_target(race)} of the validation split; median over seeds, local losses over "
        f"backpropagation. The exact 95 % interval of the rank-sum test lies at or below {exact(SHARE)} (confirmed) or wholly above it "
        "(refuted). Each arm chose its learning rate, batch size and length from the same grid by the time to the study's target, on "
        "another seed and the same machine. A run that never arrives takes for ever. "
        f"Fewer than {fewest_a_side()} runs an arm decide nothing.",
        "" if yes or no else _why(race, seconds, short),
        "" if yes or no else f"forwardgrad reproduce faster --rows {model}",
    )  # fmt: skip


def _target(race: Race) -> str:
    if race.threshold is None:
        return "the same accuracy"
    if race.slack is not None:
        return f"{percent(race.threshold)}, {_points(race.slack)} below where backpropagation ends,"
    return f"{100 * race.threshold:g} %"


def _points(share: float) -> str:
    return f"{100 * share:g} points"


def _why(race: Race, seconds: TimeRatio | None, short: str) -> str:
    if race.unfair:
        return f"Not comparable: {race.unfair}."
    if seconds is None:
        return "An arm is not finished."
    if short:
        return f"The runs are too short ({short})."
    if not seconds.decides:
        return f"{_few(seconds)}: {fewest_a_side()} runs an arm are needed."
    return f"The interval holds {exact(SHARE)}."


def _few(found: TimeRatio) -> str:
    most = "no interval" if found.low is None else f"an interval of at most {100 * found.confidence:.0f} %"
    return f"{found.first} and {found.second} runs give {most}"


def _readings(race: Race, seconds: TimeRatio | None, steps: TimeRatio | None) -> tuple[Observation, ...]:
    if race.threshold is None or seconds is None or steps is None:
        return ()
    found = []
    for what, column, ratio, words in (("Time", "seconds", seconds, duration), ("Steps", "step", steps, _steps)):
        medians = [stats.median(race.arrivals(arm, column)) for arm in race.arms]
        both = ", ".join(f"{_or_never(middle, words)} with {arm.label}" for arm, middle in zip(race.arms, medians, strict=True))
        value = f"{both}, to {percent(race.threshold)}: {ratio_words(ratio)}"
        found.append(Observation(f"{what} to the accuracy", value, f"{ratio.first} and {count(ratio.second, 'seed')}"))
    return tuple(found)


def _steps(value: float) -> str:
    return f"{value:,.0f} steps"


def _or_never(value: float, words: Callable[[float], str]) -> str:
    return words(value) if math.isfinite(value) else "never"


def ratio_words(found: TimeRatio) -> str:
    """A ratio with its interval, and how sure that is where it is not 95 %."""
    value = f"{number(found.value)} times" if math.isfinite(found.value) else "never there"
    value = value if found.value else "the other never there"
    return f"{value} ({interval_words(found)})"


def interval_words(found: TimeRatio) -> str:
    if found.low is None or found.high is None:
        return "no interval"
    ends = [number(end) if math.isfinite(end) else "∞" for end in (found.low, found.high)]
    sure = "95 % interval" if found.decides else f"least to greatest of all pairs: a {100 * found.confidence:.0f} % interval"
    return f"{sure} {ends[0]} to {ends[1]}"


def verdicts(study: StudyResult) -> list[str]:
    """A sentence for every network: how soon, and how sure that is."""
    return [_verdict(race) for race in all_races(study)]


def _verdict(race: Race) -> str:
    seconds = race.ratio("seconds")
    if race.threshold is None or seconds is None or race.local is None:
        why = race.unfair or "an arm is unfinished"
        return f"{race.title}: not decided yet ({why})."
    reached = sum(map(math.isfinite, race.arrivals(race.local, "seconds")))
    short = next((f"; {arm.shortened}" for arm in race.arms if arm.shortened), "")
    unfair = f"; not comparable: {race.unfair}" if race.unfair else ""
    goal = f"{_target(race)} of the validation split"
    runs = count(len(race.local.done), "run")
    if not math.isfinite(seconds.value):
        return f"{race.title}: {reached} of {runs} of {race.local.label} come to {goal}{short}{unfair}."
    missed = f" ({reached} of {runs} get there)" if reached < len(race.local.done) else ""
    sure = f"{interval_words(seconds)}{short}{unfair}"
    sooner = f"in {number(seconds.value)} times the time" if seconds.value else "and half of backpropagation's runs or more never do"
    return f"{race.title}: {race.local.label} come to {goal}{missed}, {sooner} ({sure})."


def spacing(runs: Sequence[Done]) -> float:
    """The most steps between two evaluations of these runs: how finely times are known."""
    places = [[0.0, *run.evaluations["step"]] for run in runs if has_curve(run)]
    return max((b - a for at in places for a, b in itertools.pairwise(at)), default=0.0)
