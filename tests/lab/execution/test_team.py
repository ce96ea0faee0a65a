"""Runs over several processes: one run in the store, and whichever of them dies costs its steps since the last checkpoint alone."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.support import command
from tests.support.faults import tidy

from forwardgrad.lab import lockstep
from forwardgrad.lab.errors import UserError
from forwardgrad.lab.execution import place as places
from forwardgrad.lab.execution import team
from forwardgrad.lab.execution.dispatch import execute
from forwardgrad.lab.execution.place import Place
from forwardgrad.lab.execution.unit import WorkerDied, train_unit
from forwardgrad.lab.lockstep import RankLost
from forwardgrad.lab.store import read_json, read_table
from forwardgrad.lab.store.progress import Progress
from forwardgrad.lab.store.store import Store
from forwardgrad.lab.studies import from_json, signed
from forwardgrad.lab.studies.run import Optimizer, Run

QUIET = Progress(quiet=True)
ROOT = Path(__file__).parents[3]
RUN = Run("digits", "logistic", {"name": "backprop"}, Optimizer("sgd", 0.1, momentum=0.5), epochs=2)
LONG = dataclasses.replace(RUN, epochs=16)
SCRIPT = """
import sys
from pathlib import Path
from tests.lab.execution.test_team import LONG, QUIET
from forwardgrad.lab.errors import UserError
from forwardgrad.lab.execution import Place, execute
from forwardgrad.lab.store import Store
try:
    execute([LONG], Store(Path(sys.argv[1])), Place(threads=1, ranks=2, checkpoint_seconds=0.0), QUIET)
except UserError as error:
    sys.exit(f"told: {error}")
except KeyboardInterrupt:
    sys.exit("interrupted")
"""


def environment(store: Store, run: Run) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((store.folder(run.identity) / "environment.json").read_text())
    return found


def assert_the_same(store: Store, alone: Store, run: Run) -> None:
    """As one process trained it, to some hundred units of the rounding of float32."""
    one, other = (read_table(s.folder(run.identity) / "losses.csv.gz")["loss"] for s in (alone, store))
    assert other == pytest.approx(one, rel=1e-4)
    for key in ("status", "steps", "forward_passes"):
        assert (store.result(run.identity) or {})[key] == (alone.result(run.identity) or {})[key]


def children(process: int) -> list[int]:
    """The processes that a process has started."""
    found = [path.name for path in Path("/proc").glob("[0-9]*")]
    return [int(name) for name in found if parent_of(name) == process]


def parent_of(name: str) -> int | None:
    try:
        return int((Path("/proc") / name / "stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return None


def gone(process: int, seconds: float = 30.0) -> bool:
    until = time.monotonic() + seconds
    while Path(f"/proc/{process}").exists() and time.monotonic() < until:
        time.sleep(0.05)
    return not Path(f"/proc/{process}").exists()


@pytest.mark.full
def test_a_command_trains_one_run_with_its_ranks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    words = [tmp_path / "out" if word == "OUT" else word for word in command.DIGITS]
    before = children(os.getpid())
    status, out, _ = command.run(monkeypatch, capfd, *words, "--ranks", 2)  # type: ignore[arg-type]
    assert status == 0
    assert "finished" in out
    assert children(os.getpid()) == before
    store = Store(tmp_path / "out")
    (name,) = store.runs()
    here = json.loads((store.folder(name) / "environment.json").read_text())
    assert here["ranks"] == 2
    assert "--ranks 2" in here["command"]
    assert command.run(monkeypatch, capfd, *words)[0] == 0  # type: ignore[arg-type]  # finished: the same run, however many trained it
    assert store.runs() == [name]
    tidy(store)


@pytest.mark.full
@pytest.mark.parametrize(("who", "then"), [("follower", 2), ("first", 3), ("interrupt", 1)])
def test_a_run_goes_on_with_another_number_of_ranks(who: str, then: int, tmp_path: Path) -> None:
    store, alone = Store(tmp_path / "out"), Store(tmp_path / "alone")
    first = subprocess.Popen([sys.executable, "-c", SCRIPT, str(store.root)], stderr=subprocess.PIPE, text=True, cwd=ROOT)
    folder = store.folder(LONG.identity)
    until = time.monotonic() + 120
    while not (folder / "checkpoint.pt").exists():
        assert first.poll() is None
        assert time.monotonic() < until
        time.sleep(0.01)
    (follower,) = children(first.pid)
    os.kill(follower if who == "follower" else first.pid, signal.SIGINT if who == "interrupt" else signal.SIGKILL)
    said = first.communicate(timeout=60)[1]
    assert gone(follower)
    assert (folder / "checkpoint.pt").exists()
    assert not (folder / "result.json").exists()
    if who == "follower":
        assert said.splitlines() == [
            "told: rank 1 of 2 was killed by SIGKILL, as is done where memory runs out. The last checkpoint is kept: the same command goes "
            "on from there, with any number of --ranks"
        ]
    elif who == "interrupt":
        assert said.splitlines() == ["interrupted"]
    execute([LONG], store, Place(threads=1, ranks=then), QUIET)
    execute([LONG], alone, Place(threads=1), QUIET)
    assert_the_same(store, alone, LONG)
    here = environment(store, LONG)
    assert here.get("ranks", 1) == then
    assert here.get("before", here)["ranks"] == 2
    tidy(store)


MODULE = """
import os, signal, sys
import torch.distributed as dist
import torch.nn.functional as F

