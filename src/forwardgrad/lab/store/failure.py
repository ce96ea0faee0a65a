"""A run that could not be trained: its result says why. Loads without torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from forwardgrad.lab.errors import UserError
from forwardgrad.lab.store.files import read_json, write_json, write_whole
from forwardgrad.lab.store.locks import alone
from forwardgrad.lab.store.run_files import read_result, write_result
from forwardgrad.lab.store.store import Store
from forwardgrad.lab.studies import Run, to_json

LONGEST = 300  # characters of a reason
_retried: set[Path] = set()  # folders whose failure this process deleted: once, or a run that always fails would never end


def record(run: Run, store: Store, reason: str, details: str) -> dict[str, Any]:
    """Write the result of a failed run, and the details to error.txt. A result that another process wrote first is kept.

    The checkpoint stays: a run that is tried again goes on from there.
    """
    folder = store.folder(run.identity)
    with alone(folder):
        if (done := read_result(folder)) is not None:
            return done
        status = _status(folder / "status.json")
        step, total = status.get("step", 0), status.get("steps", 0)
        result = {
            "status": "failed",
            "reason": reason if len(reason) <= LONGEST else f"{reason[: LONGEST - 2]} …",
            "diverged_at": None,
            "steps": step,
            "epochs": run.epochs * step / total if total else 0.0,
            "parameters": 0,
            "seconds": status.get("seconds", 0.0),
            "forward_passes": 0,
            "peak_bytes": None,
            "initial_norm": None,
            "validation_loss": None,
            "validation_accuracy": None,
            "test": None,
        }
        write_json(folder / "run.json", to_json(run))
        write_whole(folder / "error.txt", details.encode(errors="backslashreplace"))
        write_result(folder, result)
        (folder / "status.json").unlink(missing_ok=True)
    return result


def _status(path: Path) -> dict[str, Any]:
    """How far a run had come. The status is for a display alone, so a damaged one is taken as none."""
    try:
        return read_json(path) or {}
    except UserError:
        return {}


def forget(run: Run, store: Store) -> None:
    """Delete the result of a failed run, at most once in this process, so that it is run again."""
    folder = store.folder(run.identity)
    if folder not in _retried:
        with alone(folder):
            for name in ("result.json", "error.txt"):
                (folder / name).unlink(missing_ok=True)
        _retried.add(folder)
