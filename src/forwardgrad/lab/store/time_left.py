"""How long some runs will still take. It is told from the steps and seconds of runs that have ended or are under way.

Loads without torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from forwardgrad.lab.store.runs_now import Ended, Going, RunsNow, count_of, runs_of


@dataclass(frozen=True)
class WorkLeft:
    """What some runs still need: `seconds` if they ran one after another, `longest` the most that a run under way needs.

    `partly` says that the length of some runs is not known yet.
    """

    seconds: float
    longest: float
    running: int
    partly: bool = False

    @property
    def left(self) -> float | None:
        """The seconds until all have ended, if as many runs stay under way as are now; None where nothing is known."""
        if self.partly and not self.seconds:
            return None
        return max(self.longest, self.seconds / max(1, self.running))


def work_left(store: RunsNow, runs: list[str], planned: int, steps: float | None, pace: float | None, now: float) -> WorkLeft:
    """What `planned` runs still need, of which `runs` are named. A run usually has `steps` steps, of `pace` seconds each."""
    going = store.going_of(runs)
    running = [run for run in going if run.fresh(now)]
    paces = [run.spent / run.step if run.step else pace for run in running]
    known = [(run.steps - run.step) * p for run, p in zip(running, paces, strict=True) if p is not None]
    stopped = [run for run in going if not run.fresh(now)]
    waiting = planned - len(store.ended_of(runs)) - len(going)
    partly = len(known) < len(running) or bool(stopped and pace is None) or (waiting > 0 and (steps is None or pace is None))
    seconds = sum(known) + sum(run.steps - run.step for run in stopped) * (pace or 0.0)
    return WorkLeft(seconds + max(0, waiting) * (steps or 0.0) * (pace or 0.0), max(known, default=0.0), len(running), partly)


def usual_steps_and_pace(store: RunsNow, kind: str, arm: dict[str, Any], group: list[dict[str, Any]]) -> tuple[float | None, float | None]:
    """The steps of a run of this kind, and the seconds of a step. Both come from the arm's own runs, else from its group's."""
    steps = pace = None
    for arms in ([arm], group):
        trials, finals = (store.both([run for a in arms for run in runs_of(a, which)]) for which in ("trial", "seed"))
        steps = steps or _mean([_length(run) for run in (trials if kind == "trial" else finals)])
        if steps is None and kind == "seed" and (longer := count_of(arm, "epochs")) and (short := count_of(arm.get("budget"), "epochs")):
            steps = (_mean([_length(run) for run in trials]) or 0.0) * longer / short or None
        taken = [(run.spent, run.steps if isinstance(run, Ended) else run.step) for run in (*trials, *finals)]
        pace = pace or (sum(s for s, _ in taken) / n if (n := sum(n for _, n in taken)) else None)
        if steps and pace:
            break
    return steps, pace


def total_of(works: list[WorkLeft]) -> WorkLeft:
    """What several groups of runs need together."""
    longest = max((work.longest for work in works), default=0.0)
    return WorkLeft(sum(w.seconds for w in works), longest, sum(w.running for w in works), any(w.partly for w in works))


def _length(run: Ended | Going) -> int | None:
    """The steps that a run was planned to have. None for a run that ended early, and for one that has not said so yet."""
    if isinstance(run, Ended):
        return run.steps if run.status == "finished" else None
    return run.steps if run.seconds else None


def _mean(values: list[int | None]) -> float | None:
    known = [value for value in values if value]
    return sum(known) / len(known) if known else None
