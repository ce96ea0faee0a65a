"""The most bytes that torch's allocator gave out on the processor during a step: what compiled code holds, too.

Compiled code asks the allocator for memory outside torch's operators, where `peak_bytes` does not see it. The profiler does.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch.autograd.profiler import profile


def allocated_bytes(work: Callable[[], object]) -> int:
    """The most bytes held at once during the work, above what was held before it; scratch that operators ask torch for included.

    >>> import torch
    >>> allocated_bytes(lambda: torch.empty(100) + torch.empty(100))  # 400 bytes each, and the sum
    1200
    """
    with _without_banner(), profile(use_cpu=True, profile_memory=True) as seen:
        work()
    assert seen.kineto_results is not None  # there since the profile has ended
    now = peak = 0
    for event in sorted((e for e in seen.kineto_results.events() if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


@contextmanager
def _without_banner() -> Iterator[None]:
    """The profiler of some builds of torch says that it starts and stops, past Python's sys.stderr."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)
