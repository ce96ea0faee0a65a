"""Runs as folders: what was asked, where it ran, how it went, and the result, each file written whole or not at all.

OUT/runs/<identity>/run.json            the complete description; its hash is the folder's name
                    environment.json    versions, hardware, commit, command
                    status.json         where a run in progress is (replaced about once a second)
                    checkpoint.pt       the state that a killed run goes on from; gone once it has finished
                    evaluations.csv     validation loss and accuracy against step, epoch and training seconds
                    walk.csv            the parameters' norm over that before the first step, and the relative step, now and then
                    losses.csv.gz       the training loss of every step, and the directional derivative where the estimator has one
                    result.json         written last, with the digests of the files beside it: a folder that has it is finished
OUT/runs.jsonl.gz                       finished runs that `forwardgrad pack` took out of their folders (`forwardgrad.lab.store.packed`)
OUT/batches/<identity>/batch.json       the runs that are trained as one program, until all of them have a result
                       checkpoint.pt    the state that all of them go on from
OUT/studies/<name>.json                 which runs belong to which arm of a comparison
OUT/records.lock                        held by who changes a record or a measurement that others may change too

After a kill, a full disk or a power cut at any moment a run is finished, goes on from a checkpoint or begins anew. What was changed
since it was written is refused: a JSON file carries its digest, that of run.json names its folder, and result.json vouches for the rest.
"""

from __future__ import annotations

import hashlib
import math
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from filelock import FileLock, Timeout

from forwardgrad.lab.errors import UserError
from forwardgrad.lab.store.files import (
    PACKED,
    check,
    damaged,
    digest,
    is_huge,
    make_folder,
    parse_json,
    parse_table,
    read_json,
    read_table,
    read_whole,
    sync,
    write_json,
    write_table,
    write_whole,
)
from forwardgrad.lab.store.packed import IDENTITY, packed_runs, run_file
from forwardgrad.lab.studies import SCHEMA, identity

__all__ = [  # with the files that it is made of, so that those who read or write a store need no other module
    "CHOSEN",
    "LATER",
    "RESULT",
    "TEST",
    "Store",
    "Stored",
    "alone",
    "beside",
    "check",
    "damaged",
    "make_folder",
    "parse_json",
    "read_checkpoint",
    "read_json",
    "read_result",
    "read_study",
    "read_table",
    "sweep",
    "sync",
    "table_beside",
    "write_checkpoint",
    "write_json",
    "write_result",
    "write_table",
    "write_whole",
]

BESIDE = ("run.json", "environment.json", "evaluations.csv", "walk.csv", "losses.csv.gz", "error.txt")  # what result.json vouches for
CHECKPOINT_SEAL = 32  # bytes at the end of a checkpoint
MEASURED = ("bench.json", "quality.json", "functions.json", "cost.json")  # what lies beside the studies
PATIENCE = 60.0  # seconds to wait for others who change a record


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


def write_result(folder: Path, result: dict[str, Any]) -> None:
    """Write result.json, with the digests of the files beside it; the run is finished, and stays so, once this returns."""
    found = {name: content for name in BESIDE if (content := read_whole(folder / name)) is not None}
    write_json(folder / "result.json", {**result, "files": {name: digest(content) for name, content in found.items()}})
    sync(folder.parent)


def beside(folder: Path, name: str, files: dict[str, str]) -> bytes | None:
    """The content of a file that result.json vouches for by `files`, None where it names no such file; UserError where it is another."""
    if name not in files:
        return None
    if (content := run_file(folder, name)) is None or digest(content) != files[name]:
        raise damaged(folder / name, "it is missing" if content is None else "it is not what the result was written beside")
    return content


def table_beside(folder: Path, name: str, files: dict[str, str]) -> dict[str, list[float]]:
    """The columns of such a file; none where there is no such file."""
    return {} if (content := beside(folder, name, files)) is None else parse_table(folder / name, content)


def write_checkpoint(path: Path, content: bytes) -> None:
    """A checkpoint, sealed together with what the run is: neither a damaged one nor another run's is gone on from."""
    write_whole(path, content + _checkpoint_seal(path, content))


def read_checkpoint(path: Path) -> bytes:
    """What `write_checkpoint` was given; UserError where it is damaged or of another run."""
    stored = read_whole(path, math.inf) or b""
    content, seal = stored[:-CHECKPOINT_SEAL], stored[-CHECKPOINT_SEAL:]
    if seal != _checkpoint_seal(path, content):
        raise damaged(path, "its content and its digest do not agree")
    return content


def _checkpoint_seal(path: Path, content: bytes) -> bytes:
    seal = hashlib.sha256(content)
    for name in ("run.json", "batch.json"):
        seal.update(read_whole(path.parent / name) or b"")
    return seal.digest()


class Stored(NamedTuple):
    """What a run's folder holds: the description, the result if there is one by now, and the digests of the files beside it."""

    description: dict[str, Any]
    result: dict[str, Any] | None
    files: dict[str, str]


