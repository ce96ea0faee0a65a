"""The memory of one step: what torch's operators and allocator gave out, beside the peak of a process of its own."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from tests.support.command import run

from forwardgrad.lab.bench import process_peak
from forwardgrad.lab.bench.arms import NAMED, BenchArm
from forwardgrad.lab.bench.cases import BenchCase
from forwardgrad.lab.errors import UserError


@pytest.mark.full
@pytest.mark.skipif(sys.platform != "linux", reason="the peak of a process is read from /proc, which is Linux's")
def test_compiled_steps_have_a_tally_that_is_the_peak_of_a_process() -> None:
    found = process_peak.process_peak(BenchCase("mlp-4x1024", 512, "contiguous", "adam"), NAMED["backprop-compiled"])
    assert found["tally"] > 8_000_000
    assert process_peak.within_tolerance(found["tally"], found["process"]), found


@pytest.mark.skipif(sys.platform != "linux", reason="the peak of a process is read from /proc, which is Linux's")
@pytest.mark.parametrize("name", ["backprop", *(pytest.param(name, marks=pytest.mark.full) for name in ("forward", "low-rank"))])
def test_the_tally_of_tensors_is_the_peak_of_a_process(name: str) -> None:
    """Tensors of 2 to 4 MB each, and kernels that need no scratch."""
    found = process_peak.process_peak(BenchCase("mlp-4x1024", 512, "contiguous"), NAMED[name])
    assert found["tally"] > 8_000_000
    assert process_peak.within_tolerance(found["tally"], found["process"]), found


def test_memory_alone_is_printed_stored_and_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    peaks = {"plain": 100_000_000, "backprop": 400_000_000, "low-rank": 210_000_000}

    def told(case: BenchCase, arm: BenchArm, asked_by: str, *, few_steps: bool) -> dict[str, int]:
        if arm.name not in peaks:
            raise UserError(f"{asked_by}: the process failed")
        return {"tally": peaks[arm.name], "process": peaks[arm.name] + 1_000_000}

    monkeypatch.setattr(process_peak, "process_peak", told)
    asked = ("bench", "--models", "gpt-2x64", "--batch-size", 4, "--sequence", 16, "--memory-only", "--out", tmp_path)
    for loss in ("parts", "whole", "parts"):
        status, out, _ = run(monkeypatch, capsys, *asked, "--loss", loss, "--arms", "low-rank,zeroth-order,feedback")
        assert status == 0
    assert "GPT of 2 blocks, width 64 · batch 4 of 16 tokens · 3,382,080 parameters" in out  # the embedding is the read-out's, counted once
    assert "loss in parts" in out
    assert "rank 1                        210 MB       2.10         0.525       211 MB" in out
    assert "zeroth order: --memory-only: the process failed" in out
    assert "learned feedback: it keeps numbers for each of 50,257 outputs" in out
    cases = json.loads((tmp_path / "memory.json").read_text())["cases"]
    assert [case["loss"] for case in cases] == ["whole", "parts"]  # the third took the place of the first
    assert [arm.get("peak_bytes") for arm in cases[0]["arms"]] == [*peaks.values(), None, None]
    page = (tmp_path / "report.md").read_text()
    assert "## The memory of one step" in page
    assert "in peaks of inference, a step holds 4.00 (backpropagation, plain torch), 2.10 (rank 1)." in page


@pytest.mark.full
@pytest.mark.skipif(not hasattr(torch.nn, "LinearCrossEntropyOptions"), reason="this torch has no loss in parts: install torch 2.13")
@pytest.mark.skipif(sys.platform != "linux", reason="the peak of a process is read from /proc, which is Linux's")
def test_a_step_with_its_loss_in_parts_holds_no_scores_of_the_whole() -> None:
    """64 places, whose scores of 50,257 words would be 12.9 MB, and their tangents as much."""
    found = process_peak.process_peak(BenchCase("gpt-2x64", 4, "contiguous", sequence=16, loss="parts"), NAMED["low-rank"], few_steps=True)
    assert 500_000 < found["tally"] < 64 * 50_257 * 4 / 4


def test_the_tolerance_is_no_more_than_it_says() -> None:
    assert process_peak.within_tolerance(100_000_000, 105_900_000)
    assert not process_peak.within_tolerance(100_000_000, 106_100_000)
    assert not process_peak.within_tolerance(100_000_000, 93_900_000)


def test_a_process_that_fails_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process_peak, "_ALLOCATOR", {"PYTHONPATH": "", "PYTHONHOME": "/nowhere"})
    with pytest.raises(UserError, match="--verify-memory: the process that measures plain on mlp-2x8 failed: "):
        process_peak.process_peak(BenchCase("mlp-2x8", 4, "contiguous"), NAMED["plain"])
