"""Map runs over this process or a pool of processes, alone or batched; what is finished is not repeated, what is unfinished goes on."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from forwardgrad.lab import interrupts
from forwardgrad.lab.errors import UserError
from forwardgrad.lab.progress import Progress
from forwardgrad.lab.run import Run
from forwardgrad.lab.store import Store, sweep


@dataclass(frozen=True)
class Place:
    """Where runs are executed: the device, the data folder, and how many runs at a time share the processor's cores.

    `batched`: whether runs that differ in seed and optimizer's numbers alone are trained as one program; None for on a GPU only.
    `tensorboard`: whether every run also writes events for TensorBoard, in the store's folder of that name.
    """

    device: str = "cpu"
    data_dir: Path | None = None
    jobs: int = 1
    batched: bool | None = None
    tensorboard: bool = False

    def __post_init__(self) -> None:
        if self.jobs < 1:
            raise UserError(f"the number of jobs must be at least 1, not {self.jobs}")


def execute(runs: Sequence[Run], store: Store, place: Place, progress: Progress) -> dict[str, dict[str, Any]]:
    """The result of every run, by its identity. Runs in progress are killed on Ctrl-C and resume from their checkpoints."""
    todo = {run.identity: run for run in runs}
    results = {key: result for key in todo if (result := store.result(key)) is not None}
    waiting = [run for key, run in todo.items() if key not in results]
    with progress.over(store, [run.identity for run in waiting], done=len(results)):
        units = _units(waiting, store, place)
        if place.jobs == 1:
            for unit in units:
                interrupts.check()
                results |= _together(unit, store, place)
        elif units:
            results |= _pooled(units, store, place)
    return {key: results[key] for key in todo}


def _units(runs: list[Run], store: Store, place: Place) -> list[tuple[Run, ...]]:
    """What one process does at a time: a run, or several as one program."""
    if not (place.device.startswith("cuda") if place.batched is None else place.batched):
        return [(run,) for run in runs]
    from forwardgrad.lab.batched import plan

    return plan(runs, store)


def _together(unit: tuple[Run, ...], store: Store, place: Place) -> dict[str, dict[str, Any]]:
    boards = store.root / "tensorboard" if place.tensorboard else None
    if len(unit) > 1:
        from forwardgrad.lab import batched

        return batched.train(unit, store, device=place.device, data_dir=place.data_dir, tensorboard=boards)
    from forwardgrad.lab.train import train

    (run,) = unit
    return {run.identity: train(run, store.folder(run.identity), device=place.device, data_dir=place.data_dir, tensorboard=boards)}


def _pooled(units: list[tuple[Run, ...]], store: Store, place: Place) -> dict[str, dict[str, Any]]:
    threads = max(1, (os.cpu_count() or 1) // place.jobs)
    pool = ProcessPoolExecutor(min(place.jobs, len(units)), get_context("spawn"), initializer=_start_worker, initargs=(threads,))
    pending: set[Future[dict[str, dict[str, Any]]]] = {pool.submit(_together, unit, store, place) for unit in units}
    results: dict[str, dict[str, Any]] = {}
    try:
        while pending:
            finished, pending = wait(pending, return_when=FIRST_COMPLETED)
            for future in finished:
                results |= future.result()
    except BrokenProcessPool as error:
        raise UserError("a worker process was killed (out of memory?): run the same command again to go on, with fewer --jobs") from error
    except BaseException:
        for process in list((pool._processes or {}).values()):  # a run only ends at its end: waiting for it would ignore Ctrl-C
            process.terminate()
            process.join()
        for run in (run for unit in units for run in unit):
            sweep(store.folder(run.identity))
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
    return results


def _start_worker(threads: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    threading.Thread(target=_follow, args=(os.getppid(),), daemon=True).start()
    import torch

    torch.set_num_threads(threads)


def _follow(parent: int) -> None:
    """End this worker once its parent is gone: nobody would take its results, and its runs would stay locked."""
    while os.getppid() == parent:
        time.sleep(1.0)
    os._exit(1)
