"""Runs as folders: what was asked, where it ran, how it went, and the result, each file written whole or not at all.

OUT/runs/<identity>/run.json            the complete description; its hash is the folder's name
                    environment.json    versions, hardware, commit, command
                    status.json         where a run in progress is (replaced about once a second)
                    checkpoint.pt       the state that a killed run goes on from; gone once it has finished
                    evaluations.csv     validation loss and accuracy against step, epoch and training seconds
                    walk.csv            the parameters' norm over that before the first step, and the relative step, every 100 steps
                    losses.csv.gz       the training loss of every step, and the directional derivative where the estimator has one
                    result.json         written last: a folder that has it is finished
OUT/batches/<identity>/batch.json       the runs that are trained as one program, until all of them have a result
                       checkpoint.pt    the state that all of them go on from
OUT/studies/<name>.json                 which runs belong to which arm of a comparison
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
import tempfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from forwardgrad.lab.errors import UserError
from forwardgrad.lab.run import SCHEMA


def write_whole(path: Path, content: bytes) -> None:
    """Write through a temporary file and a rename: after a kill or a power cut the file is the old one or the new one."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).chmod(0o644)
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


class Busy(UserError):
    """Another process holds the folder of a run."""


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Hold a run's folder, swept of what a killed writer left there; the lock of a process that died is free.

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
    """The lock of a run's folder, held; None where another process holds it.

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


def write_json(path: Path, value: Any) -> None:
    write_whole(path, (json.dumps(value, indent=1, allow_nan=False) + "\n").encode())


def read_json(path: Path) -> dict[str, Any] | None:
    """The object in a JSON file, None where there is no file; UserError where it is damaged."""
    try:
        value = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except (ValueError, OSError, RecursionError) as error:
        raise damaged(path, error) from error
    if not isinstance(value, dict):
        raise damaged(path, "it holds no JSON object")
    return value


def damaged(path: Path, why: object) -> UserError:
    """What to say of a stored file that cannot be used: what is lost with it is the least that mends it."""
    if path.parent.parent.name in ("runs", "batches"):
        return UserError(f"{path} is damaged ({why}): delete the folder {path.parent} to run it again")
    return UserError(f"{path} is damaged ({why}): delete this file and run its command again; finished runs are kept")


def check(path: Path, value: Any, fields: dict[str, Any]) -> dict[str, Any]:
    """`value` as an object with these fields of these types; UserError, naming the file, where it is none."""
    if not isinstance(value, dict):
        raise damaged(path, "an object is missing")
    for name, kind in fields.items():
        if name not in value:
            raise damaged(path, f"{name!r} is missing")
        if not isinstance(value[name], kind) or isinstance(value[name], bool):
            raise damaged(path, f"{name!r} is {value[name]!r}")
    return value


def write_table(path: Path, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """A CSV file, gzipped where the name ends in .gz (the same rows give the same bytes)."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    content = text.getvalue().encode()
    write_whole(path, gzip.compress(content, mtime=0) if path.suffix == ".gz" else content)


def read_table(path: Path) -> dict[str, list[float]]:
    """The columns of a CSV file written by `write_table`, all of one length; an empty field is NaN, a missing file has no columns."""
    try:
        content = path.read_bytes()
        text = (gzip.decompress(content) if path.suffix == ".gz" else content).decode()
        header, *rows = csv.reader(io.StringIO(text))
        if any(len(row) != len(header) for row in rows):
            raise ValueError("a row is cut short")
        return {name: [float(row[i]) if row[i] else float("nan") for row in rows] for i, name in enumerate(header)}
    except FileNotFoundError:
        return {}
    except (OSError, EOFError, ValueError, IndexError, zlib.error) as error:
        raise damaged(path, error) from error


