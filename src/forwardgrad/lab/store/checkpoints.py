"""The state that a killed run goes on from, sealed together with what the run is. Loads without torch."""

from __future__ import annotations

import hashlib
import math
from pathlib import Path

from forwardgrad.lab.store.files import damaged, read_whole, write_whole

CHECKPOINT_SEAL = 32  # bytes at the end of a checkpoint


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
