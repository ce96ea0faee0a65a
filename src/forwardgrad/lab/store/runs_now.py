"""The runs of a store as they are now: their results, and the statuses of those under way. Loads without torch.

Nothing is locked and nothing written. A file may vanish between two looks, or be half written. Then it is read at the next look.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from forwardgrad.lab.errors import UserError
from forwardgrad.lab.store.files import PACKED, read_json
from forwardgrad.lab.store.packed import packed_runs
from forwardgrad.lab.store.run_files import read_result
from forwardgrad.lab.store.schema import read_study
from forwardgrad.lab.store.store import Store

FRESH_SECONDS = 60.0  # a run that has said nothing for longer is not under way: it was killed, or its machine is lost


@dataclass(frozen=True)
class Ended:
    """A run with a result. `spent` is the time from its beginning to its result in seconds, with evaluations."""

    result: dict[str, Any]
    steps: int
    best: float | None
    spent: float
    begun: float
    told: float

    @property
    def status(self) -> str:
        return str(self.result["status"])


@dataclass(frozen=True)
class Going:
    """A run that has begun and has no result. `told` is when it last wrote its status."""

    step: int
    steps: int
    seconds: float
    best: float | None
    begun: float
    told: float

    @property
    def spent(self) -> float:
        return max(self.seconds, self.told - self.begun)

    def fresh(self, now: float) -> bool:
        return now - self.told <= FRESH_SECONDS


class RunsNow:
    """Reads the runs of a store again and again. A result is read once, and a record whenever it has changed."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.ended: dict[str, Ended] = {}
        self.going: dict[str, Going] = {}
        self._records: dict[Path, tuple[tuple[int, int], dict[str, Any]]] = {}

    def read_records(self) -> tuple[list[dict[str, Any]], list[str]]:
        """The records of studies, and a sentence for each that cannot be read."""
        found, unread = [], []
        for path in sorted((self.store.root / "studies").glob("*.json")):
            try:
                stat = path.stat()
                stamp = stat.st_mtime_ns, stat.st_size
                if path not in self._records or self._records[path][0] != stamp:
                    self._records[path] = stamp, read_study(path)
                found.append(self._records[path][1])
            except FileNotFoundError:
                continue
            except (UserError, OSError) as error:
                self._records.pop(path, None)
                unread.append(str(error))
        return found, unread

    def read_runs(self, only: Sequence[str] | None) -> list[str]:
        """Read what is new of the runs; returns a sentence where the pack cannot be read.

        With `only`, these runs alone are read, and the other runs of their studies.
        """
        there, unread = set[str](), list[str]()
        with contextlib.suppress(OSError), os.scandir(self.store.root / "runs") as entries:
            there |= {entry.name for entry in entries if entry.is_dir()}
        try:
            there |= packed_runs(self.store.root).keys()
        except UserError as error:
            unread.append(str(error))
        if only is not None:
            there &= set(only) | {run for _, record in self._records.values() for run in identities_of(record)}
        self.ended = {run: ended for run, ended in self.ended.items() if run in there}
        self.going = {}
        for run in sorted(there - self.ended.keys()):
            folder = self.store.folder(run)
            try:
                if (result := read_result(folder)) is not None:
                    begun, told = self._times(folder, result)
                    best = None if result["status"] != "finished" or (loss := result["validation_loss"]) is None else float(loss)
                    self.ended[run] = Ended(result, max(0, result["steps"]), best, max(0.0, result["seconds"], told - begun), begun, told)
                else:
                    self.going[run] = _going(folder / "status.json", (folder / "run.json").stat().st_mtime)
            except (UserError, OSError, OverflowError):
                continue
        return unread

    def _times(self, folder: Path, result: dict[str, Any]) -> tuple[float, float]:
        """When a run began and ended. A pack does not keep that: its runs count as ended when it was written."""
        if (folder / "result.json").exists():
            return (folder / "run.json").stat().st_mtime, (folder / "result.json").stat().st_mtime
        told = (self.store.root / PACKED).stat().st_mtime
        return told - max(0.0, result["seconds"]), told

    def ended_of(self, runs: Iterable[str]) -> list[Ended]:
        return [self.ended[run] for run in runs if run in self.ended]

    def going_of(self, runs: Iterable[str]) -> list[Going]:
        return [self.going[run] for run in runs if run in self.going]

    def both(self, runs: list[str]) -> list[Ended | Going]:
        return [*self.ended_of(runs), *self.going_of(runs)]


def _going(path: Path, begun: float) -> Going:
    """A run under way, from its status. A run without a status has only begun."""
    status = read_json(path)
    if status is None:
        return Going(0, 1, 0.0, None, begun, begun)
    numbers = [status.get(name) for name in ("step", "steps", "seconds")]
    if any(not isinstance(n, (int, float)) or isinstance(n, bool) or not 0 <= n < math.inf for n in numbers) or not status["steps"]:
        raise UserError(f"{path} is damaged")
    best, told = status.get("validation_loss"), path.stat().st_mtime
    best = float(best) if isinstance(best, (int, float)) else None
    return Going(min(status["step"], status["steps"]), status["steps"], float(status["seconds"]), best, min(begun, told), told)


def runs_of(arm: dict[str, Any], kind: str) -> list[str]:
    return [trial["run"] for trial in arm["trials"]] if kind == "trial" else [run for run in arm["runs"] if isinstance(run, str)]


def identities_of(record: dict[str, Any]) -> set[str]:
    return {run for arm in record["arms"] for kind in ("trial", "seed") for run in runs_of(arm, kind)}


def count_of(record: Any, name: str) -> int:
    """A count that a record may have; older ones lack it."""
    value = record.get(name) if isinstance(record, dict) else None
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else 0
