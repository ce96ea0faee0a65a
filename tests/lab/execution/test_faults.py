"""Power cuts, full disks and kill -9 at many moments of a small study: it goes on from what is left, and ends as if undisturbed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.support import disk

from forwardgrad.lab import cli, environment, store
from forwardgrad.lab.commands.carrying import carry_out
from forwardgrad.lab.errors import UserError
from forwardgrad.lab.execution.place import Place
from forwardgrad.lab.store.store import Store
from forwardgrad.lab.studies.length import Length
from forwardgrad.lab.studies.run import Optimizer, Run
from forwardgrad.lab.studies.study import Arm, Study
from forwardgrad.lab.training import loop, schedule, training

RUN = Run("digits", "logistic", {"name": "backprop"}, Optimizer("sgd", 0.1), epochs=1)
STUDY = Study("small", "Small", (Arm("arm", "group", "backprop", "arm", RUN, {"lr": (0.1, 1.0)}),), seeds=1, tuning=Length(epochs=1))


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint whenever there can be one, and no look at memory, which waits for the garbage collector, nor at git."""
    real = loop.train
    monkeypatch.setattr(
        "forwardgrad.lab.training.train", lambda run, folder, **options: real(run, folder, **{**options, "checkpoint_seconds": 0.0})
    )
    monkeypatch.setattr(schedule, "FIRST_EVALUATIONS", (4, 8, 12))
    monkeypatch.setattr(training, "peak_bytes", lambda work, devices: work() or 0)
    monkeypatch.setattr(environment, "commit", lambda: "abc")


def undertake(root: Path) -> None:
    carry_out([STUDY], root, Place())


def outcome(root: Path) -> dict[str, Any]:
    """All that a study comes to, but for times."""
    found: dict[str, Any] = {"study": store.read_study(root / "studies" / "small.json")}
    here = Store(root, create=False)
    for name in here.runs():
        folder = here.folder(name)
        result, evaluations = here.result(name) or {}, store.read_table(folder / "evaluations.csv")
        kept = [{key: value for key, value in table.items() if key != "seconds"} for table in (result, evaluations)]
        found[name] = (*kept, (folder / "losses.csv.gz").read_bytes(), (folder / "walk.csv").read_bytes())
    return {**found, "study": {**found["study"], "arms": [{**arm, "command": ""} for arm in found["study"]["arms"]]}}


@pytest.fixture
def undisturbed(tmp_path: Path) -> dict[str, Any]:
    root = tmp_path / "undisturbed"
    undertake(root)
    return outcome(root)


def what_cuts_leave(tmp_path: Path) -> tuple[int, list[dict[Path, bytes | None]]]:
    """The number of operations of the study, and the different trees that power cuts after each of them may leave."""
    trees: dict[str, dict[Path, bytes | None]] = {}
    count = 0

    def happened(now: disk.Disk) -> None:
        nonlocal count
        count += 1
        for tree in now.cuts():
            trees.setdefault(disk.key(tree), tree)

    root = tmp_path / "watched"
    root.mkdir()
    with disk.Operations(root, happened).watched():
        undertake(root)
    assert any(path.name == "checkpoint.pt" for tree in trees.values() for path in tree)
    shutil.rmtree(root)
    return count, list(trees.values())


def recover(tree: dict[Path, bytes | None], root: Path, wanted: dict[str, Any]) -> None:
    disk.build(tree, root)
    finished = {path.parent.name for path in tree if path.name == "result.json"}
    for name in finished:  # what is there of a result is a whole one
        assert Store(root).result(name) is not None
    undertake(root)
    assert outcome(root) == wanted
    assert not list((root / "studies").glob(".*"))
    shutil.rmtree(root)


