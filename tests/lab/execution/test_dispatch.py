"""Execution: in process and in a pool the same results; nothing finished is repeated; failures are told."""

import dataclasses
import errno
import json
import math
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock
from tests.support.faults import seeded, tidy

from forwardgrad.lab.errors import UserError
from forwardgrad.lab.execution import unit
from forwardgrad.lab.execution.dispatch import execute
from forwardgrad.lab.execution.place import Place
from forwardgrad.lab.execution.workers import ready
from forwardgrad.lab.store import failure
from forwardgrad.lab.store.locks import Busy, alone, held
from forwardgrad.lab.store.progress import Progress
from forwardgrad.lab.store.store import Store
from forwardgrad.lab.studies.run import Optimizer, Run
from forwardgrad.lab.training import batched, functions, loop
from forwardgrad.lab.training.loop import SingleRun

RUN = Run("digits", "logistic", {"name": "forward", "clip": 1.0}, Optimizer("sgd", 0.01), epochs=2)
QUIET = Progress(quiet=True)


def test_what_is_finished_is_not_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(tmp_path)
    first = execute([RUN, RUN], store, Place(), QUIET)
    monkeypatch.setattr("forwardgrad.lab.execution.dispatch.ready", lambda *_: pytest.fail("workers were asked for"))
    assert execute([RUN], store, Place(jobs=2), QUIET) == first


class Listening(Progress):
    """Hears when it is said that another process is waited for."""

    def __init__(self) -> None:
        super().__init__(quiet=True)
        self.waiting = threading.Event()

    def say(self, line: str) -> None:
        if "that another process is training" in line:
            self.waiting.set()


def test_a_run_that_another_process_holds_is_waited_for_and_taken_over(tmp_path: Path) -> None:
    store, progress, others = Store(tmp_path), Listening(), dataclasses.replace(RUN, seed=1)
    begun = threading.Event()

    def hold() -> None:
        with alone(store.folder(RUN.identity)):
            begun.set()
            assert progress.waiting.wait(60)
            assert store.result(others.identity) is not None  # what nobody holds came first

    holder = threading.Thread(target=hold)
    holder.start()
    begun.wait()
    results = execute([RUN, others], store, Place(), progress)
    holder.join()
    assert progress.waiting.is_set()
    assert {result["status"] for result in results.values()} == {"finished"}
    tidy(store)


TWO = """
import json, os, sys, time
from pathlib import Path
from tests.support.faults import seeded
from forwardgrad.lab.training import loop
from forwardgrad.lab.execution import Place, execute
from forwardgrad.lab.store import Progress
from forwardgrad.lab.store import Store
out, log = Path(sys.argv[1]), Path(sys.argv[2])
real = loop.train_to_end
def waiting(work, *rest):
    with log.open("a") as file:
        file.write(f"{os.getpid()} {work.training.run.identity}\\n")
    deadline = time.monotonic() + 60  # until both are at a run
    while len({line.split()[0] for line in log.read_text().splitlines()}) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    return real(work, *rest)
loop.train_to_end = waiting
print(json.dumps(execute(seeded(*range(5)), Store(out), Place(threads=1), Progress(quiet=True))))
"""


@pytest.mark.full
def test_two_commands_share_the_runs_of_one_store(tmp_path: Path) -> None:
    command = [sys.executable, "-c", TWO, str(tmp_path / "out"), str(tmp_path / "log")]
    root = Path(__file__).parents[3]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, cwd=root) for _ in range(2)]
    one, other = (json.loads(process.communicate(timeout=300)[0]) for process in both)
    assert one == other
    assert len(one) == 5
    trained = [line.split() for line in (tmp_path / "log").read_text().splitlines()]
    assert sorted(identity for _, identity in trained) == sorted(one)  # each once
    assert len({pid for pid, _ in trained}) == 2
    tidy(Store(tmp_path / "out"))


def test_a_lock_whose_file_was_removed_meanwhile_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, acquire, others = tmp_path / "run", FileLock.acquire, FileLock(tmp_path / "run.lock")

    def late(lock: FileLock, **options: Any) -> Any:
        got = acquire(lock, **options)
        monkeypatch.setattr(FileLock, "acquire", acquire)
        Path(lock.lock_file).unlink()  # as the holder before does at its end ...
        others.acquire(timeout=0)  # ... after which the next one is quicker
        return got

    monkeypatch.setattr(FileLock, "acquire", late)
    with pytest.raises(Busy), alone(folder):
        pass
    assert held(folder)
    others.release()
    assert not held(folder)
    with alone(folder):
        assert (tmp_path / "run.lock").exists()
    assert not (tmp_path / "run.lock").exists()


THROWN: list[tuple[BaseException, str]] = [
    (ValueError("the loss\nis not one"), "ValueError: the loss is not one"),
    (MemoryError(), "the memory was exhausted (MemoryError)"),
    (torch.OutOfMemoryError("CUDA out of memory. Tried ..."), "the memory was exhausted (OutOfMemoryError)"),
    (ZeroDivisionError(), "ZeroDivisionError"),
    (SystemExit("enough"), "SystemExit: enough"),
    (ValueError("x" * 1000), "ValueError: " + "x" * 286 + " …"),
]


