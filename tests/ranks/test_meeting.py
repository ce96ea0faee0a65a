"""Processes find those that live, whatever earlier ones have left in the store they meet in."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch.distributed as dist

import forwardgrad as fg
from forwardgrad.ranks.meeting import meeting


def met(store: dist.Store, size: int, late: int = 0) -> set[str]:
    """The words of so many ranks, one of which comes last."""

    def meet(rank: int) -> str:
        time.sleep(0.2 * (rank == late))
        return meeting(store, rank, size, 20.0)

    with ThreadPoolExecutor(size) as pool:
        return set(pool.map(meet, range(size)))


def test_ranks_agree_on_a_word_that_earlier_ones_did_not_have() -> None:
    store = dist.HashStore()
    found = [met(store, size, late) for size, late in ((3, 0), (3, 0), (3, 2), (2, 1), (4, 1), (1, 0))]
    assert [len(words) for words in found] == [1] * 6
    assert len(set[str]().union(*found)) == 6


def test_a_rank_that_is_not_there_again_is_waited_for_in_vain() -> None:
    store = dist.HashStore()
    met(store, 2)
    with pytest.raises(RuntimeError, match="rank 0 of 2 waited in vain for all others to be there: start them again"):
        meeting(store, 0, 2, 0.1)


def test_ranks_that_torchrun_did_not_start_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="timeout must be a number of seconds above 0, or None, not 0"):
        fg.join_ranks(0)
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(ValueError, match="environment variable RANK expected, but not set"):
        fg.join_ranks()
