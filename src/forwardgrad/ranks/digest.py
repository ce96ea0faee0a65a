"""A digest of every bit of some tensors, cheap enough for every step: ranks whose parameters have become different see it by that."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from functools import cache

import torch
from torch import Generator, Tensor

_FACTOR = 0x9E3779B97F4A7C15 - 2**64  # odd, so that no bit of a sum is lost


def digest(tensors: Iterable[Tensor]) -> Tensor:
    """64 bits of the tensors' bits, on the device of the first: sums of words, each times a number of its place.

    It tells rounding errors that came to differ. It is no protection against somebody who means to deceive it.
    """
    total: Tensor | None = None
    for number, tensor in enumerate(tensors, 1):
        part = _sum(tensor.detach()) * ((_FACTOR * number + 2**63) % 2**64 - 2**63 | 1)
        total = part if total is None else total * 31 + part.to(total.device)
    return torch.zeros((), dtype=torch.int64) if total is None else total


def _sum(tensor: Tensor) -> Tensor:
    flat = tensor.contiguous().reshape(-1).view(torch.uint8)
    whole = flat.numel() // 8 * 8
    aligned = flat.data_ptr() % 8 == 0
    words = flat[:whole].view(torch.int64) if aligned else flat[:whole].clone().view(torch.int64)
    total, factors = flat[whole:].sum(dtype=torch.int64) * _FACTOR, _factors(words.device)
    for block in words.split(_BLOCK):
        part = block.dot(factors[: len(block)]) if words.device.type == "cpu" else (block * factors[: len(block)]).sum()
        total = total * _FACTOR + part
    return total


_BLOCK = 2**16  # words that have factors of their own, so that two changes in one tensor do not cancel


@cache
def _factors(device: torch.device) -> Tensor:
    """Odd numbers, as random as a fixed seed makes them."""
    return torch.randint(-(2**62), 2**62, (_BLOCK,), generator=Generator().manual_seed(0)).mul_(2).add_(1).to(device)


def of_text(text: str) -> int:
    """The same of a text, as a whole number with a sign."""
    return _short(text.encode())


def of_state(generator: Generator | None) -> int:
    """The same of where a generator is."""
    return 0 if generator is None else _short(generator.get_state().cpu().numpy().tobytes())


def _short(data: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big", signed=True)
