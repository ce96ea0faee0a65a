"""Map runs over this process or a pool of processes; what is finished is not repeated, what is unfinished goes on."""

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

from forwardgrad.lab.errors import UserError
from forwardgrad.lab.progress import Progress
from forwardgrad.lab.run import Run
from forwardgrad.lab.store import Store, sweep


@dataclass(frozen=True)
class Place:
    """Where runs are executed: the device, the data folder, and how many runs at a time share the processor's cores."""

    device: str = "cpu"
    data_dir: Path | None = None
    jobs: int = 1

    def __post_init__(self) -> None:
        if self.jobs < 1:
            raise UserError(f"the number of jobs must be at least 1, not {self.jobs}")


def execute(runs: Sequence[Run], store: Store, place: Place, progress: Progress) -> dict[str, dict[str, Any]]:
    """The result of every run, by its identity. Runs in progress are killed on Ctrl-C and resume from their checkpoints."""
    todo = {run.identity: run for run in runs}
    results = {key: result for key in todo if (result := store.result(key)) is not None}
    waiting = [run for key, run in todo.items() if key not in results]
    with progress.over(store, [run.identity for run in waiting], done=len(results)):
        if place.jobs == 1:
            results |= {run.identity: _one(run, store, place) for run in waiting}
        elif waiting:
            results |= _pooled(waiting, store, place)
    return results


def _one(run: Run, store: Store, place: Place) -> dict[str, Any]:
    from forwardgrad.lab.train import train

    return train(run, store.folder(run.identity), device=place.device, data_dir=place.data_dir)


def _pooled(runs: Sequence[Run], store: Store, place: Place) -> dict[str, dict[str, Any]]:
    threads = max(1, (os.cpu_count() or 1) // place.jobs)
    pool = ProcessPoolExecutor(min(place.jobs, len(runs)), get_context("spawn"), initializer=_start_worker, initargs=(threads,))
    pending: dict[Future[dict[str, Any]], str] = {pool.submit(_one, run, store, place): run.identity for run in runs}
    results: dict[str, dict[str, Any]] = {}
    try:
        while pending:
            finished, _ = wait(pending, return_when=FIRST_COMPLETED)
            for future in finished:
                results[pending.pop(future)] = future.result()
    except BrokenProcessPool as error:
        raise UserError("a worker process was killed (out of memory?): run the same command again to go on, with fewer --jobs") from error
    except BaseException:
        for process in list((pool._processes or {}).values()):  # a run only ends at its end: waiting for it would ignore Ctrl-C
            process.terminate()
            process.join()
        for run in runs:
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
