"""How far the runs of a store are, from its files alone: records of studies, statuses of runs under way, results. Loads without torch.

Nothing is locked and nothing written, so any number of watchers may look while others train. Files may vanish, or be half there, between
two looks: what cannot be read now is read at the next look.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from forwardgrad.lab.errors import UserError
from forwardgrad.lab.store.files import PACKED, parse_json, read_json
from forwardgrad.lab.store.packed import packed_runs, run_file
from forwardgrad.lab.store.run_files import read_result
from forwardgrad.lab.store.schema import read_study
from forwardgrad.lab.store.store import Store
from forwardgrad.lab.studies import format_estimator

FRESH_SECONDS = 60.0  # a run that has said nothing for longer is not under way: it was killed, or its machine is lost


@dataclass(frozen=True)
class Ended:
    """A run with a result. `spent` are the seconds from its beginning to its result, evaluations included."""

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
    """A run that has begun and has no result; `told` is when it last said something."""

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


@dataclass(frozen=True)
class Work:
    """What is left of some runs, in seconds of one of them alone: `longest` of a single run under way, `partly` where some is unknown."""

    seconds: float
    longest: float
    running: int
    partly: bool = False

    @property
    def left(self) -> float | None:
        """The time until the end if as many runs stay under way as are now."""
        if self.partly and not self.seconds:
            return None
        return max(self.longest, self.seconds / max(1, self.running))


@dataclass(frozen=True)
class Phase:
    """Where an arm is: `at` of `of` runs of a kind have begun ("trial", "seed", "run"), or it is "waiting", "stopped" or "done"."""

    kind: str
    at: int = 0
    of: int = 0


@dataclass(frozen=True)
class ArmNow:
    """An arm, or a run outside studies. `share` is how much of its phase is done, `rate` the steps a second of all its running runs."""

    study: str
    name: str
    phase: Phase
    share: float
    done: int
    planned: int
    running: int
    diverged: int
    failed: int
    best: float | None
    rate: float | None
    work: Work
    latest: float  # when its last run began


@dataclass(frozen=True)
class StudyNow:
    """A study, or all runs outside studies. `elapsed` counts from the first run's beginning, to its last word where none is under way."""

    name: str
    title: str
    done: int
    planned: int
    running: int
    diverged: int
    failed: int
    elapsed: float | None
    work: Work

    @property
    def complete(self) -> bool:
        return self.done >= self.planned


@dataclass(frozen=True)
class Snapshot:
    """A store at one moment; `arms` begin with those under way, the last begun first."""

    studies: tuple[StudyNow, ...]
    arms: tuple[ArmNow, ...]
    unread: tuple[str, ...]  # what is to say of records that cannot be read

    @property
    def complete(self) -> bool:
        """Whether there was something to do, and all of it is done; runs outside studies whose process is gone are not waited for."""
        return bool(self.studies or self.unread) and all(s.complete or (not s.name and not s.running) for s in self.studies)


def snapshot(store: Store, studies: Collection[str] | None = None, now: float | None = None) -> Snapshot:
    """The studies of these names, or everything, as it is now."""
    return Watch(store, studies).snapshot(now)


