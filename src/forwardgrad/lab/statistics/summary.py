"""A long series of losses as the few numbers that figures and tables read of it. Knows nothing of files."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

WINDOW = 20  # steps that a mean is taken over where it is asked when a loss left its bounds


@dataclass(frozen=True)
class Bins:
    """Equal bins of `width` steps: of each that holds finite values its first step (from 0), their number, sum, least and greatest."""

    width: int
    first: tuple[int, ...]
    sizes: tuple[int, ...]
    sums: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]


@dataclass(frozen=True)
class LossSummary:
    """The losses of `steps` steps in bins of some widths, and when the mean of the last 20 was above or below all means before it.

    `ends` is the first step, from 1, whose loss is not finite; rising and falling means are those before it.
    """

    steps: int
    bins: tuple[Bins, ...]
    rising: tuple[tuple[int, float], ...]
    falling: tuple[tuple[int, float], ...]
    ends: int | None

    def __len__(self) -> int:
        return self.steps

    def at(self, width: int) -> Bins:
        """The bins of this width; else the narrowest there are, which a wider one is made of."""
        return min(self.bins, key=lambda each: (each.width != width, each.width))

    def first_outside(self, low: float, high: float) -> float:
        """What `walk.first_outside` says of the whole series."""
        steps = [step for step, mean in self.rising if mean > high][:1] + [step for step, mean in self.falling if mean < low][:1]
        return float(min([*steps, *([] if self.ends is None else [self.ends])], default=math.inf))

    def to_json(self) -> dict[str, Any]:
        return {
            "steps": self.steps,
            "ends": self.ends,
            "rising": [list(each) for each in self.rising],
            "falling": [list(each) for each in self.falling],
            "bins": [{name: getattr(each, name) for name in Bins.__dataclass_fields__} for each in self.bins],
        }


def summarized(losses: Sequence[float], widths: Sequence[int]) -> LossSummary:
    """The summary of a series, with bins of these widths."""
    means = list(running_means(losses, WINDOW))
    ends = next((step for step, loss in enumerate(losses, 1) if not math.isfinite(loss)), None)
    bins = tuple(_bins(np.asarray(losses, dtype=float), width) for width in sorted(set(widths)))
    return LossSummary(len(losses), bins, _records(means, 1), _records(means, -1), ends)


def from_json(stored: dict[str, Any]) -> LossSummary:
    """The summary that `to_json` wrote; ValueError, KeyError or TypeError where it is none."""
    bins = tuple(
        Bins(int(each["width"]), *(tuple(each[name]) for name in ("first", "sizes", "sums", "low", "high"))) for each in stored["bins"]
    )
    if not bins or any(len({len(each.first), len(each.sizes), len(each.sums), len(each.low), len(each.high)}) != 1 for each in bins):
        raise ValueError("its bins are not of one length")
    rising, falling = (tuple((int(step), float(mean)) for step, mean in stored[name]) for name in ("rising", "falling"))
    return LossSummary(int(stored["steps"]), bins, rising, falling, stored["ends"])


def running_means(losses: Sequence[float], window: int) -> Iterator[tuple[int, float]]:
    """The mean of the last `window` losses at every step that has so many, up to the first loss that is not finite."""
    total = 0.0
    for step, loss in enumerate(losses, 1):
        if not math.isfinite(loss):
            return
        total += loss - (losses[step - window - 1] if step > window else 0.0)
        if step >= window:
            yield step, total / window


def _records(means: Sequence[tuple[int, float]], sign: int) -> tuple[tuple[int, float], ...]:
    """The means that are greater (least, for sign −1) than all before."""
    found: list[tuple[int, float]] = []
    for step, mean in means:
        if not found or sign * mean > sign * found[-1][1]:
            found.append((step, mean))
    return tuple(found)


def _bins(values: np.ndarray, width: int) -> Bins:
    steps = np.flatnonzero(np.isfinite(values))
    places, values = steps // width, values[steps]
    count = int(places.max(initial=-1)) + 1
    low, high = np.full(count, np.inf), np.full(count, -np.inf)
    np.minimum.at(low, places, values)
    np.maximum.at(high, places, values)
    sizes, sums = np.bincount(places, minlength=count), np.bincount(places, weights=values, minlength=count)
    there = np.flatnonzero(sizes)
    return Bins(width, *(tuple(each.tolist()) for each in (there * width, sizes[there], sums[there], low[there], high[there])))
