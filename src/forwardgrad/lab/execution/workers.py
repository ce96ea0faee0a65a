"""Workers that train units: this process, a pool of processes on this machine, or a Ray cluster."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from forwardgrad.lab.execution.place import Place
from forwardgrad.lab.execution.unit import Reply, Unit, train_unit
from forwardgrad.lab.store import Store

POLL_SECONDS = 0.5  # that workers are waited for at a time


class Workers(Protocol):
    """What units are given to. Every unit comes back, with a result or with what happened to it."""

    @property
    def room(self) -> int:
        """How many units may be under way."""

    def expect(self, units: int) -> None:
        """Hear how many units are to come, before the first of them."""

    def start(self, unit: Unit, store: Store, ranks: int | None) -> None:
        """Have a unit trained; where it has lost ranks, by those that are left."""

    def finished(self, seconds: float) -> Iterator[tuple[Unit, Reply]]:
        """The units that came back, waiting for one so long."""

    def cancel(self) -> None:
        """End what is under way at once; more may be started."""

    def close(self) -> None:
        """End for good."""


class InThisProcess:
    """This process: a unit is done when it has been started."""

    room = 1

    def __init__(self, place: Place) -> None:
        self.place = place
        self._done: list[tuple[Unit, Reply]] = []

    def expect(self, units: int) -> None:
        """One after the other, however many."""

    def start(self, unit: Unit, store: Store, ranks: int | None) -> None:
        self._done.append((unit, train_unit(unit, store, self.place.with_ranks(ranks))))

    def finished(self, seconds: float) -> Iterator[tuple[Unit, Reply]]:
        while self._done:
            yield self._done.pop()

    def cancel(self) -> None:
        self._done.clear()

    close = cancel


_ready: dict[Place, Workers] = {}


@contextmanager
def ready(place: Place) -> Iterator[Workers]:
    """The workers of a place, started once: within this block every `execute` there uses the same."""
    if place in _ready:
        yield _ready[place]
        return
    workers = _ready[place] = _workers(place)
    try:
        yield workers
    finally:
        del _ready[place]
        workers.close()


def _workers(place: Place) -> Workers:
    if place.executor == "ray":
        from forwardgrad.lab.execution.cluster import Cluster

        return Cluster(place)
    if place.jobs > 1:
        from forwardgrad.lab.execution.pool import Pool

        return Pool(place)
    return InThisProcess(place)
