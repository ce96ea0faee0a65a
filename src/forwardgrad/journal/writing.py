"""`StepLog`: the numbers that the steps of a training were taken by, in a file that grows by some bytes a step."""

from __future__ import annotations

import base64
import errno
import json
import os
import weakref
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import torch
from torch import Tensor, nn

from forwardgrad.journal import records
from forwardgrad.journal.digests import digest_of
from forwardgrad.journal.reading import Settings, read_journal
from forwardgrad.journal.records import FORMAT, MAGIC, changes, packed


class StepLog:
    """A file from which a training is taken again without its data: `TrainingStep(..., log=StepLog(path))` writes it, `replay` reads it.

    A direction follows from the generator, and how far a step went along it is one number. So the file holds where the generator stood, and
    of each step the loss and K numbers: 11 bytes and K + 1 numbers, 19 bytes in float32 at K = 1. Learning rates and the places that moved
    are written when they change; so is the state of the generator (5 kB), where somebody else drew from it between two steps.

    Args:
        path: the file. It must not be there yet, unless the log goes on.
        since: go on with a log after its step of that number, such as that of a checkpoint. Later steps are cut off.
        digest_every: after how many steps the digest of the parameters is written, by which a replay finds the first steps that came out
            different. 0: only when the log is closed.

    `close` writes the digest of the parameters as they are then. A log that was not closed lacks that, and no step.

    Raises ValueError for numbers that are none of these. The step that it is given to raises ValueError for a file that is there, is not
    there, is shorter than `since`, or belongs to another training.
    """

    def __init__(self, path: str | Path, *, since: int | None = None, digest_every: int = 100) -> None:
        for what, value in (("since", since), ("digest_every", digest_every)):
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 0):
                raise ValueError(f"{what} must be a whole number of at least 0, not {value!r}")
        self.path, self.since, self.digest_every = Path(path), since, digest_every
        self.steps = since or 0
        """How many steps it holds."""
        self._file: FileIO | None = None
        self._model: nn.Module | None = None
        self._settings: Settings = []
        self._places: dict[str, Any] = {}

    def begin(self, model: nn.Module, about: dict[str, Any], settings: Settings, generator: bytes) -> None:
        """Write the beginning, or find the place to go on from. `about` is plain JSON and says which training this is."""
        if self._model is not None:
            raise ValueError(f"the log {self.path} belongs to a training step already: give each its own StepLog")
        digest = digest_of(model)
        if self.since is not None:
            self._go_on(self.since, about, settings, digest)
        else:
            whole = {"format": FORMAT, **about, "settings": settings, "digest": digest.hex()}
            whole |= {"generator": base64.b64encode(generator).decode(), "torch": torch.__version__}
            try:
                content = json.dumps(whole).encode()
            except TypeError as error:
                raise ValueError(f"what the log has to say of the training is no plain JSON: {error}") from error
            if self.path.exists():
                raise ValueError(f"{self.path} is there already: give StepLog another path, or since=N to go on after step N")
            self._open("xb")
            self._write(MAGIC + packed(records.HEADER, content))
            self._settings = settings
        self._model = model

    def _go_on(self, since: int, about: dict[str, Any], settings: Settings, digest: bytes) -> None:
        if not self.path.exists():
            raise ValueError(f"there is no log {self.path} to go on with: leave since out to begin one")
        journal = read_journal(self.path, since)
        if len(journal.steps) < since:
            raise ValueError(f"{self.path} ends after step {len(journal.steps)}, and is to go on after step {since}: go on without it")
        for name, value in about.items():
            if journal.header.get(name) != json.loads(json.dumps(value)):
                raise ValueError(f"{self.path} is the log of another training: its {name} is {journal.header.get(name)!r}, not {value!r}")
        last = journal.steps[since - 1] if since else None
        if (known := last.between if last else journal.digest) is not None and known != digest:
            raise ValueError(f"the model's parameters are not those that {self.path} has after step {since}: load that step's first")
        self._settings = journal.settings(since)
        file = self._open("r+b")
        file.truncate(last.end if last else journal.end)
        file.seek(0, os.SEEK_END)
        self._write(packed(records.BETWEEN, digest))

    def _open(self, mode: Literal["xb", "r+b"]) -> FileIO:
        """Without a buffer, so that what a step wrote outlives the process; and closed without a word with the log."""
        self._file = self.path.open(mode, buffering=0)
        weakref.finalize(self, self._file.close)
        return self._file

    def write_step(
        self, loss: Tensor, weights: Tensor, moved: dict[str, Any], trained: list[str], settings: Settings, generator: bytes | None
    ) -> None:
        """Append a step that was taken; `generator` is the state that it began in, where it was not the one that the step before left."""
        found = b""
        if changed := changes(self._settings, settings):
            found += packed(records.SETTINGS, json.dumps(changed).encode())
            self._settings = settings
        kinds = {"loss": _kind(loss), "weights": _kind(weights)}
        places = {"trained": trained, "moved": moved, **kinds}
        if places != self._places:
            found += packed(records.PLACES, json.dumps(places).encode())
            self._places = places
        if generator is not None:
            found += packed(records.GENERATOR, generator)
        self.steps += 1
        found += packed(records.STEP, _bits(loss) + _bits(weights))
        if self.digest_every and self.steps % self.digest_every == 0:
            assert self._model is not None
            found += packed(records.DIGEST, digest_of(self._model))
        self._write(found)

    def sync(self) -> None:
        """Wait until all that was written is on the disk."""
        if self._file is not None:
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Write the digest of the parameters, and close the file."""
        if self._file is not None and self._model is not None:
            self._write(packed(records.BETWEEN, digest_of(self._model)))
            self.sync()
            self._file.close()
            self._file = None

    def __enter__(self) -> StepLog:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _write(self, content: bytes) -> None:
        if self._file is None:
            raise ValueError(f"the log {self.path} is closed: no further step can be written to it")
        before = self._file.tell()
        try:
            if self._file.write(content) != len(content):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))
        except OSError:  # what comes behind a torn record could not be read
            file, self._file = self._file, None
            with file:
                file.truncate(before)
            raise


def _bits(numbers: Tensor) -> bytes:
    return bytes(numbers.detach().cpu().reshape(-1).contiguous().view(torch.uint8).tolist())


def _kind(numbers: Tensor) -> str:
    return str(numbers.dtype).removeprefix("torch.")
