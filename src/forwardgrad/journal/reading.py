"""A log of steps, read: what it began with, and step by step the numbers, and what changed before each."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from forwardgrad.journal import records
from forwardgrad.journal.records import FORMAT, JournalError, Record

Settings = list[dict[str, Any]]
"""The settings of an optimizer, group by group."""


@dataclass
class LoggedStep:
    """One step.

    `loss` and `weights` [K] are its numbers, bit for bit. `places` says what moved, and `trained` which parameters there were to move.
    `settings` are those that changed before it: group, name, value. `generator` is the state that it began in, where the step before
    did not leave it. `digest` is that of the parameters that the move left, where one was written; `between` that of the parameters
    when the log was closed after the step, or went on after it. `end` is where its records end in the file.
    """

    loss: Tensor
    weights: Tensor
    places: Mapping[str, Any]
    trained: tuple[str, ...]
    settings: list[tuple[int, str, Any]]
    generator: bytes | None
    end: int
    digest: bytes | None = None
    between: bytes | None = None


@dataclass
class Journal:
    """A log of steps: what the first of them began with, and all of them."""

    path: Path
    header: dict[str, Any]
    end: int  # of what stands ahead of the first step
    steps: list[LoggedStep] = field(default_factory=list)

    @property
    def generator(self) -> bytes:
        """The state of the generator ahead of the first step."""
        return base64.b64decode(self.header["generator"])

    @property
    def digest(self) -> bytes:
        """That of the parameters ahead of the first step."""
        return bytes.fromhex(self.header["digest"])

    def settings(self, step: int) -> Settings:
        """Those of the optimizer's groups after so many steps."""
        found: Settings = [dict(group) for group in self.header["settings"]]
        for one in self.steps[:step]:
            for group, name, value in one.settings:
                found[group][name] = value
        return found

    def check_length(self, step: int) -> None:
        """JournalError unless it holds so many steps."""
        if not 0 <= step <= len(self.steps):
            raise JournalError(f"{self.path} holds the steps 1 to {len(self.steps)}, and none up to step {step}: ask for one of these")


def read_journal(path: str | Path, until: int | None = None) -> Journal:
    """Read a log, or its first steps alone. Raises JournalError for a file that is none, or is damaged in what is read of it."""
    where = Path(path)
    found = records.read_records(where)
    first = next(found, None)
    if first is None or first.kind != records.HEADER:
        raise JournalError(f"{where} is no log of steps: it has no beginning")
    try:
        header = json.loads(first.content)
        if header["format"] != FORMAT:
            raise JournalError(f"{where} was written in format {header['format']}, and this version reads format {FORMAT}")
        journal = Journal(where, header, first.end)
        _ = journal.digest, journal.generator, journal.settings(0)  # that they are there
        _read_steps(journal, found, until)
    except JournalError:
        raise
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, RuntimeError) as error:
        raise JournalError(f"{where} holds what no log of steps has ({type(error).__name__}: {error})") from error
    return journal


def _read_steps(journal: Journal, found: Iterator[Record], until: int | None) -> None:
    steps, places, settings, generator = journal.steps, dict[str, Any](), list[tuple[int, str, Any]](), None
    for kind, content, start, end in found:
        if kind in (records.DIGEST, records.BETWEEN):
            if steps:
                setattr(steps[-1], "digest" if kind == records.DIGEST else "between", content)
                steps[-1].end = end
            continue
        if until is not None and len(steps) >= until:
            return
        if kind == records.PLACES:
            places = json.loads(content)
        elif kind == records.SETTINGS:
            settings += [(int(group), str(name), value) for group, name, value in json.loads(content)]
        elif kind == records.GENERATOR:
            generator = content
        elif kind == records.STEP:
            loss, weights = _numbers(content, places)
            steps.append(LoggedStep(loss, weights, places["moved"], tuple(places["trained"]), settings, generator, end))
            settings, generator = [], None
        else:
            raise JournalError(f"{journal.path} begins a second time at byte {start}: it is two logs in one")


def _numbers(content: bytes, places: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """The loss and the weights of a step."""
    size = torch.empty((), dtype=_kind(places["loss"])).element_size()
    loss = torch.frombuffer(bytearray(content[:size]), dtype=_kind(places["loss"]))[0]
    return loss, torch.frombuffer(bytearray(content[size:]), dtype=_kind(places["weights"]))


def _kind(name: str) -> torch.dtype:
    found = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32, "float64": torch.float64}
    return found[name]
