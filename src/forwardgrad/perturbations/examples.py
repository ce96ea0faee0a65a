"""Which dimension of a tensor holds the examples of a batch, and what was learned of a model (`Reading`, `Memory`)."""

from __future__ import annotations

import itertools
import math
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class Rows:
    """One dimension of a tensor, along which the numbers of each of G examples lie.

    Of a dimension of size G index i is example i. Of a multiple of it, index i is example i // (size/G), blocks of one example in a row
    (tokens of sentences flattened behind the batch), or i % G where examples take `turns` (time flattened before the batch).
    """

    dim: int
    turns: bool = False

    def fits(self, shape: Sequence[int], count: int) -> bool:
        """Whether a tensor of this shape can hold so many examples this way."""
        return self.dim < len(shape) and shape[self.dim] >= count and shape[self.dim] % count == 0

    def of(self, size: int, count: int) -> Tensor:
        """The example of every index [size]."""
        index = torch.arange(size)
        return index % count if self.turns else index // (size // count)

    def gather(self, tensor: Tensor, count: int, lead: int = 0) -> Float[Tensor, "*lead count m"]:
        """The numbers of each example side by side, behind `lead` dimensions that are not the tensor's own."""
        if count == 1:
            return tensor.reshape(*tensor.shape[:lead], 1, -1)
        moved: Tensor = tensor.movedim(lead + self.dim, lead)
        each = moved.shape[lead] // count
        if each == 1:
            return moved.flatten(lead + 1) if moved.dim() > lead + 1 else moved.unsqueeze(-1)
        cut: Tensor = moved.unflatten(lead, (each, count)).transpose(lead, lead + 1) if self.turns else moved.unflatten(lead, (count, each))
        return cut.flatten(lead + 1)

    def scatter(self, gathered: Float[Tensor, "count m"], shape: Sequence[int]) -> Tensor:
        """The inverse of `gather`."""
        if len(gathered) == 1:
            return gathered.reshape(tuple(shape))
        count, inner = len(gathered), [size for dim, size in enumerate(shape) if dim != self.dim]
        each = shape[self.dim] // count
        cut = gathered.reshape(count, each, *inner)
        return (cut.transpose(0, 1) if self.turns else cut).reshape(count * each, *inner).movedim(0, self.dim)

    def along(self, weights: Float[Tensor, "k count"], size: int) -> Float[Tensor, "k size"]:
        """A number of each example as one for every index along the dimension."""
        each = size // weights.shape[1]
        if each == 1:
            return weights
        return weights.repeat(1, each) if self.turns else weights.repeat_interleave(each, dim=1)

    def spread(self, weights: Float[Tensor, "k count"], shape: Sequence[int]) -> Tensor:
        """A number of each example in a shape that multiplies [k, *shape]."""
        along = self.along(weights, shape[self.dim])
        return along.reshape(len(along), *[1] * self.dim, -1, *[1] * (len(shape) - 1 - self.dim))


@dataclass(frozen=True)
class ExamplesPlace:
    """A place of the model where something moves: the dimension of its examples, and whether they stay apart from there on.

    `apart`: each example affects its own part of the loss alone. Otherwise the place is scored by the whole loss, and `why` says what was
    seen. `rows` is None where no dimension holds examples. `layer` names the parameters.
    """

    layer: str
    rows: Rows | None = None
    apart: bool = False
    why: str = ""


@dataclass(frozen=True)
class Told:
    """Where the examples lie in the scores that a cross-entropy of class indices was given, and so in its targets.

    rows: None where that could not be found out.
    apart: numbers of places whose positions lie in another order than the targets, so that none of them is that of its target.
    """

    rows: Rows | None
    apart: frozenset[int] = frozenset()


ReadingKind = Literal["outputs", "replay", "examples", "whole"]


