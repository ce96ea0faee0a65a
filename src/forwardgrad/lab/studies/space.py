"""Search spaces: the points to try in them, and further points where the best one lies on an edge.

A space maps the name of a hyperparameter to the values of a grid (a tuple) or to a range. Loads without torch, and without scipy until
points are sampled.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from forwardgrad.lab.errors import UserError
from forwardgrad.lab.studies.run import stream

NEAR = 0.1  # a winner in the outermost tenth of a range lies on its edge
FURTHER = 2  # points that one round of widening adds for every arm
DIGITS = 6  # significant digits of a sampled value: the same point has the same name on every machine


@dataclass(frozen=True)
class Range:
    """Values between two ends, both included, spaced evenly in the value or, with `log`, in its logarithm; `integer` rounds them."""

    low: float
    high: float
    log: bool = False
    integer: bool = False

    def __post_init__(self) -> None:
        if not (math.isfinite(self.low) and math.isfinite(self.high) and self.low < self.high):
            raise UserError(f"a range runs from a smaller finite number to a larger one, not from {self.low} to {self.high}")
        if self.log and self.low <= 0:
            raise UserError(f"a logarithmic range starts above zero, not at {self.low}")

    def at(self, share: float) -> float:
        """The value at a share of the way from the low end to the high one; shares outside [0, 1] lie beyond the ends."""
        value = self.low * (self.high / self.low) ** share if self.log else self.low + (self.high - self.low) * share
        value = round(value) if self.integer else short(value)
        return min(max(value, self.low), self.high) if 0 <= share <= 1 else value  # rounding may have left the range

    def share(self, value: float) -> float:
        """The inverse of `at`."""
        if self.log and value <= 0:
            return -math.inf
        if self.log:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)


def LogUniform(low: float, high: float) -> Range:
    """A range spaced evenly in the logarithm, as learning rates are searched."""
    return Range(low, high, log=True)


def Uniform(low: float, high: float) -> Range:
    """A range spaced evenly in the value."""
    return Range(low, high)


def Whole(low: int, high: int, *, log: bool = False) -> Range:
    """A range of whole numbers."""
    return Range(low, high, log=log, integer=True)


Values = tuple[Any, ...] | Range
Space = Mapping[str, Values]
Point = dict[str, Any]


def short(value: float) -> float:
    return float(f"{value:.{DIGITS}g}")


def _listed(values: Values) -> tuple[Any, ...] | None:
    """The different values there are, None for a range that has no end of them."""
    if isinstance(values, tuple):
        return tuple(dict.fromkeys(values))
    return tuple(range(math.ceil(values.low), math.floor(values.high) + 1)) if values.integer else None


def size(space: Space) -> float:
    """How many points a space has; infinite where it has a range of other than whole numbers."""
    return math.prod(math.inf if (there := _listed(values)) is None else len(there) for values in space.values())


def grid(space: Space) -> list[Point]:
    """Every point of a space of grids."""
    listed = {name: _listed(values) for name, values in space.items()}
    if endless := [name for name, values in listed.items() if values is None]:
        raise UserError(f"{endless[0]!r} is a range, which has no grid: give its values, or say how many trials are sampled")
    return [dict(zip(space, values, strict=True)) for values in itertools.product(*listed.values())]  # type: ignore[arg-type]


def sampled(space: Space, count: int, name: str) -> list[Point]:
    """`count` different points, quasi-random: a scrambled Halton sequence whose scrambling follows from `name` (Halton 1960, Owen 2017).

    A longer sample begins with the shorter one. A space of grids that has no more points than asked for is taken whole.
    """
    if size(space) <= count:
        return grid(space)
    points: dict[tuple[Any, ...], Point] = {}
    for point in _halton(space, name):
        points.setdefault(tuple(point.values()), point)
        if len(points) == count:
            break
    return list(points.values())


def _halton(space: Space, name: str) -> Iterator[Point]:
    from scipy.stats import qmc

    engine = qmc.Halton(len(space), scramble=True, rng=stream(0, f"space of {name}"))
    while True:
        for row in engine.random(64):
            yield {key: _pick(values, float(share)) for (key, values), share in zip(space.items(), row, strict=True)}


def _pick(values: Values, share: float) -> Any:
    return values.at(share) if isinstance(values, Range) else values[min(int(share * len(values)), len(values) - 1)]


def edges(space: Space, tried: Sequence[Point], point: Point) -> dict[str, int]:
    """The hyperparameters whose value in `point` lies on an edge of what was searched: −1 at the low one, 1 at the high one.

    A value of a grid lies on an edge where no tried one lies beyond it. A value of a range does in the outermost tenth of the range and of
    what was tried beyond it. Zero is no edge: it is the absence of momentum or decay.
    """
    found = {}
    for name, values in space.items():
        here = [other[name] for other in tried if _number(other[name])]
        if not _number(point[name]) or point[name] == 0 or len(set(here)) < 2:
            continue
        if isinstance(values, Range):
            (low, high), share = _reach(values, here), values.share(point[name])
            near = NEAR * (high - low)
            sides = [side for side, gap in ((-1, share - low), (1, high - share)) if gap <= near]
        else:
            sides = [side for side, end in ((-1, min(here)), (1, max(here))) if point[name] == end]
        if sides:
            found[name] = sides[0]
    return found


def _reach(values: Range, tried: Sequence[float]) -> tuple[float, float]:
    """The least and the greatest share of a range that was searched: its ends, or beyond them."""
    shares = [values.share(value) for value in tried]
    return min(0.0, *shares), max(1.0, *shares)


def further(space: Space, tried: Sequence[Point], winner: Point, possible: Callable[[Point], bool] = lambda point: True) -> list[Point]:
    """The `FURTHER` next points of one round of widening. Every arm gets as many, wherever its winner lies.

    They lie beyond every edge that the winner lies on, with the other hyperparameters held. Points that are not `possible` are replaced by
    points closer to the winner: halfway to its neighbours, then a quarter of the way. So are all of them where the winner lies inside.
    There are fewer only where nothing can be moved.
    """
    points: list[Point] = []
    for moved in itertools.chain(_outward(space, tried, winner), _closer(space, tried, winner)):
        point = {**winner, **moved}
        if point not in tried and point not in points and possible(point):
            points.append(point)
        if len(points) == FURTHER:
            break
    return points


def _outward(space: Space, tried: Sequence[Point], winner: Point) -> Iterator[Point]:
    """Beyond all edges at once, one stride, then two."""
    if outward := edges(space, tried, winner):
        for count in range(1, FURTHER + 1):
            yield {name: _beyond(space[name], [other[name] for other in tried], side, count) for name, side in outward.items()}


def _beyond(values: Values, tried: Sequence[Any], side: int, count: int) -> float:
    """The value so many strides beyond an edge: a quarter of a range, or the grid's last stride."""
    if isinstance(values, Range):
        low, high = _reach(values, tried)
        return values.at(high + 0.25 * count if side > 0 else low - 0.25 * count)
    ordered = sorted({other for other in tried if _number(other)}, reverse=side < 0)
    before, last = ordered[-2], ordered[-1]
    value = last * (last / before) ** count if before > 0 and last > 0 else last + (last - before) * count
    return round(value) if all(isinstance(other, int) for other in ordered) else short(value)


def _closer(space: Space, tried: Sequence[Point], winner: Point) -> Iterator[Point]:
    """One hyperparameter at a time, part of the way from the winner to its nearest neighbours below and above."""
    for part in (1 / 2, 1 / 4, 3 / 4, 1 / 8):
        for name in space:
            here = winner[name]
            if not _number(here):
                continue
            values = {other[name] for other in tried if _number(other[name])}
            below, above = (v for v in values if v < here), (v for v in values if v > here)
            for near in (max(below, default=None), min(above, default=None)):
                if near is not None:
                    value = here * (near / here) ** part if here > 0 and near > 0 else here + (near - here) * part
                    yield {name: round(value) if all(isinstance(other, int) for other in values) else short(value)}


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def to_json(space: Space) -> dict[str, Any]:
    """A declared space as a study's record keeps it."""
    return {name: list(values) if isinstance(values, tuple) else _described(values) for name, values in space.items()}


def _described(values: Range) -> dict[str, Any]:
    return {"low": values.low, "high": values.high, "log": values.log, **({"integer": True} if values.integer else {})}
