"""A comparison: arms that differ in one thing, tuned with the same number of points, trained on fresh seeds.

`Study` is what a recipe returns and the command line runs; `Record` is what is stored in OUT/studies/<name>.json and all that a report
needs besides the runs themselves. Neither needs torch.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from forwardgrad.lab.errors import UserError
from forwardgrad.lab.run import SCHEMA, Precision, Run
from forwardgrad.lab.store import Store, read_study, write_json

TUNING_SEED = 10_000  # trials never share a split, an initialisation or a direction with the final runs, whose seeds count from 0

Results = dict[str, dict[str, Any]]
Execute = Callable[[Sequence[Run]], Results]


@dataclasses.dataclass(frozen=True)
class Published:
    """What the paper prints for an arm: the loss of the last 16 shuffled test images after so many epochs."""

    epochs: int
    test_loss: float


@dataclasses.dataclass(frozen=True)
class Arm:
    """One arm of a study. Arms of one `group` are compared with one another; `space` maps optimizer fields to grid values.

    `kind` is how the report tells arms apart, by colour and by mark; it sets "forward" and "backprop" beside one another.
    `full_epochs` is what fewer epochs are a shortened run of, where nothing is published.
    """

    name: str
    group: str
    kind: str
    label: str
    run: Run
    space: dict[str, tuple[float, ...]] = dataclasses.field(default_factory=dict)
    published: Published | None = None
    full_epochs: int | None = None

    def trials(self, epochs: int) -> list[tuple[dict[str, float], Run]]:
        """Every point of the grid as a run that never reads the test split."""
        points = [dict(zip(self.space, values, strict=True)) for values in itertools.product(*self.space.values())]
        base = dataclasses.replace(self.run, seed=TUNING_SEED, epochs=epochs, test=False)
        return [(point, _with(base, point)) for point in points]

    @property
    def points(self) -> int:
        return math.prod(len(values) for values in self.space.values()) if self.space else 0


@dataclasses.dataclass(frozen=True)
class Study:
    """Arms with the same tuning budget, and the seeds of their final runs."""

    name: str
    title: str
    arms: tuple[Arm, ...]
    seeds: int = 1
    tuning_epochs: int = 10

    def __post_init__(self) -> None:
        if self.seeds < 1:
            raise UserError(f"the number of seeds must be at least 1, not {self.seeds}")
        if self.tuning_epochs < 1:
            raise UserError(f"the number of tuning epochs must be at least 1, not {self.tuning_epochs}")
        for group in {arm.group for arm in self.arms}:
            budgets = {arm.points for arm in self.arms if arm.group == group and arm.space}
            if len(budgets) > 1:
                raise UserError(f"unequal tuning budgets in {group!r}: {sorted(budgets)} points; give every tuned arm the same number")

    def computed_in(self, precision: Precision) -> Study:
        """The same study with the layers of every run in this precision."""
        arms = tuple(dataclasses.replace(arm, run=dataclasses.replace(arm.run, precision=precision)) for arm in self.arms)
        return dataclasses.replace(self, arms=arms)


def run_study(study: Study, store: Store, execute: Execute, command: str, names: dict[str, str] | None = None) -> dict[str, Any]:
    """Tune every arm on validation, train each winner on fresh seeds, and store which run was what. Returns the stored record.

    `names`, if given, is filled with what to call each run on a display.
    """
    names = names if names is not None else {}
    trials = {arm.name: arm.trials(study.tuning_epochs) if arm.space else [] for arm in study.arms}
    names.update({run.identity: f"{name} trial {_short(values)}" for name, tried in trials.items() for values, run in tried})
    searched = execute([run for arm in study.arms for _, run in trials[arm.name]])
    chosen = {arm.name: _choose(arm, trials[arm.name], searched) for arm in study.arms}
    finals = {
        arm.name: [dataclasses.replace(_with(arm.run, chosen[arm.name]["values"]), seed=seed) for seed in range(study.seeds)]
        for arm in study.arms
    }
    names.update({run.identity: f"{name} seed {run.seed}" for name, runs in finals.items() for run in runs})
    _record(study, store, command, trials, chosen, finals)  # before the long part: a report can be made of what is there
    execute([run for arm in study.arms for run in finals[arm.name]])
    return _record(study, store, command, trials, chosen, finals)


def _short(values: dict[str, float]) -> str:
    return " ".join(f"{name}={value:g}" for name, value in values.items())


def _with(run: Run, point: dict[str, float]) -> Run:
    optimizer = dataclasses.replace(run.optimizer, **point)  # type: ignore[arg-type]
    return dataclasses.replace(run, optimizer=optimizer)


def _choose(arm: Arm, trials: Sequence[tuple[dict[str, float], Run]], results: Results) -> dict[str, Any]:
    """The trial with the least validation loss, and on which edges of its grid it lies."""
    finished = [(results[run.identity], values) for values, run in trials if results[run.identity]["status"] == "finished"]
    fit = [(result["validation_loss"], values) for result, values in finished if result["validation_loss"] is not None]
    if not trials:
        return {"values": {}, "validation_loss": None, "at_edge": []}
    if not fit:  # every point diverged: the least learning rate is the best guess there is, and the report shows it
        values = min((values for values, _ in trials), key=lambda values: values.get("lr", 0.0))
        return {"values": values, "validation_loss": None, "at_edge": sorted(arm.space)}
    loss, values = min(fit, key=lambda pair: pair[0])
    edges = [name for name, grid in arm.space.items() if len(grid) > 1 and values[name] in (min(grid), max(grid)) and values[name] != 0]
    return {"values": values, "validation_loss": loss, "at_edge": edges}


def _record(
    study: Study,
    store: Store,
    command: str,
    trials: dict[str, list[tuple[dict[str, float], Run]]],
    chosen: dict[str, dict[str, Any]],
    finals: dict[str, list[Run]],
) -> dict[str, Any]:
    """Store the study; arms of the same study that were run before and are not part of this call are kept."""
    path = store.root / "studies" / f"{study.name}.json"
    with store.changing():
        return _merged(study, path, command, trials, chosen, finals)


def _merged(
    study: Study,
    path: Path,
    command: str,
    trials: dict[str, list[tuple[dict[str, float], Run]]],
    chosen: dict[str, dict[str, Any]],
    finals: dict[str, list[Run]],
) -> dict[str, Any]:
    before = {arm["name"]: arm for arm in (read_study(path)["arms"] if path.exists() else [])}
    for arm in study.arms:
        before[arm.name] = {
            "name": arm.name,
            "group": arm.group,
            "kind": arm.kind,
            "label": arm.label,
            "command": command,
            "published": dataclasses.asdict(arm.published) if arm.published else None,
            "space": {name: list(values) for name, values in arm.space.items()},
            "tuning_epochs": study.tuning_epochs if arm.space else 0,
            "trials": [{"values": values, "run": run.identity} for values, run in trials[arm.name]],
            "chosen": chosen[arm.name],
            "runs": [run.identity for run in finals[arm.name]],
            **({"full_epochs": arm.full_epochs} if arm.full_epochs else {}),
        }
    record = {"schema": SCHEMA, "name": study.name, "title": study.title, "arms": list(before.values())}
    write_json(path, record)
    return record


def logspace(low: float, high: float, count: int) -> tuple[float, ...]:
    """`count` values from 10^low to 10^high, evenly spaced in the exponent, to six significant digits."""
    return tuple(float(f"{10 ** (low + (high - low) * i / (count - 1)):.6g}") for i in range(count))
