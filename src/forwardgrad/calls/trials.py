"""The trials of a survey: change the numbers of some examples, and see whose part of the loss changes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from forwardgrad.calls.watch import Mark
from forwardgrad.forward_mode import Redo
from forwardgrad.perturbations import Entered, ExamplesPlace, Reading, Rows, codes, halves

RUNS = 400  # forward passes that a survey may take; what is not known by then is scored by the whole loss


@dataclass(frozen=True)
class Option:
    """A number of examples, where they would lie in what is read, and where their number could be read off."""

    count: int
    read: tuple[Rows, ...]
    source: Any


class Passes(Protocol):
    """The passes of a survey: how many there were, what entered in them and its names."""

    runs: int
    entered: list[Entered]
    names: list[str]

    def read(self, way: Reading, mark: Mark) -> list[Tensor]:
        """What the loss is read at, after one more pass."""

    def derivatives(self, way: Reading, chosen: Callable[[int, Tensor], Tensor | None]) -> list[Tensor]:
        """How that follows where the numbers that are chosen at each place move."""


class Trials:
    """Which places hold which examples apart, for one option."""

    def __init__(self, passes: Passes, way: Reading, read: Sequence[Tensor], option: Option) -> None:
        self._passes, self._way, self._before, self._option = passes, way, read, option
        count = option.count
        self._choices = {
            index: found for index, entered in enumerate(passes.entered) if (found := list(_choices(entered.dims, entered.shape, count)))
        }
        self._sets = codes(count) if count > 1 else []
        self._hidden = False  # whether a comparison was seen to hide something

    def search(self) -> tuple[ExamplesPlace, ...]:
        """Where examples lie at every place, and whether they stay apart behind it."""
        if self._option.count == 1:
            firsts = {index: found[0] for index, found in self._choices.items()}
            return tuple(ExamplesPlace(name, firsts.get(index), index in firsts) for index, name in enumerate(self._passes.names))
        found = self._found()
        if found and not self._confirmed(found):
            self._hidden = True
            found = self._found()
        places = []
        for index, name in enumerate(self._passes.names):
            choices = self._choices.get(index, [])
            alone = any(self._passes.entered[index].shape[dim] == 1 for dim in self._passes.entered[index].dims)
            if index in found or not choices or alone:  # a row of positions is all examples' own
                places.append(ExamplesPlace(name, found.get(index), index in found))
                continue
            like = [rows for rows in choices if rows in found.values()] if found else choices
            places.append(ExamplesPlace(name, like[0] if like else None, False, "examples meet"))
        return tuple(places)

    def _found(self) -> dict[int, Rows]:
        """Rows of the places that hold examples apart: as many of the last as go together, then further ones before those."""
        order = sorted(self._choices)
        found = self._suffix({}, order, {index: self._choices[index][0] for index in order})
        at, step, like = len(order) - len(found) - 1, 1, next(iter(found.values()), None)
        while at >= 0 and self._passes.runs < RUNS:
            choices = self._choices[order[at]]
            preferred = sorted(choices, key=lambda rows: rows != like)
            fits = next((rows for rows in preferred if self._hold({**found, order[at]: rows})), None)
            if fits is None:  # what lies further ahead most likely meets, too
                at, step = at - step, 2 * step
                continue
            found, like, step = {**found, order[at]: fits}, fits, 1
            ahead = order[:at]
            more = self._suffix(found, ahead, {index: fits if fits in self._choices[index] else self._choices[index][0] for index in ahead})
            at -= 1 + len(more) - len(found)
            found = more
        return found

    def _suffix(self, known: dict[int, Rows], order: list[int], rows: Mapping[int, Rows]) -> dict[int, Rows]:
        """What is known with the longest end of an order that goes with it."""
        low, high = 0, len(order)  # the end from `high` on goes with it, that from `low` on not yet known
        while low < high and self._passes.runs < RUNS:
            middle = low if high == len(order) and low == 0 else (low + high) // 2
            if self._hold({**known, **{index: rows[index] for index in order[middle:]}}):
                high = middle
            else:
                low = middle + 1
        return {**known, **{index: rows[index] for index in order[high:]}}

    def _hold(self, places: Mapping[int, Rows]) -> bool:
        """Whether all of these places at once hold every example apart from every other."""
        spoiled = all(self._stays(places, chosen, _spoiled) for chosen in self._sets)
        return spoiled and (not self._hidden or self._confirmed(places))

    def _confirmed(self, places: Mapping[int, Rows]) -> bool:
        """Whether other finite numbers of half of the examples, and moves of them, leave the other half as it was."""
        sets = halves(self._option.count)
        return all(self._stays(places, chosen, _changed) and self._stands(places, chosen) for chosen in sets)

    def _stays(self, places: Mapping[int, Rows], chosen: Tensor, spoil: Callable[[Tensor], Tensor]) -> bool:
        """Whether nothing of the examples outside a set follows from what is changed inside it."""

        def mark(index: int, entered: Entered, tensor: Tensor) -> Tensor:
            inside = self._inside(places, chosen, index, tensor)
            return tensor if inside is None else torch.where(inside, spoil(tensor), tensor)

        try:
            found = self._passes.read(self._way, mark)
        except Redo:
            raise
        except Exception:  # what cannot be tried does not hold
            return False
        return self._only(chosen, [_differs(before, now) for before, now in zip(self._before, found, strict=True)])

    def _stands(self, places: Mapping[int, Rows], chosen: Tensor) -> bool:
        """Whether nothing of the examples outside a set moves where those inside it do."""
        try:
            found = self._passes.derivatives(self._way, lambda index, tensor: self._inside(places, chosen, index, tensor))
        except Redo:
            raise
        except Exception:
            return False
        return self._only(chosen, [derivative != 0 for derivative in found])

    def _inside(self, places: Mapping[int, Rows], chosen: Tensor, index: int, tensor: Tensor) -> Tensor | None:
        """Which numbers at a place belong to the examples of a set."""
        if (rows := places.get(index)) is None:
            return None
        inside = chosen[rows.of(tensor.shape[rows.dim], self._option.count)].to(tensor.device)
        return inside.reshape(*[1] * rows.dim, -1, *[1] * (tensor.dim() - rows.dim - 1))

    def _only(self, chosen: Tensor, others: Sequence[Tensor]) -> bool:
        """Whether what is other in what the loss is read at belongs to the examples of a set alone."""
        for rows, other in zip(self._option.read, others, strict=True):
            if bool((rows.gather(other.to(chosen.device), self._option.count).any(1) & ~chosen).any()):
                return False
        return True


def _choices(dims: range, shape: Sequence[int], count: int) -> Iterator[Rows]:
    for dim in dims:
        if dim < len(shape) and shape[dim] == count:
            yield Rows(dim)
    for dim in dims:
        if dim < len(shape) and shape[dim] > count and Rows(dim).fits(shape, count):
            yield Rows(dim)
            if count > 1:
                yield Rows(dim, turns=True)


def _spoiled(tensor: Tensor) -> Tensor:
    return torch.full((), math.nan, dtype=tensor.dtype, device=tensor.device)


def _changed(tensor: Tensor) -> Tensor:
    """Other finite numbers, far from those that there are."""
    return 0.5 - 1.5 * tensor


def _differs(before: Tensor, now: Tensor) -> Tensor:
    """Where numbers differ by more than the order of a sum can make them."""
    if before.shape != now.shape:
        return torch.ones_like(before, dtype=torch.bool)
    scale = before[before.isfinite()].abs().max() if bool(before.isfinite().any()) else before.new_zeros(())
    same = (now - before).abs() <= 64 * torch.finfo(before.dtype).eps * scale
    return ~(same | (now == before) | before.isnan())