class Store:
    """The output folder of the laboratory."""

    def __init__(self, root: Path, *, create: bool = True) -> None:
        self.root = root
        if create:
            if root == Path():
                raise UserError("the output folder must be one of its own, not the current folder: name it with --out")
            try:
                for name in ("runs", "studies"):
                    (root / name).mkdir(parents=True, exist_ok=True)
                with tempfile.TemporaryFile(dir=root):
                    pass
            except OSError as error:
                raise UserError(f"cannot write to the output folder {root} ({error.strerror}): choose another with --out") from error
        elif not (root / "runs").is_dir():
            raise UserError(f"{root} is not an output folder of forwardgrad: it has no runs")

    def folder(self, identity: str) -> Path:
        return self.root / "runs" / identity

    def result(self, identity: str) -> dict[str, Any] | None:
        """The result of a finished run, None for a run that is absent or unfinished."""
        return read_result(self.folder(identity))

    def studies(self) -> list[dict[str, Any]]:
        """Every stored study; UserError for one that is damaged or of another version."""
        return [read_study(path) for path in sorted((self.root / "studies").glob("*.json"))]


NUMBER, MAYBE = (int, float), (int, float, type(None))
RESULT = {
    "status": str,
    "reason": (str, type(None)),
    "diverged_at": (int, type(None)),
    "steps": int,
    "epochs": NUMBER,
    "parameters": int,
    "seconds": NUMBER,
    "validation_loss": MAYBE,
    "validation_accuracy": MAYBE,
    "test": (dict, type(None)),
}
LATER = {"forward_passes": int, "peak_bytes": (int, type(None)), "initial_norm": MAYBE, "replicas": int}  # what not every run has
TEST = {"loss": MAYBE, "accuracy": MAYBE, "examples": int}
LATER_TEST = {"last16": MAYBE, "last16_low": MAYBE, "last16_high": MAYBE}  # what only losses of examples have
STUDY = {"name": str, "title": str, "arms": list}
ARM = {
    "name": str,
    "group": str,
    "kind": str,
    "label": str,
    "command": str,
    "published": (dict, type(None)),
    "space": dict,
    "tuning_epochs": int,
    "trials": list,
    "chosen": dict,
    "runs": list,
}
LATER_ARM = {"full_epochs": int, "budget": dict, "sampler": str}  # what not every arm has
PUBLISHED = {"epochs": int, "test_loss": NUMBER}
TRIAL = {"values": dict, "run": str}
CHOSEN = {"values": dict, "validation_loss": MAYBE, "at_edge": list}


def read_result(folder: Path) -> dict[str, Any] | None:
    """The checked result of the run in a folder, None where it has none."""
    path = folder / "result.json"
    if (result := read_json(path)) is None:
        return None
    check(path, result, RESULT)
    check(path, result, {name: kind for name, kind in LATER.items() if name in result})
    if result["test"] is not None:
        check(path, result["test"], TEST)
        check(path, result["test"], {name: kind for name, kind in LATER_TEST.items() if name in result["test"]})
    if result["status"] not in ("finished", "diverged", "failed") or (result["status"] == "diverged") != (
        result["diverged_at"] is not None
    ):
        raise damaged(path, f"its status is {result['status']!r} and it diverged at {result['diverged_at']!r}")
    return result


def read_study(path: Path) -> dict[str, Any]:
    """The checked record of a study."""
    study = read_json(path) or {}
    if study.get("schema") != SCHEMA:
        raise UserError(
            f"{path} was written by another version of forwardgrad (schema {study.get('schema')!r}, this one reads {SCHEMA}): "
            "use that version, or choose a new output folder with --out"
        )
    for arm in check(path, study, STUDY)["arms"]:
        check(path, check(path, arm, ARM)["chosen"], CHOSEN)
        check(path, arm, {name: kind for name, kind in LATER_ARM.items() if name in arm})
        for trial in arm["trials"]:
            check(path, trial, TRIAL)
        if arm["published"] is not None:
            check(path, arm["published"], PUBLISHED)
    return study
