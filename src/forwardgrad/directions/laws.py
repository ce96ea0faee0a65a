"""The laws that directions are drawn from: each has mean 0 and covariance I, which is what makes d·v unbiased.

A draw is always made from an explicit generator, so the same seed replays it. It is ordered tangent by tangent, parameter by parameter:
K tangents drawn at once are the same bits as K drawn one after the other, except where the law couples them.
"""

from __future__ import annotations

import hashlib
import math
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Generator, Tensor

from forwardgrad.directions import streams
from forwardgrad.directions.plan import Growth, drawn, grown

_WORD = 64  # random bits per int64


@dataclass(frozen=True)
class Law(ABC):
    """A law of directions v over all parameters jointly, with E[v] = 0 and E[v vᵀ] = I.

    `joint` laws couple the tangents of one draw, which therefore have to be drawn together; `independent` ones draw every weight of a
    tangent by itself, so that the part of one parameter can be drawn alone.
    """

    name: ClassVar[str]
    joint: ClassVar[bool] = False
    independent: ClassVar[bool] = False

    def draw(self, like: Mapping[str, Tensor], count: int, generator: Generator) -> dict[str, Tensor]:
        """Draw `count` tangents: for every parameter a tensor [count, *shape], with the parameter's dtype and device.

        A CPU generator gives a model on any device the same directions, up to rounding.
        """
        return drawn(lambda: self._draw(like, count, generator), on=None if self.joint else [generator])

    def _draw(self, like: Mapping[str, Tensor], count: int, generator: Generator) -> dict[str, Tensor]:
        made = {name: torch.empty((count, *p.shape), dtype=p.dtype, device=generator.device) for name, p in like.items()}
        for index in range(count):
            self.fill_([tangent[index] for tangent in made.values()], generator)
        return {name: tangent.to(like[name].device) for name, tangent in made.items()}

    def chunks(self, like: Mapping[str, Tensor], count: int, size: int, generator: Generator) -> Iterator[dict[str, Tensor]]:
        """The tangents of one draw of `count`, at most `size` at a time; those of a joint law are all held until the last chunk."""
        starts = range(0, count, size)
        if not self.joint or len(starts) == 1:
            yield from (self.draw(like, min(size, count - start), generator) for start in starts)
            return
        made = self.draw(like, count, generator)
        for start in starts:  # cloned, since a chunk may be written to and outlives the others
            yield {name: tangent[start : start + size].clone() for name, tangent in made.items()}

    def part(self, like: Tensor, generator: Generator, seed: Callable[[], int], once: Hashable) -> Tensor:
        """What a tangent has for one parameter, drawn alone, as only an independent law can: it follows from `seed` and nothing else.

        `seed` is asked again wherever a plan draws again. Whoever asks again with the same `once` gets the same bits, in new memory.
        """

        def make() -> Tensor:
            v = torch.empty(like.shape, dtype=like.dtype, device=generator.device)
            self.fill_([v], generator.manual_seed(seed()))
            return v.to(like.device)

        return drawn(make, once)

    def add_part_(self, to: Tensor, scale: float, generator: Generator, seed: int) -> None:
        """to += scale · `part` in place, where a law can without ever having all of it. It is for eager code: no plan knows of it."""
        to.add_(self.part(to, generator, lambda: seed, None), alpha=scale)

    @abstractmethod
    def fill_(self, tangent: list[Tensor], generator: Generator) -> None:
        """Fill the parts of one tangent in place."""

    def second_moment(self, n: int, tangents: int = 1) -> float:
        """E‖ĝ‖² / ‖g‖² of ĝ = (1/K) Σ (g·vₖ)vₖ over n weights and K tangents: one plus the relative variance of the forward gradient.

        Of independent tangents it is 1 + (m − 1)/K, where m is the second moment of one.
        """
        return 1 + (self.moment(n) - 1) / tangents

    @abstractmethod
    def moment(self, n: int) -> float:
        """E‖(g·v)v‖² / ‖g‖² of a single tangent."""