@pytest.mark.parametrize(("error", "reason"), THROWN, ids=lambda value: type(value).__name__)
def test_a_run_that_fails_is_a_result_and_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: BaseException, reason: str
) -> None:
    store, fine, real = Store(tmp_path), dataclasses.replace(RUN, seed=1), loop.train_to_end

    def failing(work: SingleRun, *rest: Any) -> Any:
        if work.training.run == RUN:
            raise error
        return real(work, *rest)

    monkeypatch.setattr(loop, "train_to_end", failing)
    results = execute([RUN, fine], store, Place(), Progress())
    assert results[fine.identity]["status"] == "finished"
    failed = store.result(RUN.identity)
    assert failed == results[RUN.identity]
    assert failed["status"] == "failed"
    assert failed["reason"] == reason
    assert failed["test"] is failed["validation_loss"] is failed["validation_accuracy"] is failed["diverged_at"] is None
    assert "in failing\n    raise error" in (store.folder(RUN.identity) / "error.txt").read_text()
    said = capsys.readouterr().err
    assert f"failed at step 0 ({reason})" in said
    assert "1 of 2 runs failed: error.txt in their folders says why" in said
    tidy(store)


def test_failed_runs_are_run_again_where_that_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, tries = Store(tmp_path), []

    def failing(work: SingleRun, *_: Any) -> Any:
        tries.append(work.training.run.seed)
        raise ValueError

    runs = seeded(*range(2))
    monkeypatch.setattr(loop, "train_to_end", failing)
    execute(runs, store, Place(), QUIET)
    execute(runs, store, Place(), QUIET)
    assert tries == [0, 1]
    execute(runs, store, Place(retry_failed=True), QUIET)
    assert tries == [0, 1, 0, 1]
    execute(runs, store, Place(retry_failed=True), QUIET)  # the same command comes to the same runs again
    assert tries == [0, 1, 0, 1]
    monkeypatch.undo()
    monkeypatch.setattr(failure, "_retried", set())  # as in another process
    results = execute(runs, store, Place(retry_failed=True), QUIET)
    assert {result["status"] for result in results.values()} == {"finished"}
    assert not list(tmp_path.rglob("error.txt"))


def test_a_full_disk_is_no_failed_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(tmp_path)

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        execute([RUN], store, Place(), QUIET)
    assert store.result(RUN.identity) is None
    monkeypatch.undo()
    assert execute([RUN], store, Place(), QUIET)[RUN.identity]["status"] == "finished"


def test_runs_that_fail_together_are_taken_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch that is too large becomes smaller ones, down to the run that does not even fit alone."""
    store, runs = Store(tmp_path), seeded(*range(5))
    real, sizes = loop.train_to_end, []

    def together(batch: batched.ManyRuns, *rest: Any) -> None:
        sizes.append(len(batch.runs))
        if len(batch.runs) > 2:
            raise torch.OutOfMemoryError("out of memory")
        real(batch, *rest)

    def alone(work: SingleRun, *rest: Any) -> None:
        sizes.append(1)
        real(work, *rest)

    monkeypatch.setattr(batched, "train_to_end", together)
    monkeypatch.setattr(loop, "train_to_end", alone)
    results = execute(runs, store, Place(batched=True), QUIET)
    assert sizes == [5, 3, 2, 2, 1]
    assert {result["status"] for result in results.values()} == {"finished"}
    assert not list((tmp_path / "batches").iterdir())
    tidy(store)


def test_a_gpu_that_is_lost_ends_the_command_and_not_the_next_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, runs = Store(tmp_path), seeded(0, 1)

    def failing(*_: Any) -> Any:
        raise RuntimeError("CUDA error: device-side assert triggered")

    monkeypatch.setattr(loop, "train_to_end", failing)
    monkeypatch.setattr(unit, "_gpu_is_lost", lambda device: True)
    with pytest.raises(UserError, match=r"device-side assert triggered\): run the same command again to go on"):
        execute(runs, store, Place(), QUIET)
    first, second = (store.result(run.identity) for run in runs)
    assert first is not None
    assert first["status"] == "failed"
    assert second is None


def test_workers_are_kept_between_calls(tmp_path: Path) -> None:
    with ready(Place()) as workers:
        with ready(Place()) as again:
            assert again is workers
        with ready(Place(threads=1)) as others:
            assert others is not workers
    with ready(Place()) as new:
        assert new is not workers


@pytest.mark.full
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


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"jobs": 0}, "jobs must be at least 1"),
    ({"threads": 0}, "threads must be at least 1"),
    ({"executor": "slurm"}, "unknown executor 'slurm': choose one of process, ray"),
    ({"address": "auto"}, "belong to --executor ray"),
    ({"gpus": 0.5}, "belong to --executor ray"),
    ({"executor": "ray", "gpus": 0.5}, "add --device cuda"),
    ({"executor": "ray", "device": "cuda", "gpus": 0.0}, "must be above 0 and at most 1"),
    ({"executor": "ray", "device": "cuda", "gpus": math.nan}, "must be above 0 and at most 1"),
    ({"executor": "ray", "device": "cuda:1"}, "the device is cpu or cuda, not 'cuda:1'"),
]


@pytest.mark.parametrize(("options", "sentence"), REFUSED)
def test_places_that_are_none_are_refused(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        Place(**options)


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
