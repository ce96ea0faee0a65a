"""What a run's folder holds: the result that vouches for the files beside it, and the state that a killed run goes on from.

Loads without torch.
"""

from __future__ import annotations

import hashlib
import math
from pathlib import Path
from typing import Any, NamedTuple

from forwardgrad.lab.store.files import check, damaged, digest, parse_json, parse_table, read_whole, sync, write_json, write_whole
from forwardgrad.lab.store.packed import run_file
from forwardgrad.lab.store.schema import checked_result
from forwardgrad.lab.studies import identity

BESIDE = ("run.json", "environment.json", "evaluations.csv", "walk.csv", "losses.csv.gz", "error.txt")  # what result.json vouches for
CHECKPOINT_SEAL = 32  # bytes at the end of a checkpoint


class Stored(NamedTuple):
    """What a run's folder holds: the description, the result if there is one by now, and the digests of the files beside it."""

    description: dict[str, Any]
    result: dict[str, Any] | None
    files: dict[str, str]


def write_result(folder: Path, result: dict[str, Any]) -> None:
    """Write result.json, with the digests of the files beside it; the run is finished, and stays so, once this returns."""
    found = {name: content for name in BESIDE if (content := read_whole(folder / name)) is not None}
    write_json(folder / "result.json", {**result, "files": {name: digest(content) for name, content in found.items()}})
    sync(folder.parent)


def beside(folder: Path, name: str, files: dict[str, str]) -> bytes | None:
    """The content of a file whose digest stands in `files`, and agrees. None where no digest stands there; UserError where it differs."""
    if name not in files:
        return None
    if (content := run_file(folder, name)) is None or digest(content) != files[name]:
        raise damaged(folder / name, "it is missing" if content is None else "it is not what the result was written beside")
    return content


def table_beside(folder: Path, name: str, files: dict[str, str]) -> dict[str, list[float]]:
    """The columns of a table that is read as `beside` reads it; none where there is no such table."""
    return {} if (content := beside(folder, name, files)) is None else parse_table(folder / name, content)


def read_result(folder: Path) -> dict[str, Any] | None:
    """The checked result of the run in a folder, None where it has none."""
    return None if (found := read_stored(folder)) is None else found.result


def read_stored(folder: Path, name: str | None = None) -> Stored | None:
    """What is stored of the run of a folder. UserError where `name` is given and is not the hash of the description."""
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
    return Stored(description, checked_result(path, result), files)


def write_checkpoint(path: Path, content: bytes) -> None:
    """Write a checkpoint with a digest of itself and of the run's description, so that no other run goes on from it."""
    write_whole(path, content + _checkpoint_seal(path, content))


def read_checkpoint(path: Path) -> bytes:
    """The content that `write_checkpoint` was given. UserError where the file is damaged or of another run."""
    stored = read_whole(path, math.inf) or b""
    content, seal = stored[:-CHECKPOINT_SEAL], stored[-CHECKPOINT_SEAL:]
    if seal != _checkpoint_seal(path, content):
        raise damaged(path, "its content and its digest do not agree")
    return content


def _checkpoint_seal(path: Path, content: bytes) -> bytes:
    seal = hashlib.sha256(content)
    seal.update(run_file(path.parent, "run.json") or b"")  # a run that keeps its weights may have been packed since
    seal.update(read_whole(path.parent / "batch.json") or b"")
    return seal.digest()
