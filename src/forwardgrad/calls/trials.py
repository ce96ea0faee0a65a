"""The trials of a survey: change the numbers of some examples, and see whose part of the loss changes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from forwardgrad.calls.watch import Mark
from forwardgrad.forward_mode import Redo
from forwardgrad.perturbations import ActivityUse, Entered, ExamplesPlace, Reading, Rows, Told, codes, halves

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

    def scores(self, way: Reading, mark: Mark, bare: frozenset[int]) -> list[Tensor]:
        """What the loss functions were given, after one more pass in which places of these numbers do not lie behind views."""

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
        self._sets = halves(count)  # a few at first: what passes these goes on to all
        self._hidden = False  # whether a comparison was seen to hide something
        self._held = dict[frozenset[tuple[int, Rows]], bool]()

    def search(self) -> tuple[ExamplesPlace, ...]:
        """Where examples lie at every place, and whether they stay apart behind it."""
        if self._option.count == 1:
            firsts = {index: found[0] for index, found in self._choices.items()}
            return tuple(ExamplesPlace(name, firsts.get(index), index in firsts) for index, name in enumerate(self._passes.names))
        found, sets = self._found(), codes(self._option.count)
        if found and not self._spares(found, sets):
            self._sets, self._held = sets, {}
            found = self._found()
        if found and not self._confirmed(found):
            self._sets, self._hidden, self._held = sets, True, {}
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
        key = frozenset(places.items())
        if key not in self._held:
            self._held[key] = self._spares(places, self._sets) and (not self._hidden or self._confirmed(places))
        return self._held[key]

    def _spares(self, places: Mapping[int, Rows], sets: Sequence[Tensor]) -> bool:
        """Whether numbers of the examples of each set can be spoiled at all of these places, and nothing of the others is."""
        return all(self._stays(places, chosen, _spoiled) for chosen in sets)

    def _confirmed(self, places: Mapping[int, Rows]) -> bool:
        """Whether other finite numbers of half of the examples, and moves of them, leave the other half as it was."""
        sets = halves(self._option.count)
        return all(self._stays(places, chosen, _changed) and self._stands(places, chosen) for chosen in sets)

    def _stays(self, places: Mapping[int, Rows], chosen: Tensor, spoil: Callable[[Tensor], Tensor]) -> bool:
        """Whether nothing of the examples outside a set follows from what is changed inside it."""

        def mark(index: int, entered: Entered, tensor: Tensor) -> Tensor:
            inside = _inside(places.get(index), chosen, tensor)
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
            found = self._passes.derivatives(self._way, lambda index, tensor: _inside(places.get(index), chosen, tensor))
        except Redo:
            raise
        except Exception:
            return False
        return self._only(chosen, [derivative != 0 for derivative in found])

    def _only(self, chosen: Tensor, others: Sequence[Tensor]) -> bool:
        """Whether what is other in what the loss is read at belongs to the examples of a set alone."""
        for rows, other in zip(self._option.read, others, strict=True):
            if bool((rows.gather(other.to(chosen.device), self._option.count).any(1) & ~chosen).any()):
                return False
        return True


class LabelTrials:
    """Where the targets of a cross-entropy lie that classifiers inside the model learn: by what the scores follow from.

    Scores and targets lie alike. They may do so in another order than what the loss is read at, or than the blocks of the model: behind a
    view that lets examples take turns, or exchanges two dimensions of an image.
    """

    def __init__(self, passes: Passes, way: Reading, count: int, before: Sequence[Tensor]) -> None:
        self._passes, self._way, self._count, self._before = passes, way, count, before
        self._last = [index for index, entered in enumerate(passes.entered) if isinstance(entered, ActivityUse) and entered.exact]

    def told(self, scored: Sequence[bool]) -> tuple[Told, ...]:
        """For the scores of every loss function; those that are not `scored` have no targets that a classifier could learn."""
        rows = [list(self._choices(t)) if known else [] for t, known in zip(self._before, scored, strict=True)]
        if self._way.way == "outputs":
            rows = [[one] if some and one.dim != 1 else [] for one, some in zip(self._way.read, rows, strict=True)]
        elif self._count > 1:
            rows = self._followed(rows)
        found = [some[0] if some else None for some in rows]
        apart = self._apart(found, self._in_order)
        for index in self._last:
            turned = self._turned(found, index)
            apart = [frozenset(range(len(self._passes.entered))) if all_ else some for all_, some in zip(turned, apart, strict=True)]
        return tuple(Told(one, places) for one, places in zip(found, apart, strict=True))

    def _choices(self, scores: Tensor) -> Iterator[Rows]:
        if self._count == 1:
            yield Rows(0)
        else:
            yield from (rows for rows in _choices(range(scores.dim()), scores.shape, self._count) if rows.dim != 1)

    def _followed(self, rows: list[list[Rows]]) -> list[list[Rows]]:
        """Those of some choices by which no example has scores that follow from another one, and each has some that follow."""
        places = {index: place.rows for index, place in enumerate(self._way.places) if place.apart and index not in self._last}
        follow = [{one: torch.zeros(self._count, dtype=torch.bool) for one in some} for some in rows]
        for chosen in codes(self._count):

            def mark(index: int, entered: Entered, tensor: Tensor, chosen: Tensor = chosen) -> Tensor:
                inside = _inside(places.get(index), chosen, tensor)
                return tensor if inside is None else torch.where(inside, _spoiled(tensor), tensor)

            for known, other in zip(follow, self._changed(mark), strict=True):
                for one in list(known):
                    changed = one.gather(other, self._count).any(1)
                    if bool((changed & ~chosen).any()):
                        del known[one]
                    else:
                        known[one] |= changed
        return [[one for one, changed in known.items() if bool(changed.all())] for known in follow]

    def _apart(self, found: Sequence[Rows | None], rows_of: Callable[[int, ActivityUse], Rows | None]) -> list[frozenset[int]]:
        """The numbers of places where something of a position changes, and nothing of the score of that position: for each loss function.

        Numbers are changed wherever nothing has changed yet, of the places for which `rows_of` tells where their examples lie.
        """
        apart = [frozenset[int]() for _ in found]
        sizes = [t.numel() // (self._count * t.shape[1]) if rows is not None else 1 for t, rows in zip(self._before, found, strict=True)]
        for positions in {size for size in sizes if size > 1}:
            for chosen in codes(positions):
                spoils = _Positions(self._count, chosen, rows_of)
                for number, other in enumerate(self._changed(spoils)):
                    if (rows := found[number]) is not None and sizes[number] == positions and bool(other.any()):
                        changed = Rows(rows.dim - (rows.dim > 1), rows.turns).gather(other.any(1), self._count).cpu()
                        apart[number] |= {index for index, now in spoils.seen.items() if bool((now & ~changed).any())}
        return apart

    def _in_order(self, index: int, entered: ActivityUse) -> Rows | None:
        return entered.place.rows if entered.place.apart and index not in self._last else None

    def _turned(self, found: Sequence[Rows | None], last: int) -> list[bool]:
        """Whether the loss has the positions of the model's output in another order, for each loss function, wherever examples lie."""
        choices = list[Rows]()

        def look(index: int, entered: Entered, tensor: Tensor) -> Tensor:
            if index == last and isinstance(entered, ActivityUse):
                dims = [dim for dim in range(tensor.dim()) if dim != entered.channels]
                one = [Rows(dims[0])] if self._count == 1 and dims else []
                choices[:] = one or [rows for rows in _choices(range(tensor.dim()), tensor.shape, self._count) if rows.dim in dims]
            return tensor

        self._changed(look)
        each = [self._apart(found, lambda index, _, rows=rows: rows if index == last else None) for rows in choices]  # type: ignore[misc]
        return [bool(each) and all(bool(one[number]) for one in each) for number in range(len(found))]

    def _changed(self, mark: Mark) -> list[Tensor]:
        """Where scores are others after a pass with something changed; nothing of it where that cannot be tried."""
        try:
            now = self._passes.scores(self._way, mark, frozenset(self._last))
        except Redo:
            raise
        except Exception:
            return [torch.zeros_like(t, dtype=torch.bool) for t in self._before]
        return [_differs(before, after) for before, after in zip(self._before, now, strict=True)]


