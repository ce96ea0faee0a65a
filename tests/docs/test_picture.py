"""The pictures of the pages: their numbers are those of the stored results, and their files are drawn from these numbers."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from forwardgrad.lab.report.figures import Drawing, render

ROOT = Path(__file__).resolve().parents[2]
PICTURES = ROOT / "docs" / "pictures"


def module(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, PICTURES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


@pytest.fixture(scope="module")
def accuracy() -> Any:
    return module("accuracy")


@pytest.fixture(scope="module")
def wire() -> Any:
    return module("wire")


@pytest.fixture(scope="module")
def stored() -> Any:
    return json.loads((ROOT / "results" / "wire.json").read_text(encoding="utf-8"))


def is_stored(name: str, drawing: Drawing) -> bool:
    """Whether both files are this drawing, and have no ground of their own."""
    files = {ground: (PICTURES / f"{name}-{ground}.svg").read_text(encoding="utf-8") for ground in ("light", "dark")}
    grounded = any(re.search(r"fill: #(ffffff|1b2128)", svg) for svg in files.values())
    return files == {"light": drawing.on_ground(False), "dark": drawing.on_ground(True)} and not grounded


def test_its_numbers_are_those_of_the_stored_runs(accuracy: Any) -> None:
    assert accuracy.read(ROOT / "results") == json.loads((PICTURES / "accuracy.json").read_text(encoding="utf-8"))


def test_its_files_are_drawn_from_these_numbers(accuracy: Any) -> None:
    arms = json.loads((PICTURES / "accuracy.json").read_text(encoding="utf-8"))
    assert is_stored("accuracy", render("accuracy", lambda: accuracy.draw(arms)))


def test_it_has_the_four_arms(accuracy: Any) -> None:
    assert [kind for kind, _, _ in accuracy.ARMS] == ["backprop", "local", "feedback", "forward"]


def test_many_machines_are_drawn_from_the_stored_measurement(wire: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["wire.py", "--out", str(tmp_path)])
    wire.main()
    for ground in ("light", "dark"):
        svg = (tmp_path / f"wire-{ground}.svg").read_text(encoding="utf-8")
        assert svg == (PICTURES / f"wire-{ground}.svg").read_text(encoding="utf-8")
        assert not re.search(r"fill: #(ffffff|1b2128)", svg)


def test_its_lines_are_the_formula_of_the_measurement(wire: Any, stored: Any) -> None:
    numbers = wire.Wire(stored, "nn")
    pairs = (e for e in stored["predictions"] if (e["model"], e["ranks"], e["batch"]) == ("nn", 2, numbers.batch))
    told = [(e["link"], e["method"], 2, e["predicted"]) for e in pairs]
    for e in (e for e in stored["extrapolations"] if e["model"] == "nn"):
        told += [(e["link"], e["method"], int(ranks), value) for ranks, value in e["ring"].items()]
    assert {ranks for _, _, ranks, _ in told} == {2, 8, 64, 512}
    for link, method, ranks, seconds in told:
        assert numbers.told(method, ranks, numbers.rates[link]) == pytest.approx(seconds, rel=1e-9)


def test_what_was_not_measured_is_told(
    wire: Any, stored: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    early = {**stored, "lines": {"loopback": stored["lines"]["loopback"]}}
    (tmp_path / "early.json").write_text(json.dumps(early), encoding="utf-8")
    for given, sentence in (
        (["--model", "cnn"], "has no model 'cnn': choose of nn"),
        (["--read", str(tmp_path / "early.json")], "has nothing of two ranks at 10 Mbit/s: measure these, too"),
    ):
        monkeypatch.setattr(sys, "argv", ["wire.py", *given])
        with pytest.raises(SystemExit) as ended:
            wire.main()
        assert ended.value.code == 2
        assert sentence in capsys.readouterr().err
