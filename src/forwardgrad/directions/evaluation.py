"""`Directions`: the random directions of one evaluation, one draw for every place that moves."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Generator, Tensor

from forwardgrad.directions.laws import Law, Rademacher, StreamSeeds
from forwardgrad.directions.plan import drawn
from forwardgrad.directions.streams import sown, words


class Directions:
    """K directions of one law, each of which follows from a seed, place by place.

    Every place has random numbers of its own, so they can be drawn again when they are needed a second time, and need not be held.
    `kept` are directions whose seeds stay for some steps, for the factors that are kept as long; None where none are.
    """

    next_place: int = 0
    """The number of the place that is drawn for next."""
    kept: Directions | None = None

    def __init__(self, law: Law, seeds: Sequence[int], device: torch.device, kept: Sequence[int] | None = None) -> None:
        self.law, self._count, self._home = law, len(seeds), device
        self._sources = _Running.of(seeds, device) if device.type == "cuda" else _Sown(seeds, device)
        if kept is not None:
            self.kept = type(self)(law, kept, device)

    def __len__(self) -> int:
        return self._count

    @property
    def seeds(self) -> list[int]:
        """A seed for each direction, from which its numbers at every place follow."""
        return list(self._sources.seeds)

    @property
    def home(self) -> torch.device:
        """Where numbers are drawn."""
        return self._home

    def plan(self, shape: tuple[int, ...], like: Tensor) -> Callable[[], Tensor]:
        """What draws a stack [K, *shape] with the dtype and device of `like`: the same bits at every call."""
        return self._planned(shape, like, range(self._count))

    def draw(self, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """A stack [K, *shape] with the dtype and device of `like`."""
        return self.plan(shape, like)()

    def only(self, which: Sequence[int]) -> Directions:
        """Some of these directions. They have the numbers that they have among all, and places are counted as if all were drawn."""
        return _Some(self, which)

    def _planned(self, shape: tuple[int, ...], like: Tensor, which: Sequence[int]) -> Callable[[], Tensor]:
        place, dtype, device, sources, home = self.next_place, like.dtype, like.device, self._sources, self._home
        self.next_place += 1
        size = (len(which), *shape)
        if not which:
            return lambda: torch.empty(size, dtype=dtype, device=device)
        generators = None if sources.generators is None else [sources.generators[k] for k in which]

        def stack() -> Tensor:  # in few words: it is asked for at every step, twice
            numbers = torch.empty(size, dtype=dtype, device=home)
            sources.fill_((numbers,) if size[0] == 1 else numbers, self.law, place, which)
            return numbers if home == device else numbers.to(device)

        return lambda: drawn(stack, once=(id(sources.seeds), place), on=generators)

    def replayed(self, shape: tuple[int, ...], like: Tensor) -> Callable[[], Tensor]:
        """As `plan`, for numbers that are too many to be held: they are drawn at every call."""
        return self.plan(shape, like)


class HeldDirections(Directions):
    """Directions for several evaluations, which come to the same places one after the other: numbers are held once they are drawn."""

    def __init__(self, law: Law, seeds: Sequence[int], device: torch.device, kept: Sequence[int] | None = None) -> None:
        super().__init__(law, seeds, device, kept)
        if device.type != "cuda":
            self._sources = _Counted(seeds, device)
        self._held: dict[int, Tensor] = {}

    def again(self) -> HeldDirections:
        """The same, for the next evaluation."""
        self.next_place = 0
        if isinstance(self.kept, HeldDirections):
            self.kept.again()
        return self

    def plan(self, shape: tuple[int, ...], like: Tensor) -> Callable[[], Tensor]:
        place, make = self.next_place, self.replayed(shape, like)

        def held() -> Tensor:
            if (found := self._held.get(place)) is None or found.shape[1:] != shape:  # another path of calls
                found = self._held[place] = make()
            return found

        return held

    def replayed(self, shape: tuple[int, ...], like: Tensor) -> Callable[[], Tensor]:
        make = super().plan(shape, like)

        def below() -> Tensor:
            inside = torch._C._are_functorch_transforms_active() and not torch.compiler.is_compiling()
            return _Below.apply(make) if inside else make()  # type: ignore[no-untyped-call]

        return below


class _Below(torch.autograd.Function):
    """What is drawn inside of vmap takes ten times as long: this leaves it for the draw."""

    @staticmethod
    def forward(make: Callable[[], Tensor]) -> Tensor:
        return make()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def vmap(*_: Any) -> Any:
        raise AssertionError("nothing that it is given is of a member, so there is nothing to do for each")


class PartOfSeeds(Sequence[int]):
    """Some seeds of a list, as they are when they are asked for: a plan of random numbers writes new ones into the list."""

    def __init__(self, seeds: Sequence[int], part: range) -> None:
        self._seeds, self._part = seeds, part

    def __len__(self) -> int:
        return len(self._part)

    def __getitem__(self, index: Any) -> Any:
        return self._seeds[self._part[index]]


class Still(Directions):
    """No directions at all, for an evaluation in which nothing moves."""

    def __init__(self) -> None:
        self._count = 0

    def plan(self, shape: tuple[int, ...], like: Tensor) -> Callable[[], Tensor]:
        return lambda: torch.empty((0, *shape), dtype=like.dtype, device=like.device)

    def only(self, which: Sequence[int]) -> Directions:
        return self


class _Some(Directions):
    """Some of many directions."""

    def __init__(self, every: Directions, which: Sequence[int]) -> None:
        self.law, self._every, self._which, self._count = every.law, every, which, len(which)

    @property
    def next_place(self) -> int:  # type: ignore[override]
        return self._every.next_place

    @property
    def seeds(self) -> list[int]:
        every = self._every.seeds
        return [every[k] for k in self._which]

    @property
    def home(self) -> torch.device:
        return self._every.home

    def plan(self, shape: tuple[int, ...], like: Tensor) -> Callable[[], Tensor]:
        return self._every._planned(shape, like, self._which)


class _Sown:
    """One generator, begun anew for every direction at every place."""

    generators: list[Generator] | None = None  # a graph cannot begin one

    def __init__(self, seeds: Sequence[int], device: torch.device) -> None:
        self.seeds, self._stream = seeds, Generator(device)

    def fill_(self, tangents: Iterable[Tensor], law: Law, place: int, which: Sequence[int]) -> None:
        for tangent, k in zip(tangents, which, strict=True):
            law.fill_([tangent], self._stream.manual_seed(sown(self.seeds[k], place)))


class _Counted(_Sown):
    """As `_Sown`, with random signs by words that are counted: those of many directions are a few operations on all of them."""

    def fill_(self, tangents: Iterable[Tensor], law: Law, place: int, which: Sequence[int]) -> None:
        if not isinstance(law, Rademacher):
            super().fill_(tangents, law, place, which)
            return
        stack = tangents if isinstance(tangents, Tensor) else next(iter(tangents))
        law.fill_by_(stack, lambda count: words([self.seeds[k] for k in which], place, count, self._stream.device))


class _Running:
    """A generator on the GPU for every direction, which goes through the places in the order in which they are first drawn.

    A captured graph, which draws every place once, can do so itself: nothing but where a generator begins is the host's business. An
    evaluation that is made again, with the same seeds, finds each place where it was.
    """

    def __init__(self, seeds: Sequence[int], device: torch.device) -> None:
        self.seeds, self.generators = seeds, [Generator(device) for _ in seeds]
        self._offsets, self._ends = dict[tuple[int, int], int](), [0] * len(seeds)

    @classmethod
    def of(cls, seeds: Sequence[int], device: torch.device) -> _Running:
        found: _Running = getattr(seeds, "running", None) or cls(seeds, device)
        if isinstance(seeds, StreamSeeds):
            seeds.running = found
        drawn(found._begin, once=(id(seeds), None), on=found.generators)
        return found

    def _begin(self) -> list[Generator]:
        return [stream.manual_seed(seed) for stream, seed in zip(self.generators, self.seeds, strict=True)]

    def fill_(self, tangents: Iterable[Tensor], law: Law, place: int, which: Sequence[int]) -> None:
        captured = torch.cuda.is_current_stream_capturing()
        for tangent, k in zip(tangents, which, strict=True):
            stream = self.generators[k]
            if not captured:
                stream.set_offset(self._offsets.setdefault((place, k), self._ends[k]))
            law.fill_([tangent], stream)
            if not captured:
                self._ends[k] = max(self._ends[k], stream.get_offset())
