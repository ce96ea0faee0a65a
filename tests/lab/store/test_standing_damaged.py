"""Watching a folder with a record that cannot be read: said in one sentence, and nothing is waited for that cannot come."""

import re
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from tests.support.command import run
from tests.support.stored import fail, put, record, seeds, tried, under_way

from forwardgrad.lab.recipes import paper
from forwardgrad.lab.store import progress
from forwardgrad.lab.store.files import read_json, write_json
from forwardgrad.lab.store.progress import follow
from forwardgrad.lab.store.standing import StoreWatch, snapshot
from forwardgrad.lab.store.store import Store
from forwardgrad.lab.studies.study import Study


@pytest.fixture
def damaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    monkeypatch.setattr(progress, "POLL_SECONDS", 0.01)
    store = Store(tmp_path / "out")
    (store.root / "studies" / "half.json").write_text('{"schema": 1, "na')
    return store


@pytest.mark.parametrize("once", [(), ("--once",)])
def test_a_damaged_record_ends_the_watching_with_a_sentence(
    damaged: Store, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], once: tuple[str, ...]
) -> None:
    status, out, err = run(monkeypatch, capsys, "watch", damaged.root, *once)
    assert status == 2
    assert re.fullmatch(r"forwardgrad: .*studies/half\.json is damaged \(.*\): delete this file and run its command again; .*\n", err)
    assert "no runs yet" not in out


def test_what_else_is_there_is_watched_to_its_end(damaged: Store, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    arm = paper.TABLE1[0]
    study = Study("table1", "Table I", (arm,))
    record(damaged, study)
    (only,) = seeds(arm, 1)
    under_way(damaged, only, 10, 400, 1.0, None)
    seen: list[bool] = []

    def look(watched: StoreWatch, *rest: Any) -> Any:
        real = watched.snapshot

        def snapshots(now: float | None = None) -> Any:
            found = real(now)
            seen.append(found.complete)
            if len(seen) == 4:
                put(damaged, only, 0.5)
            return found

        monkeypatch.setattr(watched, "snapshot", snapshots)
        return follow(watched, *rest)

    monkeypatch.setattr(progress, "follow", look)
    status, out, err = run(monkeypatch, capsys, "watch", damaged.root)
    assert status == 2
    assert seen[:4] == [False] * 4
    assert out.count("half.json is damaged") == 1  # while the other goes on
    assert "finished" in out
    assert err.count("half.json is damaged") == 1


def test_a_record_that_can_be_read_at_the_next_look_ends_nothing(damaged: Store) -> None:
    """As on a file system that several machines write to."""
    arm = paper.TABLE1[0]
    watched, stop = StoreWatch(damaged), threading.Event()
    real, looks = watched.snapshot, []

    def snapshots(now: float | None = None) -> Any:
        looks.append(real(now))
        if len(looks) == 1:
            (damaged.root / "studies" / "half.json").unlink()
            record(damaged, Study("half", "Half", (arm,)))
        if len(looks) == 4:
            put(damaged, seeds(arm, 1)[0], 0.5)
        return looks[-1]

    watched.snapshot = snapshots  # type: ignore[method-assign]
    last = follow(watched, Console(quiet=True), stop, None)
    assert [bool(look.unread) for look in looks[:2]] == [True, False]
    assert (last.unread, last.complete) == ((), True)
    assert len(looks) >= 5


def test_an_arm_without_a_winner_is_waited_for_no_longer(tmp_path: Path) -> None:
    store, arm = Store(tmp_path), paper.table1(["1"], retune=True).arms[0]
    study = Study("s", "S", (arm,), seeds=3)
    record(store, study)
    for _, trial in tried(study, arm):
        fail(store, trial, "no such luck")
    path = tmp_path / "studies" / "s.json"
    stored = {**(read_json(path) or {}), "seeds": 3}
    row = {**stored["arms"][0], "runs": []}
    write_json(path, {**stored, "arms": [row]})
    assert not snapshot(store, now=time.time()).complete
    write_json(path, {**stored, "arms": [{**row, "no_winner": "all 12 trials failed"}]})
    now = snapshot(store, now=time.time())
    assert now.complete
    assert (now.arms[0].done, now.arms[0].planned, now.arms[0].failed) == (12, 12, 12)
