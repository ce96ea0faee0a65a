"""The files under benchmarks/ are no tests, and work: each is run once, untimed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from tests.support.networks import NoNetwork, check

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


@pytest.mark.full
def test_a_pipeline_is_measured_beside_one_process() -> None:
    command = [sys.executable, "benchmarks/pipeline.py", "--model", "nn", "--rounds", "1", "--steps", "5", "--batch-size", "8"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    rows = [line for line in done.stdout.splitlines() if "examples/s" in line]
    assert len(rows) == 3
    assert len({line.partition("loss ")[2].split()[0] for line in rows}) == 1  # all of them train the same


@pytest.mark.full
def test_a_population_is_measured_beside_inference() -> None:
    command = [sys.executable, "benchmarks/population.py", "--width", "32", "--batch-size", "4", "--directions", "2,64", "--rounds", "2"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert len([line for line in done.stdout.splitlines() if ": share " in line]) == 4
    assert done.stdout.count("(goal: 0.8)") == 2


@pytest.mark.full
def test_attention_is_measured_both_ways() -> None:
    command = [
        sys.executable,
        "benchmarks/attention.py",
        "--lengths",
        "32",
        "600",
        "--tangents",
        "1",
        "--heads",
        "1",
        "--width",
        "4",
        "--rounds",
        "1",
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    short, long = ([float(part) for part in line.replace("ms", "").replace("MiB", "").split()] for line in done.stdout.splitlines()[-2:])
    assert (short[0], long[0]) == (32, 600)
    assert long[6] < long[7] / 2  # bytes by tiles and by the formula


@pytest.mark.rest
def test_ranks_are_measured_on_a_slow_link(tmp_path: Path) -> None:
    try:
        check()
    except NoNetwork as missing:
        pytest.skip(str(missing))
    few = ["--ranks", "2", "--rates", "100", "--models", "nn", "--methods", "ddp,dense-k8,dense-k8-div", "--batch-size", "4"]
    command = [sys.executable, "-m", "benchmarks.wire", *few, "--rounds", "1", "--seconds", "0.001", "--out", str(tmp_path / "wire.json")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    told = json.loads((tmp_path / "wire.json").read_text(encoding="utf-8"))
    rows = {row["method"]: row for row in told["rows"] if (row["link"], row["batch"]) == ("100 Mbit/s", 4)}
    assert set(rows) == {"ddp", "dense-k8", "dense-k8-div"}
    weights = 4 * 1_863_690
    assert rows["ddp"]["payload_bytes"] == weights <= rows["ddp"]["sent_bytes"] < 1.1 * weights
    assert all(rows[method]["payload_bytes"] <= 64 < rows[method]["sent_bytes"] < 10_000 for method in ("dense-k8", "dense-k8-div"))
    assert {told["link"] for told in told["predictions"]} == {"loopback", "100 Mbit/s"}


@pytest.mark.full
def test_a_replay_is_measured_beside_the_training() -> None:
    command = [sys.executable, "benchmarks/replay.py", "--steps", "3"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("the same bits") == 3
