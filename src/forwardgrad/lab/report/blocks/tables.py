"""A table, its cells, and how numbers are written in them. Loads without torch."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

DATA = {"mnist": "MNIST", "cifar10": "CIFAR-10", "digits": "digits"}
MODELS = {"nn": "NN", "cnn": "CNN", "cifar-cnn": "CNN", "logistic": "logistic regression", "mlp": "MLP"}


@dataclass(frozen=True)
class Cell:
    """What stands in a cell, a smaller line below it, and a tone: an arm's kind, `warn`, `quiet`, `code` or nothing.

    `link` is the place on the page that its text leads to, `anchor` the place that it is.
    """

    text: str
    sub: str = ""
    tone: str = ""
    link: str = ""
    anchor: str = ""


@dataclass(frozen=True)
class Table:
    """Rows in titled groups, and what each column means in plain words."""

    columns: tuple[str, ...]
    groups: tuple[tuple[str, tuple[tuple[Cell, ...], ...]], ...]
    caption: str
    meaning: tuple[tuple[str, str], ...] = ()


NONE = Cell("–", tone="quiet")


def number(value: float | None, digits: int = 3) -> str:
    """Three significant digits, without exponents where a reader can do without; words for what is no finite number.

    >>> number(0.06128), number(12345.6), number(1e-05), number(float("inf"))
    ('0.0613', '12,346', '1e-5', 'not finite')
    """
    if value is None or not math.isfinite(value):
        return "not finite"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    if value == 0 or abs(value) >= 1e-4:
        return f"{value:#.{digits}g}".rstrip(".") if value else "0"
    return f"{value:.{digits}g}".replace("e-0", "e-")


def exact(value: float) -> str:
    """A hyperparameter as it was given: 0.1, 1e-5."""
    return f"{value:.6g}".replace("e-0", "e-")


def percent(value: float) -> str:
    return "not finite" if not math.isfinite(value) else f"{100 * value:.2f} %"


def duration(value: float) -> str:
    """Seconds in the unit that suits them.

    >>> duration(0.00321), duration(75), duration(5400)
    ('3.21 ms', '75.0 s', '1.50 h')
    """
    if not math.isfinite(value):
        return "not finite"
    for limit, factor, unit in ((1e-3, 1e6, "µs"), (1.0, 1e3, "ms"), (120.0, 1.0, "s"), (5400.0, 1 / 60, "min")):
        if value < limit:
            return f"{number(value * factor)} {unit}"
    return f"{number(value / 3600)} h"


def size(count: float) -> str:
    """Bytes in the unit that suits them.

    >>> size(512), size(7_454_760)
    ('512 B', '7.45 MB')
    """
    for limit, factor, unit in ((1e3, 1.0, "B"), (1e6, 1e3, "kB"), (1e9, 1e6, "MB")):
        if count < limit:
            return f"{count:,.0f} B" if unit == "B" else f"{number(count / factor)} {unit}"
    return f"{number(count / 1e9)} GB"


def count(n: int, what: str) -> str:
    return f"{n:,} {what}" if n == 1 else f"{n:,} {what}s"


def place(*words: str) -> str:
    """A name for a place on the page, another one for other words.

    >>> place("source", "demo", "a b")
    'source.demo.a_20_b'
    """
    return ".".join(re.sub(r"[^A-Za-z0-9-]", lambda sign: f"_{ord(sign[0]):x}_", word) for word in words)
