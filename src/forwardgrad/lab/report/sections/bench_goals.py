"""What a step was meant to cost, set before the measurement, and what it costs; and the memory of a step alone. Loads without torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from forwardgrad.lab.report.blocks import NONE, Cell, Section, Table, number, tables
from forwardgrad.lab.report.sections.bench_figures import batch_of, network_of, update_of

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


MEMORY_HEADS = ("arm", "peak memory", "/ inference", "/ backprop", "process")
MEMORY_MEANING = (
    (
        "peak memory",
        "most bytes that torch's allocator gave out at once during one step, above parameters and input: activations, gradients, "
        "directions, and the scratch that operators ask it for",
    ),
    ("/ inference, / backprop", "the peak over that of a plain forward pass with its loss, and over that of backpropagation"),
    ("process", "how far the resident memory of a process of its own rose in a step without the profile that counts them"),
)
INFERENCE, REVERSE = "plain", "backprop"


def memory_section(stored: Mapping[str, Any]) -> Section:
    """The section on every case of memory.json."""
    groups = tuple((_memory_title(case), tuple(_memory_row(arm, case) for arm in case["arms"])) for case in stored["cases"])
    verdict = " ".join(_memory_sentence(case) for case in stored["cases"])
    table = Table(MEMORY_HEADS, groups, "The memory of one step", MEMORY_MEANING)
    return Section("memory", "The memory of one step", verdict, (verdict, table))


def memory_text(case: Mapping[str, Any]) -> str:
    """The rows of one case, aligned, for a terminal."""
    rows = [MEMORY_HEADS, *(tuple(cell.text for cell in _memory_row(arm, case)) for arm in case["arms"] if not arm["failed"])]
    widths = [max(len(row[i]) for row in rows) for i in range(len(MEMORY_HEADS))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    failed = [f"{arm['label']}: {arm['failed']}" for arm in case["arms"] if arm["failed"]]
    return "\n".join([_memory_title(case), *lines, *failed])


def _memory_title(case: Mapping[str, Any]) -> str:
    loss = " · loss in parts" if case["loss"] == "parts" else ""
    update = f" · {update_of(case)}" if update_of(case) else ""
    return f"{network_of(case)} · {batch_of(case)} · {case['parameters']:,} parameters{update}{loss}"


def _memory_row(arm: Mapping[str, Any], case: Mapping[str, Any]) -> tuple[Cell, ...]:
    if arm["failed"]:
        return (Cell(arm["label"], f"not measured: {arm['failed']}", "warn"), *[NONE] * (len(MEMORY_HEADS) - 1))
    shares = [_share(arm, case, other) for other in (INFERENCE, REVERSE)]
    return (
        Cell(arm["label"], arm["spec"] or "", arm["kind"]),
        Cell(tables.size(arm["peak_bytes"])),
        *(NONE if share is None else Cell(number(share)) for share in shares),
        Cell(tables.size(arm["process_bytes"])),
    )


def _share(arm: Mapping[str, Any], case: Mapping[str, Any], other: str) -> float | None:
    held = _arm(case, other).get("peak_bytes")
    return arm["peak_bytes"] / held if held else None


def _memory_sentence(case: Mapping[str, Any]) -> str:
    told = [(arm, _share(arm, case, INFERENCE)) for arm in case["arms"] if not arm["failed"] and arm["name"] != INFERENCE]
    words = [f"{number(share)} ({arm['label']})" for arm, share in told if share is not None]
    what = f"{network_of(case)}, {batch_of(case)}{', loss in parts' if case['loss'] == 'parts' else ''}"
    return f"{what}: in peaks of inference, a step holds {', '.join(words)}." if words else ""
