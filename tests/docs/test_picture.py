"""The picture of the first page: its numbers are those of the stored runs, and its files are drawn from these numbers."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import pytest

from forwardgrad.lab.report.figures.drawing import render

ROOT = Path(__file__).resolve().parents[2]
PICTURES = ROOT / "docs" / "pictures"


@pytest.fixture(scope="module")
def accuracy() -> Any:
    spec = importlib.util.spec_from_file_location("accuracy", PICTURES / "accuracy.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_its_numbers_are_those_of_the_stored_runs(accuracy: Any) -> None:
    assert accuracy.read(ROOT / "results") == json.loads((PICTURES / "accuracy.json").read_text(encoding="utf-8"))


def test_its_files_are_drawn_from_these_numbers_and_have_no_ground_of_their_own(accuracy: Any) -> None:
    arms = json.loads((PICTURES / "accuracy.json").read_text(encoding="utf-8"))
    drawing = render("accuracy", lambda: accuracy.draw(arms))
    for name, dark in (("light", False), ("dark", True)):
        svg = accuracy.coloured(drawing, dark)
        assert (PICTURES / f"accuracy-{name}.svg").read_text(encoding="utf-8") == svg
        assert not re.search(r"fill: #(ffffff|1b2128)", svg)


def test_it_has_the_four_arms(accuracy: Any) -> None:
    assert [kind for kind, _, _ in accuracy.ARMS] == ["backprop", "local", "feedback", "forward"]
