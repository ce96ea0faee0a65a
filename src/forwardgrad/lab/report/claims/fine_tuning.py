"""Which way to fine-tune: the most accurate one in so much memory, and how it stands to backpropagation and to MeZO. No torch.

Accuracy is the balanced one: the mean over classes of the share that is classified rightly. Where most texts are of one class, a guess at
that class would look good otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from forwardgrad.lab.recipes import finetune
from forwardgrad.lab.report.blocks import has_curve, lost, number, percent, tables
from forwardgrad.lab.report.claims import goals
from forwardgrad.lab.report.claims.goals import MINUS
from forwardgrad.lab.statistics import stats
from forwardgrad.lab.store import ArmResult, Done, StudyResult

BACKWARD = ("backprop", "checkpoint", "lora")  # kinds of arms with a reverse pass
BEHIND, AHEAD = 1.0, 3.0  # goals: points below backpropagation at most, and above MeZO at least
FEWER = 0.25  # goal: forward passes to MeZO's final accuracy, of those that MeZO takes


def forward_only(arm: ArmResult) -> bool:
    return arm.kind not in BACKWARD


def balanced(arm: ArmResult) -> float:
    """The mean balanced test accuracy over seeds, below everything where there is none. A run that was lost got nothing right."""
    return stats.estimate([_right(run) for run in arm.done]).mean if arm.done else -math.inf


def _right(run: Done) -> float:
    return run.balanced_accuracy if math.isfinite(run.balanced_accuracy) and not lost(run) else 0.0


def peak(arm: ArmResult) -> float | None:
    """The mean of the most bytes that its runs held at once, None where that was not measured."""
    found = [run.result.get("peak_bytes") for run in arm.done]
    return None if not found or None in found else sum(map(float, found)) / len(found)  # type: ignore[arg-type]


def gap(arm: ArmResult, other: ArmResult) -> stats.MeanEstimate | None:
    """Points of balanced accuracy that an arm has more than another, over shared seeds; None where they are not comparable."""
    mine, theirs = arm.by_seed, other.by_seed
    seeds = sorted(mine.keys() & theirs.keys())
    if not seeds or goals.unequal(arm, other):
        return None
    return stats.difference([100 * _right(mine[seed]) for seed in seeds], [100 * _right(theirs[seed]) for seed in seeds])


def front(arms: Sequence[ArmResult]) -> list[tuple[float, ArmResult]]:
    """The arms that are worth their memory, the leanest first: none with as much memory or less is as accurate."""
    known = [(at, arm) for arm in arms if arm.complete and (at := peak(arm)) is not None]
    found: list[tuple[float, ArmResult]] = []
    for at, arm in sorted(known, key=lambda pair: (pair[0], -balanced(pair[1]))):
        if not found or balanced(arm) > balanced(found[-1][1]):
            found.append((at, arm))
    return found


def passes_to(arm: ArmResult, target: float) -> float:
    """Forward passes to the first evaluation at a validation accuracy, a backward pass counting as two: the median over runs."""
    found = []
    for run in arm.done:
        table = run.evaluations if has_curve(run) and not lost(run) else {}
        step = stats.first_at_or_above(table.get("step", []), table.get("validation_accuracy", []), target)
        found.append(step * run.passes / max(1, int(run.result["steps"])) if run.passes else math.inf)
    return stats.median(found) if found else math.inf


def verdicts(study: StudyResult) -> list[str]:
    """For every set of texts: the best arm without a backward pass beside backpropagation and MeZO, and what to use in so much memory."""
    return [sentence for title, arms in study.groups.items() for sentence in _verdict(title, arms)]


def _verdict(title: str, arms: Sequence[ArmResult]) -> list[str]:
    finished = [arm for arm in arms if arm.complete]
    best = max(filter(forward_only, finished), key=balanced, default=None)
    if best is None:
        return [f"{title}: no arm without a backward pass is finished yet."]
    reached = f"{percent(balanced(best))} balanced test accuracy{_seeds(best)}"
    said = [f"{title}: the best arm without a backward pass is {best.label}, {reached}."]
    backprop, mezo = (next((arm for arm in finished if arm.kind == kind), None) for kind in ("backprop", "zeroth-order"))
    if backprop is not None and (apart := gap(best, backprop)) is not None:
        met = _met(-apart.mean <= BEHIND)
        said.append(f"That is {_points(apart)} backpropagation. Goal, at most {BEHIND:g} point below: {met}.")
    if mezo is not None and mezo is not best and (apart := gap(best, mezo)) is not None:
        said.append(f"It is {_points(apart)} MeZO. Goal, at least {AHEAD:g} points above: {_met(apart.mean >= AHEAD)}.")
    if mezo is not None:
        said += _sooner(mezo, [arm for arm in finished if forward_only(arm) and arm is not mezo])
    return [*said, *_memory(arms)]


def _seeds(arm: ArmResult) -> str:
    seconds = (arm.record.get("training") or {}).get("seconds")
    full = finetune.SPENT["full"].training
    short = f"; shortened: {seconds:g} of {full:g} seconds" if seconds and seconds < full else ""
    seeds = "one seed, which says nothing of another" if len(arm.done) == 1 else f"mean of {len(arm.done)} seeds"
    return f" ({seeds}{short})"


def _sooner(mezo: ArmResult, others: Sequence[ArmResult]) -> list[str]:
    """Which arm comes to the accuracy at which MeZO ends in the fewest forward passes."""
    ends = [run.result.get("validation_accuracy") for run in mezo.done]
    if not others or None in ends:
        return []
    target = stats.estimate([float(end) for end in ends if end is not None]).mean
    spent = [run.passes for run in mezo.done if run.passes]
    own = sum(spent) / len(spent) if spent else math.inf
    first = min(others, key=lambda arm: passes_to(arm, target))
    passes = passes_to(first, target)
    if not (math.isfinite(own) and math.isfinite(passes)):
        return []
    goal = f"Goal, at most {FEWER:g} times: {_met(passes <= FEWER * own)}."
    return [
        f"To the validation accuracy at which MeZO ends ({percent(target)}), {first.label} takes {passes:,.0f} forward passes, "
        f"{number(passes / own)} times MeZO's {own:,.0f}. {goal}"
    ]


def _memory(arms: Sequence[ArmResult]) -> list[str]:
    """Where memory is the limit: from how much of it on which arm is the most accurate."""
    worth = front(arms)
    if len(worth) < 2:
        return []
    parts = [f"from {tables.size(at)} {arm.label} ({percent(balanced(arm))})" for at, arm in worth]
    return [f"Where memory is the limit, the most accurate is {', '.join(parts)}."]


def _points(apart: stats.MeanEstimate) -> str:
    ends = "" if apart.low is None or apart.high is None else f" (95 % interval {apart.low:+.2f} to {apart.high:+.2f})"
    return f"{abs(apart.mean):.2f} points {'below' if apart.mean < 0 else 'above'}{ends.replace('-', MINUS)}"


def _met(met: bool) -> str:
    return "met" if met else "missed"
