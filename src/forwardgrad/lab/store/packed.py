"""Finished runs in one file: OUT/runs.jsonl.gz holds the files of many run folders, and is read as those folders are.

The first line says how many runs follow. Every other line is one run: its identity, and its files by name, as text (gzipped ones as
base64).
A folder with a result comes before the same run in the pack. `packing` writes the file. Loads without torch.
"""

from __future__ import annotations

import base64
import gzip
import io
import json
import re
import zlib
from pathlib import Path

from forwardgrad.lab.store.files import LARGEST, PACKED, damaged, read_whole

FORMAT = 1
IDENTITY = re.compile(r"[0-9a-f]{12}")  # the name of a run
LOSSES = "losses.csv.gz"  # the training loss of every step
SUMMARY = "losses.json"  # what a thin pack has in its place
HELD = ("run.json", "environment.json", "evaluations.csv", "walk.csv", LOSSES, SUMMARY, "result.json")  # of a run's files
Files = dict[str, bytes]
_read: dict[Path, tuple[tuple[int, int, int], dict[str, Files]]] = {}  # every pack as it was last read


def run_file(folder: Path, name: str) -> bytes | None:
    """The content of one file of a run, from its folder or from the pack beside the folders; None where neither has it."""
    if (folder / "result.json").exists() and (content := read_whole(folder / name)) is not None:
        return content  # else another process has packed it since
    files = packed_runs(folder.parent.parent).get(folder.name)
    return read_whole(folder / name) if files is None else files.get(name)


def left_out(folder: Path, name: str) -> bool:
    """Whether a run is read from a pack that does not hold this file of it."""
    if (folder / "result.json").exists():
        return False
    files = packed_runs(folder.parent.parent).get(folder.name)
    return files is not None and name not in files


def packed_runs(root: Path) -> dict[str, Files]:
    """Every run in the pack of an output folder, none where there is no pack; UserError where the pack is damaged."""
    path = root / PACKED
    try:
        found = path.stat()
    except OSError:
        _read.pop(path, None)
        return {}
    stamp = found.st_mtime_ns, found.st_size, found.st_ino
    if path not in _read or _read[path][0] != stamp:
        _read[path] = stamp, _parse(path, read_whole(path) or b"")
    return _read[path][1]


def _parse(path: Path, content: bytes) -> dict[str, Files]:
    try:
        with gzip.GzipFile(fileobj=io.BytesIO(content)) as file:
            lines = file.read(LARGEST + 1)
        if len(lines) > LARGEST:
            raise ValueError(f"it unpacks to more than {LARGEST:,} bytes")
        if not lines:
            raise ValueError("it is empty")
        head, *rows = [json.loads(line) for line in lines.splitlines()]
        if head["format"] != FORMAT:
            raise ValueError(f"its format is {head['format']!r}, and this version reads {FORMAT}")
        runs = {row["run"]: {name: _content(name, text) for name, text in row["files"].items()} for row in rows}
        if not all(map(IDENTITY.fullmatch, runs)) or len(runs) != head["runs"]:
            raise ValueError(f"it should hold {head['runs']} runs")
    except (OSError, EOFError, ValueError, LookupError, TypeError, AttributeError, RecursionError, zlib.error) as error:
        raise damaged(path, error) from error
    return runs


def as_lines(runs: dict[str, Files]) -> bytes:
    """The content of a pack that holds these runs; the same runs give the same bytes."""
    rows: list[dict[str, object]] = [{"format": FORMAT, "runs": len(runs)}]
    rows += [
        {"run": run, "files": {name: _text(name, files[name]) for name in HELD if name in files}} for run, files in sorted(runs.items())
    ]
    return gzip.compress("".join(f"{json.dumps(row)}\n" for row in rows).encode(), mtime=0)


def _content(name: str, text: str) -> bytes:
    if name not in HELD:
        raise ValueError(f"a run in it has a file {name[:40]!r}")
    return base64.b64decode(text, validate=True) if name.endswith(".gz") else text.encode()


def _text(name: str, content: bytes) -> str:
    return base64.b64encode(content).decode() if name.endswith(".gz") else content.decode()
