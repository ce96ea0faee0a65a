"""From finished runs to a claim. Loads without torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from forwardgrad.lab.errors import UserError
from forwardgrad.lab.records.claim import SAME_MACHINE, ClaimedRun, RecordClaim
from forwardgrad.lab.records.tasks import LEAST_SEEDS, RecordTask
from forwardgrad.lab.store import Done, Store, results
from forwardgrad.lab.studies import Run, to_json

HERE = ("forwardgrad", "commit", "python", "torch", "platform", "device", "threads", "cores", "tf32")  # kept of an environment


def claimed_runs(folders: Sequence[Path], task: RecordTask, who: str) -> RecordClaim:
    """The claim of runs that differ in their seeds alone, from their folders; UserError for runs that make no claim."""
    found = [_finished(folder) for folder in folders]
    runs = [run for run, _ in found]
    for run in runs:
        task.check(run)
    _check_alike(runs, [done for _, done in found])
    seeds = {run.seed for run in runs}
    if len(seeds) < len(runs):
        raise UserError("a run is named twice: name one run for each seed")
    if len(seeds) < LEAST_SEEDS:
        raise UserError(f"a record needs {LEAST_SEEDS} seeds or more, not {len(seeds)}: train the same command with another --seed")
    ordered = sorted(found, key=lambda pair: pair[0].seed)
    claim = claim_of(task, who, ordered)
    for each in claim.runs:
        if each.figure(task) is None:
            raise UserError(
                f"the run {each.run} has no {task.measure} to the target: every run of a record of {task.name} has to come to a validation "
                f"accuracy of {task.target}, trained by itself"
            )
    return claim


def claim_of(task: RecordTask, who: str, found: Sequence[tuple[Run, Done]]) -> RecordClaim:
    """The claim that some runs would make, however few they are."""
    first, commands = found[0], dict.fromkeys(str(done.environment.get("command", "not stored")) for _, done in found)
    where = {name: first[1].environment[name] for name in HERE if name in first[1].environment}
    return RecordClaim(task.name, who, first[0], tuple(outcome(run, done, task) for run, done in found), where, tuple(commands))


def outcome(run: Run, done: Done, task: RecordTask) -> ClaimedRun:
    """What came of one run. One that diverged gets nothing right, and arrives nowhere."""
    right = 0.0 if done.diverged or not done.accuracy >= 0 else done.accuracy
    seconds = float(done.result["seconds"]) if done.replicas == 1 else None  # of several as one program nobody's own
    peak = done.result.get("peak_bytes")
    target = None if done.diverged or task.target is None else _arrival(done, task.target)
    return ClaimedRun(run.seed, run.identity, right, seconds, done.passes, None if peak is None else int(peak), target)


def _arrival(done: Done, target: float) -> dict[str, Any] | None:
    """Seconds, passes and step of the first evaluation at the target, and the step of the evaluation before it."""
    table, before = done.evaluations, 0
    for step, seconds, accuracy in zip(table["step"], table["seconds"], table["validation_accuracy"], strict=True):
        if accuracy >= target:
            passes = None if done.passes is None else done.passes * step / max(1, int(done.result["steps"]))
            return {"seconds": seconds if done.replicas == 1 else None, "passes": passes, "step": int(step), "before": before}
        before = int(step)
    return None


def _finished(folder: Path) -> tuple[Run, Done]:
    """The run of a folder, which may also be one that was packed since."""
    root = folder.resolve().parent.parent
    if not Store.there(root):
        raise UserError(f"{folder} is no folder of a run: name OUT/runs/NAME, with the names that `forwardgrad list OUT` shows")
    found = results.finished(Store(root, create=False), folder.name)
    if found is None or found[1].result["status"] != "finished":
        raise UserError(f"the run {folder} has not finished: a record is made of finished runs alone")
    return found


def _check_alike(runs: Sequence[Run], done: Sequence[Done]) -> None:
    """Refuse runs of several descriptions, machines or commits."""
    if len({str(to_json(dataclasses.replace(run, seed=0))) for run in runs}) > 1:
        raise UserError("the runs differ in more than their seeds: a record is one description, trained with several seeds")
    for name in (*SAME_MACHINE, "commit"):
        if len(values := {str(each.environment.get(name)) for each in done}) > 1:
            raise UserError(f"the runs are of more than one {name} ({', '.join(sorted(values))}): train all of a record in one place")
        if name in SAME_MACHINE and "None" in values:
            raise UserError(f"a run does not say on what {name} it was trained: train it again with this version")
