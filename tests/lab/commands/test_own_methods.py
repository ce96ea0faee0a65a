"""Estimators and components of a user's in commands: by file or module, in worker processes, measured, and stored by import path."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.support.command import run

METHODS = """
from dataclasses import dataclass
import forwardgrad as fg

@dataclass(frozen=True)
class Flipped(fg.ForwardGradient):
    name = "flipped"

@dataclass(frozen=True)
class Narrow(fg.Law):
    name = "narrow"
    independent = True
    half: float = 3**0.5

    def fill_(self, tangent, generator):
        for part in tangent:
            part.uniform_(-self.half, self.half, generator=generator)

    def moment(self, n):
        return n + 0.8
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    before = list(sys.path)
    (tmp_path / "flippedmethods.py").write_text(METHODS)
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    sys.path[:] = before
    sys.modules.pop("flippedmethods", None)


SPEC = "flippedmethods:Flipped(tangents=2, law=flippedmethods:Narrow(half=1.5))"


def described(folder: Path) -> list[dict[str, object]]:
    return [json.loads(path.read_text()) for path in folder.rglob("run.json")]


@pytest.mark.parametrize("where", ["flippedmethods", "flippedmethods.py", "FOLDER/flippedmethods.py"])
def test_train_stores_the_import_paths_of_a_module_or_a_file(
    where: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = SPEC.replace("flippedmethods:", f"{where.replace('FOLDER', str(folder))}:")
    status, _, err = run(monkeypatch, capsys, "train", "--data", "digits", "--model", "logistic", "--epochs", 1, "--estimator", spec)
    assert status == 0, err
    (stored,) = described(folder / "runs")
    estimator = stored["estimator"]
    assert isinstance(estimator, dict)
    assert estimator["name"] == "flippedmethods:Flipped"
    assert estimator["law"] == {"name": "flippedmethods:Narrow", "half": 1.5}
    assert estimator["perturb"] == "dense"
    assert stored["code"]


@pytest.mark.full
def test_workers_find_what_a_file_elsewhere_holds(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    elsewhere = folder / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    options = ("--data", "digits", "--model", "logistic", "--epochs", 1, "--tuning-epochs", 1, "--jobs", 2, "--lr", "0.001,0.01")
    spec = f"{folder}/flippedmethods.py:Flipped(tangents=2)"
    status, out, err = run(monkeypatch, capsys, "tune", *options, "--estimator", spec)
    assert status == 0, err
    assert "report" in out
    assert len(described(elsewhere / "runs")) == 3


def test_quality_and_bench_measure_them(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--data", "digits", "--model", "logistic", "--tangents", 1, "--repeats", 10)
    status, out, err = run(monkeypatch, capsys, "quality", *options, "--estimators", f"forward; {SPEC}")
    assert status == 0, err
    assert "flippedmethods:Flipped" in out
    options = ("--models", "mlp-1x8", "--rounds", 5, "--seconds", 0, "--repeats", 0, "--arms", "forward(law=flippedmethods:Narrow)")
    status, out, err = run(monkeypatch, capsys, "bench", *options)
    assert status == 0, err
    assert "forward(law=flippedmethods:Narrow)" in out


def test_the_listing_names_perturbations_and_says_how_ones_own_are_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    status, out, _ = run(monkeypatch, capsys, "estimators")
    assert status == 0
    assert "  low-rank: " in out
    assert "    overrides={}: what to perturb" in out
    assert out.rstrip().endswith("'forward(perturb=module:Class)'")
