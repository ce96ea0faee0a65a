"""The memory of a run, told before it begins: what parameters and the optimizer take, and what a step takes on top, by trial steps.

The trial steps have one row, two, four, and so on. Each two of them foretell what a whole batch takes, and what will not fit is refused
before that much is asked for. The last step has the real shape of the batch, and gives the exact number.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from forwardgrad.diagnostics import peak_bytes
from forwardgrad.lab.errors import UserError

UNITS = ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"))
CGROUPS = (  # the most that a container may hold, and what it holds now
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
)


class Trial(Protocol):
    """A model with its optimizer, made to be thrown away."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    memory: dict[str, Tensor]

    def step(self, rows: int) -> None:
        """Take a step on so many rows, each as long as the longest."""


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes by what takes them, and those that are free (None where the system does not tell)."""

    parameters: int
    optimizer: int
    estimator: int  # what it remembers from step to step
    step: int  # the most that a step holds on top, its gradient included
    rows: int
    tokens: int
    exact: bool  # whether a step of the batch's real shape was seen
    free: int | None

    @property
    def total(self) -> int:
        return self.parameters + self.optimizer + self.estimator + self.step

    @property
    def fits(self) -> bool:
        return self.free is None or self.total <= self.free

    def sentence(self) -> str:
        """The plan in words."""
        kept = f" + {shown(self.estimator)} that the estimator keeps" if self.estimator else ""
        parts = f"{shown(self.parameters)} parameters + {shown(self.optimizer)} optimizer{kept} + {shown(self.step)} during a step"
        there = "the system does not tell what is free" if self.free is None else f"{shown(self.free)} are free"
        about = "" if self.exact else "about "
        return f"memory: {about}{shown(self.total)} = {parts} (batch {self.rows} × {self.tokens} tokens); {there}"

    def check(self) -> None:
        """UserError where the machine does not have that much."""
        if self.fits:
            return
        assert self.free is not None
        rows = int(self.rows * (self.free - self.total + self.step) / max(1, self.step))
        advice = f"--batch-size {rows} would fit" if rows >= 1 else "try --lora 8, a shorter --max-length, or an estimator that keeps less"
        about = "" if self.exact else "about "
        raise UserError(f"the run takes {about}{shown(self.total)}, and {shown(self.free)} are free: {advice}")


def shown(count: int) -> str:
    """Bytes in words.

    >>> shown(1_234_567), shown(12_345_678_901), shown(0)
    ('1.2 MB', '12.3 GB', '0 bytes')
    """
    for size, unit in UNITS:
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} bytes"


def check_weights(weights: int, on: torch.device) -> None:
    """UserError where not even the parameters fit: before they are read."""
    free = free_bytes(on)
    if free is not None and weights > free:
        raise UserError(
            f"the parameters alone take {shown(weights)}, and {shown(free)} are free: take a smaller model, or --weights bfloat16"
        )


def planned(begin: Callable[[], Trial], rows: int, tokens: int, on: torch.device) -> tuple[MemoryPlan, Trial]:
    """The plan of a run, and the trial it was found by. `begin` makes the model; rows and tokens are those of the largest batch.

    Raises UserError where the machine does not have that much, before the batch of that size is tried.
    """
    free = free_bytes(on)
    try:
        trial = begin()
        trial.step(1)  # what comes into being in a first step is there from here on: the optimizer's state, the estimator's memory
        tried, step, each = 0, 0, 0.0
        while tried < rows:
            count = min(max(1, 2 * tried), rows)
            found = _step_bytes(trial, count, on)
            each = max(0.0, (found - step) / (count - tried)) if tried else 0.0  # a row more
            tried, step = count, found
            plan = _plan(trial, round(step + each * (rows - tried)), rows, tokens, exact=tried == rows, free=free)
            plan.check()
    except (MemoryError, torch.OutOfMemoryError) as error:
        raise UserError(f"the memory of the machine is not enough for a step of one row: {' '.join(str(error).split())[:120]}") from error
    return plan, trial


def _step_bytes(trial: Trial, rows: int, on: torch.device) -> int:
    trial.optimizer.zero_grad(set_to_none=True)
    return peak_bytes(lambda: trial.step(rows), [on])


def _plan(trial: Trial, step: int, rows: int, tokens: int, *, exact: bool, free: int | None) -> MemoryPlan:
    slots = (slot for slots in trial.optimizer.state.values() for slot in slots.values())
    held = [*trial.model.parameters(), *trial.model.buffers()]
    return MemoryPlan(_stored(held), _stored(slots), _stored(trial.memory.values()), step, rows, tokens, exact, free)


def _stored(tensors: Iterable[object]) -> int:
    """The bytes of the tensors among these, each storage once."""
    found = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if isinstance(t, Tensor)}
    return sum(found.values())


def free_bytes(on: torch.device) -> int | None:
    """The bytes that a program can have on a device now: a GPU's own, or the machine's, or those left to its container; None: not told."""
    if on.type == "cuda":
        free, _ = torch.cuda.mem_get_info(on)
        return int(free + torch.cuda.memory_reserved(on) - torch.cuda.memory_allocated(on))
    found = [_available(), *(_left(Path(most), Path(now)) for most, now in CGROUPS)]
    return min((count for count in found if count is not None), default=None)


def _available() -> int | None:
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):
        return None


def _left(most: Path, now: Path) -> int | None:
    """What a container may still take: its limit less what it holds, but for files in memory, which are given up when it is needed."""
    try:
        counts = dict(line.split() for line in (most.parent / "memory.stat").read_text().splitlines())
        files = int(counts.get("total_inactive_file", counts.get("inactive_file", 0)))
        return max(0, int(most.read_text()) - int(now.read_text()) + files)
    except (OSError, ValueError):  # no container, or "max": no limit
        return None
