"""Figures and tables for a paper: PDF that is the same every time, LaTeX that is escaped and whole."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tests.support.stored import put, record, seeds, undrawn

from forwardgrad.lab.recipes import paper
from forwardgrad.lab.report import document, figures
from forwardgrad.lab.report.blocks import as_latex
from forwardgrad.lab.report.blocks.kinds import Picture, Section
from forwardgrad.lab.report.blocks.tables import Cell, Table
from forwardgrad.lab.report.figures import plots
from forwardgrad.lab.report.figures.drawing import Drawing
from forwardgrad.lab.statistics import stats
from forwardgrad.lab.store.store import Store

UNESCAPED = re.compile(r"(?<!\\)[#$%_^~&]")


def check(text: str) -> None:
    """What TeX would stop at: braces and environments that do not pair, rows of the wrong length, signs with a meaning, odd letters."""
    body = "\n".join(line for line in text.splitlines() if not line.startswith("%"))
    bare = re.sub(r"\\[{}]", "", body)
    assert bare.count("{") == bare.count("}")
    assert re.findall(r"\\(?:begin|end)\{(\w+)\}", body) == ["tabular", "tabular"]
    assert body.count(r"\(") == body.count(r"\)")
    assert body.isascii()
    (layout,) = re.findall(r"\\begin\{tabular\}\{@\{\}(.*)@\{\}\}", body)
    columns = len(re.sub(r"\{[^}]*\}", "", layout))
    rows = [line for line in body.splitlines() if line.endswith(r"\\") and not line.startswith(r"\multicolumn")]
    assert rows
    for row in rows:
        cells = re.split(r"(?<!\\)&", row.removesuffix(r"\\"))
        assert len(cells) == columns
        for cell in cells:
            assert not UNESCAPED.search(re.sub(r"\\\(.*?\\\)", "", cell).replace("~", "")), cell


def test_every_sign_with_a_meaning_is_escaped() -> None:
    evil = r"\input{x} a&b 50% $x$ #1 a_b ^ ~ <script> \ {y} 'q' " + '"r" `s` β₁ γ₀ ‖θ‖ ≤ − – ± ²'
    text = as_latex.latex(Table(("a & b", "c"), ((evil, ((Cell(evil, evil), Cell(evil, tone="code")),)),), evil, (("a & b", evil),)))
    check(text)
    assert r"\input" not in text.replace("% ", "").splitlines()[4]
    assert r"\textbackslash{}input\{x\}" in text
    assert r"\texttt{" in text


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    store = Store(tmp_path_factory.mktemp("exports"))
    for study in (paper.table1(epochs=1), paper.demo(1, seeds=2)):
        record(store, study, edge=("lr",))
        for number, arm in enumerate(study.arms):
            for run in seeds(arm, study.seeds):
                put(store, run, 0.3, diverged="the loss is not finite" if number == 0 else None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(figures, "curves", undrawn)
        document.write(store)
    return store


def test_every_table_of_a_report_is_latex(store: Store) -> None:
    found = sorted(path.name for path in (store.root / "tables").iterdir())
    assert {"table1-results.tex", "demo-tuning.tex", "demo-runs-that-diverged-or-failed.tex"} <= set(found)
    for name in found:
        check((store.root / "tables" / name).read_text())
    assert len(found) == len(re.findall(r"^### ", (store.root / "report.md").read_text(), flags=re.MULTILINE))


DRAW = """
from forwardgrad.lab.report import figures
from forwardgrad.lab.statistics import stats
curve = stats.Curve((1.0, 2.0, 3.0), (3.0, 2.0, 1.0), (2.5, 1.5, 0.5), (3.5, 2.5, 1.5))
drawing = figures.curves("one", [[figures.Panel("a panel", (figures.Line("forward", curve),))]], xlabel="x", ylabel="y")
pdf = drawing.pdf()
"""


def test_a_pdf_is_the_same_in_another_process_and_has_no_date() -> None:
    here: dict[str, Any] = {}
    exec(DRAW, here)
    other = {**os.environ, "PYTHONHASHSEED": "1", "SOURCE_DATE_EPOCH": "1000000"}
    code = f"import sys\n{DRAW}\nsys.stdout.buffer.write(pdf)"
    assert subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, env=other).stdout == here["pdf"]
    assert here["pdf"].startswith(b"%PDF")
    assert b"Date" not in here["pdf"]
    assert b"/Type3" not in here["pdf"]


def test_figures_are_written_as_pdf_where_that_is_asked_for(tmp_path: Path) -> None:
    store = Store(tmp_path / "out")
    section = Section("one", "One", "", (Picture("one", Drawing("<svg/>", lambda: b"%PDF"), "A figure."),))
    document._export(store, [section], False)
    assert {path.name for path in (store.root / "figures").iterdir()} == {"one.svg"}
    document._export(store, [section], True)
    assert (store.root / "figures" / "one.pdf").read_bytes() == b"%PDF"


def test_the_numbers_of_a_figure_are_those_it_draws() -> None:
    curve = stats.Curve((10.0, 20.0, 40.0), (0.5, 0.05, 0.005), (0.4, 0.04, 0.004), (0.6, 0.06, 0.006))
    drawing = plots.curves("one", [[plots.Panel("a </script> panel", (plots.Line("forward", curve),))]], xlabel="step", ylabel="loss")
    (panel,) = drawing.panels
    assert panel["lines"] == [
        {"name": "forward gradient", "colour": "var(--vermilion)", "x": [10, 20, 40], "y": [0.5, 0.05, 0.005],
         "low": [0.4, 0.04, 0.004], "high": [0.6, 0.06, 0.006]}
    ]  # fmt: skip
    assert panel["y"]["log"]
    assert not panel["x"]["log"]
    assert "</script" not in drawing.data
    left, top, wide, tall = panel["box"]
    (path,) = re.findall(r'<path d="(M [^"]*)"[^>]*stroke-dasharray[^>]*stroke: #d55e00', drawing.svg)[:1] or [""]
    points = [tuple(map(float, point)) for point in re.findall(r"[ML] ([\d.]+) ([\d.]+)", path)]
    x, y = panel["x"], panel["y"]
    assert points[0][0] == pytest.approx(left + wide * (10 - x["from"]) / (x["to"] - x["from"]), abs=0.05)
    assert left < points[-1][0] < left + wide
    assert all(top <= up <= top + tall for _, up in points)
    assert y["from"] < 0.005 < 0.5 < y["to"]
