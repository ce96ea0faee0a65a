"""The report: one self-contained page, the same in Markdown, and its figures, made from what is stored. Loads without torch."""

from __future__ import annotations

import dataclasses
import importlib.resources
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jinja2

from forwardgrad.lab import comparison_section, results
from forwardgrad.lab.bench_section import bench_section, cost_section
from forwardgrad.lab.beyond_section import beyond_section
from forwardgrad.lab.errors import UserError
from forwardgrad.lab.figures import FURTHER
from forwardgrad.lab.noise_section import noise_section
from forwardgrad.lab.quality_section import quality_section
from forwardgrad.lab.results import StudyResult
from forwardgrad.lab.sections import Block, Picture, Section, functions_section, provenance_section, study_section
from forwardgrad.lab.store import Store, read_json, write_whole
from forwardgrad.lab.tables import Cell

TITLE = "Forward gradients beside backpropagation"
ORDER = ("table1", "table1-retuned", "baydin", "beyond", "noise", "demo")
MEASURED: dict[str, tuple[str, Callable[[dict[str, Any]], Section]]] = {
    "functions.json": ("descents on two functions", functions_section),
    "bench.json": ("cost of one step", bench_section),
    "cost.json": ("time of a step, as measured earlier", cost_section),
    "quality.json": ("quality of estimates", quality_section),
}


def write(store: Store) -> Path:
    """Write report.html, report.md and figures/*.svg into the output folder; returns the path of the page.

    The same stored results give the same bytes. Raises UserError where there is nothing to report or a stored file is damaged.
    """
    studies = sorted(results.studies(store), key=lambda study: ORDER.index(study.name) if study.name in ORDER else len(ORDER))
    measured = {name: stored for name in MEASURED if (stored := read_json(store.root / name)) is not None}
    if not studies and not measured:
        raise UserError(f"nothing to report in {store.root}: run `forwardgrad reproduce table1 --out {store.root}` first")
    sections = _sections(store, studies, measured)
    (store.root / "figures").mkdir(exist_ok=True)
    for picture in (block for section in sections for block in section.blocks if isinstance(block, Picture)):
        write_whole(store.root / "figures" / f"{picture.name}.svg", f'<?xml version="1.0" encoding="utf-8"?>\n{picture.svg}'.encode())
    write_whole(store.root / "report.md", markdown(sections).encode())
    page = store.root / "report.html"
    write_whole(page, html(sections).encode())
    return page


def _sections(store: Store, studies: list[StudyResult], measured: dict[str, dict[str, Any]]) -> list[Section]:
    """Studies in the paper's order, the two functions after Baydin's comparison, the demonstration after the cost, provenance last."""
    extra, environments = {}, []
    for name, stored in measured.items():
        title, make = MEASURED[name]
        try:
            extra[name] = make(stored)
            environments.append((title, stored["environment"]))
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise UserError(f"{store.root / name} is damaged ({error!r}): delete it and measure it again") from error
    ahead = [_study(study, studies) for study in studies if study.name != "demo"]
    behind = [_study(study, studies) for study in studies if study.name == "demo"]
    return [*ahead, *extra.values(), *behind, provenance_section(studies, environments)]


def _study(study: StudyResult, studies: list[StudyResult]) -> Section:
    if study.name == "noise":  # asks what holds an explosion back, not which arm is best
        return noise_section(study)
    section = beyond_section(study, studies) if study.name == "beyond" else study_section(study)
    said, *compared = comparison_section.blocks(study)
    first, *others = section.blocks
    headed = isinstance(first, tuple) and isinstance(said, tuple) and first[: len(said)] == said
    return dataclasses.replace(section, blocks=(first, *([] if headed else [said]), *others, *compared))


def html(sections: list[Section]) -> str:
    template = importlib.resources.files("forwardgrad.lab").joinpath("page.html.jinja").read_text(encoding="utf-8")
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["kept"] = lambda text: text.replace(" %", "\N{NO-BREAK SPACE}%")  # no line begins with a percent sign
    return environment.from_string(template).render(title=TITLE, sections=sections, kinds=FURTHER)


def markdown(sections: list[Section]) -> str:
    lines = [f"# {TITLE}", "", *(f"- **{_plain(part.title)}.** {_plain(part.verdict)}" for part in sections if part.verdict)]
    for section in sections:
        lines += ["", f"## {_plain(section.title)}"]
        for block in section.blocks:
            lines += ["", *_block(block)]
    return "\n".join(lines) + "\n"


def _block(block: Block) -> list[str]:
    if isinstance(block, str):
        return [_plain(block)]
    if isinstance(block, tuple):
        return [f"- {_plain(sentence)}" for sentence in block]
    if isinstance(block, Picture):
        return [f"![{_plain(block.caption)}](figures/{block.name}.svg)", "", f"*{_plain(block.caption)}*"]
    head = ["comparison", *block.columns]
    lines = [f"### {_plain(block.caption)}", "", _row(head), _row(["---"] * len(head))]
    for title, rows in block.groups:
        lines += [_row([_plain(title), *map(_cell, row)]) for row in rows]
    return lines + ([""] if block.meaning else []) + [f"- *{_plain(column)}*: {_plain(words)}" for column, words in block.meaning]


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _cell(cell: Cell) -> str:
    if cell.tone == "code":
        return "`" + cell.text.replace("`", "'").replace("|", "\\|") + "`"
    text = _plain(cell.text)
    return f"{text} ({_plain(cell.sub)})" if cell.sub else text


def _plain(text: str) -> str:
    """Text that Markdown and its tables take literally."""
    for sign, literal in (("\\", "\\\\"), ("&", "&amp;"), ("<", "&lt;"), ("|", "\\|"), ("*", "\\*"), ("`", "\\`"), ("\n", " ")):
        text = text.replace(sign, literal)
    return text
