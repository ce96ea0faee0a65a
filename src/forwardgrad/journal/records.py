"""The records of a journal: how a file of them is laid out, and how it is read without trusting it.

A file is eight bytes that say what it is, and records. Of each there are its kind (a letter) and the length of what it holds (four bytes),
two bytes that check these, what it holds, and a CRC-32 of all of it. Numbers are little-endian.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

MAGIC = b"fgsteps\n"
FORMAT = 1
HEADER, SETTINGS, PLACES, GENERATOR, STEP, DIGEST, BETWEEN = b"H", b"O", b"P", b"G", b"S", b"D", b"B"
KINDS = b"".join((HEADER, SETTINGS, PLACES, GENERATOR, STEP, DIGEST, BETWEEN))

_HEAD, _CHECK, _CRC = struct.Struct("<cI"), struct.Struct("<H"), struct.Struct("<I")
FRAME = _HEAD.size + _CHECK.size + _CRC.size
"""Bytes of a record beside what it holds."""


class JournalError(ValueError):
    """A log of steps that cannot be read, or does not belong to what it is used with. One sentence says why."""


class Record(NamedTuple):
    """One record, and where it begins and ends in its file."""

    kind: bytes
    content: bytes
    start: int
    end: int


def packed(kind: bytes, content: bytes) -> bytes:
    """A record as it stands in a file."""
    head = _HEAD.pack(kind, len(content))
    checked = head + _CHECK.pack(_check(head)) + content
    return checked + _CRC.pack(zlib.crc32(checked))


def read_records(path: Path) -> Iterator[Record]:
    """The records of a file, in order. A last one that was not written to its end is left out.

    Raises JournalError, naming the byte, at what is not as it was written, and for a file of another kind.
    """
    data = path.read_bytes()
    if data[: len(MAGIC)] != MAGIC[: len(data)]:
        raise JournalError(f"{path} is no log of steps: it does not begin as `StepLog` begins its files")
    at = len(MAGIC)
    while at + _HEAD.size + _CHECK.size <= len(data):
        body = at + _HEAD.size + _CHECK.size
        kind, length = _HEAD.unpack_from(data, at)
        if _CHECK.unpack_from(data, at + _HEAD.size)[0] != _check(data[at : at + _HEAD.size]) or kind not in KINDS:
            raise _damaged(path, at)
        end = body + length + _CRC.size
        if end > len(data):
            return
        if zlib.crc32(data[at : body + length]) != _CRC.unpack_from(data, body + length)[0]:
            raise _damaged(path, at)
        yield Record(kind, data[body : body + length], at, end)
        at = end


def _damaged(path: Path, at: int) -> JournalError:
    return JournalError(f"{path} is damaged in the record at byte {at}: the steps from there on cannot be taken again")


def _check(head: bytes) -> int:
    return zlib.crc32(head) & 0xFFFF


def changes(before: list[dict[str, Any]], now: list[dict[str, Any]]) -> list[tuple[int, str, Any]]:
    """The settings of groups that are not what they were: group, name and value."""
    return [
        (index, name, value)
        for index, (old, new) in enumerate(zip(before, now, strict=True))
        for name, value in new.items()
        if name not in old or old[name] != value
    ]