@dataclass(frozen=True)
class Gaussian(Law):
    """v ~ N(0, I), the law of Baydin et al. (2022), eq. 4: E‖(g·v)v‖² = (n + 2)‖g‖².

    >>> Gaussian().second_moment(10), Gaussian().second_moment(10, tangents=11)
    (12.0, 2.0)
    """

    name: ClassVar[str] = "gaussian"
    independent: ClassVar[bool] = True

    def draw(self, like: Mapping[str, Tensor], count: int, generator: Generator) -> dict[str, Tensor]:
        """As `Law.draw`. Large tensors are made from seeds (`streams`): on all cores, or inside a compiled step."""
        sown = drawn(lambda: self._sown(like, count, generator), on=[generator])
        return {name: _grown(tangent, like[name]) if tangent.dtype == torch.int64 else tangent for name, tangent in sown.items()}

    def _sown(self, like: Mapping[str, Tensor], count: int, generator: Generator) -> dict[str, Tensor]:
        """Tangents, and where they are streams nothing but their seeds [count]."""
        if generator.device.type == "cuda":
            return self._at_once(like, count, generator)
        streamed = {name for name, p in like.items() if _streamed(p, generator)}
        few = {
            name: torch.empty((count, *p.shape), dtype=p.dtype, device=generator.device) for name, p in like.items() if name not in streamed
        }
        seeds = {name: torch.empty(count, dtype=torch.int64, device=generator.device) for name in streamed}
        for index in range(count):
            for name in like:
                if name in streamed:
                    seeds[name][index].random_(-(2**63), None, generator=generator)
                else:
                    few[name][index].normal_(generator=generator)
        return {name: (seeds if name in streamed else few)[name].to(p.device) for name, p in like.items()}

    def _at_once(self, like: Mapping[str, Tensor], count: int, generator: Generator) -> dict[str, Tensor]:
        """Tangents as parts of one block of memory for each type of number: a GPU takes as long to be asked as to draw."""
        ends, places = dict[torch.dtype, int](), dict[str, int]()
        for name, p in like.items():
            places[name] = ends.get(p.dtype, 0)
            ends[p.dtype] = places[name] - (-p.numel() // _APART) * _APART
        blocks = {dtype: torch.empty((count, end), dtype=dtype, device=generator.device) for dtype, end in ends.items()}
        for index in range(count):
            for block in blocks.values():
                block[index].normal_(generator=generator)
        parts = {name: blocks[p.dtype][:, places[name] : places[name] + p.numel()] for name, p in like.items()}
        return {name: parts[name].view(count, *p.shape).to(p.device) for name, p in like.items()}

    def part(self, like: Tensor, generator: Generator, seed: Callable[[], int], once: Hashable) -> Tensor:
        """As `Law.part`. A large one is a stream, as in `draw`."""
        if not _streamed(like, generator):
            return super().part(like, generator, seed, once)
        return _grown(drawn(lambda: torch.tensor([seed()], device=like.device), once), like, once)[0]

    def add_part_(self, to: Tensor, scale: float, generator: Generator, seed: int) -> None:
        if _streamed(to, generator) and to.is_contiguous():
            streams.add_(to.view(-1), seed, scale)
        else:
            super().add_part_(to, scale, generator, seed)

    def fill_(self, tangent: list[Tensor], generator: Generator) -> None:
        for part in tangent:
            _normal_(part, generator)

    def moment(self, n: int) -> float:
        return n + 2


@dataclass(frozen=True)
class Rademacher(Law):
    """Independent signs ±1: E‖(g·v)v‖² = n‖g‖², the least of all laws with independent entries (Belouze 2022); one random bit a weight."""

    name: ClassVar[str] = "rademacher"
    independent: ClassVar[bool] = True

    def part(self, like: Tensor, generator: Generator, seed: Callable[[], int], once: Hashable) -> Tensor:
        """As `Law.part`. Drawn are the bits alone; what uses them makes signs of them, a compiler wherever it needs them."""
        words = drawn(lambda: _words(like.numel(), generator.manual_seed(seed())).to(like.device), once)
        return (_shifted if torch.compiler.is_compiling() else _looked_up)(words, like.numel(), like.dtype).view(like.shape)

    def add_part_(self, to: Tensor, scale: float, generator: Generator, seed: int) -> None:
        if not to.is_contiguous():
            super().add_part_(to, scale, generator, seed)
            return
        words = _words(to.numel(), generator.manual_seed(seed)).to(to.device)
        for place, some in zip(to.view(-1).split(_BLOCK), words.split(_BLOCK // _WORD), strict=True):
            place.add_(_looked_up(some, place.numel(), place.dtype), alpha=scale)

    def fill_(self, tangent: list[Tensor], generator: Generator) -> None:
        for part in tangent:
            words, count = _words(part.numel(), generator), part.numel()
            if part.is_contiguous() and count % 8 == 0:
                _look_up(words, count, part.dtype, out=part.view(-1, 8))
            else:
                part.copy_(_looked_up(words, count, part.dtype).view(part.shape))

    def fill_by_(self, stack: Float[Tensor, "k ..."], words: Callable[[int], Int[Tensor, "k words"]]) -> None:
        """Fill a stack of parts in place, each by so many words of its own."""
        count = stack[0].numel()
        bits = words(-(-count // _WORD))
        stack.copy_(_looked_up(bits.flatten(), bits.numel() * _WORD, stack.dtype).view(len(stack), -1)[:, :count].view_as(stack))

    def moment(self, n: int) -> float:
        return n


@dataclass(frozen=True)
class Sphere(Law):
    """Uniform on the sphere of radius √n, n counting all parameters together: E‖(g·v)v‖² = n‖g‖² and |v| never varies."""

    name: ClassVar[str] = "sphere"

    def fill_(self, tangent: list[Tensor], generator: Generator) -> None:
        wide = [part if part.dtype.itemsize >= 4 else part.float() for part in tangent]  # a norm of many weights needs the digits
        for part in wide:
            _normal_(part, generator)
        norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(part, dtype=torch.float64) for part in wide]))
        scale = math.sqrt(sum(part.numel() for part in tangent)) / norm
        for part, z in zip(tangent, wide, strict=True):
            part.copy_(z.mul_(scale.to(z.dtype)))

    def moment(self, n: int) -> float:
        return n


@dataclass(frozen=True)
class Orthogonal(Law):
    """K tangents √n·Q, where Q is the first K columns of a Haar-random orthogonal n × n matrix: E‖ĝ‖² = (n/K)‖g‖², exact at K = n.

    Each tangent alone is uniform on the sphere of radius √n, so E[v vᵀ] = I. Together vₖ·vₗ = 0, so (1/K) Σ (g·vₖ)vₖ is n/K times the
    projection of g on a random K-dimensional space, whose squared length is (K/n)‖g‖² on average. At K = n the projection is g itself.
    Q comes from the QR decomposition of a Gaussian n × K matrix; with the diagonal of R made positive it is unique, and so as
    rotation-invariant as the matrix (Mezzadri 2007). Cost: 2nK² operations a draw, and all K tangents held at once.

    Raises ValueError where more tangents are drawn than there are weights.

    >>> Orthogonal().second_moment(10, tangents=5), Orthogonal().second_moment(10, tangents=10)
    (2.0, 1.0)
    """

    name: ClassVar[str] = "orthogonal"
    joint: ClassVar[bool] = True

    def _draw(self, like: Mapping[str, Tensor], count: int, generator: Generator) -> dict[str, Tensor]:
        sizes = [p.numel() for p in like.values()]
        n = sum(sizes)
        if count > n:
            raise ValueError(f"there are at most as many orthogonal tangents as weights: {count} were asked for, with {n} weights")
        dtype = torch.float64 if any(p.dtype == torch.float64 for p in like.values()) else torch.float32
        q, r = torch.linalg.qr(torch.randn(count, n, dtype=dtype, device=generator.device, generator=generator).mT)
        rows = (q * torch.where(r.diagonal() < 0, -1.0, 1.0)).mT * math.sqrt(n)
        made = {name: torch.empty((count, *p.shape), dtype=p.dtype, device=p.device) for name, p in like.items()}
        for tangent, part in zip(made.values(), rows.split(sizes, dim=1), strict=True):
            tangent.copy_(part.reshape(tangent.shape))
        return made

    def fill_(self, tangent: list[Tensor], generator: Generator) -> None:
        made = self._draw({str(index): part for index, part in enumerate(tangent)}, 1, generator)
        for part, v in zip(tangent, made.values(), strict=True):
            part.copy_(v[0])

    def second_moment(self, n: int, tangents: int = 1) -> float:
        return n / tangents

    def moment(self, n: int) -> float:
        return n


class StreamSeeds(list[int]):
    """Seeds of streams, with the generators on a GPU that were begun from them, if there are any."""

    running: Any = None


def fork(generator: Generator, count: int) -> StreamSeeds:
    """Seeds of `count` streams that follow from the generator's state, which moves on; a generator on a GPU is not waited for."""
    return drawn(lambda: StreamSeeds(_seeds(generator, count)), on=[generator])


def _seeds(generator: Generator, count: int) -> list[int]:
    if generator.device.type == "cpu":
        seeds: list[int] = torch.randint(2**63 - 1, (count,), generator=generator).tolist()
        return seeds
    offset = generator.get_offset()
    generator.set_offset(offset + 4)  # the least a draw moves it by
    digests = (hashlib.sha256(f"{generator.initial_seed()}/{offset}/{index}".encode()).digest() for index in range(count))
    return [int.from_bytes(digest[:8], "big") >> 1 for digest in digests]


_WORTH_A_STREAM = 2**16  # numbers
_APART = 64  # numbers: parts of a block begin where kernels expect a tensor to begin


def _streamed(part: Tensor, generator: Generator) -> bool:
    """Whether a parameter's directions are streams: a generator of the processor draws on one core, and in no graph."""
    return generator.device.type == "cpu" and part.is_floating_point() and part.numel() >= _WORTH_A_STREAM


def _grown(seeds: Tensor, like: Tensor, once: Hashable = None) -> Tensor:
    """The streams of some seeds, [count, *shape]."""
    on_host = seeds.device.type == "cpu" and not torch.compiler.is_compiling()
    given = seeds.tolist() if on_host else seeds  # of a GPU the host is not to wait for
    grown(Growth(len(seeds), like.numel(), like.dtype, like.device, on_host), once)
    return streams.normal(given, like.numel(), like.dtype, like.device).view(len(seeds), *like.shape)


_MANY, _BLOCK = 2**22, 2**20  # numbers from which several threads are worth it (those of torch wait for work in a loop), and of a block


def _normal_(part: Tensor, generator: Generator) -> None:
    """Fill with standard normal numbers: where they are many, in blocks with generators of their own, so that all cores can draw.

    A generator of the processor draws on one core. The blocks do not depend on the number of cores, and so neither do the bits.
    """
    if generator.device.type != "cpu" or part.numel() < _MANY or not part.is_contiguous():
        part.normal_(generator=generator)
        return
    blocks = part.view(-1).split(_BLOCK)
    seeds = fork(generator, len(blocks))
    share = -(-len(blocks) // torch.get_num_threads())

    def fill(start: int) -> None:
        stream = Generator()
        for block, seed in zip(blocks[start : start + share], seeds[start : start + share], strict=True):
            block.normal_(generator=stream.manual_seed(seed))

    others = [_threads().submit(fill, start) for start in range(share, len(blocks), share)]
    fill(0)
    for other in others:
        other.result()


@cache
def _threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="forwardgrad")


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_threads.cache_clear)  # threads do not outlive a fork


def _words(count: int, generator: Generator) -> Tensor:
    """Random bits for `count` signs, one bit each, in words of 64."""
    return torch.empty(-(-count // _WORD), dtype=torch.int64, device=generator.device).random_(-(2**63), None, generator=generator)


def _looked_up(words: Tensor, count: int, dtype: torch.dtype) -> Tensor:
    """The first `count` bits as signs."""
    return _look_up(words, words.numel() * _WORD, dtype).view(-1)[:count]


def _look_up(words: Tensor, count: int, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
    """Bits as signs, a multiple of eight: a byte picks a row of as many from a table of 256."""
    return torch.index_select(_sign_table(dtype, words.device), 0, words.view(torch.uint8)[: count // 8].int(), out=out)


def _shifted(words: Tensor, count: int, dtype: torch.dtype) -> Tensor:
    """The same signs by operations, which a compiler can make part of what uses them; half a word at a time, since that takes less."""
    bits = words.view(torch.int32).unsqueeze(1) >> torch.arange(32, dtype=torch.int32, device=words.device) & 1
    return (bits * 2 - 1).to(dtype).view(-1)[:count]


@cache
def _sign_table(dtype: torch.dtype, device: torch.device) -> Tensor:
    byte, bit = torch.arange(256, device=device), torch.arange(8, device=device)
    return ((byte[:, None] >> bit & 1) * 2 - 1).to(dtype)


LAWS: tuple[type[Law], ...] = (Gaussian, Rademacher, Sphere, Orthogonal)
