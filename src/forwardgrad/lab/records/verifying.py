"""From a claim and fresh runs to a verdict: holds, does not hold, or not decided. Loads without torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from forwardgrad.lab.errors import UserError
from forwardgrad.lab.records.claim import SAME_MACHINE, ClaimedRun, RecordClaim, as_json
from forwardgrad.lab.records.claiming import outcome
from forwardgrad.lab.records.tasks import LEAST_SEEDS, RecordTask, record_task
from forwardgrad.lab.report.blocks import duration, percent
from forwardgrad.lab.statistics import Replication, replication
from forwardgrad.lab.store import Done
from forwardgrad.lab.studies import Run, identity, stream

Outcome = Literal["holds", "does not hold", "not decided"]
TIMING = 0.05  # of the seconds: what one hour differs from another on the same machine


@dataclass(frozen=True)
class Verification:
    """What came of it, in a word, and why, in sentences."""

    outcome: Outcome
    why: str
    lines: tuple[str, ...]


def fresh_runs(claim: RecordClaim, seeds: int | None = None, first: int | None = None) -> list[Run]:
    """The claim's run with seeds that the claim did not use: as many as it has, from `first` or a number that follows from its content."""
    wanted = len(claim.seeds) if seeds is None else seeds
    if wanted < LEAST_SEEDS:
        raise UserError(f"a verification needs {LEAST_SEEDS} fresh seeds or more, not {wanted}")
    seed = 100_000 + stream(0, f"fresh seeds of {identity(as_json(claim))}") % 900_000 if first is None else first
    runs: list[Run] = []
    while len(runs) < wanted:
        if seed not in claim.seeds:
            runs.append(dataclasses.replace(claim.run, seed=seed))
        seed += 1
    return runs


def verdict(claim: RecordClaim, fresh: Sequence[tuple[Run, Done]]) -> Verification:
    """Compare a claim with fresh runs, of which all have a result."""
    task = record_task(claim.task)
    failed = sum(done.result["status"] == "failed" for _, done in fresh)
    if failed:
        why = f"{failed} of {len(fresh)} fresh runs failed: error.txt in their folders says why, and --retry-failed runs them again"
        return Verification("not decided", why, ())
    found = [outcome(run, done, task) for run, done in fresh]
    elsewhere = _elsewhere(claim, [done.environment for _, done in fresh])
    lines = (*_beside(claim, found), _seconds(claim, found, elsewhere))
    return _judged(task, claim, found, _examples(fresh), elsewhere, lines)


def _judged(
    task: RecordTask, claim: RecordClaim, found: list[ClaimedRun], examples: int, elsewhere: str, lines: tuple[str, ...]
) -> Verification:
    if wrong := _other_passes(claim, found):
        return Verification("does not hold", wrong, lines)
    if task.target is not None and (missed := sum(run.target is None for run in found)):
        why = f"{missed} of {len(found)} fresh runs never came to {percent(task.target)} of the validation split"
        return Verification("does not hold", why, lines)
    if task.measure == "seconds" and elsewhere:
        return Verification("not decided", f"every fresh run came to the target, but seconds were not compared: {elsewhere}", lines)
    figures = [run.figure(task) for run in found]
    if None in figures:
        return Verification("not decided", f"the {task.measure} of a fresh run were not measured", lines)
    values = [float(value) for value in figures if value is not None]
    test = _test(task, claim, values, found, examples)
    why = _compared(task, test)
    if not test.holds:
        return Verification("does not hold", why, lines)
    coarse = task.resolution * (1 if task.measure == "accuracy" else claim.value())
    if test.tolerance > coarse:
        more = f"a claim {_shown(task, coarse)} too good could pass among so few: add --seeds {2 * len(found)}"
        return Verification("not decided", f"{why}; {more}", lines)
    return Verification("holds", why, lines)


def _test(task: RecordTask, claim: RecordClaim, values: list[float], found: list[ClaimedRun], examples: int) -> Replication:
    """The test of what the task measures, the higher the better; the grain is a test example, an evaluation, or what timings differ by."""
    if task.measure == "accuracy":
        return replication(claim.value(), len(claim.runs), values, 1 / max(1, examples))
    grain = _between(found) * claim.value() + (TIMING * claim.value() if task.measure == "seconds" else 0.0)
    return replication(-claim.value(), len(claim.runs), [-value for value in values], grain)


def _between(found: list[ClaimedRun]) -> float:
    """What lies between two evaluations, as a share of the way to the target, in the fresh runs: no arrival is known any better."""
    return max(1 - float(run.target["before"] / run.target["step"]) for run in found if run.target is not None)


def _other_passes(claim: RecordClaim, found: list[ClaimedRun]) -> str:
    """What is wrong where fresh runs took other numbers of forward passes than were claimed: they follow from the description alone."""
    claimed = {run.passes for run in claim.runs}
    others = {run.passes for run in found if run.accuracy} - claimed
    if None in claimed or None in others or not others:
        return ""
    return f"a run takes {_numbers(others)} forward passes, and {_numbers(claimed)} were claimed"


def _numbers(values: set[float | None]) -> str:
    return " or ".join(f"{value:,.0f}" for value in sorted(value for value in values if value is not None))


def _elsewhere(claim: RecordClaim, environments: Sequence[dict[str, Any]]) -> str:
    """Why seconds cannot be compared; empty where they can."""
    for name in SAME_MACHINE:
        here = {str(each.get(name)) for each in environments}
        if here != {str(claim.environment.get(name))}:
            return f"the claim's {name} is {claim.environment.get(name)}, here {' and '.join(sorted(here))}"
    return ""


def _examples(fresh: Sequence[tuple[Run, Done]]) -> int:
    return min(int((done.result.get("test") or {}).get("examples", 1)) for _, done in fresh)


def _compared(task: RecordTask, test: Replication) -> str:
    claimed, found = abs(test.claimed), abs(test.found)
    much = f"at most {_shown(task, test.tolerance)} better would be chance"
    return f"claimed {_shown(task, claimed)} over {test.of} seeds, found {_shown(task, found)} over {test.n} fresh ones; {much}"


def _shown(task: RecordTask, value: float) -> str:
    if task.measure == "accuracy":
        return percent(value)
    return duration(value) if task.measure == "seconds" else f"{value:,.0f} passes"


def _beside(claim: RecordClaim, found: list[ClaimedRun]) -> tuple[str, ...]:
    mean = sum(run.accuracy for run in found) / len(found)
    claimed = sum(run.accuracy for run in claim.runs) / len(claim.runs)
    passes = {run.passes for run in found}, {run.passes for run in claim.runs}
    told = "not measured" if any(None in each for each in passes) else f"claimed {_numbers(passes[1])}, found {_numbers(passes[0])}"
    return (f"test accuracy: claimed {percent(claimed)}, found {percent(mean)}", f"forward passes of a run: {told}")


def _seconds(claim: RecordClaim, found: list[ClaimedRun], elsewhere: str) -> str:
    if elsewhere:
        return f"seconds: not compared, {elsewhere}"
    claimed, here = [run.seconds for run in claim.runs], [run.seconds for run in found]
    if None in claimed or None in here:
        return "seconds: not measured"
    means = [sum(value for value in values if value is not None) / len(values) for values in (claimed, here)]
    return f"seconds of training: claimed {duration(means[0])}, found {duration(means[1])}"
