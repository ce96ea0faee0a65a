"""The joules of a step, where the machine tells them: `forwardgrad.lab.energy` says which counters those are.

A counter moves a thousand times a second on a processor and some ten times a second on a GPU, which is too seldom for one step. So every
arm takes steps in a row for half a second, the arms in turn, and a block of steps is one value. The machine's idle power is in it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from forwardgrad.lab.bench import timing
from forwardgrad.lab.bench.records import ValueWithInterval
from forwardgrad.lab.energy import EnergyMeter

BLOCK = 0.5  # seconds of steps in a row, at the least
BLOCKS = 5  # of every arm


def joules_of_steps(
    steps: Mapping[str, timing.TimedWork], meter: EnergyMeter, *, seed: int, now: Callable[[], float], block: float | None = None
) -> dict[str, dict[str, ValueWithInterval]]:
    """Of every piece of work, the joules of one step by counter: the median over the blocks.

    Empty where the machine does not tell, or other programs worked as well.
    """
    found: dict[str, list[dict[str, float]]] = {name: [] for name in steps}
    if not meter.tells:
        return {}
    for index in range(BLOCKS):
        for name in timing.order(list(steps), seed, index):
            work = steps[name]
            work()
            before, end, count = meter.read(), now() + (BLOCK if block is None else block), 0
            while now() < end:
                work()
                count += 1
            if (used := meter.since(before)) is None:
                return {}
            found[name].append({where: value / max(1, count) for where, value in used.items()})
    if meter.shared:
        return {}
    return {name: {where: timing.median(np.array([one[where] for one in blocks])) for where in blocks[0]} for name, blocks in found.items()}
