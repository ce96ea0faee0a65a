"""What is there to be a record: the finished arms of stored studies, and the claims in a folder. Loads without torch."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from forwardgrad.lab.errors import UserError
from forwardgrad.lab.records.claim import SAME_MACHINE, RecordClaim, read_claim
from forwardgrad.lab.records.claiming import claim_of
from forwardgrad.lab.records.tasks import LEAST_SEEDS, TASKS, RecordTask
from forwardgrad.lab.store import ArmResult, Store, results
from forwardgrad.lab.studies import from_json

CLAIMS = "records"  # the folder of claims in a folder of results
Machine = tuple[str, ...]


@dataclass(frozen=True)
class Candidate:
    """A claim, or an arm in the same form, and where it comes from; `timed` says whether its runs were made to be timed."""

    claim: RecordClaim
    source: str
    timed: bool

    @property
    def reverse(self) -> bool:
        """Whether it makes a backward pass; the estimators of claims were checked when the claims were made."""
        return bool(self.claim.run.estimator["name"] == "backprop")

    @property
    def machine(self) -> Machine:
        return tuple(str(self.claim.environment.get(name)) for name in SAME_MACHINE)


def candidates(folder: Path) -> list[Candidate]:
    """Everything in a folder of results that is of some task; UserError where it holds neither results nor claims."""
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}: name one that holds output folders, or claims in a folder {CLAIMS}")
    stores = [path for path in (folder, *sorted(folder.iterdir())) if path.is_dir() and Store.there(path)]
    claims = sorted((folder / CLAIMS).glob("*.json"))
    found = [candidate for path in stores for candidate in _stored(path)]
    return found + [Candidate(claim, f"{path.name} by {claim.who}", True) for path in claims for claim in (read_claim(path),)]


def _stored(path: Path) -> Iterator[Candidate]:
    """The arms of an output folder whose runs have all ended, for each task that they are of."""
    store = Store(path, create=False)
    for study in results.studies(store):
        for arm in study.arms:
            if arm.complete and all(done.result["status"] == "finished" for done in arm.done):
                yield from _arm(arm, f"{study.name}, {arm.name}")


def _arm(arm: ArmResult, source: str) -> Iterator[Candidate]:
    run = from_json(arm.run)
    seeds = [from_json({**arm.run, "seed": seed}) for seed in arm.seeds]
    for task in TASKS.values():
        try:
            task.check(run)
        except UserError:
            continue
        claim = claim_of(task, "the project", list(zip(seeds, arm.done, strict=True)))
        yield Candidate(claim, source, timed="target" in arm.record)


def machines(task: RecordTask, found: Sequence[Candidate]) -> list[Machine | None]:
    """The machines that a task has rows for: only seconds need one each. [None] where all machines stand in one row, or none has any."""
    if task.measure != "seconds":
        return [None]
    there: set[Machine | None] = {candidate.machine for candidate in found if not candidate.reverse and _counts(task, candidate)}
    return sorted(there, key=str) or [None]


def best(task: RecordTask, found: Sequence[Candidate], machine: Machine | None, *, reverse: bool) -> Candidate | None:
    """The best candidate with or without a backward pass: of those with seeds enough, where there are any."""
    wanted = [each for each in found if each.reverse == reverse and machine in (None, each.machine) and _counts(task, each)]
    enough = [each for each in wanted if len(each.claim.runs) >= LEAST_SEEDS] or wanted
    sign = 1 if task.measure == "accuracy" else -1
    return max(enough, key=lambda each: sign * each.claim.value(), default=None)


def _counts(task: RecordTask, candidate: Candidate) -> bool:
    """Whether a candidate has the figure of the task."""
    return (candidate.timed or task.measure != "seconds") and math.isfinite(candidate.claim.value())