class Watch:
    """A store that is looked at again and again: every result is read once, every record when it has changed.

    With `runs`, only these runs and the studies that hold them are looked at; `names` says what runs outside studies are called.
    """

    def __init__(
        self,
        store: Store,
        studies: Collection[str] | None = None,
        runs: Sequence[str] | None = None,
        names: Mapping[str, str] | None = None,
    ) -> None:
        self.store, self.only, self.runs, self.names = store, studies, runs, names if names is not None else {}
        self.ended: dict[str, Ended] = {}
        self._going: dict[str, Going] = {}
        self._records: dict[Path, tuple[tuple[int, int], dict[str, Any]]] = {}
        self._called: dict[str, str] = {}

    def snapshot(self, now: float | None = None) -> Snapshot:
        now = time.time() if now is None else now
        records, unread = self._studies()
        unread += self._look()
        studies, arms, inside = [], [], set[str]()
        for record in records:
            mine = _identities(record)
            inside |= mine
            if (self.only is None or record["name"] in self.only) and (self.runs is None or mine & set(self.runs)):
                found = [self._arm(record, arm, now) for arm in record["arms"]]
                studies.append(self._total(record["name"], record["title"], mine, found, now))
                arms += found
        others = [run for run in (self.runs if self.runs is not None else [*self.ended, *self._going]) if run not in inside]
        if others and self.only is None:
            found = [self._alone(run, now) for run in others]
            studies.append(self._total("", "other runs" if studies else "runs", others, found, now))
            arms += [arm for arm in found if arm.latest]
        return Snapshot(tuple(studies), tuple(sorted(arms, key=_rank)), tuple(unread))

    def _studies(self) -> tuple[list[dict[str, Any]], list[str]]:
        """The records as they are now, and what is to say of those that cannot be read."""
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

    def _look(self) -> list[str]:
        """Read what is new of the runs; returns what is to say of a pack that cannot be read."""
        packed, unread = set[str](), list[str]()
        try:
            with os.scandir(self.store.root / "runs") as entries:
                there = {entry.name for entry in entries if entry.is_dir()}
        except OSError:
            there = set()
        try:
            packed |= packed_runs(self.store.root).keys()
        except UserError as error:
            unread.append(str(error))
        there |= packed
        if self.runs is not None:
            there &= set(self.runs) | {run for _, record in self._records.values() for run in _identities(record)}
        self.ended = {run: ended for run, ended in self.ended.items() if run in there}
        self._going = {}
        for run in sorted(there - self.ended.keys()):
            folder = self.store.folder(run)
            try:
                if (result := read_result(folder)) is not None:
                    begun, told = self._times(folder, result)
                    best = None if result["status"] != "finished" or (loss := result["validation_loss"]) is None else float(loss)
                    self.ended[run] = Ended(result, max(0, result["steps"]), best, max(0.0, result["seconds"], told - begun), begun, told)
                else:
                    self._going[run] = _going(folder / "status.json", (folder / "run.json").stat().st_mtime)
            except (UserError, OSError, OverflowError):
                continue
        return unread

    def _times(self, folder: Path, result: dict[str, Any]) -> tuple[float, float]:
        """When a run began and ended; one in a pack as if all of them had ended when the pack was written."""
        if (folder / "result.json").exists():
            return (folder / "run.json").stat().st_mtime, (folder / "result.json").stat().st_mtime
        told = (self.store.root / PACKED).stat().st_mtime
        return told - max(0.0, result["seconds"]), told

    def _arm(self, record: dict[str, Any], arm: dict[str, Any], now: float) -> ArmNow:
        trials = [trial["run"] for trial in arm["trials"]]
        finals = [run for run in arm["runs"] if isinstance(run, str)]
        tried = max(len(trials), 0 if finals else _count(arm.get("budget"), "trials"))
        trained = 0 if arm.get("no_winner") else len(finals) or _count(record, "seeds")
        kinds = {"trial": (trials, tried), "seed": (finals, trained)}
        group = [a for a in record["arms"] if a["group"] == arm["group"]]
        works = [
            self._work(runs, planned, *self._usual(kind, arm, group), now)
            for kind, (runs, planned) in kinds.items()
            if planned > len(self._ended_of(runs))
        ]
        return self._now(record["name"], arm["name"], kinds, _sum(works), now)

    def _alone(self, run: str, now: float) -> ArmNow:
        kinds = {"run": ([run], 1)}
        return self._now("", self.name(run), kinds, self._work([run], 1, None, None, now), now)

    def _now(self, study: str, name: str, kinds: dict[str, tuple[list[str], int]], work: Work, now: float) -> ArmNow:
        runs = [run for mine, _ in kinds.values() for run in mine]
        ended, going = self._ended_of(runs), self._going_of(runs)
        running = [run for run in going if run.fresh(now)]
        rates = [run.step / run.seconds for run in running if run.seconds > 0]
        losses = [run.best for run in ended] + [run.best for run in running]
        best = [loss for loss in losses if loss is not None and math.isfinite(loss)]
        planned = sum(of for _, of in kinds.values())
        phase, share = self._phase(kinds, now)
        return ArmNow(
            study=study,
            name=name,
            phase=phase,
            share=share,
            done=len(ended),
            planned=planned,
            running=len(running),
            diverged=sum(run.status == "diverged" for run in ended),
            failed=sum(run.status == "failed" for run in ended),
            best=min(best, default=None),
            rate=sum(rates) if rates else None,
            work=work,
            latest=max((run.begun for run in self._both(runs)), default=0.0),
        )

    def _phase(self, kinds: dict[str, tuple[list[str], int]], now: float) -> tuple[Phase, float]:
        """The phase under way, or the first that is not done, and how much of it is done."""
        last = (Phase("done"), 1.0)
        for kind, (runs, planned) in reversed(kinds.items()):
            done, going = len(self._ended_of(runs)), self._going_of(runs)
            running = [run for run in going if run.fresh(now)]
            share = min(1.0, (done + sum(run.step / run.steps for run in going)) / planned) if planned else 1.0
            if running:
                return Phase(kind, done + len(running), planned), share
            if done < planned:
                last = (Phase("stopped" if going else "waiting", done, planned), share)
        return last

    def _usual(self, kind: str, arm: dict[str, Any], group: list[dict[str, Any]]) -> tuple[float | None, float | None]:
        """Steps of a run of this kind, and seconds a step: this arm's own where there are some, else those of its group."""
        steps = pace = None
        for arms in ([arm], group):
            trials, finals = (self._both([run for a in arms for run in _runs(a, which)]) for which in ("trial", "seed"))
            steps = steps or _mean([_length(run) for run in (trials if kind == "trial" else finals)])
            if steps is None and kind == "seed" and (longer := _count(arm, "epochs")) and (short := _count(arm.get("budget"), "epochs")):
                steps = (_mean([_length(run) for run in trials]) or 0.0) * longer / short or None
            taken = [(run.spent, run.steps if isinstance(run, Ended) else run.step) for run in (*trials, *finals)]
            pace = pace or (sum(s for s, _ in taken) / n if (n := sum(n for _, n in taken)) else None)
            if steps and pace:
                break
        return steps, pace

    def _work(self, runs: list[str], planned: int, steps: float | None, pace: float | None, now: float) -> Work:
        going = self._going_of(runs)
        running = [run for run in going if run.fresh(now)]
        paces = [run.spent / run.step if run.step else pace for run in running]
        known = [(run.steps - run.step) * p for run, p in zip(running, paces, strict=True) if p is not None]
        stopped = [run for run in going if not run.fresh(now)]
        waiting = planned - len(self._ended_of(runs)) - len(going)
        partly = len(known) < len(running) or bool(stopped and pace is None) or (waiting > 0 and (steps is None or pace is None))
        seconds = sum(known) + sum(run.steps - run.step for run in stopped) * (pace or 0.0)
        return Work(seconds + max(0, waiting) * (steps or 0.0) * (pace or 0.0), max(known, default=0.0), len(running), partly)

    def _total(self, name: str, title: str, runs: Iterable[str], arms: list[ArmNow], now: float) -> StudyNow:
        both = self._both(list(runs))
        work = _sum([arm.work for arm in arms])
        end = now if work.running else max((run.told for run in both), default=now)
        elapsed = max(0.0, end - min(run.begun for run in both)) if both else None
        done, planned, diverged, failed = (sum(getattr(arm, n) for arm in arms) for n in ("done", "planned", "diverged", "failed"))
        return StudyNow(name, title, done, planned, work.running, diverged, failed, elapsed, work)

    def _ended_of(self, runs: Iterable[str]) -> list[Ended]:
        return [self.ended[run] for run in runs if run in self.ended]

    def _going_of(self, runs: Iterable[str]) -> list[Going]:
        return [self._going[run] for run in runs if run in self._going]

    def _both(self, runs: list[str]) -> list[Ended | Going]:
        return [*self._ended_of(runs), *self._going_of(runs)]

    def name(self, run: str) -> str:
        """What a run outside studies is called: as the caller says, else after its description."""
        if (given := self.names.get(run)) is not None:
            return given
        folder = self.store.folder(run)
        if run not in self._called:
            try:
                told = parse_json(folder / "run.json", content) if (content := run_file(folder, "run.json")) is not None else {}
                words = told["data"], told["model"], format_estimator(told["estimator"]), told["optimizer"]["name"]
                self._called[run] = f"{' '.join(words)} seed {told['seed']}"
            except (UserError, KeyError, TypeError, ValueError, AttributeError):
                return run
        return self._called[run]


