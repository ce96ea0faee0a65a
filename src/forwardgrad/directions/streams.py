"""Normal numbers made from a seed and a count: any of them can be made alone, on every core, or inside a compiled step.

Word i of a stream is mix(start + (i + 1)·γ), where `mix` is the finaliser of a 64-bit hash and start and the odd γ follow from the seed:
the generator SplitMix64, its streams told apart by steps of their own as its authors do it (Steele, Lea and Flood 2014, 'Fast splittable
pseudorandom number generators'). The halves of a word are made a pair of normal numbers by the formulas of Box and Muller, which are
exact:

    z₁ = √(−2 ln u) cos θ,   z₂ = √(−2 ln u) sin θ     with u uniform on (0, 1) and θ on [−π, π)

In a stream the first numbers of all pairs stand before the second ones.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

_BLOCK = 2**17  # pairs made at a time where nothing fuses the passes over them: so many stay in the caches of two cores
_SCALE = 2.0**31, 2.0**63  # of whole numbers with a sign, in float32 and in float64
_GOLDEN, _ALTERNATING = 0x9E3779B97F4A7C15, 0xAAAAAAAAAAAAAAAA
_MASK = 2**64 - 1
_STAFFORD = (30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1)
_MURMUR = (33, 0xFF51AFD7ED558CCD), (33, 0xC4CEB9FE1A85EC53), (33, 1)

Seeds = Int[Tensor, " k"] | Sequence[int]


def normal(seeds: Seeds, count: int, dtype: torch.dtype, device: torch.device | None = None) -> Float[Tensor, "k count"]:
    """The first `count` standard normal numbers of the streams of some seeds.

    Args:
        seeds: 64 random bits each. A tensor's numbers are operations that a compiler can put where they are used.
        count: how many numbers of each stream.
        dtype: of the numbers. In float64 uniform numbers have 63 or 64 random bits, else 31 or 32, and |z| ≤ 6.66.
        device: where numbers are made, if the seeds are no tensor.
    """
    if not isinstance(seeds, Tensor):
        begun = [_begun(seed) for seed in seeds]
        numbers = torch.empty((len(seeds), count), dtype=torch.float64 if dtype == torch.float64 else torch.float32, device=device)
        _fill_(numbers, *torch.tensor(begun, device=device).T.unsqueeze(2))
        return numbers.to(dtype)
    half, wide = -(-count // 2), dtype == torch.float64
    start, gamma = (word.unsqueeze(1) for word in _begun_together(seeds))
    words = mixed(torch.arange(1, (half, 2 * half)[wide] + 1, device=seeds.device) * gamma + start)
    if wide:  # a word for each number of a pair
        length, angle = words[:, :half].double(), words[:, half:].double()
    else:
        length, angle = (words >> 32).int().float(), words.int().float()
    length = torch.sqrt(torch.log((length + 0.5).abs() * (1 / _SCALE[wide])) * -2)
    cosine, sine = _turned(angle * (1 / _SCALE[wide]))
    return torch.cat([cosine * length, sine * length], 1)[:, :count].to(dtype)


# sin πh / h and cos πh as polynomials of h² for |h| ≤ 1/2: least largest errors of 3e-9 and 5e-8, of which float32 sees little
_SIN = (3.141592580568632, -5.167706900163041, 2.550031640175756, -0.598046445926762, 0.07722223980834378)
_COS = (0.9999999534706298, -4.9347928588338235, 4.05841191569072, -1.3318801653219854, 0.21969679863844838)


def _turned(t: Tensor) -> tuple[Tensor, Tensor]:
    """cos πt and sin πt for |t| ≤ 1. In float32 they are polynomials: a compiler's own functions first look for the part of the circle,
    each for itself, and take a sixth of the time of all that a stream is made of."""
    if t.dtype == torch.float64:
        return torch.cos(t * math.pi), torch.sin(t * math.pi)
    h = 0.5 - t.abs()  # without rounding: cos πt = sin πh and |sin πt| = cos πh
    square = h * h
    return h * _polynomial(square, _SIN), torch.copysign(_polynomial(square, _COS), t)


def _polynomial(x: Tensor, coefficients: tuple[float, ...]) -> Tensor:
    value: Tensor = x * coefficients[-1] + coefficients[-2]
    for coefficient in reversed(coefficients[:-2]):
        value = value * x + coefficient
    return value


def add_(numbers: Float[Tensor, " n"], seed: int, scale: float) -> None:
    """numbers += scale · the first n normal numbers of a stream, in place, a block at a time: no more are there at once."""
    start, gamma = torch.tensor([_begun(seed)], device=numbers.device).T.unsqueeze(2)
    wide = numbers.dtype == torch.float64
    first, second = numbers.view(1, -1).tensor_split([-(-numbers.numel() // 2)], 1)
    blocks = _Blocks(1, first.shape[1], start, gamma, wide)
    made = torch.empty((2, 1, blocks.size), dtype=torch.float64 if wide else torch.float32, device=numbers.device)
    for done in range(0, first.shape[1], blocks.size):
        places = first[:, done : done + blocks.size], second[:, done : done + blocks.size]
        parts = [part[:, : place.shape[1]] for part, place in zip(made, places, strict=True)]
        blocks.fill_(done, *parts)
        for place, part in zip(places, parts, strict=True):
            place.add_(part.to(place.dtype), alpha=scale)


def _fill_(numbers: Float[Tensor, "k count"], start: Tensor, gamma: Tensor) -> None:
    """As many normal numbers as there are, in blocks and in place: without a compiler, memory is what takes the time."""
    first, second = numbers.tensor_split([-(-numbers.shape[1] // 2)], 1)
    streams, pairs = first.shape
    blocks = _Blocks(streams, pairs, start, gamma, numbers.dtype == torch.float64)
    for done in range(0, pairs, blocks.size):
        blocks.fill_(done, first[:, done : done + blocks.size], second[:, done : done + blocks.size])


class _Blocks:
    """Blocks of `size` pairs of some streams, made in the same scratch memory one after the other."""

    def __init__(self, streams: int, pairs: int, start: Tensor, gamma: Tensor, wide: bool) -> None:
        self.size = max(1, min(pairs, _BLOCK // streams))
        self._pairs, self._gamma, self._wide = pairs, gamma, wide
        self._steps = torch.arange(1, self.size + 1, device=start.device) * gamma + start
        self._whole = torch.empty((2, streams, self.size), dtype=torch.int64, device=start.device)
        real = torch.float64 if wide else torch.float32
        self._real = torch.empty((2, streams, self.size), dtype=real, device=start.device)

    def fill_(self, done: int, one: Tensor, other: Tensor) -> None:
        """The pairs that come behind so many, the first numbers of each and the second ones, of which there may be fewer."""
        size, wide, gamma = one.shape[1], self._wide, self._gamma
        whole, real = self._whole, self._real
        words, scratch, length, angle = (*whole[:, :, :size], *real[:, :, :size]) if size < self.size else (*whole, *real)
        _mix_(torch.add(self._steps[:, :size], gamma * done, out=words), scratch)
        if wide:
            length.copy_(words)
            angle.copy_(_mix_(torch.add(self._steps[:, :size], gamma * (self._pairs + done), out=words), scratch))
        else:
            angle.copy_(words.int())
            length.copy_(torch.bitwise_right_shift(words, 32, out=scratch).int())
        length.add_(0.5).abs_().mul_(1 / _SCALE[wide]).log_().mul_(-2).sqrt_()
        angle.mul_(math.pi / _SCALE[wide])
        torch.cos(angle, out=one).mul_(length)
        if (rest := other.shape[1]) < size:
            angle, length = angle[:, :rest], length[:, :rest]
        torch.sin(angle, out=other).mul_(length)


def _begun(seed: int) -> tuple[int, int]:
    """Where a stream starts and the odd step γ of its words, one whose bits change often enough, as torch's integers write them."""
    start, gamma = sown(seed, 0), _finished(seed + 2 * _GOLDEN & _MASK, _MURMUR) | 1
    if ((gamma ^ gamma >> 1) & _MASK >> 1).bit_count() < 24:
        gamma ^= _ALTERNATING
    return _signed(start), _signed(gamma)