def rank():
    return dist.get_rank() if dist.is_initialized() else 0

def throws(output, target):
    if rank() == 1:
        raise ValueError("no such luck")
    return F.cross_entropy(output, target)

def dies(output, target):
    if rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return F.cross_entropy(output, target)
"""


@pytest.fixture
def faulty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    (tmp_path / "faulty_rank.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    sys.modules.pop("faulty_rank", None)


@pytest.mark.full
def test_an_error_on_another_rank_is_the_reason_of_a_failed_run(faulty: Path) -> None:
    run, store = signed(dataclasses.replace(RUN, loss="faulty_rank:throws")), Store(faulty / "out")
    result = execute([run], store, Place(threads=1, ranks=2, path=faulty), QUIET)[run.identity]
    assert result["status"] == "failed"
    assert result["reason"] == "RuntimeError: rank 1 of 2 ended with ValueError: no such luck"
    assert 'raise ValueError("no such luck")' in (store.folder(run.identity) / "error.txt").read_text()
    tidy(store)


@pytest.mark.full
def test_of_several_jobs_one_that_loses_a_rank_is_tried_again(faulty: Path) -> None:
    run, store = signed(dataclasses.replace(RUN, loss="faulty_rank:dies")), Store(faulty / "out")
    here = Place(threads=1, ranks=2, path=faulty)
    reply = train_unit((run,), store, here)
    assert isinstance(reply, RankLost)  # alone, the command ends with it
    assert reply.how == "rank 1 of 2 was killed by SIGKILL, as is done where memory runs out"
    again = train_unit((run,), store, dataclasses.replace(here, jobs=2))
    assert isinstance(again, WorkerDied)
    assert again.counts
    assert reply.how in again.how


@pytest.mark.full
@pytest.mark.parametrize("executor", ["process", pytest.param("ray", marks=pytest.mark.rest)])  # Ray starts for two minutes
def test_jobs_of_ranks_end_where_one_process_does(executor: Any, tmp_path: Path) -> None:
    if executor == "ray":
        pytest.importorskip("ray", reason="pip install 'forwardgrad[ray]'")
    runs = [dataclasses.replace(RUN, seed=seed) for seed in range(2)]
    store, alone = Store(tmp_path / "out"), Store(tmp_path / "alone")
    execute(runs, store, Place(jobs=2, threads=1, ranks=2, executor=executor), QUIET)
    execute(runs, alone, Place(threads=1), QUIET)
    for run in runs:
        assert_the_same(store, alone, run)
        assert environment(store, run)["ranks"] == 2
    tidy(store)


@pytest.mark.full
def test_torchrun_starts_the_ranks_of_a_command(tmp_path: Path) -> None:
    store, alone = Store(tmp_path / "out"), Store(tmp_path / "alone")
    train = ["train", "--data", "digits", "--model", "logistic", "--estimator", "backprop", "--lr", "0.1", "--momentum", "0.5"]
    train += ["--epochs", "2", "--out", str(store.root)]
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "forwardgrad", *train]

    def ended(*more: str) -> tuple[int, str]:
        found = subprocess.run([*start, *more], capture_output=True, text=True, cwd=ROOT, timeout=300)
        return found.returncode, found.stdout + found.stderr

    status, said = ended("--ranks", "3")
    assert status == 1
    assert "forwardgrad: torchrun started 2 ranks, and --ranks asks for 3: leave --ranks out" in said
    assert not store.runs()
    assert ended("--ranks", "2")[0] == 0
    (name,) = store.runs()
    run = from_json(read_json(store.folder(name) / "run.json") or {}, "run.json")
    assert run.identity == name
    execute([run], alone, Place(threads=1), QUIET)
    assert_the_same(store, alone, run)
    assert environment(store, run)["ranks"] == 2
    status, said = ended()  # finished before: all ranks hear so
    assert (status, said.count("finished, validation loss")) == (0, 1)


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"ranks": 0}, "the number of ranks must be at least 1, not 0"),
    ({"ranks": 2, "batched": True}, "--batched makes one program of many runs"),
]


@pytest.mark.parametrize(("options", "sentence"), REFUSED)
def test_ranks_that_make_no_sense_are_refused(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        Place(**options)


@pytest.mark.parametrize("recipe", ["faster", "finetune", "passes"])
def test_runs_that_are_timed_have_one_process(
    recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    status, _, said = command.run(monkeypatch, capsys, "reproduce", recipe, "--ranks", 2, "--out", tmp_path / "out")
    assert status == 2
    assert said == f"forwardgrad: `reproduce {recipe}` times every run in one process: leave --ranks out\n"
    assert not (tmp_path / "out").exists()


def test_a_batch_that_is_too_small_ends_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(team._Followers, "_start", lambda *_: None)
    monkeypatch.setattr(team._Followers, "meet", lambda self: team.dist.init_process_group("gloo", store=self._store, rank=0, world_size=1))
    monkeypatch.setattr(lockstep.Distributed, "size", 4)
    words = ["train", "--data", "digits", "--model", "logistic", "--batch-size", 3, "--ranks", 4, "--out", tmp_path]
    status, _, said = command.run(monkeypatch, capsys, *words)
    assert status == 2
    assert "ranks divide every batch into 4 parts, and a batch has 3" in said.splitlines()[-1]
    assert not Store(tmp_path).runs()


def test_ranks_share_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(places.os, "cpu_count", lambda: 8)
    assert [Place(ranks=ranks).share for ranks in (1, 2, 4, 16)] == [8, 4, 2, 1]
    assert Place(jobs=2, ranks=2).share == 2
    assert Place(jobs=4, ranks=2, threads=1).crowded == ""
    assert Place(ranks=8).crowded == ""
    assert Place(ranks=16).crowded == "16 ranks are more than this machine's 8 cores: they slow one another down"
    assert Place(jobs=3, ranks=4).crowded == "3 jobs of 4 ranks are more than this machine's 8 cores: they slow one another down"


def test_what_torchrun_started_is_told_by_its_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WORLD_SIZE", "RANK", "MASTER_ADDR"):
        monkeypatch.delenv(name, raising=False)
    assert places.launched() == 1
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert places.launched() == 1  # of another program
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    assert places.launched() == 4
