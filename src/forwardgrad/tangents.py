"""The laws that directions are drawn from: each has mean 0 and covariance I, which is what makes d·v unbiased.

A draw is always made from an explicit generator and is ordered tangent by tangent, parameter by parameter: K tangents drawn at once
are the same bits as K drawn one after the other, and the same seed replays them.
"""

from __future__ import annotations

import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import ClassVar

import torch
from torch import Generator, Tensor

_WORD = 64  # random bits per int64


@dataclass(frozen=True)
class Law(ABC):
    """A law of directions v over all parameters jointly, with E[v] = 0 and E[v vᵀ] = I."""

    name: ClassVar[str]

    def draw(self, like: Mapping[str, Tensor], count: int, generator: Generator) -> dict[str, Tensor]:
        """Draw `count` tangents: for every parameter a tensor [count, *shape], with the parameter's dtype and device.

        The bits are made on the generator's device and moved where a parameter lives elsewhere, so a CPU generator gives a model
        on any device the same directions.
        """
        drawn = {name: torch.empty((count, *p.shape), dtype=p.dtype, device=generator.device) for name, p in like.items()}
        for index in range(count):
            self.fill_([tangent[index] for tangent in drawn.values()], generator)
        return {name: tangent.to(like[name].device) for name, tangent in drawn.items()}

    @abstractmethod
    def fill_(self, tangent: list[Tensor], generator: Generator) -> None:
        """Fill the parts of one tangent in place."""

    @abstractmethod
    def second_moment(self, n: int) -> float:
        """E‖(g·v)v‖² / ‖g‖² over n weights: one plus the variance of the forward gradient relative to ‖g‖²."""


@dataclass(frozen=True)
class Gaussian(Law):
    """v ~ N(0, I), the law of Baydin et al. (2022), eq. 4: E‖(g·v)v‖² = (n + 2)‖g‖².

    >>> Gaussian().second_moment(10)
    12
    """

    name: ClassVar[str] = "gaussian"

    def fill_(self, tangent: list[Tensor], generator: Generator) -> None:
        for part in tangent:
            part.normal_(generator=generator)

    def second_moment(self, n: int) -> float:
        return n + 2


@dataclass(frozen=True)
class Rademacher(Law):
    """Independent signs ±1: E‖(g·v)v‖² = n‖g‖², the least of all laws with independent entries (Belouze 2022); one random bit a weight."""

    name: ClassVar[str] = "rademacher"

    def fill_(self, tangent: list[Tensor], generator: Generator) -> None:
        for part in tangent:
            part.copy_(_signs(part.numel(), part.dtype, generator).view(part.shape))

    def second_moment(self, n: int) -> float:
        return n


@dataclass(frozen=True)
class Sphere(Law):
    """Uniform on the sphere of radius √n, n counting all parameters together: E‖(g·v)v‖² = n‖g‖² and |v| never varies."""

    name: ClassVar[str] = "sphere"

    def fill_(self, tangent: list[Tensor], generator: Generator) -> None:
        wide = [part if part.dtype.itemsize >= 4 else part.float() for part in tangent]  # a norm of many weights needs the digits
        for part in wide:
            part.normal_(generator=generator)
        norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(part, dtype=torch.float64) for part in wide]))
        scale = math.sqrt(sum(part.numel() for part in tangent)) / norm
        for part, z in zip(tangent, wide, strict=True):
            part.copy_(z.mul_(scale.to(z.dtype)))

    def second_moment(self, n: int) -> float:
        return n


def fork(generator: Generator, count: int) -> list[int]:
    """Seeds of `count` streams that follow from the generator's state, which moves on; a generator on a GPU is not waited for."""
    if generator.device.type == "cpu":
        seeds: list[int] = torch.randint(2**63 - 1, (count,), generator=generator).tolist()
        return seeds
    offset = generator.get_offset()
    generator.set_offset(offset + 4)  # the least a draw moves it by
    digests = (hashlib.sha256(f"{generator.initial_seed()}/{offset}/{index}".encode()).digest() for index in range(count))
    return [int.from_bytes(digest[:8], "big") >> 1 for digest in digests]


def _signs(count: int, dtype: torch.dtype, generator: Generator) -> Tensor:
    """`count` random signs from one bit each: a byte of random bits picks a row of eight signs from a table of 256."""
    words = torch.empty(-(-count // _WORD), dtype=torch.int64, device=generator.device).random_(-(2**63), None, generator=generator)
    return _sign_table(dtype, generator.device).index_select(0, words.view(torch.uint8).int()).view(-1)[:count]


@cache
def _sign_table(dtype: torch.dtype, device: torch.device) -> Tensor:
    byte, bit = torch.arange(256, device=device), torch.arange(8, device=device)
    return ((byte[:, None] >> bit & 1) * 2 - 1).to(dtype)


LAWS: tuple[type[Law], ...] = (Gaussian, Rademacher, Sphere)
