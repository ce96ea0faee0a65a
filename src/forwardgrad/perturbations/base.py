"""What a perturbation is: a choice of what moves in a layer, and how a directional derivative becomes that layer's gradient."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Generator, Tensor
from torch.func import vmap

from forwardgrad.draws import drawn
from forwardgrad.factored import Gradient
from forwardgrad.perturbations.layers import Layer
from forwardgrad.streams import sown
from forwardgrad.tangents import Law

Pick = Callable[[Tensor], Tensor]
"""From a stack of K to the one that is being evaluated: `stack[k]`, with k unknown to the code while K are evaluated at once."""


class Directions:
    """K directions of one law, each of which follows from a seed, place by place.

    Every place has random numbers of its own, so they can be drawn again when they are needed a second time, and need not be held.
    """

    def __init__(self, law: Law, seeds: list[int], device: torch.device) -> None:
        self.law, self._count, self._home = law, len(seeds), device
        self._sources: _Sources = _Running(seeds, device) if device.type == "cuda" else _Sown(seeds, device)
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

        return lambda: drawn(stack, once=(id(sources.known), place), on=sources.generators)

    def draw(self, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """A stack [K, *shape] with the dtype and device of `like`."""
        return self.plan(shape, like)()


class _Sown:
    """One generator, begun anew for every direction at every place."""

    generators: list[Generator] | None = None  # a graph cannot begin one

    def __init__(self, seeds: list[int], device: torch.device) -> None:
        self.known, self._stream = seeds, Generator(device)

    def fill_(self, tangents: Iterable[Tensor], law: Law, place: int) -> None:
        for tangent, seed in zip(tangents, self.known, strict=True):
            law.fill_([tangent], self._stream.manual_seed(sown(seed, place)))


class _Running:
    """A generator on the GPU for every direction, which goes through the places in the order in which they are first drawn.

    A captured graph, which draws every place once, can do so itself: nothing but where a generator begins is the host's business.
    """

    def __init__(self, seeds: list[int], device: torch.device) -> None:
        streams = [Generator(device) for _ in seeds]
        self.generators = drawn(lambda: [stream.manual_seed(seed) for stream, seed in zip(streams, seeds, strict=True)], on=streams)
        self.known, self._offsets = self.generators, dict[int, int]()

    def fill_(self, tangents: Iterable[Tensor], law: Law, place: int) -> None:
        captured = torch.cuda.is_current_stream_capturing()
        for tangent, stream in zip(tangents, self.generators, strict=True):
            if captured:
                law.fill_([tangent], stream)
                continue
            now = stream.get_offset()
            stream.set_offset(self._offsets.setdefault(place, now))
            law.fill_([tangent], stream)
            stream.set_offset(max(now, stream.get_offset()))


_Sources = _Sown | _Running


class Entered(ABC):
    """A perturbation at work at one place of the model, in one evaluation.

    `rows` is the number of examples that moved independently (1 where all share one direction). `kept` holds what the gradient needs of
    the primal pass; while the pass lasts the tensors in it belong to torch's transforms, and are replaced by plain ones at its end.
    """

    rows: int = 1
    apart: bool = True
    """Whether its rows are the examples of the loss."""

    def __init__(self) -> None:
        self.kept: dict[str, Tensor] = {}

    @abstractmethod
    def gradient(self, weights: Float[Tensor, "k rows"]) -> Mapping[str, Gradient]:
        """Σₖ Σ_b weights[k, b] · (direction k of example b), by parameter name."""

    @abstractmethod
    def gram(self) -> Float[Tensor, "k k rows"]:
        """Inner products of the directions of each example."""

    @property
    @abstractmethod
    def names(self) -> list[str]:
        """The parameters that this perturbation has a gradient for."""


class Sown(Entered):
    """A change of weights, with covariance I there, that is added to a layer's output as soon as that is known."""

    @abstractmethod
    def inner(self, other: dict[str, Tensor]) -> Float[Tensor, "k rows"]:
        """⟨direction k of example b, other⟩ with `other` given by parameter name."""

    @abstractmethod
    def tangent(self, pick: Pick) -> Tensor:
        """What the layer's output moves by along one tangent."""

    def tangents(self, count: int) -> Tensor:
        """What it moves by along each of `count` tangents."""
        if count == 1:
            return self.tangent(lambda stack: stack[0]).unsqueeze(0)
        each = vmap(lambda index: self.tangent(lambda stack: stack.index_select(0, index.reshape(1)).squeeze(0)))
        moved: Tensor = each(torch.arange(count))
        return moved

    def add_to_(self, tangents: Tensor) -> None:
        """Add that to what the output moves by already."""
        tangents.add_(self.tangents(len(tangents)))


@dataclass(frozen=True)
class Perturbation(ABC):
    """What is perturbed; its fields are its hyperparameters. Uses of parameters outside the layers with rules get dense tangents."""

    name: ClassVar[str]

    @property
    def weights(self) -> bool:
        """Whether directions lie in the space of the weights, so that a direction there can be compared with them."""
        return True

    @abstractmethod
    def enter(self, layer: Layer, x: Tensor, out: Tensor, directions: Directions) -> Entered | None:
        """Draw for one use of a layer with input x and output out (primal values); None for dense tangents on its parameters."""

    def check(self, law: Law) -> None:
        """Raise ValueError for a law that these directions cannot be drawn from."""
        if getattr(law, "joint", False):
            raise ValueError(f"the law {law.name} couples all weights of a tangent: it goes with perturb=Dense() alone, not {self.name}")
