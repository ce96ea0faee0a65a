"""What a report is made of: paragraphs, lists, tables, figures, the same figure against several things, and claims beside measurements."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from forwardgrad.lab.report.blocks.tables import Table
from forwardgrad.lab.report.figures import Drawing


@dataclass(frozen=True)
class Picture:
    """A figure with its caption; `name` is the name of its files."""

    name: str
    drawing: Drawing
    caption: str


@dataclass(frozen=True)
class Views:
    """One figure in several views, of which a reader sees one at a time: `label` says what they differ in."""

    name: str
    label: str
    views: tuple[tuple[str, Picture], ...]


@dataclass(frozen=True)
class Observation:
    """One measurement that bears on a claim: where it was made, its value in words, and over how many runs or seeds."""

    where: str
    value: str
    n: str


@dataclass(frozen=True)
class Judged:
    """A claim beside what was measured; the rule is all that decides between the three words."""

    id: str
    said: str
    source: str
    status: str
    readings: tuple[Observation, ...]
    rule: str
    why: str = ""
    command: str = ""  # what would decide it
    evidence: str = ""  # the section that it was read from


Block = str | tuple[str, ...] | Table | Picture | Views | tuple[Judged, ...]


@dataclass(frozen=True)
class Section:
    """A titled part of the page, with what it comes to in a sentence or two where it comes to something.

    `source` is the place in the table of provenance where the commands behind its numbers begin.
    """

    id: str
    title: str
    verdict: str
    blocks: tuple[Block, ...]
    source: str = ""


def pictures_of(sections: Sequence[Section]) -> Iterator[Picture]:
    """Every figure of the sections, each view by itself."""
    for block in (block for section in sections for block in section.blocks):
        if isinstance(block, Picture):
            yield block
        elif isinstance(block, Views):
            yield from (picture for _, picture in block.views)


def tables_of(sections: Sequence[Section]) -> Iterator[tuple[str, Table]]:
    """Every table of the sections with a name for its file."""
    seen: dict[str, int] = {}
    for section in sections:
        for table in (block for block in section.blocks if isinstance(block, Table)):
            name = slug(f"{section.id}-{table.caption}")
            seen[name] = seen.get(name, 0) + 1
            yield (name if seen[name] == 1 else f"{name}-{seen[name]}"), table


def slug(text: str) -> str:
    """The words of a text as a name for a file.

    >>> slug("beyond-NN · MNIST: every arm")
    'beyond-nn-mnist-every-arm'
    """
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-") or "table"