@dataclass(frozen=True)
class Reading:
    """How the loss of a model is told apart by example, on one path of calls. A survey finds it out.

    path: the path of calls that it holds for; None for any.
    way: where the loss is read.
        "outputs": at the model's outputs, where a loss function whose error has a closed form was given them.
        "replay": at what the calls after the last layer were given; these calls are made again to find their derivative.
        "examples": the loss function returned one loss an example.
        "whole": as one number, which tells no examples apart.
    places: for each place that moves, where its examples lie.
    read: where the examples lie in each tensor that is read.
    count: where their number stands: in a tensor that is read or at a place, by its index and dimension; None for one example.
    beyond: whether the loss has more than what is read, such as a factor, or a penalty on weights (`penalty`).
    rest: whether some of that depends on activities.
    even: for each tensor that is read and each place that is apart, whether an example has a single row there.
    told: where examples lie in what each of the loss functions was given, if somebody learns their labels.
    behind: whether it is read behind calls inside a transform of torch.func, which may be all of the loss.
    since, cut: for "replay", how many calls come before those that are made again, and what these are given.
    why: what stood in the way of a better `way`, as the end of a sentence.
    """

    path: Hashable
    way: ReadingKind
    places: tuple[ExamplesPlace, ...] = ()
    read: tuple[Rows, ...] = ()
    count: tuple[Literal["read", "place"], int, int] | None = None
    beyond: bool = False
    penalty: bool = False
    rest: bool = False
    behind: bool = False
    even: tuple[bool, ...] = ()
    told: tuple[Told, ...] = ()
    since: int | None = None
    cut: tuple[tuple[int, int], ...] = ()
    why: str = ""

    def examples(self, read: Sequence[Sequence[int]], places: Sequence[Sequence[int]]) -> int:
        """How many there are, in tensors of these shapes."""
        if self.count is None:
            return 1
        kind, index, dim = self.count
        return (read if kind == "read" else places)[index][dim]

    def sizes(self, read: Sequence[Sequence[int]], places: Sequence[Sequence[int]]) -> Iterator[int | None]:
        """How many rows what is read and each apart place have for an example; None where examples cannot lie there."""
        count = self.examples(read, places)
        told = [*zip(self.read, read, strict=False)]
        told += [(place.rows, shape) for place, shape in zip(self.places, places, strict=False) if place.apart and place.rows is not None]
        for rows, shape in told:
            yield shape[rows.dim] // count if rows.fits(shape, count) else None

    def fits(self, read: Sequence[Sequence[int]], places: Sequence[Sequence[int]]) -> bool:
        """Whether examples can lie in tensors of these shapes as they did when this was found out."""
        if self.count is None:
            return True
        sizes = list(self.sizes(read, places))
        return None not in sizes and tuple(size == 1 for size in sizes) == self.even

    def place(self, index: int) -> ExamplesPlace:
        return self.places[index] if index < len(self.places) else _NOWHERE


_NOWHERE = ExamplesPlace("")
WHOLE = Reading(None, "whole")
"""What is known of a loss before anything is: it is one number."""


@dataclass
class Memory:
    """What is remembered of a model under one loss.

    at_once: numbers of the layers whose output moves at once, and not behind the ReLU that follows; those below zero: see `calls.retakes`.
    whole: parameters that move as a whole from the start, as the loss uses them inside a transform of torch.func.
    apart: whether what follows a block has to have a copy of its values, as it writes to them.
    readings: a reading for each path of calls; `last` is the one that the next evaluation goes by.
    ahead: for each path, what is known of the loss before it is computed; `unsteady` where that did not hold once.
    unsaid, said: warnings that are still to be given, and all that there ever were.
    """

    at_once: frozenset[int] = frozenset()
    whole: frozenset[str] = frozenset()
    apart: bool = False
    readings: dict[Hashable, Reading] = field(default_factory=dict)
    last: Reading | None = None
    ahead: dict[Hashable, Any] = field(default_factory=dict)
    unsteady: bool = False
    unsaid: list[str] = field(default_factory=list)
    said: set[str] = field(default_factory=set)

    def tell(self, text: str) -> None:
        """Keep a sentence that the next step of somebody who is to be warned will say, once."""
        if text and text not in self.said:
            self.said.add(text)
            self.unsaid.append(text)

    def keep(self, reading: Reading) -> None:
        self.readings[reading.path] = self.last = reading

    def forget(self) -> None:
        """Where examples lie has to be found out anew: other places move."""
        self.readings, self.last, self.ahead = {}, None, {}


MOST_PATHS = 32  # paths of calls; a model that takes ever new ones is read as a whole


def codes(count: int) -> list[Tensor]:
    """Sets of examples [count] such that of any two, in some set, the first is in it and the second is not; as few as there can be.

    Every example is in half of the sets, no two in the same half, so none is in all sets that another one is in (Sperner, 1928).
    """
    sets = next(sets for sets in itertools.count(2) if math.comb(sets, sets // 2) >= count)
    found = torch.zeros(sets, count, dtype=torch.bool)
    for example, halves in zip(range(count), itertools.combinations(range(sets), sets // 2), strict=False):
        found[list(halves), example] = True
    return list(found)


def halves(count: int) -> list[Tensor]:
    """Two sets [count], the examples whose number has an odd number of digits 1 and the others: whatever shift or exchange of examples
    there is, many of them change from one set to the other."""
    index, odd = torch.arange(count), torch.zeros(count, dtype=torch.bool)
    for bit in range(count.bit_length()):
        odd ^= (index >> bit) % 2 == 1
    return [odd, ~odd]
