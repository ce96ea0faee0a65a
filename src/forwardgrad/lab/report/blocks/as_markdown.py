"""The report as Markdown: the same words and numbers as the page."""

from __future__ import annotations

from collections.abc import Sequence

from forwardgrad.lab.report.blocks.kinds import Block, Judged, Picture, Section, Views
from forwardgrad.lab.report.blocks.tables import Cell, Table


def markdown(title: str, verdict: Sequence[str], sections: Sequence[Section]) -> str:
    lines = [f"# {title}", "", *(line for sentence in verdict for line in (_plain(sentence), ""))]
    lines += [f"- **{_plain(part.title)}.** {_plain(part.verdict)}" for part in sections if part.verdict]
    for section in sections:
        lines += ["", f"## {_plain(section.title)}"]
        for block in section.blocks:
            lines += ["", *_block(block)]
    return "\n".join(lines) + "\n"


def _block(block: Block) -> list[str]:
    match block:
        case str():
            return [_plain(block)]
        case Picture():
            return [f"![{_plain(block.caption)}](figures/{block.name}.svg)", "", f"*{_plain(block.caption)}*"]
        case Views():
            return [line for _, picture in block.views for line in (*_block(picture), "")][:-1]
        case Table():
            return _table(block)
        case tuple():
            return [line for item in block for line in (_judged(item) if isinstance(item, Judged) else [f"- {_plain(item)}"])]


def _judged(claim: Judged) -> list[str]:
    lines = [f"- **{claim.status}**: {_plain(claim.said)} ({_plain(claim.source)})"]
    lines += [f"  - {_plain(reading.where)}: {_plain(reading.value)}, {_plain(reading.n)}" for reading in claim.readings]
    lines += [f"  - {_plain(claim.why)}"] if claim.why else []
    lines.append(f"  - Rule: {_plain(claim.rule)}")
    return lines + ([f"  - What would decide it: {_code(claim.command)}"] if claim.command else [])


def _table(table: Table) -> list[str]:
    head = ["comparison", *table.columns]
    lines = [f"### {_plain(table.caption)}", "", _row(head), _row(["---"] * len(head))]
    for title, rows in table.groups:
        lines += [_row([_plain(title), *map(_cell, row)]) for row in rows]
    return lines + ([""] if table.meaning else []) + [f"- *{_plain(column)}*: {_plain(words)}" for column, words in table.meaning]


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _cell(cell: Cell) -> str:
    if cell.tone == "code":
        return _code(cell.text)
    text = _plain(cell.text)
    return f"{text} ({_plain(cell.sub)})" if cell.sub else text


def _code(text: str) -> str:
    return "`" + text.replace("`", "'").replace("|", "\\|") + "`"


def _plain(text: str) -> str:
    """Text that Markdown and its tables take literally."""
    for sign, literal in (("\\", "\\\\"), ("&", "&amp;"), ("<", "&lt;"), ("|", "\\|"), ("*", "\\*"), ("`", "\\`"), ("\n", " ")):
        text = text.replace(sign, literal)
    return text
