"""A pool of processes: the same bits as one process, whatever befalls its workers."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tests.support.faults import ALWAYS_DIES, DIES_ONCE, EXHAUSTS, EXITS, FULL, LEAVES, THROWS, folder, left, seeded, tidy

from forwardgrad.lab.errors import UserError
from forwardgrad.lab.execution.dispatch import execute
from forwardgrad.lab.execution.place import Place
from forwardgrad.lab.execution.pool import Pool, how
from forwardgrad.lab.execution.workers import ready
from forwardgrad.lab.store.progress import Progress
from forwardgrad.lab.store.store import Store
from forwardgrad.lab.studies.run import Optimizer, Run
from forwardgrad.lab.tuning.cost import Cost, clock, cost_table

QUIET = Progress(quiet=True)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """What a place asks for must not be what is there anyway."""
    before = torch.get_num_threads()
    yield
    assert torch.get_num_threads() == before


@pytest.mark.full
def test_a_pool_gives_the_same_bits_as_one_process(tmp_path: Path) -> None:
    runs = [*seeded(0, 1), LEAVES]
    serial, pooled = Store(tmp_path / "serial"), Store(tmp_path / "pooled")
    results = execute(runs, serial, Place(threads=1), QUIET)
    assert [results[run.identity]["status"] for run in runs] == ["finished", "finished", "diverged"]
    assert execute(runs, pooled, Place(jobs=2, threads=1), QUIET).keys() == results.keys()
    for run in runs:
        assert left(pooled, run) == left(serial, run)
    tidy(pooled)


@pytest.mark.full
def test_whatever_befalls_a_worker_costs_its_own_run_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store, serial, fine = Store(tmp_path / "out"), Store(tmp_path / "serial"), seeded(0, 1, DIES_ONCE)
    fails = seeded(THROWS, ALWAYS_DIES, EXHAUSTS, EXITS)
    place = Place(jobs=2, threads=1, path=folder(tmp_path / "path", store), checkpoint_seconds=0.0)
    results = execute([*fails, *fine], store, place, Progress())
    assert (tmp_path / "path" / "killed").exists()
    execute(fine, serial, Place(threads=1), QUIET)
    for run in fine:
        assert left(store, run) == left(serial, run)
    assert {results[run.identity]["status"] for run in fails} == {"failed"}
    reasons = [results[run.identity]["reason"] for run in fails]
    assert reasons == [
        "ValueError: no such luck",
        "its worker was killed by SIGKILL, as is done where memory runs out, 3 times in a row",
        "the memory was exhausted (MemoryError)",
        "SystemExit: enough",
    ]
    assert 'raise ValueError("no such' in (store.folder(fails[0].identity) / "error.txt").read_text()
    assert "4 of 7 runs failed" in capsys.readouterr().err
    tidy(store)


def test_a_mistake_ends_a_pool_at_once(tmp_path: Path) -> None:
    runs = [Run("mnist", "nn", {"name": "backprop"}, Optimizer("sgd", 0.1), 1, seed=seed) for seed in (0, 1)]
    place = Place(data_dir=tmp_path / "empty", jobs=2, threads=1)
    with pytest.raises(UserError, match="forwardgrad data fetch mnist"):
        execute(runs, Store(tmp_path / "out"), place, QUIET)


def test_a_full_disk_is_told_with_its_number_and_file(tmp_path: Path) -> None:
    store = Store(tmp_path / "out")
    place = Place(jobs=2, threads=1, path=folder(tmp_path / "path", store))
    with pytest.raises(OSError, match="No space left on device") as raised:
        execute(seeded(FULL), store, place, QUIET)
    assert (raised.value.errno, raised.value.strerror, raised.value.filename) == (28, "No space left on device", "some/file")
    assert store.result(seeded(FULL)[0].identity) is None


@pytest.mark.full
def test_a_pool_goes_on_after_a_worker_was_killed_with_nothing_to_do(tmp_path: Path) -> None:
    store, place = Store(tmp_path), Place(jobs=2, threads=1)
    with ready(place) as workers:
        assert isinstance(workers, Pool)
        execute(seeded(2, 3), store, place, QUIET)
        assert workers._pool is not None
        for pid in list(workers._pool._pool_manager.worker_manager.workers):
            os.kill(pid, signal.SIGKILL)
        results = execute(seeded(0, 1), store, place, QUIET)
    assert {result["status"] for result in results.values()} == {"finished"}


def processes(pool: Pool) -> int:
    return 0 if pool._pool is None else len(pool._pool._pool_manager.worker_manager.workers)


@pytest.mark.full
def test_there_are_never_more_processes_than_runs(tmp_path: Path) -> None:
    store, place = Store(tmp_path), Place(jobs=99, threads=1)
    with ready(place) as workers:
        assert isinstance(workers, Pool)
        for seeds, there in (((0,), 1), ((0, 1, 2), 2), ((3,), 2), ((4, 5, 6), 3)):  # finished ones need none; what is there is used again
            assert len(execute(seeded(*seeds), store, place, QUIET)) == len(seeds)
            assert processes(workers) == there
    assert processes(workers) == 0


@pytest.mark.parametrize(
    ("cores", "jobs", "threads", "runs", "at_a_time", "told"),
    [
        (2, 1, None, 40, 1, ""),
        (2, 2, None, 40, 2, ""),
        (2, 99, None, 40, 2, "99 runs at a time are more than this machine's 2 cores"),
        (2, 99, None, 1, 1, "99 runs at a time are more"),
        (16, 4, None, 3, 3, ""),
        (16, 14, 1, 40, 14, ""),
        (16, 8, 4, 40, 4, "8 runs at a time of 4 threads each are more than this machine's 16 cores"),
        (2, 3, 8, 40, 1, "3 runs at a time of 8 threads each are more"),
        (16, 5, None, 40, 5, ""),
    ],
)
def test_an_estimate_counts_no_more_at_a_time_than_there_are_runs_and_cores(
    monkeypatch: pytest.MonkeyPatch, cores: int, jobs: int, threads: int | None, runs: int, at_a_time: int, told: str
) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    place = Place(jobs=jobs, threads=threads)
    assert place.at_a_time(runs) == at_a_time
    assert place.crowded.startswith(told) if told else not place.crowded
    cost = Cost("arm", trials=runs, finals=1, steps=10, tuning=600.0, training=60.0, forward_passes=20, further=0)
    hand = clock(600 / at_a_time + 60)  # one final run is one, however many jobs there are
    assert f"{runs + 1} runs, 11 min 0 s of work: about {hand} with {at_a_time} at a time" in cost_table([cost], place)


@pytest.mark.parametrize(("code", "said"), [(3, "ended with status 3"), (-11, "was killed by SIGSEGV"), (-200, "was killed by signal 200")])
def test_how_a_process_ended(code: int, said: str) -> None:
    assert how(code) == said
