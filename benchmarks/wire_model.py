"""How long a step takes with more ranks than there are here: a formula with nothing fitted, whose parts are measured one by one.

    t(R) = c · max(1, R / cores) + n(R) · g + b(R) / r

c: seconds of a step of one rank alone, on as many examples as a rank has. g: seconds of an all_gather of ten numbers between two ranks on
the same link, one after the other; so it holds the time that these few bytes take. r: bytes a second of plain TCP on the link.
n and b are what gloo sends, both in a ring. An all_gather is R − 1 messages in a row. An all_reduce is 2 (R − 1) for each bucket of
gradients, and 2 (R − 1) / R of the gradient's bytes. That a message of DDP travels while the backward pass goes on is not counted.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

FEW = 1000  # bytes up to which a message takes no time of its own beyond g


class Line(NamedTuple):
    """A link as measured: seconds of a small all_gather between two ranks, bytes a second."""

    gather: float
    rate: float


class Sent(NamedTuple):
    """One call of a collective: the bytes that a rank gives, and whether they are reduced (else gathered)."""

    size: int
    reduced: bool


def messages(ranks: int, sent: Sequence[Sent]) -> int:
    """How many wait for one another."""
    return sum((2 if one.reduced else 1) * (ranks - 1) for one in sent)


def transmitted(ranks: int, sent: Sequence[Sent]) -> float:
    """Bytes that each rank sends, without headers."""
    return sum((ranks - 1) * one.size * (2 / ranks if one.reduced else 1) for one in sent)


def seconds(compute: float, ranks: int, sent: Sequence[Sent], line: Line, cores: float = math.inf) -> float:
    """The formula; without `cores` every rank has one of its own."""
    long = transmitted(ranks, [one for one in sent if one.size > FEW]) / line.rate
    return compute * max(1.0, ranks / cores) + messages(ranks, sent) * line.gather + long


def by_doubling(compute: float, ranks: int, sent: Sequence[Sent], line: Line) -> float:
    """The same, if gathers went by doubling: ⌈log2 R⌉ messages in a row in place of R − 1. Gloo does not do this."""
    long = transmitted(ranks, sent) / line.rate
    return compute + len(sent) * math.ceil(math.log2(ranks)) * line.gather + long
