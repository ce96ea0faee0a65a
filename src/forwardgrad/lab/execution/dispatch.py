"""Hands runs to workers: what is finished is not repeated, what is unfinished goes on.

Several commands may work on one store. A run that another command holds is left to it, and taken over where that command ends.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Sequence
from contextlib import suppress

from forwardgrad.lab import interrupts
from forwardgrad.lab.execution.place import Place
from forwardgrad.lab.execution.unit import FailedTogether, FewerRanks, Reply, Results, Unit, WorkerDied, give_up, take_apart
from forwardgrad.lab.execution.workers import POLL_SECONDS, Workers, ready
from forwardgrad.lab.store import Busy, Progress, Store, alone, failure, held
from forwardgrad.lab.studies import Run

TRIES = 3  # of a unit whose worker dies


def execute(runs: Sequence[Run], store: Store, place: Place, progress: Progress) -> Results:
    """The result of every run, by its identity; of one that failed too.

    Runs in progress are killed on Ctrl-C, and go on from their checkpoints when they are asked for again.

    Raises UserError for what is wrong with all of them, such as missing data, and OSError where the disk is full.
    """
    todo = {run.identity: run for run in runs}
    if place.retry_failed:
        for run in todo.values():
            _retry(run, store)
    results = {key: result for key in todo if (result := store.result(key)) is not None}
    waiting = [run for key, run in todo.items() if key not in results]
    with progress.over(store, [run.identity for run in waiting], done=len(results)):
        if waiting:
            with ready(place) as workers:
                results |= Dispatch(_units(waiting, store, place), workers, store, progress).results()
    if failed := sum(result["status"] == "failed" for result in results.values()):
        progress.say(f"{failed} of {len(todo)} runs failed: error.txt in their folders says why, and --retry-failed runs them again")
    return {key: results[key] for key in todo}


def _retry(run: Run, store: Store) -> None:
    if (result := store.result(run.identity)) is not None and result["status"] == "failed":
        with suppress(Busy):  # somebody else is at it
            failure.forget(run, store)


def _units(runs: list[Run], store: Store, place: Place) -> list[Unit]:
    """What one worker does at a time: a run, or several as one program."""
    if place.ranks > 1 or not (place.device.startswith("cuda") if place.batched is None else place.batched):
        return [(run,) for run in runs]
    from forwardgrad.lab.training import plan

    return plan(runs, store)


class Dispatch:
    """Gives units to workers and takes in what comes back, beside whatever other commands do in the same store."""

    def __init__(self, units: list[Unit], workers: Workers, store: Store, progress: Progress) -> None:
        self.waiting, self.workers, self.store, self.progress = deque(units), workers, store, progress
        self.under_way: dict[str, Unit] = {}
        self.found: Results = {}
        self.deaths: Counter[str] = Counter()
        self.ranks: dict[str, int] = {}  # that are left to runs which have lost some
        self.told = False
        workers.expect(len(units))

    def results(self) -> Results:
        """All results, once there are all."""
        try:
            while self.waiting or self.under_way:
                interrupts.check()
                self._fill()
                for unit, reply in self.workers.finished(POLL_SECONDS):
                    del self.under_way[_name(unit)]
                    self._take(unit, reply)
        except BaseException:
            self.workers.cancel()
            self._sweep()
            raise
        return self.found

    def _sweep(self) -> None:
        """Remove what workers had half written when they were ended."""
        for folder in (self.store.folder(run.identity) for unit in self.under_way.values() for run in unit):
            if folder.exists():
                with suppress(Busy), alone(folder):
                    pass

    def _fill(self) -> None:
        """Start units while there is room, those that others hold last; wait a little where there are no others."""
        room, skipped = self.workers.room, 0
        while len(self.under_way) < room and skipped < len(self.waiting):
            unit = self.waiting.popleft()
            if self._finished(unit):
                continue
            if any(held(self.store.folder(run.identity)) for run in unit):
                self.waiting.append(unit)
                skipped += 1
                continue
            self.under_way[_name(unit)] = unit
            self.workers.start(unit, self.store, self.ranks.get(_name(unit)))
        if self.waiting and not self.under_way:
            if not self.told:
                self.progress.say(f"waiting for {sum(map(len, self.waiting))} runs that another process is training")
                self.told = True
            time.sleep(POLL_SECONDS)

    def _finished(self, unit: Unit) -> bool:
        there = {run.identity: result for run in unit if (result := self.store.result(run.identity)) is not None}
        if len(there) == len(unit):
            self.found |= there
        return len(there) == len(unit)

    def _take(self, unit: Unit, reply: Reply) -> None:
        """Whatever comes back of a unit: results, something to try again, or what ends all."""
        if isinstance(reply, FewerRanks):
            self._go_on(unit, reply)
            return
        if isinstance(reply, WorkerDied):
            self.deaths[_name(unit)] += reply.counts
            if self.deaths[_name(unit)] < TRIES:
                self.waiting.appendleft(unit)
                return
            why = f"its worker {reply.how}, {TRIES} times in a row"
            reply = give_up(unit[0], self.store, why, f"{why}\n") if len(unit) == 1 else take_apart(unit, self.store)
        if isinstance(reply, Busy):
            self.waiting.append(unit)
        elif isinstance(reply, FailedTogether):
            open_runs = [run for run in unit if self.store.result(run.identity) is None]
            self.waiting += [part for part in (tuple(open_runs[::2]), tuple(open_runs[1::2])) if part]
            self.found |= {run.identity: result for run in unit if (result := self.store.result(run.identity)) is not None}
        elif isinstance(reply, dict):
            self.found |= reply
        elif isinstance(reply, Exception):
            raise reply

    def _go_on(self, unit: Unit, lost: FewerRanks) -> None:
        """Let a run go on with the ranks that are left, and say so."""
        self.ranks[_name(unit)] = lost.left
        self.waiting.appendleft(unit)
        (run,) = unit
        name = self.progress.names.get(run.identity, run.identity)
        there = (self.store.folder(run.identity) / "checkpoint.pt").exists()
        left = f"{lost.left} ranks" if lost.left > 1 else "one process"
        self.progress.say(f"{name}: {lost.how}; it {'goes on from its last checkpoint' if there else 'begins again'} with {left}")


def _name(unit: Unit) -> str:
    return " ".join(run.identity for run in unit)
