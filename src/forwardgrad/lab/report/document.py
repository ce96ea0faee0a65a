"""The report, made from what is stored: a page, the same in Markdown, figures and tables for a paper. Loads without torch."""

from __future__ import annotations

import dataclasses
import re
import shlex
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from forwardgrad.lab.errors import UserError
from forwardgrad.lab.report import blocks
from forwardgrad.lab.report.blocks import Section, html, latex, markdown, place, source
from forwardgrad.lab.report.claims import claims_section, verdict
from forwardgrad.lab.report.sections import (
    bench_section,
    beyond_section,
    comparison,
    cost_section,
    faster_section,
    finetune_section,
    functions_section,
    layers_section,
    memory_section,
    noise_section,
    passes_section,
    provenance_section,
    quality_section,
    study_section,
)
from forwardgrad.lab.store import Store, StudyResult, read_json, results, write_whole

TAKEN = (
    "claims",
    "provenance",
    "functions",
    "bench",
    "memory",
    "cost",
    "quality",
    "layers",
    "verdict",
    "main",
    "theme",
)  # places that the page has itself
TITLE = "Forward gradients beside backpropagation"
ORDER = ("table1", "table1-retuned", "baydin", "beyond", "faster", "passes", "noise", "finetune", "demo")
MEASURED: dict[str, tuple[str, Callable[[dict[str, Any]], Section]]] = {
    "functions.json": ("descents on two functions", functions_section),
    "bench.json": ("cost of one step", bench_section),
    "memory.json": ("memory of one step", memory_section),
    "cost.json": ("time of a step, as measured earlier", cost_section),
    "quality.json": ("quality of estimates", quality_section),
    "layers.json": ("layer by layer", layers_section),
}


def write(store: Store, *, pdf: bool = False) -> Path:
    """Write report.html, report.md, figures/*.svg and tables/*.tex into the output folder; returns the path of the page.

    With `pdf` also figures/*.pdf: embedding their letters takes longer than all else. The same stored results give the same bytes.
    Raises UserError where there is nothing to report or a stored file is damaged.
    """
    studies = sorted(results.studies(store), key=_order)
    measured = {name: stored for name in MEASURED if (stored := read_json(store.root / name)) is not None}
    if not studies and not measured:
        raise UserError(_nothing(store))
    sections = _sections(store, studies, measured)
    with _checked(store.root / "bench.json", "measure it again"):
        said = verdict.verdict(studies, measured.get("bench.json"))
    page, plain = html(TITLE, said, sections).encode(), markdown(TITLE, said, sections).encode()  # both made before anything is written
    _export(store, sections, pdf)
    write_whole(store.root / "report.md", plain)
    write_whole(store.root / "report.html", page)
    return store.root / "report.html"


def _order(study: StudyResult) -> tuple[int, str, int, str]:
    """The paper's studies first, the records of one study together."""
    place = ORDER.index(study.family) if study.family in ORDER else len(ORDER)
    return place, study.family, len(study.name), study.name


def _nothing(store: Store) -> str:
    """Why there is no report, and what there is instead."""
    where, runs = shlex.quote(str(store.root)), len(store.runs())
    if not runs:
        return f"nothing to report in {store.root}: no command has left anything there; one that does is `forwardgrad demo --out {where}`"
    some = "its one run belongs to no study" if runs == 1 else f"its {runs:,} runs belong to no study"
    return f"nothing to report in {store.root}: {some}, and reports are of studies; `forwardgrad list {where}` shows runs"


def _export(store: Store, sections: list[Section], pdf: bool) -> None:
    """Figures and tables as a paper takes them."""
    for folder in ("figures", "tables"):
        (store.root / folder).mkdir(exist_ok=True)
    for picture in blocks.pictures_of(sections):
        svg = f'<?xml version="1.0" encoding="utf-8"?>\n{picture.drawing.svg}'.encode()
        write_whole(store.root / "figures" / f"{picture.name}.svg", svg, durable=False)
        if pdf:
            write_whole(store.root / "figures" / f"{picture.name}.pdf", picture.drawing.pdf(), durable=False)
    for name, table in blocks.tables_of(sections):
        write_whole(store.root / "tables" / f"{name}.tex", latex(table).encode(), durable=False)


def _sections(store: Store, studies: list[StudyResult], measured: dict[str, dict[str, Any]]) -> list[Section]:
    """Studies in the paper's order, the two functions after Baydin's comparison, the demonstration after the cost, provenance last."""
    extra, environments = {}, []
    for name, stored in measured.items():
        title, make = MEASURED[name]
        with _checked(store.root / name, "measure it again"):
            extra[name] = dataclasses.replace(make(stored), source=place("source", title))
            environments.append((title, stored["environment"]))
    ahead = [_study(store, study, studies) for study in studies if study.family != "demo"]
    behind = [_study(store, study, studies) for study in studies if study.family == "demo"]
    with _checked(store.root / "studies", "run its commands again"):
        judged = claims_section(studies, measured)
    return [*([judged] if judged else []), *ahead, *extra.values(), *behind, provenance_section(studies, environments)]


@contextmanager
def _checked(path: Path, mend: str) -> Iterator[None]:
    """What is stored but cannot be read as what it should be is told in a sentence."""
    try:
        yield
    except (AttributeError, IndexError, KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise UserError(f"{path} is damaged ({error!r}): delete it and {mend}") from error


def _named(study: StudyResult) -> StudyResult:
    """The study under a name that can be a place on the page and a part of a file's name, and is nothing else's."""
    name = re.sub(r"[^A-Za-z0-9_-]+", "-", study.name)
    return dataclasses.replace(study, name=f"study-{name}" if name in TAKEN else name)


def _study(store: Store, study: StudyResult, studies: list[StudyResult]) -> Section:
    with _checked(store.root / "studies" / f"{study.name}.json", "run its command again; finished runs are kept"):
        if study.family == "noise":  # asks what holds an explosion back, not which arm is best
            section = noise_section(study)
        elif study.family == "faster":  # asks how soon, not how good
            section = faster_section(study)
        elif study.family == "passes":  # asks what each pass is worth
            section = passes_section(study)
        elif study.family == "finetune":  # asks what a way is worth in equal seconds and so much memory
            section = finetune_section(study)
        elif study.family == "beyond":
            section = _compared(beyond_section(study, studies), study)
        else:
            section = _compared(study_section(_named(study)), _named(study))
    return dataclasses.replace(section, source=source(study.arms[0]) if study.arms else "")


def _compared(section: Section, study: StudyResult) -> Section:
    """The section with its arms compared: which is best and how sure that is first, the tables and figures behind that last."""
    said, *compared = comparison.blocks(study)
    first, *others = section.blocks
    headed = isinstance(first, tuple) and isinstance(said, tuple) and first[: len(said)] == said
    return dataclasses.replace(section, blocks=(first, *([] if headed else [said]), *others, *compared))
