"""The tables of a report: stored results in, words and figures in cells out. Loads without torch."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from forwardgrad.lab.recipes import TABLE1
from forwardgrad.lab.statistics import LossSummary, stats, summary
from forwardgrad.lab.store import ArmResult, Done, StudyResult, damaged, finite
from forwardgrad.lab.studies import format_value

TARGETS = {"cifar10": (2.2, 2.0, 1.5, 1.0)}  # validation losses whose first sight is timed
TARGETS_ELSEWHERE = (1.0, 0.5, 0.3, 0.1)
DATA = {"mnist": "MNIST", "cifar10": "CIFAR-10", "digits": "digits"}
MODELS = {"nn": "NN", "cnn": "CNN", "cifar-cnn": "CNN", "logistic": "logistic regression", "mlp": "MLP"}
ROWS = {arm.name: number for number, arm in enumerate(TABLE1, 1)}


@dataclass(frozen=True)
class Cell:
    """What stands in a cell, a smaller line below it, and a tone: an arm's kind, `warn`, `quiet`, `code` or nothing.

    `link` is the place on the page that its text leads to, `anchor` the place that it is.
    """

    text: str
    sub: str = ""
    tone: str = ""
    link: str = ""
    anchor: str = ""


@dataclass(frozen=True)
class Table:
    """Rows in titled groups, and what each column means in plain words."""

    columns: tuple[str, ...]
    groups: tuple[tuple[str, tuple[tuple[Cell, ...], ...]], ...]
    caption: str
    meaning: tuple[tuple[str, str], ...] = ()


NONE = Cell("–", tone="quiet")


def number(value: float | None, digits: int = 3) -> str:
    """Three significant digits, without exponents where a reader can do without; words for what is no finite number.

    >>> number(0.06128), number(12345.6), number(1e-05), number(float("inf"))
    ('0.0613', '12,346', '1e-5', 'not finite')
    """
    if value is None or not math.isfinite(value):
        return "not finite"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    if value == 0 or abs(value) >= 1e-4:
        return f"{value:#.{digits}g}".rstrip(".") if value else "0"
    return f"{value:.{digits}g}".replace("e-0", "e-")


def exact(value: float) -> str:
    """A hyperparameter as it was given: 0.1, 1e-5."""
    return f"{value:.6g}".replace("e-0", "e-")


def percent(value: float) -> str:
    return "not finite" if not math.isfinite(value) else f"{100 * value:.2f} %"


def duration(value: float) -> str:
    """Seconds in the unit that suits them.

    >>> duration(0.00321), duration(75), duration(5400)
    ('3.21 ms', '75.0 s', '1.50 h')
    """
    if not math.isfinite(value):
        return "not finite"
    for limit, factor, unit in ((1e-3, 1e6, "µs"), (1.0, 1e3, "ms"), (120.0, 1.0, "s"), (5400.0, 1 / 60, "min")):
        if value < limit:
            return f"{number(value * factor)} {unit}"
    return f"{number(value / 3600)} h"


def size(count: float) -> str:
    """Bytes in the unit that suits them.

    >>> size(512), size(7_454_760)
    ('512 B', '7.45 MB')
    """
    for limit, factor, unit in ((1e3, 1.0, "B"), (1e6, 1e3, "kB"), (1e9, 1e6, "MB")):
        if count < limit:
            return f"{count:,.0f} B" if unit == "B" else f"{number(count / factor)} {unit}"
    return f"{number(count / 1e9)} GB"


def count(n: int, what: str) -> str:
    return f"{n:,} {what}" if n == 1 else f"{n:,} {what}s"


def results(study: StudyResult) -> Table:
    """What every arm reached on the test split."""
    numbered = any(arm.name in ROWS for arm in study.arms)
    published = any(arm.record.get("published") for arm in study.arms)
    kinds: list[tuple[str, str, Callable[[ArmResult], Cell]]] = [
        ("arm", "the method that supplies the gradient; within a comparison only it and the hyperparameters beside it differ", arm_cell),
        ("hyperparameters", "lr γ₀ and decay k: the learning rate at step t is γ₀·exp(−k·t)", lambda arm: Cell(hyperparameters(arm))),
        ("epochs", "epochs really run; 'shortened' where the paper trained longer", epochs),
        ("published 'test loss'", "as printed in Table I: the loss of the last 16 shuffled test images, one seed", _published),
        ("ours, last 16", "the same reading of our first run; below it, the 5–95 % range of such readings of the same network", _last16),
        (
            "test loss",
            "mean over the whole test split (cross-entropy in nats, or a study's own loss), mean over seeds and its 95 % t interval; "
            "a cross-entropy's is cut at 0",
            test_loss,
        ),
        (
            "test accuracy",
            "examples of the whole test split classified rightly, mean over seeds and its 95 % t interval, cut at 0 and 100 %",
            accuracy,
        ),
        ("outcome", "whether the runs finished, and where and why one was stopped as diverged", outcome),
    ]
    if numbered:
        kinds.insert(0, ("#", "row of the paper's Table I", lambda arm: Cell(str(ROWS[arm.name])) if arm.name in ROWS else NONE))
    if not published:
        kinds = [kind for kind in kinds if kind[2] not in (_published, _last16)]
    rows = _grouped(study, [make for _, _, make in kinds])
    return Table(tuple(head for head, _, _ in kinds), rows, "Results", tuple((head, words) for head, words, _ in kinds))


def speed(study: StudyResult) -> list[Table]:
    """How long each arm took to given validation losses: one table for each data set, because the losses differ."""
    tables = []
    for data in dict.fromkeys(arm.data for arm in study.arms if arm.done):
        targets = TARGETS.get(str(data), TARGETS_ELSEWHERE)
        makers = [arm_cell, per_step, *(_to(target) for target in targets)]
        arms = tuple(arm for arm in study.arms if arm.data == data and arm.done)
        meaning = (
            ("time per step", "training time over steps, averaged over seeds; evaluations do not count, but runs trained at the same time "
             "slow one another: what a step costs is measured apart, both arms in turn"),
            ("to loss …", "step and training time of the first evaluation with at most this validation loss, the median over seeds; "
             "losses are evaluated after every epoch, and in the first one after 50, 100, 200 and 400 steps where it is longer"),
        )  # fmt: skip
        columns = ("arm", "time per step", *(f"to loss {target}" for target in targets))
        caption = f"Speed on {DATA.get(str(data), str(data))}"
        tables.append(Table(columns, _grouped(StudyResult(study.name, study.title, arms), makers), caption, meaning))
    return tables


def tuning(study: StudyResult) -> Table | None:
    """How each arm was tuned; None for a study without a search."""
    arms = tuple(arm for arm in study.arms if arm.record.get("space"))
    if not arms:
        return None
    columns = ("arm", "grid points", "searched", "chosen", "validation loss", "winner's place")
    meaning = (
        ("grid points", "combinations tried, each for the epochs given below it, on a seed of its own, without the test split"),
        ("chosen", "the combination with the least validation loss"),
        ("winner's place", "on an edge of the grid a better value may lie outside it"),
    )
    rows = _grouped(
        StudyResult(study.name, study.title, arms),
        [arm_cell, _points, _space, lambda arm: Cell(values_text(_chosen(arm).get("values") or {}) or "–"), _trial_loss, _edge],
    )
    return Table(columns, rows, "Tuning", meaning)


def _grouped(study: StudyResult, makers: Sequence[Callable[[ArmResult], Cell]]) -> tuple[tuple[str, tuple[tuple[Cell, ...], ...]], ...]:
    return tuple((group, tuple(tuple(make(arm) for make in makers) for arm in arms)) for group, arms in study.groups.items())


def arm_cell(arm: ArmResult) -> Cell:
    return Cell(arm.label, tone=arm.kind, link=source(arm))


def source(arm: ArmResult) -> str:
    """Where the page says by what command, how often and on what machine an arm was measured."""
    return place("source", arm.study, arm.name)


def place(*words: str) -> str:
    """A name for a place on the page, another one for other words.

    >>> place("source", "demo", "a b")
    'source.demo.a_20_b'
    """
    return ".".join(re.sub(r"[^A-Za-z0-9-]", lambda sign: f"_{ord(sign[0]):x}_", word) for word in words)


def lost(run: Done) -> bool:
    """Whether a run diverged or failed: either way it counts as infinitely bad, and is never left out."""
    return str(run.result["status"]) != "finished"


def hyperparameters(arm: ArmResult) -> str:
    if not arm.run:
        return values_text(_chosen(arm).get("values") or {}) or "–"
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


def epochs(arm: ArmResult) -> Cell:
    run = [float(done.result["epochs"]) for done in arm.done]
    text = "–" if not run else _epoch(run[0]) if min(run) == max(run) else f"{_epoch(min(run))} to {_epoch(max(run))}"
    return Cell(text, arm.shortened or "", "warn" if arm.shortened else "")


def _epoch(value: float) -> str:
    return f"{value:.0f}" if value == round(value) else f"{value:.2g}" if value < 1 else f"{value:.1f}"


def _published(arm: ArmResult) -> Cell:
    published = arm.record.get("published")
    return Cell(f"{published['test_loss']:.3f}", f"after {published['epochs']} epochs") if published else NONE


def _last16(arm: ArmResult) -> Cell:
    tests = [done.result["test"] for done in arm.done if done.result.get("test")]
    if not tests:
        return NONE
    test = tests[0]
    return Cell(number(test.get("last16")), f"{number(test.get('last16_low'))} to {number(test.get('last16_high'))}")


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


def _to(target: float) -> Callable[[ArmResult], Cell]:
    def make(arm: ArmResult) -> Cell:
        steps, seconds = ([reached(done, column, target) for done in arm.done] for column in ("step", "seconds"))
        hits = sum(math.isfinite(step) for step in steps)
        among = f"{hits} of {len(steps)} runs" if 0 < hits < len(steps) else ""
        if not math.isfinite(stats.median(steps)):
            return Cell("not reached", f"except in {among}" if among else "", "quiet")
        return Cell(f"{stats.median(steps):,.0f} steps", ", ".join(filter(None, (duration(stats.median(seconds)), arm.shared, among))))

    return make


def has_curve(run: Done) -> bool:
    """Whether a run was evaluated: one that failed may never have been, and then has no table."""
    return run.result["status"] != "failed" or "evaluations.csv" in run.files


def has_losses(run: Done) -> bool:
    """The same of the training losses."""
    return run.has_losses


def training_losses(run: Done) -> Sequence[float] | LossSummary:
    """The training losses of a run, or what a thin pack kept of them."""
    if (stored := run.loss_summary()) is None:
        return run.losses()
    try:
        return summary.from_json(stored)
    except (TypeError, ValueError, LookupError) as error:
        raise damaged(run.folder / "losses.json", error) from error


def reached(done: Done, column: str, target: float) -> float:
    """Where in a column of its evaluations a run was first seen at or below a validation loss."""
    table = done.evaluations if has_curve(done) else {}
    return stats.first_at_or_below(table.get(column, []), table.get("validation_loss", []), target)


def _chosen(arm: ArmResult) -> dict[str, Any]:
    return arm.record.get("chosen") or {}


def values_text(values: dict[str, Any]) -> str:
    """A point of a search space in one line."""
    return " · ".join(f"{name} {_given(value)}" for name, value in values.items())


def _given(value: Any) -> str:
    """A value of a search space as it was given: a number, yes or no, or a word."""
    return exact(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else format_value(value)


def _points(arm: ArmResult) -> Cell:
    results = [trial for trial in arm.trials if trial]
    waiting = len(arm.trials) - len(results)
    parts = [_each(arm)]
    for status in ("diverged", "failed"):
        bad = sum(trial.get("status") == status for trial in results)
        parts += [f"{bad} {status}"] if bad else []
    parts += [f"{waiting} unfinished"] if waiting else []
    return Cell(str(len(arm.trials)), ", ".join(parts))


def _each(arm: ArmResult) -> str:
    """How long every trial was."""
    budget = arm.record.get("budget") or {"epochs": arm.record.get("tuning_epochs") or 0}
    for unit, words in (("epochs", "epoch"), ("steps", "step"), ("seconds", "second")):
        if unit in budget:
            return f"{exact(budget[unit])} {words}{'' if budget[unit] == 1 else 's'} each"
    if "forward_passes" in budget:
        return f"{exact(budget['forward_passes'])} forward passes each"
    return "of unknown length"


def _space(arm: ArmResult) -> Cell:
    parts = []
    for name, values in arm.record["space"].items():
        if isinstance(values, dict) and "low" in values:
            scale = ", logarithmic" if values.get("log") else ""
            parts.append(f"{name} {exact(values['low'])} to {exact(values['high'])}{scale}")
            continue
        choices = list(values["choices"]) if isinstance(values, dict) else list(values)
        many = f"{exact(min(choices))} to {exact(max(choices))} ({len(choices)} values)" if _numbers(choices) and len(choices) > 4 else ""
        parts.append(f"{name} {many or ', '.join(map(_given, choices))}")
    return Cell(" · ".join(parts), str(arm.record.get("sampler") or ""))


def _numbers(values: Sequence[Any]) -> bool:
    return all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in values)


def _trial_loss(arm: ArmResult) -> Cell:
    loss = _chosen(arm).get("validation_loss")
    if loss is not None:
        return Cell(number(finite(loss)))
    if reason := arm.record.get("no_winner"):
        return Cell("no winner", reason, tone="warn")
    ended = [trial for trial in arm.trials if trial]
    return Cell("no point stayed finite", tone="warn") if len(ended) == len(arm.trials) else Cell("–", tone="quiet")


def _edge(arm: ArmResult) -> Cell:
    edges = _chosen(arm).get("at_edge") or []
    if not _chosen(arm).get("values"):
        return Cell("–", tone="quiet")
    return Cell(f"on the edge of its grid: {', '.join(edges)}", tone="warn") if edges else Cell("inside its grid", tone="quiet")
