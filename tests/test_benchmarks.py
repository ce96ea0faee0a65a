"""The files under benchmarks/ are no tests, and work: each is run once, untimed."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def test_benchmarks_are_off_by_default() -> None:
    options = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["pytest"]["ini_options"]
    assert not any(Path(path).parts[0] == "benchmarks" for path in options["testpaths"])


@pytest.mark.parametrize(("chosen", "passed"), [("test_step and nn-8 and (plain or mezo or low-rank-k2)", 3), ("test_draw", 3)])
def test_a_benchmark_runs(chosen: str, passed: int) -> None:
    pytest.importorskip("pytest_benchmark", reason="pytest-benchmark is not here: `pip install -e '.[bench]'` brings it")
    outside = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")}
    command = [sys.executable, "-m", "pytest", "benchmarks", "--benchmark-disable", "-q", "-p", "no:cacheprovider", "-k", chosen]
    done = subprocess.run(command, cwd=ROOT, env=outside, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout
    assert f"{passed} passed" in done.stdout


@pytest.mark.full
def test_the_overhead_is_measured_beside_the_same_steps() -> None:
    command = [sys.executable, "benchmarks/overhead.py", "--empty", "--blocks", "2"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "2 blocks of 100 steps of each loop in turn, the same parameters to the bit" in done.stdout