def _going(path: Path, begun: float) -> Going:
    """A run under way by its status; one that has said nothing yet has only begun."""
    status = read_json(path)
    if status is None:
        return Going(0, 1, 0.0, None, begun, begun)
    numbers = [status.get(name) for name in ("step", "steps", "seconds")]
    if any(not isinstance(n, (int, float)) or isinstance(n, bool) or not 0 <= n < math.inf for n in numbers) or not status["steps"]:
        raise UserError(f"{path} is damaged")
    best, told = status.get("validation_loss"), path.stat().st_mtime
    best = float(best) if isinstance(best, (int, float)) else None
    return Going(min(status["step"], status["steps"]), status["steps"], float(status["seconds"]), best, min(begun, told), told)


def _runs(arm: dict[str, Any], kind: str) -> list[str]:
    return [trial["run"] for trial in arm["trials"]] if kind == "trial" else [run for run in arm["runs"] if isinstance(run, str)]


def _identities(record: dict[str, Any]) -> set[str]:
    return {run for arm in record["arms"] for kind in ("trial", "seed") for run in _runs(arm, kind)}


def _length(run: Ended | Going) -> int | None:
    """The steps that a run was planned to have; one that ended early does not tell, and one without a status not yet."""
    if isinstance(run, Ended):
        return run.steps if run.status == "finished" else None
    return run.steps if run.seconds else None


def _mean(values: list[int | None]) -> float | None:
    known = [value for value in values if value]
    return sum(known) / len(known) if known else None


def _count(record: Any, name: str) -> int:
    """A count that a record may have; older ones lack it."""
    value = record.get(name) if isinstance(record, dict) else None
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else 0


def _sum(works: list[Work]) -> Work:
    longest = max((work.longest for work in works), default=0.0)
    return Work(sum(w.seconds for w in works), longest, sum(w.running for w in works), any(w.partly for w in works))


def _rank(arm: ArmNow) -> tuple[int, float]:
    """Arms under way come first, then those that were begun, done, and not begun; of each the last begun first."""
    if arm.running:
        return 0, -arm.latest
    return (3 if not arm.latest else 2 if arm.done >= arm.planned else 1), -arm.latest
