"""How far the studies of a store are, and their arms. Loads without torch.

Nothing is locked and nothing written, so any number of watchers may look while others train.
"""

from __future__ import annotations

import math
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from forwardgrad.lab.errors import UserError
from forwardgrad.lab.store.files import parse_json
from forwardgrad.lab.store.packed import run_file
from forwardgrad.lab.store.runs_now import Ended, RunsNow, count_of, identities_of
from forwardgrad.lab.store.store import Store
from forwardgrad.lab.store.time_left import WorkLeft, total_of, usual_steps_and_pace, work_left
from forwardgrad.lab.studies import format_estimator


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
    work: WorkLeft
    latest: float  # when its last run began


@dataclass(frozen=True)
class StudyNow:
    """A study, or all runs outside studies. `elapsed` counts from the beginning of the first run to now.

    Where no run is under way it counts to the last status or result.
    """

    name: str
    title: str
    done: int
    planned: int
    running: int
    diverged: int
    failed: int
    elapsed: float | None
    work: WorkLeft

    @property
    def complete(self) -> bool:
        return self.done >= self.planned


@dataclass(frozen=True)
class StoreNow:
    """A store at one moment; `arms` begin with those under way, the last begun first."""

    studies: tuple[StudyNow, ...]
    arms: tuple[ArmNow, ...]
    unread: tuple[str, ...]  # what is to say of records that cannot be read

    @property
    def complete(self) -> bool:
        """Whether all is done, and there was something to do. A run outside studies whose process is gone is not waited for."""
        return bool(self.studies or self.unread) and all(s.complete or (not s.name and not s.running) for s in self.studies)


def snapshot(store: Store, studies: Collection[str] | None = None, now: float | None = None) -> StoreNow:
    """The studies of these names, or everything, as it is now."""
    return StoreWatch(store, studies).snapshot(now)


class StoreWatch:
    """Tells again and again how far a store is.

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
        self.found = RunsNow(store)
        self._called: dict[str, str] = {}

    @property
    def ended(self) -> dict[str, Ended]:
        """The runs that have a result, as they were last seen."""
        return self.found.ended

    def snapshot(self, now: float | None = None) -> StoreNow:
        now = time.time() if now is None else now
        records, unread = self.found.read_records()
        unread += self.found.read_runs(self.runs)
        studies, arms, inside = [], [], set[str]()
        for record in records:
            mine = identities_of(record)
            inside |= mine
            if (self.only is None or record["name"] in self.only) and (self.runs is None or mine & set(self.runs)):
                found = [self._arm(record, arm, now) for arm in record["arms"]]
                studies.append(self._total(record["name"], record["title"], mine, found, now))
                arms += found
        others = [run for run in (self.runs if self.runs is not None else [*self.found.ended, *self.found.going]) if run not in inside]
        if others and self.only is None:
            found = [self._alone(run, now) for run in others]
            studies.append(self._total("", "other runs" if studies else "runs", others, found, now))
            arms += [arm for arm in found if arm.latest]
        return StoreNow(tuple(studies), tuple(sorted(arms, key=_rank)), tuple(unread))

    def _arm(self, record: dict[str, Any], arm: dict[str, Any], now: float) -> ArmNow:
        trials = [trial["run"] for trial in arm["trials"]]
        finals = [run for run in arm["runs"] if isinstance(run, str)]
        tried = max(len(trials), 0 if finals else count_of(arm.get("budget"), "trials"))
        trained = 0 if arm.get("no_winner") else len(finals) or count_of(record, "seeds")
        kinds = {"trial": (trials, tried), "seed": (finals, trained)}
        group = [a for a in record["arms"] if a["group"] == arm["group"]]
        works = [
            work_left(self.found, runs, planned, *usual_steps_and_pace(self.found, kind, arm, group), now)
            for kind, (runs, planned) in kinds.items()
            if planned > len(self.found.ended_of(runs))
        ]
        return self._now(record["name"], arm["name"], kinds, total_of(works), now)

    def _alone(self, run: str, now: float) -> ArmNow:
        kinds = {"run": ([run], 1)}
        return self._now("", self.name(run), kinds, work_left(self.found, [run], 1, None, None, now), now)

    def _now(self, study: str, name: str, kinds: dict[str, tuple[list[str], int]], work: WorkLeft, now: float) -> ArmNow:
        runs = [run for mine, _ in kinds.values() for run in mine]
        ended, going = self.found.ended_of(runs), self.found.going_of(runs)
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
            latest=max((run.begun for run in self.found.both(runs)), default=0.0),
        )

    def _phase(self, kinds: dict[str, tuple[list[str], int]], now: float) -> tuple[Phase, float]:
        """The phase under way, or the first that is not done, and how much of it is done."""
        last = (Phase("done"), 1.0)
        for kind, (runs, planned) in reversed(kinds.items()):
            done, going = len(self.found.ended_of(runs)), self.found.going_of(runs)
            running = [run for run in going if run.fresh(now)]
            share = min(1.0, (done + sum(run.step / run.steps for run in going)) / planned) if planned else 1.0
            if running:
                return Phase(kind, done + len(running), planned), share
            if done < planned:
                last = (Phase("stopped" if going else "waiting", done, planned), share)
        return last

    def _total(self, name: str, title: str, runs: Iterable[str], arms: list[ArmNow], now: float) -> StudyNow:
        both = self.found.both(list(runs))
        work = total_of([arm.work for arm in arms])
        end = now if work.running else max((run.told for run in both), default=now)
        elapsed = max(0.0, end - min(run.begun for run in both)) if both else None
        done, planned, diverged, failed = (sum(getattr(arm, n) for arm in arms) for n in ("done", "planned", "diverged", "failed"))
        return StudyNow(name, title, done, planned, work.running, diverged, failed, elapsed, work)

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


def _rank(arm: ArmNow) -> tuple[int, float]:
    """Arms under way come first, then those that were begun, done, and not begun; of each the last begun first."""
    if arm.running:
        return 0, -arm.latest
    return (3 if not arm.latest else 2 if arm.done >= arm.planned else 1), -arm.latest
