"""Runs as folders: what was asked, where it ran, how it went, and the result, each file written whole or not at all.

OUT/runs/<identity>/run.json            the complete description; its hash is the folder's name
                    environment.json    versions, hardware, commit, command
                    status.json         where a run in progress is (replaced about once a second)
                    checkpoint.pt       the state that a killed run goes on from; gone once it has finished
                    evaluations.csv     validation loss and accuracy against step, epoch and training seconds
                    losses.csv.gz       the training loss of every step
                    result.json         written last: a folder that has it is finished
OUT/studies/<name>.json                 which runs belong to which arm of a comparison
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from forwardgrad.lab.errors import UserError


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


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Hold a run's folder, swept of what a killed writer left there; the lock of a process that died is free.

    Raises UserError where another process holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder.with_suffix(".lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise UserError(f"another process is training in {folder}: wait for it, or choose another output folder with --out") from error
    try:
        sweep(folder)
        yield
        Path(lock.lock_file).unlink(missing_ok=True)
    finally:
        lock.release()


def sweep(folder: Path) -> None:
    """Remove half-written files from a run's folder; nobody may be writing there."""
    for path in folder.glob(".*"):
        path.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    write_whole(path, (json.dumps(value, indent=1, allow_nan=False) + "\n").encode())


def read_json(path: Path) -> dict[str, Any] | None:
    """The object in a JSON file, None where there is no file."""
    try:
        value = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except (ValueError, OSError) as error:
        raise UserError(f"{path} cannot be read ({error}): delete its folder to run it again") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} does not hold a JSON object: delete its folder to run it again")
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
    """The columns of a CSV file written by `write_table`; an empty field is NaN, a missing file has no columns."""
    try:
        content = path.read_bytes()
        text = (gzip.decompress(content) if path.suffix == ".gz" else content).decode()
        header, *rows = csv.reader(io.StringIO(text))
        return {name: [float(row[i]) if row[i] else float("nan") for row in rows] for i, name in enumerate(header)}
    except FileNotFoundError:
        return {}
    except (OSError, EOFError, ValueError, IndexError) as error:
        raise UserError(f"{path} is damaged ({error}): delete its folder to run it again") from error


class Store:
    """The output folder of the laboratory."""

    def __init__(self, root: Path, *, create: bool = True) -> None:
        self.root = root
        if create:
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
        return read_json(self.folder(identity) / "result.json")

    def studies(self) -> list[dict[str, Any]]:
        paths = sorted((self.root / "studies").glob("*.json"))
        return [study for path in paths if (study := read_json(path)) is not None]
