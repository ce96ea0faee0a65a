"""Trains units in a pool of processes on this machine.

Processes are used again for further units. One that dies costs only the steps of its own unit since the last checkpoint.
"""

from __future__ import annotations

import dataclasses
import os
import signal
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import get_context, resource_tracker

from pebble import ProcessExpired, ProcessPool

from forwardgrad.lab.errors import UserError
from forwardgrad.lab.execution.children import follow_parent, how
from forwardgrad.lab.execution.place import Place
from forwardgrad.lab.execution.unit import GpuLost, Reply, Unit, WorkerDied, train_unit
from forwardgrad.lab.store import Store


class Pool:
    """As many processes as the place has jobs, and no more than there are units, started with the first of them."""

    def __init__(self, place: Place) -> None:
        self.place = dataclasses.replace(place, threads=place.share)
        self.room = place.jobs
        self._processes = place.jobs
        self._running: dict[Future[Reply], Unit] = {}
        self._pool: ProcessPool | None = None
        self._fruitless = 0  # pools that broke since a unit came back

    def expect(self, units: int) -> None:
        """So many units are to come: processes are started for these, and where more are needed than there are, all anew."""
        self.room = max(1, min(self.place.jobs, units))
        if self._pool is None:
            self._processes = self.room
        elif self.room > self._processes and not self._running:
            self._end()
            self._processes = self.room

    def start(self, unit: Unit, store: Store, ranks: int | None) -> None:
        place = self.place.with_ranks(ranks)
        with _unheard():
            try:
                future = self._schedule(unit, store, place)
            except RuntimeError:  # a worker was killed while it had nothing to do, and the pool broke of it
                self.cancel()
                future = self._schedule(unit, store, place)
        self._running[future] = unit

    def _schedule(self, unit: Unit, store: Store, place: Place) -> Future[Reply]:
        if self._pool is None:
            context = get_context("spawn")
            self._pool = ProcessPool(self._processes, initializer=follow_parent, initargs=(os.getpid(),), context=context)
        return self._pool.schedule(_train_unit, args=(unit, store, place))

    def finished(self, seconds: float) -> Iterator[tuple[Unit, Reply]]:
        """The units that came back, waiting for one so long."""
        done, _ = wait(self._running, seconds, return_when=FIRST_COMPLETED)
        for future in done:
            unit = self._running.pop(future)
            try:
                yield unit, future.result()
                self._fruitless = 0
            except ProcessExpired as error:
                yield unit, WorkerDied(how(error.exitcode))
            except BrokenProcessPool as error:
                self._replace(error)
                yield unit, WorkerDied("the pool of processes broke", counts=False)

    def _replace(self, error: BrokenProcessPool) -> None:
        """Throw away a pool that lost an idle worker; the next unit starts another one."""
        if self._pool is None:
            return
        self._fruitless += 1
        if self._fruitless > 2:
            raise UserError("worker processes end before they have begun (too little memory?): try again, or with --jobs 1") from error
        self._end()

    def cancel(self) -> None:
        """End the workers, whatever they do; the next unit starts others."""
        self._running.clear()
        self._end()

    close = cancel

    def _end(self) -> None:
        if self._pool is not None:
            self._pool.stop()
            self._pool.join()
        self._pool = None


def _train_unit(unit: Unit, store: Store, place: Place) -> Reply:
    reply = train_unit(unit, store, place)
    if isinstance(reply, GpuLost):
        os._exit(1)  # the result is stored: whoever takes the unit up again finds it
    return reply


@contextmanager
def _unheard() -> Iterator[None]:
    """Start processes that a terminal's Ctrl-C does not reach, for this one decides: they inherit what is blocked here, as threads do."""
    resource_tracker.ensure_running()  # where that is started, it lets signals through again
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
