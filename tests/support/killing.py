"""Kills a small study with SIGKILL at random moments, again and again, and starts it again: `killing.py FOLDER WORKERS KILLS`.

Children are forked from this process, which has torch loaded and one thread: a start costs milliseconds. Prints what came of it as JSON.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import random
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from forwardgrad.lab import environment, store
from forwardgrad.lab.data import datasets
from forwardgrad.lab.execution.dispatch import execute
from forwardgrad.lab.execution.place import Place
from forwardgrad.lab.store.progress import Progress
from forwardgrad.lab.store.store import Store
from forwardgrad.lab.studies.length import Length
from forwardgrad.lab.studies.run import Optimizer, Run
from forwardgrad.lab.studies.study import Arm, Study
from forwardgrad.lab.training import loop, schedule, training
from forwardgrad.lab.tuning.campaign import run_study

SPAN = 0.25  # seconds, the latest moment
PATIENCE = 20  # kills before a study may end
BASE = Run("digits", "logistic", {"name": "backprop"}, Optimizer("sgd", 0.1), epochs=2)
ARMS = tuple(
    Arm(name, "group", name, name, dataclasses.replace(BASE, estimator={"name": name}), {"lr": (0.01, 0.1)})
    for name in ("backprop", "forward")
)
STUDY = Study("killed", "Killed", ARMS, seeds=2, tuning=Length(epochs=1))


def work(root: Path, worker: int, workers: int) -> None:
    """One of the workers: its share of the runs, then a wait for the others'."""
    store = Store(root)

    def mine(runs: Sequence[Run]) -> dict[str, dict[str, Any]]:
        execute(runs[worker::workers], store, Place(), Progress(quiet=True))
        while any(store.result(run.identity) is None for run in runs):
            time.sleep(0.005)
        return {run.identity: store.result(run.identity) or {} for run in runs}

    run_study(STUDY, store, mine, "killed")


def start(root: Path, worker: int, workers: int) -> int:
    pid = os.fork()
    if pid == 0:
        try:
            work(root, worker, workers)
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    return pid


def ended(pid: int) -> bool:
    """Whether a child has come to its end by itself; it must have done so without an error."""
    found, status = os.waitpid(pid, os.WNOHANG)
    if found and status:
        sys.exit(f"a worker failed with status {status}")
    return bool(found)


def kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def outcome(root: Path) -> dict[str, Any]:
    here = Store(root, create=False)
    found: dict[str, Any] = {"study": store.read_study(root / "studies" / "killed.json")}
    for name in here.runs():
        folder = here.folder(name)
        result, evaluations = here.result(name) or {}, store.read_table(folder / "evaluations.csv")
        kept = [{key: value for key, value in table.items() if key != "seconds"} for table in (result, evaluations)]
        found[name] = [*kept, (folder / "losses.csv.gz").read_bytes(), (folder / "walk.csv").read_bytes()]
    return found


def main(folder: Path, workers: int, kills: int) -> None:
    loop.train = functools.partial(loop.train, checkpoint_seconds=0.0)  # type: ignore[assignment]
    schedule.FIRST_EVALUATIONS = (4, 8, 12)
    training.peak_bytes = lambda work, devices: work() or 0  # type: ignore[assignment]  # the true one waits for the garbage collector
    environment.commit = lambda: "abc"
    torch.set_num_threads(1)
    datasets.load("digits", 0)  # what is imported for it is there in every child
    moment, root = random.Random(workers), folder / "out"
    if os.waitpid(start(folder / "undisturbed", 0, 1), 0)[1]:
        sys.exit("the undisturbed study failed")
    wanted, told = outcome(folder / "undisturbed"), {"kills": 0, "studies": 0, "different": []}
    while told["kills"] < kills:
        alive: dict[int, int] = {}
        finished: set[int] = set()
        killed = 0
        while len(finished) < workers:
            for worker in set(range(workers)) - finished - alive.keys():
                alive[worker] = start(root, worker, workers)
            time.sleep(moment.uniform(0, SPAN))
            finished |= {worker for worker in list(alive) if ended(alive[worker]) and alive.pop(worker)}
            if killed < PATIENCE:  # then it may end
                for worker in moment.sample(sorted(alive), moment.randint(min(1, len(alive)), len(alive))):
                    kill(alive.pop(worker))
                    killed += 1
        told["kills"] += killed
        told["studies"] += killed > 0
        found = outcome(root)
        told["different"] += sorted(key for key in wanted.keys() | found.keys() if found.get(key) != wanted.get(key))
        shutil.rmtree(root)
    print(json.dumps(told))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
