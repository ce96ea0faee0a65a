"""What a cell says of an arm: its name, its hyperparameters, its means over seeds. Loads without torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from forwardgrad.lab.report.blocks.run_curves import lost
from forwardgrad.lab.report.blocks.tables import NONE, Cell, count, duration, exact, number, percent, place
from forwardgrad.lab.statistics import stats
from forwardgrad.lab.store import ArmResult
from forwardgrad.lab.studies import format_value


def arm_cell(arm: ArmResult) -> Cell:
    return Cell(arm.label, tone=arm.kind, link=source(arm))


def source(arm: ArmResult) -> str:
    """Where the page says by what command, how often and on what machine an arm was measured."""
    return place("source", arm.study, arm.name)


def hyperparameters(arm: ArmResult) -> str:
    if not arm.run:
        return values_text(chosen(arm).get("values") or {}) or "–"
    optimizer, estimator = arm.run["optimizer"], arm.run["estimator"]
    parts = [f"lr {exact(optimizer['lr'])}", f"decay {exact(optimizer['decay'])}"]
    if optimizer["name"] == "nesterov" or optimizer["momentum"]:
        parts.append(f"momentum {exact(optimizer['momentum'])}")
    if optimizer["name"] == "adam":
        parts += [f"β₁ {exact(optimizer['beta1'])}", f"β₂ {exact(optimizer['beta2'])}"]
    parts += [f"weight decay {exact(optimizer['weight_decay'])}"] if "weight_decay" in optimizer else []
    parts += ["annealed to 0"] if "anneal" in optimizer else []
    parts += [f"{name} {format_value(value)}" for name, value in (optimizer.get("options") or {}).items()]
    parts += [f"steps of at most {exact(optimizer['cap'])} ‖θ‖"] if "cap" in optimizer else []
    parts += [f"warm-up of {optimizer['warm_up']} steps"] if "warm_up" in optimizer else []
    parts += [f"augmented by {arm.run['augment']}"] if "augment" in arm.run else []
    parts += [f"label smoothing {exact(arm.run['label_smoothing'])}"] if "label_smoothing" in arm.run else []
    parts += [arm.run["precision"]] if "precision" in arm.run else []
    parts += [f"engine {arm.run['engine']}"] if "engine" in arm.run else []
    if estimator["name"] == "forward":
        clip, tangents = estimator.get("clip"), estimator.get("tangents", 1)
        parts.append(f"clip ±{exact(clip)}" if clip else "no clip")
        parts += [f"{tangents} tangents"] if tangents != 1 else []
        usual = {"name": "forward", "clip": clip, "tangents": tangents, "law": "gaussian", "chunk_size": None}
    else:
        usual = {"name": estimator["name"]}
    rest = {name: value for name, value in estimator.items() if name not in usual or usual[name] != value}
    parts += [f"{name.replace('_', ' ')} {format_value(value)}" for name, value in rest.items() if value is not None]
    return " · ".join(parts)


def values_text(values: dict[str, Any]) -> str:
    """A point of a search space in one line."""
    return " · ".join(f"{name} {given(value)}" for name, value in values.items())


def given(value: Any) -> str:
    """A value of a search space as it was given: a number, yes or no, or a word."""
    return exact(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else format_value(value)


def epochs(arm: ArmResult) -> Cell:
    run = [float(done.result["epochs"]) for done in arm.done]
    text = "–" if not run else _epoch(run[0]) if min(run) == max(run) else f"{_epoch(min(run))} to {_epoch(max(run))}"
    return Cell(text, arm.shortened or "", "warn" if arm.shortened else "")


def _epoch(value: float) -> str:
    return f"{value:.0f}" if value == round(value) else f"{value:.2g}" if value < 1 else f"{value:.1f}"


def test_loss(arm: ArmResult) -> Cell:
    least = -math.inf if "loss" in arm.run else 0.0  # a user's own may be negative
    return estimated([done.test_loss for done in arm.done], number, least, math.inf)


def accuracy(arm: ArmResult) -> Cell:
    return estimated([done.accuracy for done in arm.done], percent, 0.0, 1.0)


def estimated(values: Sequence[float], words: Callable[[float], str], least: float, most: float) -> Cell:
    """A mean with its interval; where a value is not finite there is no mean, and the finite ones are listed instead."""
    if not values:
        return NONE
    bad = [value for value in values if not math.isfinite(value)]
    if bad:
        others = ", ".join(words(value) for value in values if math.isfinite(value))
        return Cell(
            f"none in {len(bad)} of {count(len(values), 'run')}"
            if words is percent
            else f"not finite in {len(bad)} of {count(len(values), 'run')}",
            f"the rest: {others}" if others else "",
            "warn",
        )
    found = stats.estimate(values, least, most)
    if found.low is None or found.high is None:
        return Cell(words(found.mean), "n = 1, no interval")
    low, high = words(found.low), words(found.high)
    unit = high[high.index(" ") :] if " " in high else ""  # named once where both ends have it
    return Cell(words(found.mean), f"{low.removesuffix(unit) if unit else low} to {high}, n = {found.n}")


def outcome(arm: ArmResult) -> Cell:
    bad = [ended(done.result) for done in arm.done if lost(done)]
    if bad:
        among = f"in {len(bad)} of {count(len(arm.done), 'run')}" if len(arm.done) > 1 else ""
        rest = "; ".join(part for part in (among, "" if arm.complete else arm.progress) if part)
        return Cell("; ".join(dict.fromkeys(bad)), rest, "warn")
    if not arm.complete:
        return Cell(arm.progress, tone="warn")
    return Cell("finished", tone="quiet")


def ended(result: dict[str, Any]) -> str:
    """How a run that was lost ended, where and why."""
    where = f" at step {result['diverged_at']:,}" if result["diverged_at"] is not None else ""
    return f"{result['status']}{where} ({result['reason']})"


def per_step(arm: ArmResult) -> Cell:
    cell = estimated([done.seconds_per_step for done in arm.done if done.result["steps"]], duration, 0.0, math.inf)
    return Cell(cell.text, "; ".join(filter(None, (cell.sub, arm.shared))), cell.tone)


def chosen(arm: ArmResult) -> dict[str, Any]:
    return arm.record.get("chosen") or {}


def rate(arm: ArmResult) -> Cell:
    """The learning rate, whether it lies on the edge of its grid, and the precision where it is not the usual one."""
    if not arm.run:
        return NONE
    edge = "lr" in arm.record["chosen"]["at_edge"]
    words = [*([arm.run["precision"]] if "precision" in arm.run else []), *(["on the edge of its grid"] if edge else [])]
    return Cell(exact(arm.run["optimizer"]["lr"]), ", ".join(words), "warn" if edge else "")


def mean_of(arm: ArmResult, field: str) -> float | None:
    """The mean of a count over the runs, None where a run did not count it."""
    values = [run.result.get(field) for run in arm.done]
    return sum(values) / len(values) if values and None not in values else None  # type: ignore[arg-type]


def steps(arm: ArmResult) -> Cell:
    taken, passes = mean_of(arm, "steps"), mean_of(arm, "forward_passes")
    if taken is None:
        return NONE
    return Cell(f"{taken:,.0f}", "passes not counted" if passes is None else f"{passes:,.0f} passes")


def training_time(arm: ArmResult, *, name_device: bool) -> Cell:
    """The seconds of a run and of a step, and where that was, if the device is to be named."""
    seconds = mean_of(arm, "seconds")
    if seconds is None:
        return NONE
    where = sorted({str(run.environment.get("device", "unknown")) for run in arm.done}) if name_device else []
    return Cell(duration(seconds), ", ".join(filter(None, (f"{per_step(arm).text} a step", arm.shared, *where))))
