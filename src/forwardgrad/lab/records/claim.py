"""A claim to a record: what was trained, what came of it for every seed, where, by which commands, and who says so. Loads without torch.

A claim is a small JSON file with a schema and a digest. It holds no code: an estimator or an optimizer of the claimant's own is an import
path and a digest of its source, as in the description of a run.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from forwardgrad.lab.errors import UserError
from forwardgrad.lab.records.tasks import LEAST_SEEDS, RecordTask, record_task
from forwardgrad.lab.statistics import stats
from forwardgrad.lab.store import check, read_json, write_json
from forwardgrad.lab.studies import Run, from_json, paths, to_json

SCHEMA = 1  # raised whenever a claim of an older version would be read wrongly
KIND = "forwardgrad record"
NUMBER, MAYBE = (int, float), (int, float, type(None))
CLAIM = {"kind": str, "task": str, "who": str, "figures": dict, "run": dict, "runs": list, "environment": dict, "commands": list}
RUN = {"seed": int, "run": str, "accuracy": NUMBER, "seconds": MAYBE, "passes": MAYBE, "peak_bytes": MAYBE, "target": (dict, type(None))}
TARGET = {"seconds": MAYBE, "passes": MAYBE, "step": int, "before": int}
WHERE = {"commit": (str, type(None)), "device": str, "threads": int, "torch": str}
SAME_MACHINE = ("device", "threads", "torch")  # what has to agree for seconds to be compared


@dataclass(frozen=True)
class ClaimedRun:
    """What came of one seed: test accuracy, training seconds, forward passes of work, peak memory; None where it was not measured.

    `target` has seconds, passes and step of the first evaluation at the task's target, and the step of the evaluation before. It is None
    where the task has no target, or the run never came there.
    """

    seed: int
    run: str
    accuracy: float
    seconds: float | None
    passes: float | None
    peak_bytes: int | None
    target: dict[str, Any] | None = None

    def figure(self, task: RecordTask) -> float | None:
        """What the task measures: the accuracy, or seconds or passes to its target."""
        if task.target is None:
            return self.accuracy
        return None if self.target is None else self.target[task.measure]


@dataclass(frozen=True)
class RecordClaim:
    """A claim; `run` is the description of its runs, with the seed of the first."""

    task: str
    who: str
    run: Run
    runs: tuple[ClaimedRun, ...]
    environment: dict[str, Any]
    commands: tuple[str, ...]

    @property
    def seeds(self) -> tuple[int, ...]:
        return tuple(run.seed for run in self.runs)

    def figures(self) -> dict[str, Any]:
        """The means over seeds with their 95 % t intervals, and the greatest peak memory; null for what was not measured."""
        task = record_task(self.task)
        found: dict[str, Any] = {
            "n": len(self.runs),
            "accuracy": estimated([run.accuracy for run in self.runs], most=1.0),
            "seconds": estimated([run.seconds for run in self.runs]),
            "passes": estimated([run.passes for run in self.runs]),
            "peak_bytes": None if any(run.peak_bytes is None for run in self.runs) else max(run.peak_bytes or 0 for run in self.runs),
        }
        if task.target is not None:
            for name in ("seconds", "passes"):
                found[f"{name}_to_target"] = estimated([None if run.target is None else run.target[name] for run in self.runs])
        return found

    def value(self) -> float:
        """The claimed figure: NaN where it was not measured in every run."""
        values = [run.figure(record_task(self.task)) for run in self.runs]
        return stats.estimate([value for value in values if value is not None]).mean if None not in values else math.nan


def estimated(values: Sequence[float | None], most: float = math.inf) -> dict[str, float | None] | None:
    """Mean, low and high of numbers; None where one is missing."""
    there = [float(value) for value in values if value is not None]
    if len(there) < len(values) or not there:
        return None
    found = stats.estimate(there, 0.0, most)
    return {"mean": found.mean, "low": found.low, "high": found.high}


def as_json(claim: RecordClaim) -> dict[str, Any]:
    """The claim as JSON values; the description has no seed, as each of the runs has its own."""
    description = {name: value for name, value in to_json(claim.run).items() if name != "seed"}
    return {
        "schema": SCHEMA,
        "kind": KIND,
        "task": claim.task,
        "who": claim.who,
        "figures": claim.figures(),
        "commands": list(claim.commands),
        "environment": claim.environment,
        "run": description,
        "runs": [dataclasses.asdict(run) for run in claim.runs],
    }


def write_claim(path: Path, claim: RecordClaim) -> None:
    """Write the file of a claim, whole or not at all."""
    write_json(path, as_json(claim))


def read_claim(path: Path) -> RecordClaim:
    """The claim in a file; UserError for one that is damaged, of another version, at odds with itself, or no run of its task."""
    stored = read_json(path)
    if stored is None:
        raise UserError(f"there is no file {path}: name the file of a claim, which `forwardgrad record claim` writes")
    if stored.get("kind") != KIND or stored.get("schema") != SCHEMA:
        raise UserError(
            f"{path} is no claim that this version reads (kind {stored.get('kind')!r}, schema {stored.get('schema')!r}; "
            f"it reads {KIND!r}, {SCHEMA}): name the file of a claim, or use the version that wrote it"
        )
    check(path, stored, CLAIM)
    check(path, stored["environment"], WHERE)
    task, runs = record_task(stored["task"]), tuple(_run(path, each) for each in stored["runs"])
    if not all(isinstance(command, str) for command in stored["commands"]):
        raise faulty(path, "a command of it is no text")
    if len(runs) < LEAST_SEEDS or len({run.seed for run in runs}) < len(runs):
        raise faulty(path, f"it has {len(runs)} runs, and a record needs {LEAST_SEEDS} or more, each with a seed of its own")
    run = from_json({**stored["run"], "seed": runs[0].seed}, str(path))
    claim = RecordClaim(task.name, stored["who"], run, runs, stored["environment"], tuple(stored["commands"]))
    _check_whole(path, task, claim, stored["figures"])
    return claim


def _run(path: Path, stored: Any) -> ClaimedRun:
    check(path, stored, RUN)
    if stored["target"] is not None:
        check(path, stored["target"], TARGET)
    numbers = [stored[name] for name in ("seed", "seconds", "passes", "peak_bytes")] + list((stored["target"] or {}).values())
    counts = all(value is None or (math.isfinite(value) and value >= 0) for value in numbers)
    if not counts or not 0 <= stored["accuracy"] <= 1:
        raise faulty(path, f"the figures of seed {stored['seed']} are impossible")
    return ClaimedRun(**{name: stored[name] for name in RUN})


def _check_whole(path: Path, task: RecordTask, claim: RecordClaim, figures: dict[str, Any]) -> None:
    """Refuse a claim whose parts do not agree with one another."""
    task.check(claim.run)
    for each in claim.runs:
        if dataclasses.replace(claim.run, seed=each.seed).identity != each.run:
            raise faulty(path, f"the run {each.run} of seed {each.seed} is not the one that it describes")
        if each.figure(task) is None:
            raise faulty(path, f"seed {each.seed} has no {task.measure} to the target" if task.target else "an accuracy is missing")
    if paths(claim.run) and claim.run.code is None:
        raise faulty(path, "it names code and has no digest of it")
    if not _alike(figures, claim.figures()):
        raise faulty(path, "its figures do not follow from its runs")


def _alike(stored: Any, wanted: Any) -> bool:
    """Whether two JSON values agree, numbers up to rounding."""
    if isinstance(wanted, dict):
        return isinstance(stored, dict) and stored.keys() == wanted.keys() and all(_alike(stored[name], wanted[name]) for name in wanted)
    if isinstance(wanted, float):
        return isinstance(stored, (int, float)) and math.isclose(stored, wanted, rel_tol=1e-9, abs_tol=1e-12)
    return bool(stored == wanted)


def faulty(path: Path, why: str) -> UserError:
    """The error for a claim that cannot be what `record claim` wrote."""
    return UserError(f"{path} is no claim to go by: {why}; make it anew from the runs with `forwardgrad record claim`")
