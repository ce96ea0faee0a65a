"""Which way the derivative of each call took, noted only while somebody asks, as `explain` does."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

Kind = Literal["rule", "dual numbers", "differences", "did not move"]


class Way(NamedTuple):
    """What became of a call."""

    function: str
    kind: Kind
    reason: str


class Scored(NamedTuple):
    """What moved at a place, by the parameters of its layer, and which part of the loss scores it."""

    layer: str
    moves: str
    scored: str
    reason: str


@dataclass
class Notes:
    """Of a step: every call with its way and how often, and every pass as a whole: "explicit" or "dual numbers", and why not the first;
    and every place that moved in the last pass, in order."""

    calls: Counter[Way] = field(default_factory=Counter)
    passes: list[tuple[str, str]] = field(default_factory=list)
    layers: list[Scored] = field(default_factory=list)


asked: ContextVar[Notes | None] = ContextVar("asked", default=None)


@contextmanager
def asking() -> Iterator[Notes]:
    """Inside, what is evaluated is noted."""
    notes = Notes()
    token = asked.set(notes)
    try:
        yield notes
    finally:
        asked.reset(token)


@contextmanager
def unasked() -> Iterator[None]:
    """Inside, nothing is noted."""
    token = asked.set(None)
    try:
        yield
    finally:
        asked.reset(token)


def counter() -> Counter[Way] | None:
    """To count the calls of one evaluation, if somebody asks."""
    return None if asked.get() is None else Counter()


def name_of(function: Callable[..., Any]) -> str:
    """A torch function as its users know it."""
    name: str = getattr(function, "__name__", type(function).__name__)
    if name in ("__get__", "__set__"):  # of a property, such as Tensor.T
        name = getattr(getattr(function, "__self__", None), "__name__", name)
    return "the loss as one number" if name == "<lambda>" else name


def outside() -> int:
    """The level of the stack at which the caller of the library stands."""
    level, frame = 1, inspect.currentframe()
    while frame is not None and str(frame.f_globals.get("__name__")).split(".")[0] in ("forwardgrad", "contextlib", "torch"):
        level, frame = level + 1, frame.f_back
    return level - 1
