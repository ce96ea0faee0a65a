"""How far arms without a backward pass came on each network: against backpropagation, and against goals set beforehand. No torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from forwardgrad.lab.recipes import NETWORKS
from forwardgrad.lab.report.blocks import exact, has_curve, percent
from forwardgrad.lab.statistics import stats
from forwardgrad.lab.store import ArmResult, Done, StudyResult

PAPER_STEPS = 39_100  # of the NN's rows in Table I: 50 epochs of 782 steps
MODELS = {network.title: model for model, network in NETWORKS.items()}


@dataclass(frozen=True)
class NetworkGoal:
    """What the best forward-only arm of a network is to reach, such as at most `points` of accuracy below backpropagation."""

    points: float
    epochs: int | None = None
    accuracy: float | None = None
    loss: float | None = None  # of validation, first seen after at most ...
    steps: int | None = None


GOALS: dict[str, NetworkGoal] = {
    "nn": NetworkGoal(points=0.2, epochs=10, loss=0.41, steps=PAPER_STEPS // 20),  # 0.41: the paper's own reading over its last ten epochs
    "cnn": NetworkGoal(points=0.3, accuracy=0.988),
    "cifar-cnn": NetworkGoal(points=5, accuracy=0.70),
}


def forward_only(arm: ArmResult) -> bool:
    """Whether an arm trains without a reverse pass; the linear classifier is a yardstick, and counts as neither."""
    return arm.kind not in ("backprop", "linear")


def accuracy(arm: ArmResult) -> float:
    """The mean test accuracy over seeds, below everything where there is none."""
    return stats.estimate([_accuracy(run) for run in arm.done]).mean if arm.done else -math.inf


def _accuracy(run: Done) -> float:
    """The test accuracy of a run. A run that failed counts as getting nothing right."""
    return run.accuracy if math.isfinite(run.accuracy) else 0.0


def yardstick(arms: Sequence[ArmResult]) -> ArmResult | None:
    """The arm of backpropagation among those of one network, None where it has no run."""
    return next((arm for arm in arms if arm.kind == "backprop" and arm.done), None)


def unequal(arm: ArmResult, backprop: ArmResult) -> list[str]:
    """What two arms differ in though a fair comparison holds it equal. Seeds are paired, and a yardstick may be another model."""
    mine, other = arm.terms, backprop.terms
    return [what for what in mine if what not in ("seeds", "model") and mine[what] != other[what]]


def gap(arm: ArmResult, backprop: ArmResult) -> stats.MeanEstimate | None:
    """Points of test accuracy that an arm has more than backpropagation, over the seeds that both have finished."""
    mine, other = arm.by_seed, backprop.by_seed
    seeds = sorted(mine.keys() & other.keys())
    if not seeds or unequal(arm, backprop):
        return None
    return stats.difference([100 * _accuracy(mine[seed]) for seed in seeds], [100 * _accuracy(other[seed]) for seed in seeds])


def verdicts(study: StudyResult) -> list[str]:
    """A sentence or two for every network: its best forward-only arm, and which goals that one meets."""
    return [_verdict(title, arms) for title, arms in study.groups.items()]


def _verdict(title: str, arms: Sequence[ArmResult]) -> str:
    finished = [arm for arm in arms if arm.complete]
    best = max((arm for arm in finished if forward_only(arm)), key=accuracy, default=None)
    if best is None:
        return f"{title}: no arm without a backward pass is finished yet."
    short = f" ({best.shortened})" if best.shortened else ""
    found = f"{title}: the best arm without a backward pass is {best.label}, {percent(accuracy(best))} of the test split{short}"
    backprop = yardstick(finished)
    if backprop is None:
        return f"{found}; backpropagation is not finished, so the goals are not decided."
    if what := unequal(best, backprop):
        return f"{found}; it is not comparable with backpropagation (different {', '.join(what)}), so the goals are not decided."
    apart = gap(best, backprop)
    goals = _goals(GOALS[MODELS[title]], best, apart) if title in MODELS else []
    return f"{found}, {_apart(apart)} backpropagation's {percent(accuracy(backprop))}.{''.join(f' {goal}' for goal in goals)}"


def _apart(apart: stats.MeanEstimate | None) -> str:
    assert apart is not None  # both arms are complete
    between = "" if apart.low is None or apart.high is None else f" (95 % interval of the difference {apart.low:+.2f} to {apart.high:+.2f})"
    return f"{abs(apart.mean):.2f} points {'below' if apart.mean < 0 else 'above'}{between.replace('-', MINUS)}"


MINUS = "\N{MINUS SIGN}"


def _goals(goal: NetworkGoal, best: ArmResult, apart: stats.MeanEstimate | None) -> list[str]:
    assert apart is not None
    epochs = max(float(run.result["epochs"]) for run in best.done)
    within = -apart.mean <= goal.points and (goal.epochs is None or epochs <= goal.epochs)
    said = [f"Goal, at most {goal.points:g} points below{f' in at most {goal.epochs} epochs' if goal.epochs else ''}: {_met(within)}."]
    if goal.accuracy is not None:
        said.append(f"Goal, at least {100 * goal.accuracy:.1f} %: {_met(accuracy(best) >= goal.accuracy)}.")
    if goal.loss is not None and goal.steps is not None:
        step = stats.median([_reached(run, goal.loss) for run in best.done])
        seen = f", seen after {step:,.0f}" if math.isfinite(step) else ", never seen"
        words = f"the paper's own loss, {exact(goal.loss)}, in at most a twentieth of its {PAPER_STEPS:,} steps"
        said.append(f"Goal, {words}: {_met(step <= goal.steps)}{seen}.")
    return said


def _reached(run: Done, loss: float) -> float:
    table = run.evaluations if has_curve(run) else {"step": [], "validation_loss": []}
    return stats.first_at_or_below(table["step"], table["validation_loss"], loss)


def _met(met: bool) -> str:
    return "met" if met else "missed"
