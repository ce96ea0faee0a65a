"""What a step is to cost, set beforehand, against what was measured. Loads without torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

NN, CNN, CIFAR = ("nn", 64), ("cnn", 64), ("cifar-cnn", 64)
DEEP, SHALLOW = ("mlp-64x1024", 256), ("mlp-8x1024", 256)
TITLES = {NN: "NN", CNN: "CNN", CIFAR: "CIFAR CNN", ("nn", 8): "NN, batch 8"}
Place = tuple[str, int]  # network and batch
Quantity = Literal["to_backprop", "to_plain", "further", "peak_bytes"]


@dataclass(frozen=True)
class Goal:
    """A figure that is to be at most (with `strict`, below) a limit; `elsewhere` says how to get a figure that this command has not.

    The figure is what one arm has of `quantity` in one case; of peak bytes, over that of another arm or case.
    """

    figure: str
    limit: float
    place: Place | None = None
    arm: str = "low-rank"
    quantity: Quantity = "to_backprop"
    over: tuple[Place, str] | None = None
    strict: bool = False
    elsewhere: str = ""

    @property
    def bound(self) -> str:
        return f"{'<' if self.strict else '≤'} {self.limit:g}"


GOALS: tuple[Goal, ...] = (
    *(Goal(f"rank-1 step / backpropagation step, {TITLES[place]}", limit, place)
      for place, limit in ((NN, 0.55), (CNN, 0.70), (CIFAR, 0.66), (("nn", 8), 0.45))),
    Goal("rank-1 step / backpropagation step on a GPU, graphs on both sides", 0.67, elsewhere="forwardgrad bench --device cuda"),
    *(Goal(f"dense Gaussian step / backpropagation step, {TITLES[place]}", limit, place, "forward")
      for place, limit in ((NN, 1.5), (CNN, 1.05), (CIFAR, 1.05))),
    *(Goal(f"rank-1 step / plain forward pass, {TITLES[place]}", 2.2, place, quantity="to_plain") for place in (NN, CNN, CIFAR)),
    *(Goal(f"each further tangent of {k} / plain forward pass, {TITLES[place]}", 1.1, place, f"low-rank-k{k}", "further")
      for place in (NN, CNN, CIFAR) for k in (2, 4, 16)),
    Goal("peak memory of a rank-1 step / of a plain forward pass, MLP of 64 layers", 2.5, DEEP, quantity="peak_bytes",
         over=(DEEP, "plain")),
    Goal("peak memory of a rank-1 step / of backpropagation with checkpoints, MLP of 64 layers", 0.5, DEEP, quantity="peak_bytes",
         over=(DEEP, "backprop-checkpoint"), strict=True),
    Goal("peak memory of a rank-1 step, MLP of 64 layers / of 8 layers", 1.05, DEEP, quantity="peak_bytes", over=(SHALLOW, "low-rank")),
    Goal("minutes for Table I, all 14 rows at full length, on one H200", 10, elsewhere="forwardgrad reproduce table1 --device cuda"),
    Goal("32 runs of the NN batched on one GPU / one run", 4, elsewhere="forwardgrad tune --device cuda"),
)  # fmt: skip


@dataclass(frozen=True)
class Outcome:
    """A goal beside what was measured: `value` is None where there is nothing, and `verdict` says what that means."""

    goal: Goal
    value: float | None
    low: float | None
    high: float | None
    verdict: str


def outcomes(cases: Sequence[dict[str, Any]]) -> list[Outcome]:
    """Every goal, met, missed, too noisy or not measured; those of the processor are read from cases on the processor alone."""
    found = {(case["model"], case["batch"]): case for case in cases if case["accelerator"] == "cpu"}
    return [_outcome(goal, found) for goal in GOALS]


def _outcome(goal: Goal, cases: dict[Place, dict[str, Any]]) -> Outcome:
    if goal.place is None:
        return Outcome(goal, None, None, None, f"not measured here: {goal.elsewhere}")
    value, low, high, refused = _read(goal, cases)
    if value is None:
        return Outcome(goal, None, None, None, "too noisy" if refused else "not measured")
    met = value < goal.limit if goal.strict else value <= goal.limit
    return Outcome(goal, value, low, high, "met" if met else "missed")


def _read(goal: Goal, cases: dict[Place, dict[str, Any]]) -> tuple[float | None, float | None, float | None, bool]:
    assert goal.place is not None
    mine = _arm(cases.get(goal.place), goal.arm)
    if goal.quantity != "peak_bytes":
        found = mine.get(goal.quantity) or {}
        return found.get("value"), found.get("low"), found.get("high"), bool(found.get("refused"))
    assert goal.over is not None
    place, arm = goal.over
    other = _arm(cases.get(place), arm).get("peak_bytes")
    value = mine["peak_bytes"] / other if mine.get("peak_bytes") is not None and other else None
    return value, None, None, False


def _arm(case: dict[str, Any] | None, name: str) -> dict[str, Any]:
    """What was measured of an arm, empty where it was not."""
    return next((arm for arm in case["arms"] if arm["name"] == name and not arm["failed"]), {}) if case else {}
