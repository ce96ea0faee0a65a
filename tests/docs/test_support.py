"""docs/support.md is whole and well-formed, and some of its rows are checked again."""

from __future__ import annotations

import importlib
import inspect
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch.nn.functional as F
from torch import nn

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "support.md"


@pytest.fixture(scope="module")
def made_by() -> Iterator[Any]:
    """The modules that make the page."""
    names = ("support_checks", "support_layers", "support_functions", "support_page")
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        yield SimpleNamespace(**{name.removeprefix("support_"): importlib.import_module(name) for name in names})
    finally:
        sys.path.remove(str(ROOT / "benchmarks"))
        for name in names:
            sys.modules.pop(name, None)


def section(title: str) -> list[list[str]]:
    """The rows of the tables under a heading, cell by cell, the head left out."""
    (text,) = re.findall(rf"^### {title}.*?\n(.*?)(?=^##|\Z)", PAGE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines[:1] + lines[2:]]


@pytest.mark.parametrize(("title", "least"), [("transformers", 20), ("timm", 5), ("Layers", 100), ("Functions", 100)])
def test_its_tables_are_well_formed(title: str, least: int) -> None:
    head, *rows = section(title)
    assert len(rows) >= least
    assert {len(row) for row in rows} == {len(head)}
    assert len({row[0] for row in rows}) == len(rows)


def test_it_says_what_it_was_made_with_and_when() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert re.search(
        r"Made on \d{4}-\d\d-\d\d with torch [\d.]+\S*, transformers [\d.]+\S*, timm [\d.]+\S* .*, at commit `[0-9a-f]{7,}\+?`", text
    )
    assert "`python benchmarks/support.py --out docs/support.md`" in text


def test_every_layer_and_function_of_torch_nn_has_a_row(made_by: Any) -> None:
    rows = {title: {row[0].split(" (")[0] for row in section(title)[1:]} for title in ("Layers", "Functions")}
    layers = {name for name, kind in vars(nn).items() if inspect.isclass(kind) and issubclass(kind, nn.Module)}
    assert layers - made_by.layers.CONTAINERS <= rows["Layers"]
    functions = {name for name in dir(F) if not name.startswith("_") and inspect.isroutine(getattr(F, name))}
    tools = {name for name in functions if getattr(getattr(F, name), "__module__", "") in ("torch.overrides", "torch._C", "typing")}
    assert functions - tools - made_by.functions.OTHER <= rows["Functions"]


def test_every_entry_of_the_script_is_on_the_page_and_a_failure_says_why(made_by: Any) -> None:
    for title, entries in (("Layers", made_by.layers.LAYERS), ("Functions", made_by.functions.FUNCTIONS)):
        _, *rows = section(title)
        assert [row[0] for row in rows] == list(entries)
        assert all(row[4] for row in rows if row[1] != "yes"), title
    text = PAGE.read_text(encoding="utf-8")
    for title in ("transformers", "timm"):
        head, *rows = section(title)
        for row in rows:
            name = re.sub(r"(\\\*)?( \(`\w+`\))?$", "", row[0])
            for estimator, cell in zip(head[2:], row[2:], strict=True):
                assert cell != "failed" or f"**{name}**" in text, (name, estimator)


AGAIN = ["EmbeddingBag (max, offsets, padding_idx)", "LSTM (packed)", "spectral_norm (hook)", "GroupNorm", "CTCLoss", "CrossMapLRN2d"]


@pytest.mark.filterwarnings("ignore:.*spectral_norm.* is deprecated:FutureWarning")
@pytest.mark.parametrize("name", AGAIN)
def test_a_row_of_a_layer_is_still_true(name: str, made_by: Any) -> None:
    found = made_by.checks.derived(lambda: made_by.layers.build(made_by.layers.LAYERS[name]), made_by.layers.loss_of)
    (row,) = [row for row in section("Layers") if row[0] == name]
    assert ("yes" if found.ok else "failed", found.way) == (row[1], row[3])


def test_a_page_of_what_failed_says_so(made_by: Any) -> None:
    """Of one model that passes in part, one that does not start, and a layer that is refused."""
    versions = {"torch": "2", "transformers": "5", "timm": "1"}
    cell = {"ok": True, "error": 1e-15, "way": "", "said": ""}
    cells = dict.fromkeys(made_by.checks.ESTIMATORS, cell)
    cells["Activity"] = {"ok": False, "error": None, "way": "", "said": "ValueError: a <thing> went | wrong"}
    rows: dict[tuple[str, str], dict[str, Any]] = {
        ("transformers", "Half"): {"commits": ["abc"], "class": "HalfModel", "weights": 1234, "single": True, "cells": cells},
        ("timm", "none"): {"commits": ["abc"], "said": "its process ended with status -11"},
        ("layer", "Wrong"): {"commits": ["abc"], "ok": False, "error": None, "way": "", "said": "it has no rule"},
    }
    text = made_by.page.page(rows, versions, "a machine", "2026-01-01", {"Wrong": "A note."})
    assert "| Half\\* (`HalfModel`) | 1,234 | 1e-15 | 1e-15 | failed | 1e-15 |" in text
    assert "- **Half**, `Activity`: ValueError: a ‹thing› went / wrong" in text
    assert "- **none**: its process ended with status -11" in text
    assert "| Wrong | failed | – | – | it has no rule A note. |" in text
    assert "Of 7 cells of 2 models 6 pass; of 1 rows of torch.nn 0." in text