class Store:
    """The output folder of the laboratory."""

    def __init__(self, root: Path, *, create: bool = True) -> None:
        self.root = root
        if create:
            if root == Path():
                raise UserError("the output folder must be one of its own, not the current folder: name it with --out")
            try:
                for name in ("runs", "studies"):
                    make_folder(root / name)
                with tempfile.TemporaryFile(dir=root):
                    pass
            except OSError as error:
                raise UserError(f"cannot write to the output folder {root} ({error.strerror}): choose another with --out") from error
        elif not self.there(root):
            raise UserError(f"{root} is not an output folder of forwardgrad: it has no runs")

    @staticmethod
    def there(root: Path) -> bool:
        """Whether a folder is an output folder: it holds folders of runs, or a pack of them."""
        return (root / "runs").is_dir() or (root / PACKED).exists()

    def folder(self, identity: str) -> Path:
        return self.root / "runs" / identity

    def stored(self, identity: str) -> Stored | None:
        """What is stored of a run, None for one that was never begun; UserError where any of it is damaged."""
        return _stored(self.folder(identity), name=identity)

    def result(self, identity: str) -> dict[str, Any] | None:
        """The result of a finished run, None for a run that is absent or unfinished."""
        return None if (found := self.stored(identity)) is None else found.result

    def runs(self) -> list[str]:
        """The identities of all runs that were begun."""
        folders = {path.name for path in (self.root / "runs").glob("*") if IDENTITY.fullmatch(path.name)}
        return sorted(folders | packed_runs(self.root).keys())

    def studies(self) -> list[dict[str, Any]]:
        """Every stored study; UserError for one that is damaged or of another version."""
        return [read_study(path) for path in sorted((self.root / "studies").glob("*.json"))]

    def check(self) -> None:
        """UserError where a record or a measurement is damaged, which would keep what is trained from being reported."""
        self.studies()
        for name in MEASURED:
            read_json(self.root / name)

    @contextmanager
    def changing(self) -> Iterator[None]:
        """Hold what many processes may change, a study's record or a measurement: read it again inside, then write it."""
        lock = FileLock(self.root / "records.lock")
        try:
            lock.acquire(timeout=PATIENCE)
        except Timeout as error:
            raise UserError(f"another process keeps {self.root} locked: wait for it, or choose another output folder with --out") from error
        try:
            sweep(self.root / "studies")
            yield
        finally:
            lock.release()


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
LATER_STUDY = {"seeds": int, "of": str}  # what not every study has
LATER_ARM = {
    "full_epochs": int,
    "budget": dict,
    "sampler": str,
    "training": dict,
    "epochs": int,
    "no_winner": str,
}  # what not every arm has
PUBLISHED = {"epochs": int, "test_loss": NUMBER}
TRIAL = {"values": dict, "run": str}
CHOSEN = {"values": dict, "validation_loss": MAYBE, "at_edge": list}
VALUE = (int, float, str)  # of a hyperparameter; a bool is an int


def read_result(folder: Path) -> dict[str, Any] | None:
    """The checked result of the run in a folder, None where it has none."""
    return None if (found := _stored(folder)) is None else found.result


def _stored(folder: Path, name: str | None = None) -> Stored | None:
    """What is in a run's folder; `name` is what the description has to hash to."""
    path = folder / "result.json"
    written, asked = run_file(folder, "result.json"), run_file(folder, "run.json")  # in this order: what is written last is read first
    result = None if written is None else parse_json(path, written)
    if asked is None:
        if result is not None:
            raise damaged(folder / "run.json", "it is missing")
        return None
    description = parse_json(folder / "run.json", asked)
    if name is not None and identity(description) != name:
        raise damaged(folder / "run.json", "it is not what its folder is named after")
    if result is None:
        return Stored(description, None, {})
    files = check(path, result, {"files": dict}).pop("files")
    if files.get("run.json") != digest(asked):
        raise damaged(path, "it belongs to another run.json")
    return Stored(description, _checked(path, result), files)


def _checked(path: Path, result: dict[str, Any]) -> dict[str, Any]:
    check(path, result, RESULT)
    check(path, result, _there(result, LATER))
    if result["test"] is not None:
        check(path, result["test"], TEST)
        check(path, result["test"], _there(result["test"], LATER_TEST))
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
    if check(path, study, {**STUDY, **_there(study, LATER_STUDY)})["name"] != path.stem:
        raise damaged(path, f"it holds the study {study['name']!r}")
    for arm in study["arms"]:
        _check_arm(path, arm)
    return study


def _check_arm(path: Path, arm: Any) -> None:
    check(path, arm, ARM)
    check(path, arm, _there(arm, LATER_ARM))
    if arm["published"] is not None:
        check(path, arm["published"], PUBLISHED)
    chosen = check(path, arm["chosen"], CHOSEN)
    values = [chosen["values"], *(check(path, trial, TRIAL)["values"] for trial in arm["trials"])]
    spaces = arm["space"].values()
    listed = [value for point in values for value in point.values()] + [value for space in spaces for value in _flat(space)]
    alike = all(len({isinstance(value, str) for value in space}) == 1 for space in spaces if isinstance(space, list))
    if not alike or not all(isinstance(value, VALUE) and not is_huge(value) for value in listed):
        raise damaged(path, f"the values tried by {arm['name']!r} are no numbers or words")
    named = [*arm["runs"], *(trial["run"] for trial in arm["trials"])]
    if not all(isinstance(name, str) and IDENTITY.fullmatch(name) for name in named):
        raise damaged(path, f"{arm['name']!r} has runs that are none")
    if not all(isinstance(name, str) for name in chosen["at_edge"]):
        raise damaged(path, f"{arm['name']!r} has edges that are none")


def _there(value: dict[str, Any], fields: dict[str, Any]) -> dict[str, Any]:
    """Those of the fields that an object has."""
    return {name: kind for name, kind in fields.items() if name in value}


def _flat(space: Any) -> Iterator[Any]:
    """The values of a grid, or the bounds of a space that is none, or the choices in it."""
    if isinstance(space, dict):
        for value in space.values():
            yield from value if isinstance(value, list) else [value]
    else:
        yield from space if isinstance(space, list) else [None]
