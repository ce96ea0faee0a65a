"""The tables that every study has: what its arms reached, how fast, and how they were tuned. Loads without torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from forwardgrad.lab.recipes import TABLE1
from forwardgrad.lab.report.blocks.arm_cells import (
    accuracy,
    arm_cell,
    chosen,
    epochs,
    given,
    hyperparameters,
    outcome,
    per_step,
    test_loss,
    values_text,
)
from forwardgrad.lab.report.blocks.run_curves import reached
from forwardgrad.lab.report.blocks.tables import DATA, NONE, Cell, Table, duration, exact, number
from forwardgrad.lab.statistics import stats
from forwardgrad.lab.store import ArmResult, StudyResult, finite

TARGETS = {"cifar10": (2.2, 2.0, 1.5, 1.0)}  # validation losses whose first sight is timed
TARGETS_ELSEWHERE = (1.0, 0.5, 0.3, 0.1)
ROWS = {arm.name: number for number, arm in enumerate(TABLE1, 1)}


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
        [arm_cell, _points, _space, lambda arm: Cell(values_text(chosen(arm).get("values") or {}) or "–"), _trial_loss, _edge],
    )
    return Table(columns, rows, "Tuning", meaning)


def _grouped(study: StudyResult, makers: Sequence[Callable[[ArmResult], Cell]]) -> tuple[tuple[str, tuple[tuple[Cell, ...], ...]], ...]:
    return tuple((group, tuple(tuple(make(arm) for make in makers) for arm in arms)) for group, arms in study.groups.items())


def _published(arm: ArmResult) -> Cell:
    published = arm.record.get("published")
    return Cell(f"{published['test_loss']:.3f}", f"after {published['epochs']} epochs") if published else NONE


def _last16(arm: ArmResult) -> Cell:
    tests = [done.result["test"] for done in arm.done if done.result.get("test")]
    if not tests:
        return NONE
    test = tests[0]
    return Cell(number(test.get("last16")), f"{number(test.get('last16_low'))} to {number(test.get('last16_high'))}")


def _to(target: float) -> Callable[[ArmResult], Cell]:
    def make(arm: ArmResult) -> Cell:
        steps, seconds = ([reached(done, column, target) for done in arm.done] for column in ("step", "seconds"))
        hits = sum(math.isfinite(step) for step in steps)
        among = f"{hits} of {len(steps)} runs" if 0 < hits < len(steps) else ""
        if not math.isfinite(stats.median(steps)):
            return Cell("not reached", f"except in {among}" if among else "", "quiet")
        return Cell(f"{stats.median(steps):,.0f} steps", ", ".join(filter(None, (duration(stats.median(seconds)), arm.shared, among))))

    return make


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
        parts.append(f"{name} {many or ', '.join(map(given, choices))}")
    return Cell(" · ".join(parts), str(arm.record.get("sampler") or ""))


def _numbers(values: Sequence[Any]) -> bool:
    return all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in values)


def _trial_loss(arm: ArmResult) -> Cell:
    loss = chosen(arm).get("validation_loss")
    if loss is not None:
        return Cell(number(finite(loss)), f"chosen by {arm.record['chosen_by']}" if arm.record.get("chosen_by") else "")
    if reason := arm.record.get("no_winner"):
        return Cell("no winner", reason, tone="warn")
    ended = [trial for trial in arm.trials if trial]
    return Cell("no point stayed finite", tone="warn") if len(ended) == len(arm.trials) else Cell("–", tone="quiet")


def _edge(arm: ArmResult) -> Cell:
    edges = chosen(arm).get("at_edge") or []
    if not chosen(arm).get("values"):
        return Cell("–", tone="quiet")
    return Cell(f"on the edge of its grid: {', '.join(edges)}", tone="warn") if edges else Cell("inside its grid", tone="quiet")
