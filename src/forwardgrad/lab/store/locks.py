"""Who may write: one process holds a run's folder, and one at a time changes a record. Loads without torch."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from forwardgrad.lab.errors import UserError

PATIENCE = 60.0  # seconds to wait for others who change a record


class Busy(UserError):
    """Another process holds the folder of a run."""


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Hold a run's folder. Half-written files in it are removed, and the lock of a process that died is free.

    Raises Busy where another process holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if (lock := _locked(folder)) is None:
        raise Busy(f"another process is training in {folder}: wait for it, or choose another output folder with --out")
    try:
        sweep(folder)
        yield
    finally:
        _let_go(lock)


def held(folder: Path) -> bool:
    """Whether another process holds a run's folder at this moment."""
    if not folder.with_suffix(".lock").exists():
        return False
    if (lock := _locked(folder)) is None:
        return True
    _let_go(lock)
    return False


def _locked(folder: Path) -> FileLock | None:
    """Take the lock of a run's folder; None where another process holds it.

    A holder removes the lock's file before it lets go: who had opened it just before gets a lock that stands for no name, and tries again.
    """
    path = folder.with_suffix(".lock")
    while True:
        lock = FileLock(path)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            if path.exists():
                return None
            continue
        try:
            descriptor, named = os.fstat(lock._context.lock_file_fd or 0), path.stat()
        except FileNotFoundError:
            lock.release()
            continue
        if (descriptor.st_dev, descriptor.st_ino) == (named.st_dev, named.st_ino):
            return lock
        lock.release()


def _let_go(lock: FileLock) -> None:
    Path(lock.lock_file).unlink(missing_ok=True)  # while it is held: nobody else can hold what the name stands for
    lock.release()


def sweep(folder: Path) -> None:
    """Remove half-written files from a run's folder; nobody may be writing there."""
    for path in folder.glob(".*"):
        path.unlink(missing_ok=True)


@contextmanager
def changing(root: Path) -> Iterator[None]:
    """Hold the records of studies and the measurements, which many processes may change. Inside, read again before writing."""
    lock = FileLock(root / "records.lock")
    try:
        lock.acquire(timeout=PATIENCE)
    except Timeout as error:
        raise UserError(f"another process keeps {root} locked: wait for it, or choose another output folder with --out") from error
    try:
        sweep(root / "studies")
        yield
    finally:
        lock.release()