@pytest.mark.parametrize("share", [12, pytest.param(120, marks=pytest.mark.full)])
def test_a_power_cut_after_any_operation_costs_steps_and_no_result(tmp_path: Path, undisturbed: dict[str, Any], share: int) -> None:
    """Evenly sampled from the different states that the disk can be in; of about 400 operations there are several hundred."""
    count, trees = what_cuts_leave(tmp_path)
    assert count > 200
    assert len(trees) > 2 * share
    for number in range(share):
        recover(trees[number * len(trees) // share], tmp_path / "cut", undisturbed)


TRAIN = ["train", "--data", "digits", "--model", "logistic", "--estimator", "backprop", "--lr", "0.1", "--epochs", "1", "--out"]


def called(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], root: Path) -> tuple[int, str]:
    monkeypatch.setattr(sys, "argv", ["forwardgrad", *TRAIN, str(root)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("forwardgrad: ")]
    assert len(told) == (1 if ended.value.code else 0)
    return int(ended.value.code or 0), "".join(told)


@pytest.mark.full
@pytest.mark.parametrize("stays", [True, pytest.param(False, marks=pytest.mark.full)])
def test_a_disk_that_fills_up_at_any_write_is_one_sentence_and_resumable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], stays: bool
) -> None:
    (tmp_path / "whole").mkdir()
    writes = 0

    def counted() -> None:
        nonlocal writes
        writes += 1

    with disk.Operations(tmp_path / "whole", before=counted).watched():
        assert called(monkeypatch, capsys, tmp_path / "whole")[0] == 0
    (name,) = Store(tmp_path / "whole").runs()
    wanted = {**(Store(tmp_path / "whole").result(name) or {}), "seconds": 0}
    assert writes > 50
    for number in range(1, writes + 1):
        root = tmp_path / "full"
        root.mkdir()
        with disk.Operations(root, before=disk.full(number, stays=stays)).watched():
            status, told = called(monkeypatch, capsys, root)
        if status or stays:  # steps differ in number with the speed of the machine: a late write may not be reached
            assert status == 2
            assert "No space left on device" in told
        status, told = called(monkeypatch, capsys, root)
        assert status == 0, (number, told)
        assert {**(Store(root).result(name) or {}), "seconds": 0} == wanted
        shutil.rmtree(root)


LONG = [pytest.param(1, 60, marks=pytest.mark.rest), pytest.param(2, 40, marks=pytest.mark.full)]


@pytest.mark.full
@pytest.mark.parametrize(("workers", "kills"), [(1, 3), *LONG])
def test_kills_at_random_moments_cost_steps_and_no_result(tmp_path: Path, workers: int, kills: int) -> None:
    """A study of eight runs, killed twenty times before it may end, then begun again elsewhere; of two processes any or both are killed.

    What is there in one of twenty moments is hit by one of a hundred kills but for 0.6 % of the time. Moments between two operations on
    files are shorter, and sampled evenly above.
    """
    script = Path(__file__).parents[2] / "support" / "killing.py"
    alone = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    words = [sys.executable, script, tmp_path, str(workers), str(kills)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=600, env={**os.environ, **alone})
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["kills"] >= kills
    assert told["studies"] >= kills // 25  # that came to their end after kills, each compared
    assert told["different"] == []


def test_a_checkpoint_of_another_run_is_refused(tmp_path: Path) -> None:
    whole = Store(tmp_path)
    for seed in (0, 1):
        folder = whole.folder(str(seed))
        folder.mkdir()
        store.write_json(folder / "run.json", {"seed": seed})
        store.write_checkpoint(folder / "checkpoint.pt", b"state")
        assert store.read_checkpoint(folder / "checkpoint.pt") == b"state"
    shutil.copy(whole.folder("0") / "checkpoint.pt", whole.folder("1") / "checkpoint.pt")
    with pytest.raises(UserError, match="do not agree"):
        store.read_checkpoint(whole.folder("1") / "checkpoint.pt")


@pytest.fixture
def changers(tmp_path: Path) -> Iterator[list[subprocess.Popen[bytes]]]:
    program = f"""
import pathlib
from forwardgrad.lab.store import Store, read_json, write_json
store = Store(pathlib.Path({str(tmp_path)!r}))
path = store.root / "studies" / "count.json"
for _ in range(50):
    with store.changing():
        write_json(path, {{"n": (read_json(path) or {{"n": 0}})["n"] + 1}})
"""
    started = [subprocess.Popen([sys.executable, "-c", program]) for _ in range(3)]
    yield started
    for process in started:
        process.kill()
        process.wait()


def test_many_writers_of_one_record_lose_nothing(tmp_path: Path, changers: list[subprocess.Popen[bytes]]) -> None:
    assert [process.wait(timeout=120) for process in changers] == [0, 0, 0]
    assert store.read_json(tmp_path / "studies" / "count.json") == {"n": 150}
