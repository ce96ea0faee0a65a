"""`Directions`: the random directions of one evaluation, one draw for every place that moves."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Generator, Tensor

from forwardgrad.directions.laws import Law, StreamSeeds
from forwardgrad.directions.plan import drawn
from forwardgrad.directions.streams import sown


class Directions:
    """K directions of one law, each of which follows from a seed, place by place.

    Every place has random numbers of its own, so they can be drawn again when they are needed a second time, and need not be held.
    """

    def __init__(self, law: Law, seeds: list[int], device: torch.device) -> None:
        self.law, self._count, self._home = law, len(seeds), device
        self._sources = _Running.of(seeds, device) if device.type == "cuda" else _Sown(seeds, device)
        self._places = 0

    def __len__(self) -> int:
        return self._count

    def plan(self, shape: tuple[int, ...], like: Tensor) -> Callable[[], Tensor]:
        """What draws a stack [K, *shape] with the dtype and device of `like`: the same bits at every call."""
        place, dtype, device, sources, home = self._places, like.dtype, like.device, self._sources, self._home
        self._places += 1
        size = (self._count, *shape)

        def stack() -> Tensor:  # in few words: it is asked for at every step, twice
            numbers = torch.empty(size, dtype=dtype, device=home)
            sources.fill_((numbers,) if size[0] == 1 else numbers, self.law, place)
            return numbers if home == device else numbers.to(device)

        return lambda: drawn(stack, once=(id(sources.seeds), place), on=sources.generators)

    def draw(self, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """A stack [K, *shape] with the dtype and device of `like`."""
        return self.plan(shape, like)()


class Still(Directions):
    """No directions at all, for an evaluation in which nothing moves."""

    def __init__(self) -> None:
        self._count = 0

    def plan(self, shape: tuple[int, ...], like: Tensor) -> Callable[[], Tensor]:
        return lambda: torch.empty((0, *shape), dtype=like.dtype, device=like.device)


class _Sown:
    """One generator, begun anew for every direction at every place."""

    generators: list[Generator] | None = None  # a graph cannot begin one

    def __init__(self, seeds: list[int], device: torch.device) -> None:
        self.seeds, self._stream = seeds, Generator(device)

    def fill_(self, tangents: Iterable[Tensor], law: Law, place: int) -> None:
        for tangent, seed in zip(tangents, self.seeds, strict=True):
            law.fill_([tangent], self._stream.manual_seed(sown(seed, place)))


class _Running:
    """A generator on the GPU for every direction, which goes through the places in the order in which they are first drawn.

    A captured graph, which draws every place once, can do so itself: nothing but where a generator begins is the host's business. An
    evaluation that is made again, with the same seeds, finds each place where it was.
    """

    def __init__(self, seeds: list[int], device: torch.device) -> None:
        self.seeds, self.generators = seeds, [Generator(device) for _ in seeds]
        self._offsets, self._end = dict[int, int](), 0

    @classmethod
    def of(cls, seeds: list[int], device: torch.device) -> _Running:
        found: _Running = getattr(seeds, "running", None) or cls(seeds, device)
        if isinstance(seeds, StreamSeeds):
            seeds.running = found
        drawn(found._begin, once=(id(seeds), None), on=found.generators)
        return found

    def _begin(self) -> list[Generator]:
        return [stream.manual_seed(seed) for stream, seed in zip(self.generators, self.seeds, strict=True)]

    def fill_(self, tangents: Iterable[Tensor], law: Law, place: int) -> None:
        captured = torch.cuda.is_current_stream_capturing()
        for tangent, stream in zip(tangents, self.generators, strict=True):
            if not captured:
                stream.set_offset(self._offsets.setdefault(place, self._end))
            law.fill_([tangent], stream)
            if not captured:
                self._end = max(self._end, stream.get_offset())
