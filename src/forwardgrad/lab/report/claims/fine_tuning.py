"""Which way to fine-tune: the most accurate one in so much memory, and how it stands to backpropagation and to MeZO. No torch.

Accuracy is the balanced one: the mean over classes of the share that is classified rightly. Where most texts are of one class, a guess at
that class would look good otherwise. Where the next word is predicted, arms are compared by the test loss of a token instead. Its
exponential is the perplexity: among as many equally likely words a guess would be as good.
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
from forwardgrad.lab.studies import NEXT_TOKEN

BACKWARD = ("backprop", "checkpoint", "lora")  # kinds of arms with a reverse pass
BEHIND, AHEAD = 1.0, 3.0  # goals: points below backpropagation at most, and above MeZO at least
FEWER = 0.25  # goal: forward passes to MeZO's final accuracy, of those that MeZO takes


def forward_only(arm: ArmResult) -> bool:
    return arm.kind not in BACKWARD


def writes(arm: ArmResult) -> bool:
    """Whether the network of an arm predicts the next word."""
    return arm.run.get("data") in NEXT_TOKEN


def score(arm: ArmResult) -> float:
    """How good an arm is, the greater the better: the mean over seeds of balanced test accuracy, or of the test loss with a minus.

    It is below everything where there is no run. A run that was lost got nothing right.
    """
    if not arm.done:
        return -math.inf
    found = [_score(arm, run) for run in arm.done]
    return stats.estimate(found).mean if all(map(math.isfinite, found)) else -math.inf


def _score(arm: ArmResult, run: Done) -> float:
    if writes(arm):
        return -math.inf if lost(run) else -run.loss
    return run.balanced_accuracy if math.isfinite(run.balanced_accuracy) and not lost(run) else 0.0


def perplexity(arm: ArmResult) -> float:
    """The exponential of the mean test loss of a token."""
    return math.exp(-score(arm))


def _shown(arm: ArmResult) -> str:
    return f"perplexity {number(perplexity(arm))}" if writes(arm) else percent(score(arm))


def peak(arm: ArmResult) -> float | None:
    """The mean of the most bytes that its runs held at once, None where that was not measured."""
    found = [run.result.get("peak_bytes") for run in arm.done]
    return None if not found or None in found else sum(map(float, found)) / len(found)  # type: ignore[arg-type]


def gap(arm: ArmResult, other: ArmResult) -> stats.MeanEstimate | None:
    """How much better an arm is than another, over shared seeds: points of balanced accuracy, or nats a token.

    None where they are not comparable.
    """
    seeds = sorted(arm.by_seed.keys() & other.by_seed.keys())
    scale = 1 if writes(arm) else 100
    mine, theirs = ([scale * _score(one, one.by_seed[seed]) for seed in seeds] for one in (arm, other))
    if not seeds or goals.unequal(arm, other) or not all(map(math.isfinite, [*mine, *theirs])):
        return None
    return stats.difference(mine, theirs)


def front(arms: Sequence[ArmResult]) -> list[tuple[float, ArmResult]]:
    """The arms that are worth their memory, the leanest first: none with as much memory or less is as accurate."""
    known = [(at, arm) for arm in arms if arm.complete and (at := peak(arm)) is not None]
    found: list[tuple[float, ArmResult]] = []
    for at, arm in sorted(known, key=lambda pair: (pair[0], -score(pair[1]))):
        if not found or score(arm) > score(found[-1][1]):
            found.append((at, arm))
    return found


def passes_to(arm: ArmResult, target: float) -> float:
    """Forward passes to the first evaluation at a validation accuracy, or loss, a backward pass counting as two: the median over runs."""
    first = stats.first_at_or_below if writes(arm) else stats.first_at_or_above
    found = []
    for run in arm.done:
        table = run.evaluations if has_curve(run) and not lost(run) else {}
        step = first(table.get("step", []), table.get(f"validation_{_followed(arm)}", []), target)
        found.append(step * run.passes / max(1, int(run.result["steps"])) if run.passes else math.inf)
    return stats.median(found) if found else math.inf


def _followed(arm: ArmResult) -> str:
    return "loss" if writes(arm) else "accuracy"


def verdicts(study: StudyResult) -> list[str]:
    """For every set of texts: the best arm without a backward pass beside backpropagation and MeZO, and what to use in so much memory."""
    return [sentence for title, arms in study.groups.items() for sentence in _verdict(title, arms)]


def _verdict(title: str, arms: Sequence[ArmResult]) -> list[str]:
    finished = [arm for arm in arms if arm.complete]
    best = max(filter(forward_only, finished), key=score, default=None)
    if best is None:
        return [f"{title}: no arm without a backward pass is finished yet."]
    reached = f"{_shown(best)}{'' if writes(best) else ' balanced test accuracy'}{_seeds(best)}"
    said = [f"{title}: the best arm without a backward pass is {best.label}, {reached}."]
    backprop, mezo = (next((arm for arm in finished if arm.kind == kind), None) for kind in ("backprop", "zeroth-order"))
    if backprop is not None and (apart := gap(best, backprop)) is not None:
        goal = "" if writes(best) else f" Goal, at most {BEHIND:g} point below: {_met(-apart.mean <= BEHIND)}."
        said.append(f"That is {_points(apart, best)} backpropagation.{goal}")
    if mezo is not None and mezo is not best and (apart := gap(best, mezo)) is not None:
        goal = "" if writes(best) else f" Goal, at least {AHEAD:g} points above: {_met(apart.mean >= AHEAD)}."
        said.append(f"It is {_points(apart, best)} MeZO.{goal}")
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
    """Which arm comes to the accuracy, or the loss, at which MeZO ends in the fewest forward passes."""
    ends = [run.result.get(f"validation_{_followed(mezo)}") for run in mezo.done]
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
    end = number(target) if writes(mezo) else percent(target)
    return [
        f"To the validation {_followed(mezo)} at which MeZO ends ({end}), {first.label} takes {passes:,.0f} forward passes, "
        f"{number(passes / own)} times MeZO's {own:,.0f}. {goal}"
    ]


def _memory(arms: Sequence[ArmResult]) -> list[str]:
    """Where memory is the limit: from how much of it on which arm is the most accurate."""
    worth = front(arms)
    if len(worth) < 2:
        return []
    parts = [f"from {tables.size(at)} {arm.label} ({_shown(arm)})" for at, arm in worth]
    return [f"Where memory is the limit, the {'best' if writes(worth[0][1]) else 'most accurate'} is {', '.join(parts)}."]


def _points(apart: stats.MeanEstimate, arm: ArmResult) -> str:
    ends = "" if apart.low is None or apart.high is None else f" (95 % interval {apart.low:+.2f} to {apart.high:+.2f})"
    if writes(arm):
        return f"{abs(apart.mean):.2f} nats a token {'worse' if apart.mean < 0 else 'better'}{ends.replace('-', MINUS)} than"
    return f"{abs(apart.mean):.2f} points {'below' if apart.mean < 0 else 'above'}{ends.replace('-', MINUS)}"


def _met(met: bool) -> str:
    return "met" if met else "missed"
