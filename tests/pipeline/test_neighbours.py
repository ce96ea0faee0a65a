"""A rank whose neighbour is busy, has ended or ends early says so within the timeout, or goes on."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.support.pipelines import batches, made, pipeline, said
from tests.support.processes import in_processes

import forwardgrad as fg

WAIT = 2.0  # seconds of the timeout, where it is tested


def deserted(rank: int) -> Any:
    """The first rank is busy for longer than the timeout."""
    step = pipeline(fg.split_stages(made("perceptron", torch.float32), 2)[rank])
    if rank:
        return said(step)
    time.sleep(WAIT * 3)
    return ""


def gone(rank: int) -> Any:
    """The first rank ends without a word."""
    step = pipeline(fg.split_stages(made("perceptron", torch.float32), 2)[rank])
    return said(step) if rank else ""


def full(rank: int) -> Any:
    """The second rank takes nothing: the first is two messages ahead, and then waits no longer than the timeout."""
    step = pipeline(fg.split_stages(made("perceptron", torch.float32), 2)[rank])
    if rank:
        time.sleep(WAIT * 3)
        return []
    batch = batches("perceptron", torch.float32)[0]
    return [said(lambda: step(*batch)) for _ in range(3)]


@pytest.mark.full
@pytest.mark.parametrize("work", [deserted, gone, full])
def test_a_rank_without_its_neighbour_does_not_wait_for_ever(work: Any, tmp_path: Path) -> None:
    first, second = in_processes(2, tmp_path, work, WAIT)
    words = first[2] if work is full else second
    verb = "rank 0 of the pipeline could not send to rank 1" if work is full else "rank 1 of the pipeline could not hear from rank 0"
    assert words.startswith(f"RuntimeError: {verb}: that process has ended, or was busy for longer than the timeout")
    if work is full:
        assert first[:2] == ["", ""]


def hasty(rank: int) -> Any:
    """The first rank ends long before the second, which has all that was sent."""
    step = pipeline(fg.split_stages(made("perceptron", torch.float32), 2)[rank])
    for batch in batches("perceptron", torch.float32) * 2:
        time.sleep(0.3 * rank)
        step(*batch) if rank == 0 else step()
    step.wait()
    return step.steps


@pytest.mark.full
def test_a_rank_may_end_before_the_next_one_has_worked_on_what_it_sent(tmp_path: Path) -> None:
    assert in_processes(2, tmp_path, hasty) == [6, 6]
