"""Execution: in process and in a pool the same results; nothing finished is repeated; failures are told."""

import dataclasses
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from forwardgrad.lab import functions, train
from forwardgrad.lab.errors import UserError
from forwardgrad.lab.execute import Place, execute
from forwardgrad.lab.progress import Progress
from forwardgrad.lab.run import Optimizer, Run
from forwardgrad.lab.store import Store, alone

RUN = Run("digits", "logistic", {"name": "forward", "clip": 1.0}, Optimizer("sgd", 0.01), epochs=2)
QUIET = Progress(quiet=True)


def test_a_pool_gives_the_same_results_as_one_process(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    runs = [dataclasses.replace(RUN, seed=seed) for seed in range(3)]
    serial = execute(runs, Store(tmp_path / "serial"), Place(), QUIET)
    pooled = execute(runs, Store(tmp_path / "pooled"), Place(jobs=2), QUIET)
    assert set(serial) == {run.identity for run in runs}
    for run in runs:
        one, other = (dict(results[run.identity], seconds=0) for results in (serial, pooled))
        assert one == other


def test_what_is_finished_is_not_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(tmp_path)
    first = execute([RUN, RUN], store, Place(), QUIET)
    monkeypatch.setattr(train, "train", lambda *_, **__: pytest.fail("repeated"))
    assert execute([RUN], store, Place(jobs=2), QUIET) == first


def test_two_processes_never_train_in_one_folder(tmp_path: Path) -> None:
    store = Store(tmp_path)
    with alone(store.folder(RUN.identity)), pytest.raises(UserError, match="another process is training"):
        execute([RUN], store, Place(), QUIET)
    assert execute([RUN], store, Place(), QUIET)[RUN.identity]["status"] == "finished"
    assert [path.name for path in (tmp_path / "runs").iterdir()] == [RUN.identity]


def test_a_mistake_in_a_worker_reaches_the_user(tmp_path: Path) -> None:
    runs = [Run("mnist", "nn", {"name": "backprop"}, Optimizer("sgd", 0.1), 1, seed=seed) for seed in (0, 1)]
    with pytest.raises(UserError, match="forwardgrad data fetch mnist"):
        execute(runs, Store(tmp_path / "out"), Place(data_dir=tmp_path / "empty", jobs=2), QUIET)


@pytest.mark.slow
def test_workers_end_with_their_parent(tmp_path: Path) -> None:
    words = ["demo", "--epochs", "5000", "--seeds", "2", "--jobs", "2", "--out", str(tmp_path)]
    parent = subprocess.Popen([sys.executable, "-m", "forwardgrad", *words], stderr=subprocess.DEVNULL, start_new_session=True)
    wait_for(lambda: len(list(tmp_path.glob("runs/*/status.json"))) > 0)
    parent.kill()
    parent.wait()

    def gone() -> bool:
        try:
            os.killpg(parent.pid, 0)
        except ProcessLookupError:
            return True
        return False

    assert wait_for(gone)


def wait_for(condition: Callable[[], bool], seconds: float = 60.0) -> bool:
    deadline = time.monotonic() + seconds
    while not (met := condition()) and time.monotonic() < deadline:
        time.sleep(0.2)
    return met


def test_lines_of_finished_runs_where_there_is_no_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    execute([RUN], Store(tmp_path), Place(), Progress({RUN.identity: "logistic forward"}))
    assert "[1/1] logistic forward: finished, validation loss" in capsys.readouterr().err


def test_fewer_than_one_job_is_refused() -> None:
    with pytest.raises(UserError, match="jobs must be at least 1"):
        Place(jobs=0)


@pytest.mark.parametrize("task", functions.TASKS, ids=lambda task: task.name)
def test_the_functions_have_their_minimum_where_they_say(task: functions.Task) -> None:
    at = torch.tensor(task.minimum, dtype=torch.float64, requires_grad=True)
    value = task.function(at)
    value.backward()
    assert value.item() == 0.0
    assert at.grad is not None
    assert at.grad.abs().max() == 0.0


def test_both_arms_go_down_from_the_same_start() -> None:
    task = dataclasses.replace(functions.TASKS[0], steps=300)
    for estimator in functions.ARMS.values():
        descent = functions.descend(task, estimator, lr=0.01)
        assert descent.path[0] == task.start
        assert len(descent.path) == len(descent.values) == 301
        assert descent.final < 0.1 * descent.values[0]


def test_a_descent_that_leaves_ends_as_a_result() -> None:
    descent = functions.descend(functions.TASKS[1], functions.ARMS["backprop"], lr=1.0)
    assert descent.diverged
    assert descent.final == math.inf
    assert all(math.isfinite(value) for value in descent.values)
    assert len(descent.values) == len(descent.path)