def _begun_together(seeds: Int[Tensor, " k"]) -> tuple[Int[Tensor, " k"], Int[Tensor, " k"]]:
    """The same for several seeds, as operations."""
    start, gamma = mixed(seeds + _signed(_GOLDEN)), mixed(seeds + _signed(2 * _GOLDEN), _MURMUR) | 1
    changes = ((gamma ^ gamma >> 1).unsqueeze(1) >> torch.arange(63, device=seeds.device) & 1).sum(1)
    return start, torch.where(changes < 24, gamma ^ _signed(_ALTERNATING), gamma)


def words(seeds: Sequence[int], place: int, count: int, device: torch.device) -> Int[Tensor, "k count"]:
    """Random words of one of many places for each of some seeds: those of a stream of one step for all, begun at 64 mixed bits."""
    start = mixed(torch.tensor(seeds, dtype=torch.int64, device=device) + _signed((place + 1) * _GOLDEN & _MASK))
    return mixed(start.unsqueeze(1) + torch.arange(1, count + 1, device=device) * _signed(_GOLDEN))


def sown(seed: int, place: int) -> int:
    """A seed for one of many places: every bit of it depends on all bits of both numbers."""
    return _finished(seed + (place + 1) * _GOLDEN & _MASK, _STAFFORD)


def _finished(word: int, finaliser: tuple[tuple[int, int], ...]) -> int:
    """A word of which every bit depends on all bits of the given one, both without a sign."""
    for by, factor in finaliser:
        word = (word ^ word >> by) * factor & _MASK
    return word


def mixed(words: Tensor, finaliser: tuple[tuple[int, int], ...] = _STAFFORD) -> Tensor:
    """The same for every word of a tensor, with a sign."""
    return _mix_(words.clone(), torch.empty_like(words), finaliser)


def _mix_(words: Tensor, scratch: Tensor, finaliser: tuple[tuple[int, int], ...] = _STAFFORD) -> Tensor:
    """The same in place."""
    for by, factor in finaliser:
        words.bitwise_xor_(torch.bitwise_right_shift(words, by, out=scratch).bitwise_and_((1 << 64 - by) - 1))
        if factor != 1:
            words.mul_(_signed(factor))
    return words


def _signed(word: int) -> int:
    """The last 64 bits as torch's integers write them."""
    return (word + 2**63) % 2**64 - 2**63
