"""Files that are written whole or not at all, stay written through a power cut, and tell when they are not what was written.

A JSON file carries the SHA-256 of the rest of its content; a table's stands in a JSON file beside it. Loads without torch.
"""

from __future__ import annotations

import csv
import errno
import gzip
import hashlib
import io
import json
import math
import os
import stat
import tempfile
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from forwardgrad.lab.errors import UserError

PACKED = "runs.jsonl.gz"  # in an output folder: finished runs in one file
SEAL = "sha256"  # the field of a JSON object that holds the digest of the others
LARGEST = 1 << 30  # bytes of a stored JSON file or table
LARGEST_INT, LARGEST_FLOAT = 1 << 63, 1e100


def write_whole(path: Path, content: bytes, *, durable: bool = True) -> None:
    """Write through a temporary file and a rename: after a kill or a power cut the file is the old one or the new one.

    Once this returns the new one is there to stay; without `durable`, which costs no wait for the disk, a power cut may leave anything.
    """
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            Path(temporary).chmod(0o644)
            if durable:
                file.flush()
                os.fsync(file.fileno())
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    if durable:
        sync(path.parent)


def sync(folder: Path) -> None:
    """Wait until the names in a folder are on the disk: a rename, a new file or a new folder is lost with the power until then."""
    if os.name == "nt":  # which has no such call, and keeps its names by itself
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # what file systems say that keep their names by themselves
            raise
    finally:
        os.close(handle)


def make_folder(folder: Path) -> None:
    """Make a folder and those above it, and wait until they are on the disk."""
    if not folder.is_dir():
        make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        sync(folder.parent)


def read_whole(path: Path, largest: float = LARGEST) -> bytes | None:
    """The content of a regular file, None where there is none; a device or a pipe in its place could be read for ever."""
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):
            raise damaged(path, "it is no file")
        if found.st_size > largest:
            raise damaged(path, f"it has {found.st_size:,} bytes")
        return path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise damaged(path, error.strerror or error) from error


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def write_json(path: Path, value: dict[str, Any], *, durable: bool = True, depth: int | None = None) -> None:
    """An object as a JSON file that carries its own digest; what lies deeper than `depth` stands on one line."""
    write_whole(path, sealed_json(value, depth=depth), durable=durable)


def sealed_json(value: dict[str, Any], *, depth: int | None = None) -> bytes:
    """The content of a file of `write_json`."""
    plain = json.loads(json.dumps(value, allow_nan=False))
    plain.pop(SEAL, None)
    sealed = {**plain, SEAL: _seal(plain)}
    return ((json.dumps(sealed, indent=1) if depth is None else _lines(sealed, depth)) + "\n").encode()


def _lines(value: Any, depth: int, indent: str = "") -> str:
    """JSON with one line for every part at `depth`, so that a change of one part is a change of one line."""
    if not depth or not value or not isinstance(value, (dict, list)):
        return json.dumps(value)
    inner = f"{indent} "
    if isinstance(value, dict):
        parts, ends = [f"{json.dumps(name)}: {_lines(part, depth - 1, inner)}" for name, part in value.items()], "{}"
    else:
        parts, ends = [_lines(part, depth - 1, inner) for part in value], "[]"
    return f"{ends[0]}\n{inner}{f',{chr(10)}{inner}'.join(parts)}\n{indent}{ends[1]}"


def read_json(path: Path) -> dict[str, Any] | None:
    """The object in a file of `write_json`, without its digest; None where there is no file; UserError where it is damaged."""
    return None if (content := read_whole(path)) is None else parse_json(path, content)


def parse_json(path: Path, content: bytes) -> dict[str, Any]:
    """The object that `content`, read from the file at `path`, holds."""
    try:
        value = json.loads(content)
        if not isinstance(value, dict):
            raise ValueError("it holds no JSON object")
        if value.pop(SEAL, None) != _seal(value):
            raise ValueError("its content and its digest do not agree")
    except (ValueError, RecursionError) as error:
        raise damaged(path, error) from error
    return value


def _seal(value: dict[str, Any]) -> str:
    """The digest of an object, whatever the order and the spaces it was written with; ValueError where it is not JSON."""
    return digest(json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode())


def damaged(path: Path, why: object) -> UserError:
    """The error for a stored file that cannot be used. It names the least that has to be deleted."""
    if path.name == PACKED:
        return UserError(f"{path} is damaged ({why}): put back a copy of it, or delete it to run the runs in it again")
    if path.parent.parent.name == "runs" and not path.parent.exists() and (pack := path.parents[2] / PACKED).exists():
        return damaged(pack, f"{path.name} of run {path.parent.name}: {why}")
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
        if not isinstance(value[name], kind) or isinstance(value[name], bool) or is_huge(value[name]):
            raise damaged(path, f"{name!r} is {str(value[name])[:40]!r}")
    return value


def is_huge(value: object) -> bool:
    """Whether a value is a number far beyond what is counted or fits into a float32: its square would overflow."""
    return abs(value) >= (LARGEST_INT if isinstance(value, int) else LARGEST_FLOAT) if isinstance(value, (int, float)) else False


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
    return {} if (content := read_whole(path)) is None else parse_table(path, content)


def parse_table(path: Path, content: bytes) -> dict[str, list[float]]:
    """The columns of the CSV file that `content`, read from the file at `path`, holds."""
    try:
        text = (gzip.decompress(content) if path.suffix == ".gz" else content).decode()
        header, *rows = csv.reader(io.StringIO(text))
        if set(map(len, rows)) - {len(header)}:
            raise ValueError("a row is cut short")
        columns = zip(*rows, strict=True) if rows else ((),) * len(header)
        return {name: [float(value) if value else math.nan for value in column] for name, column in zip(header, columns, strict=True)}
    except (OSError, EOFError, ValueError, IndexError, csv.Error, zlib.error) as error:
        raise damaged(path, error) from error
