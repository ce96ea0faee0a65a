"""A stored run vouches for itself: any other digit in any of its files is noticed, and so is a file that belongs to another run."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from tests.support.stored import put

from forwardgrad.lab import store
from forwardgrad.lab.errors import UserError
from forwardgrad.lab.store import results
from forwardgrad.lab.store.store import Store
from forwardgrad.lab.studies.run import Optimizer, Run

RUN = Run("digits", "logistic", {"name": "forward", "tangents": 3}, Optimizer("sgd", 0.25), epochs=2)
OTHER = Run("digits", "logistic", {"name": "forward", "tangents": 3}, Optimizer("sgd", 0.5), epochs=2)


@pytest.fixture
def here(tmp_path: Path) -> Store:
    made = Store(tmp_path / "out")
    put(made, RUN, 0.25, steps=20)
    put(made, OTHER, 0.5, steps=20)
    return made


def read(here: Store, run: Run = RUN) -> float:
    """Everything that is stored of a run, by the functions that a report reads with; returns its validation loss."""
    folder = here.folder(run.identity)
    found = here.stored(run.identity)
    assert found is not None
    assert found.result is not None
    results.described(folder, found)
    done = results.Done(folder, found.result, results.environment(folder, found), found.files)
    assert len(done.losses()) == 20
    assert done.evaluations["step"]
    return done.validation_loss


def test_any_other_digit_in_any_file_is_noticed(here: Store) -> None:
    assert read(here) == 0.25
    files = sorted(here.folder(RUN.identity).iterdir())
    assert [path.name for path in files] == ["environment.json", "evaluations.csv", "losses.csv.gz", "result.json", "run.json"]
    changed = 0
    for path in files:
        content = path.read_bytes()
        for place, byte in enumerate(content):
            if byte in b"0123456789":
                path.write_bytes(content[:place] + bytes([(byte - 47) % 10 + 48]) + content[place + 1 :])
                with pytest.raises(UserError, match="damaged"):
                    read(here)
                changed += 1
        path.write_bytes(content)
    assert changed > 300
    assert read(here) == 0.25


def test_what_belongs_to_another_run_is_refused(here: Store) -> None:
    mine, other = here.folder(RUN.identity), here.folder(OTHER.identity)
    for name in ("result.json", "run.json", "evaluations.csv", "losses.csv.gz"):
        content = (mine / name).read_bytes()
        shutil.copy(other / name, mine / name)
        with pytest.raises(UserError, match="damaged"):
            read(here)
        (mine / name).write_bytes(content)
    shutil.rmtree(mine)
    shutil.copytree(other, mine)  # whole in itself, and in the wrong place
    with pytest.raises(UserError, match=r"run\.json is damaged \(it is not what its folder is named after\)"):
        read(here)


def test_a_file_that_is_gone_is_missed_and_one_without_a_digest_is_damaged(here: Store) -> None:
    folder = here.folder(RUN.identity)
    for name in ("run.json", "environment.json", "evaluations.csv", "losses.csv.gz"):
        content = (folder / name).read_bytes()
        (folder / name).unlink()
        with pytest.raises(UserError, match="it is missing"):
            read(here)
        (folder / name).write_bytes(content)
    (folder / "result.json").write_text('{"status": "finished"}')
    with pytest.raises(UserError, match="its content and its digest do not agree"):
        read(here)
    (folder / "result.json").unlink()
    assert here.result(RUN.identity) is None  # unfinished, and to be run again


def test_only_what_has_to_last_waits_for_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    waits = []
    monkeypatch.setattr(os, "fsync", waits.append)
    store.write_json(tmp_path / "status.json", {"step": 1}, durable=False)
    assert waits == []
    store.write_json(tmp_path / "result.json", {"step": 1})
    assert len(waits) == 2  # the file, and its name in the folder


def test_a_study_under_another_name_is_refused(here: Store) -> None:
    path = here.root / "studies" / "one.json"
    store.write_json(path, {"schema": 1, "name": "one", "title": "One", "arms": []})
    assert store.read_study(path)["name"] == "one"
    path.rename(path.with_name("two.json"))
    with pytest.raises(UserError, match="it holds the study 'one'"):
        store.read_study(path.with_name("two.json"))


@pytest.mark.parametrize("space", [[1, "x"], [None], [[1]], [10**30], [], "abc", {"low": [[1]]}, {"low": None}])
def test_a_space_that_is_none_is_refused(here: Store, space: object) -> None:
    path = here.root / "studies" / "one.json"
    arm = {
        "name": "a", "group": "g", "kind": "forward", "label": "l", "command": "c", "published": None, "space": {"lr": [0.1, 1]},
        "tuning_epochs": 1, "trials": [], "chosen": {"values": {}, "validation_loss": None, "at_edge": []}, "runs": [],
    }  # fmt: skip
    for good in ({"lr": [0.1, 1]}, {"lr": {"low": 0.1, "high": 1, "log": True}}, {"law": ["a", "b"]}, {"law": {"choices": [True, "b"]}}):
        store.write_json(path, {"schema": 1, "name": "one", "title": "One", "arms": [{**arm, "space": good}]})
        assert store.read_study(path)["arms"][0]["space"] == good
    store.write_json(path, {"schema": 1, "name": "one", "title": "One", "arms": [{**arm, "space": {"lr": space}}]})
    with pytest.raises(UserError, match="damaged"):
        store.read_study(path)
