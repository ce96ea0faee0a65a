"""Finished runs out of their folders into one file, so that a store can be kept under version control or sent. Loads without torch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from forwardgrad.lab.store.files import PACKED, damaged, parse_table, sealed_json, sync, write_whole
from forwardgrad.lab.store.locks import Busy, alone
from forwardgrad.lab.store.packed import HELD, LOSSES, SUMMARY, Files, as_lines, packed_runs, run_file
from forwardgrad.lab.store.run_files import beside
from forwardgrad.lab.store.store import Store

LEFT = ("status.json", "checkpoint.pt", "error.txt")  # what a run that was killed while it ended may still have; no pack holds it
Thin = Callable[[str, dict[str, list[float]]], dict[str, Any] | bool]  # of a run and its losses: True keeps all, False none, else a summary


def pack(store: Store, thin: Thin | None = None) -> int:
    """Put every run that finished or diverged into OUT/runs.jsonl.gz, then delete its folder; returns how many the file holds.

    Failed and unfinished runs stay folders. `thin` says what is kept of the losses of every step; without it all are. After a kill at any
    moment every run is whole in its folder, in the file, or in both. Raises UserError, with nothing changed, where a run is damaged.
    """
    with store.changing():
        held = {run: files for run in store.runs() if (files := _files(store, run)) is not None}
        if thin is not None:
            held = {run: _thinned(store.folder(run), files, thin) for run, files in held.items()}
        if not held:
            return 0
        write_whole(store.root / PACKED, as_lines(held))
        if packed_runs(store.root) != held:
            raise damaged(store.root / PACKED, "it does not hold what was written")
        for run in held:
            _remove(store.folder(run))
    return len(held)


def _files(store: Store, run: str) -> Files | None:
    """The files of a run that has finished or diverged, each of them checked; None for any other run."""
    folder, found = store.folder(run), store.stored(run)
    if found is None or found.result is None or found.result["status"] == "failed":
        return None
    packed = not (folder / "result.json").exists()
    for name in found.files:
        if not packed or run_file(folder, name) is not None:  # a thin pack is without the losses
            beside(folder, name, found.files)
    return {name: content for name in HELD if (content := run_file(folder, name)) is not None}


def _thinned(folder: Path, files: Files, thin: Thin) -> Files:
    if LOSSES not in files:
        return files
    kept = thin(folder.name, parse_table(folder / LOSSES, files[LOSSES]))
    if kept is True:
        return files
    rest = {name: content for name, content in files.items() if name not in (LOSSES, SUMMARY)}
    return rest if kept is False else {**rest, SUMMARY: sealed_json({"run": folder.name, **kept}, depth=0)}


def _remove(folder: Path) -> None:
    """Delete a packed run's folder, its result first: without one the folder is no longer read, and the pack is."""
    if not folder.is_dir():
        return
    try:
        with alone(folder):
            (folder / "result.json").unlink(missing_ok=True)
            sync(folder)
            for name in (*HELD, *LEFT):
                (folder / name).unlink(missing_ok=True)
            if not any(folder.iterdir()):
                folder.rmdir()
    except Busy:  # it is left, and is the same run
        pass
