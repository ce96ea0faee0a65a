"""Several processes of one gloo group, and what each of them finds out."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed
import torch.multiprocessing
from tests.support.networks import DEVICE, enter

ROOT = Path(__file__).resolve().parents[2]
LIMIT = 120  # seconds after which processes that wait for one another are ended
START = "forkserver"  # copies of one process that imported what takes seconds; they have the environment of when that one began
forkserver.set_forkserver_preload(["torch.distributed", "torch.func", "pytest", "hypothesis", "forwardgrad.estimators.forward"])


def in_processes(
    count: int,
    folder: Path,
    work: Callable[[int], Any],
    timeout: float = LIMIT,
    limit: float = LIMIT,
    namespaces: Sequence[str] = (),
) -> list[Any]:
    """What each of `count` processes of one gloo group finds out, which waits for `timeout` seconds and is ended after `limit`.

    Each is in its network namespace, where these are given.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT))  # where a new process finds what it is to do
        given = (count, folder, work, timeout, namespaces)
        started = torch.multiprocessing.start_processes(_process, given, count, join=False, start_method=START)
    end = time.monotonic() + limit
    while not started.join(timeout=1):
        if time.monotonic() > end:
            for process in started.processes:
                process.terminate()
            pytest.fail(f"{count} processes were not done after {limit} seconds")
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(count)]


def _process(rank: int, count: int, folder: Path, work: Callable[[int], Any], timeout: float, namespaces: Sequence[str]) -> None:
    if namespaces:
        enter(namespaces[rank])  # before there are other threads, which would stay where they are
        os.environ["GLOO_SOCKET_IFNAME"] = DEVICE
    torch.set_num_threads(1)
    meet, limit = f"file://{folder}/meet", timedelta(seconds=timeout)
    torch.distributed.init_process_group("gloo", init_method=meet, rank=rank, world_size=count, timeout=limit)
    torch.save(work(rank), folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()
