"""Where the record of a study is stored, when there are records of the same study already.

Rows merge, and no command makes a record forget a run that has ended.

A study is stored in OUT/studies/<name>.json, or, where that would drop results of other runs, in <name>-2.json and so on. Loads
without torch.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from forwardgrad.lab.errors import UserError
from forwardgrad.lab.store.schema import read_study
from forwardgrad.lab.store.store import Store

ArmRecord = dict[str, Any]


def family(store: Store, name: str) -> Iterator[tuple[str, Path, dict[str, Any] | None]]:
    """The records that a study of this name may be stored in, each with its path and what it holds; the last one is free."""
    for number in itertools.count(1):
        called = name if number == 1 else f"{name}-{number}"
        path = store.root / "studies" / f"{called}.json"
        if not path.exists():
            yield called, path, None
            return
        stored = read_study(path)
        if stored.get("of", called) == name:  # else it is another study, which somebody called so
            yield called, path, stored


def paces(store: Store, name: str) -> dict[str, Any]:
    """What a step was measured to cost, from all records of a study."""
    found: dict[str, Any] = {}
    for _, _, stored in family(store, name):
        found = {**((stored or {}).get("paces") or {}), **found}
    return found


def placed(store: Store, name: str, rows: list[ArmRecord], written: str | None) -> tuple[str, Path, dict[str, Any] | None, list[ArmRecord]]:
    """The record that the rows of a study go into: its name, its path, what it holds now, and all rows that it will have.

    `written` is the record that the same command wrote before: it stays there where it can.
    """
    for called, path, stored in sorted(family(store, name), key=lambda each: each[0] != written):
        before = {row["name"]: row for row in (stored or {"arms": []})["arms"]}
        merged = {row["name"]: _merged(store, before.get(row["name"]), row) for row in rows}
        if not any(row is None for row in merged.values()):
            return called, path, stored, list({**before, **{key: row for key, row in merged.items() if row is not None}}.values())
    raise AssertionError("the last record of a family is free")


def _merged(store: Store, stored: ArmRecord | None, row: ArmRecord) -> ArmRecord | None:
    """The stored row or the new one. None where the new one would drop the results of runs that it does not name."""
    if stored is None:
        return row
    theirs, ours = {*stored["runs"], *_tried(stored)}, {*row["runs"], *_tried(row)}
    if theirs == ours and all(_ended(store, run) for run in theirs):
        return {**row, "command": stored["command"]}  # the one that the results came from
    if not any(_ended(store, run) for run in theirs - ours):
        return row
    begun = _tried(stored)[: len(_tried(row))] == _tried(row) and stored["runs"][: len(row["runs"])] == row["runs"]
    return stored if begun else None  # the same study, at an earlier stage of it or with fewer seeds


def _tried(row: ArmRecord) -> list[str]:
    return [trial["run"] for trial in row["trials"]]


def _ended(store: Store, run: str) -> bool:
    """Whether a run has finished or diverged. A failed run is still to be trained."""
    try:
        result = store.result(run)
    except UserError:
        return True  # damaged: the record is what is left of it
    return result is not None and result["status"] != "failed"