class _Positions:
    """A mark that spoils some positions of every example, and what each place has seen of that."""

    def __init__(self, count: int, chosen: Tensor, rows_of: Callable[[int, ActivityUse], Rows | None]) -> None:
        self._count, self._chosen, self._rows_of = count, chosen, rows_of
        self.seen = dict[int, Tensor]()

    def __call__(self, index: int, entered: Entered, tensor: Tensor) -> Tensor:
        if not isinstance(entered, ActivityUse) or (rows := self._rows_of(index, entered)) is None:
            return tensor
        units = tensor.shape[entered.channels]
        if tensor.numel() != self._count * len(self._chosen) * units or not rows.fits(tensor.shape, self._count):
            return tensor
        entered.place = replace(entered.place, rows=rows)
        now = entered.positions(tensor, self._count).isnan().any(2)
        spoil = not bool(now.any())
        self.seen[index] = self._chosen.expand(self._count, -1) if spoil else now.cpu()
        if not spoil:
            return tensor
        inside = entered.at_positions(self._chosen.to(tensor.device)[None, :, None].expand(self._count, -1, units))
        return torch.where(inside, _spoiled(tensor), tensor)


def _inside(rows: Rows | None, chosen: Tensor, tensor: Tensor) -> Tensor | None:
    """Which numbers at a place with such rows belong to the examples of a set."""
    if rows is None:
        return None
    inside = chosen[rows.of(tensor.shape[rows.dim], len(chosen))].to(tensor.device)
    return inside.reshape(*[1] * rows.dim, -1, *[1] * (tensor.dim() - rows.dim - 1))


def rows_in(shape: Sequence[int], count: int, dim: int) -> Rows | None:
    """Where so many examples lie in a tensor of this shape, the given dimension before others."""
    for d in sorted(range(len(shape)), key=lambda d: (d != dim, d)):
        if shape[d] == count:
            return Rows(d)
    return Rows(0) if Rows(0).fits(shape, count) else None


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
