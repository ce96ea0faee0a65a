"""What a step was meant to cost, set before the measurement, and what it costs. Loads without torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

NN, CNN, CIFAR = ("nn", 64), ("cnn", 64), ("cifar-cnn", 64)
DEEP, SHALLOW = ("mlp-64x1024", 256), ("mlp-8x1024", 256)
TITLES = {NN: "NN", CNN: "CNN", CIFAR: "CIFAR CNN", ("nn", 8): "NN, batch 8"}
NetworkAndBatch = tuple[str, int]  # network and batch
Quantity = Literal["to_backprop", "to_best_backprop", "to_plain", "further", "peak_bytes"]
RANK_1, DENSE = ("low-rank", "low-rank-compiled"), ("forward", "forward-compiled")


@dataclass(frozen=True)
class StepGoal:
    """A figure that is to be at most a limit, or below it with `strict`.

    `elsewhere` is the command that gives a figure which this measurement does not have.

    The figure is what the better of some arms has of `quantity` in one case; of peak bytes, over that of another arm or case.
    """

    figure: str
    limit: float
    place: NetworkAndBatch | None = None
    arms: tuple[str, ...] = RANK_1
    quantity: Quantity = "to_backprop"
    accelerator: Literal["cpu", "cuda"] = "cpu"
    over: tuple[NetworkAndBatch, str] | None = None
    strict: bool = False
    elsewhere: str = ""

    @property
    def bound(self) -> str:
        return f"{'<' if self.strict else '≤'} {self.limit:g}"


AT_MOST = ((NN, 0.55), (CNN, 0.70), (CIFAR, 0.66), (("nn", 8), 0.45))
NETWORKS = (NN, CNN, CIFAR)


def _further(k: int) -> tuple[str, ...]:
    return f"low-rank-k{k}", f"low-rank-compiled-k{k}"


def _deep(what: str, limit: float, over: tuple[NetworkAndBatch, str], *, strict: bool = False) -> StepGoal:
    figure = f"peak memory of a rank-1 step, MLP of 64 layers / {what}"
    return StepGoal(figure, limit, DEEP, ("low-rank",), "peak_bytes", over=over, strict=strict)


_TABLE_1 = "forwardgrad reproduce table1"
GOALS: tuple[StepGoal, ...] = (
    *(StepGoal(f"rank-1 step / backpropagation step, {TITLES[place]}", limit, place) for place, limit in AT_MOST),
    *(StepGoal(f"the same / the faster of eager and compiled backpropagation, {TITLES[place]}", limit, place, quantity="to_best_backprop")
      for place, limit in AT_MOST),
    *(StepGoal(f"rank-1 step / the fastest backpropagation step on a GPU, graphs on both sides, {TITLES[place]}", 0.67, place,
           ("low-rank-graph",), "to_best_backprop", "cuda", elsewhere="forwardgrad bench --device cuda") for place in NETWORKS),
    *(StepGoal(f"dense Gaussian step / backpropagation step, {TITLES[place]}", limit, place, DENSE)
      for place, limit in ((NN, 1.5), (CNN, 1.05), (CIFAR, 1.05))),
    *(StepGoal(f"rank-1 step / plain forward pass, {TITLES[place]}", 2.2, place, quantity="to_plain") for place in NETWORKS),
    *(StepGoal(f"each further tangent of {k} / plain forward pass, {TITLES[place]}", 1.1, place, _further(k), "further")
      for place in NETWORKS for k in (2, 4, 16)),
    _deep("of a plain forward pass", 2.5, (DEEP, "plain")),
    _deep("of backpropagation with checkpoints", 0.5, (DEEP, "backprop-checkpoint"), strict=True),
    _deep("of 8 layers", 1.05, (SHALLOW, "low-rank")),
    StepGoal("minutes for Table I, all 14 rows at full length, on one H200", 10, elsewhere=f"{_TABLE_1} --device cuda --engine graph"),
    StepGoal("32 runs of the NN batched on one GPU / one run", 4, elsewhere="python benchmarks/batched_runs.py --device cuda"),
)  # fmt: skip


@dataclass(frozen=True)
class GoalOutcome:
    """A goal beside what was measured: `value` is None where there is nothing, and `verdict` says what that means."""

    goal: StepGoal
    value: float | None
    low: float | None
    high: float | None
    verdict: str


def outcomes(cases: Sequence[Mapping[str, Any]]) -> list[GoalOutcome]:
    """Every goal with its outcome: met, missed, too noisy or not measured.

    Goals of the processor ask its own cases alone, and all ask for steps of SGD.
    """
    found: dict[str, dict[NetworkAndBatch, Mapping[str, Any]]] = {"cpu": {}, "cuda": {}}
    for case in cases:
        if case.get("optimizer", "sgd") == "sgd":
            found[case["accelerator"]][case["model"], case["batch"]] = case
    return [_outcome(goal, found[goal.accelerator]) for goal in GOALS]


def _outcome(goal: StepGoal, cases: dict[NetworkAndBatch, Mapping[str, Any]]) -> GoalOutcome:
    if goal.place is None or (goal.elsewhere and goal.place not in cases):
        return GoalOutcome(goal, None, None, None, f"not measured here: {goal.elsewhere}")
    value, low, high, refused = _read(goal, cases)
    if value is None:
        return GoalOutcome(goal, None, None, None, "too noisy" if refused else "not measured")
    met = value < goal.limit if goal.strict else value <= goal.limit
    return GoalOutcome(goal, value, low, high, "met" if met else "missed")


def _read(goal: StepGoal, cases: dict[NetworkAndBatch, Mapping[str, Any]]) -> tuple[float | None, float | None, float | None, bool]:
    assert goal.place is not None
    mine = [_arm(cases.get(goal.place), name) for name in goal.arms]
    if goal.quantity != "peak_bytes":
        found = [arm.get(goal.quantity) or {} for arm in mine]
        told = [one for one in found if one.get("value") is not None]
        best = min(told, key=lambda one: float(one["value"]), default={})
        return best.get("value"), best.get("low"), best.get("high"), any(one.get("refused") for one in found)
    assert goal.over is not None
    place, arm = goal.over
    other, held = _arm(cases.get(place), arm).get("peak_bytes"), mine[0].get("peak_bytes")
    return held / other if held is not None and other else None, None, None, False


def _arm(case: Mapping[str, Any] | None, name: str) -> Mapping[str, Any]:
    """What was measured of an arm, empty where it was not."""
    return next((arm for arm in case["arms"] if arm["name"] == name and not arm["failed"]), {}) if case else {}
