"""Norms of parameters and of steps, summed in float64. Each number is read once."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

PIECE = 1 << 16  # numbers at a time: their float64 copies stay in a processor's cache


def norm(tensors: Iterable[Tensor]) -> float:
    """The norm of all tensors together."""
    return math.sqrt(sum(float(torch.linalg.vector_norm(t.detach(), dtype=torch.float64)) ** 2 for t in tensors))


def walked(before: Sequence[Tensor], after: Sequence[Tensor]) -> tuple[float, float, float]:
    """The norms of `before`, of `after`, and of the way between them, over all tensors together."""
    if any(t.is_cuda or t.dtype != torch.float32 for t in after):
        return norm(before), norm(after), norm(a.detach() - b for a, b in zip(after, before, strict=True))
    squares, old, new = [0.0, 0.0, 0.0], *torch.empty(2, PIECE, dtype=torch.float64).unbind()
    for was, now in zip(before, after, strict=True):
        for b, a in zip(was.detach().reshape(-1).split(PIECE), now.detach().reshape(-1).split(PIECE), strict=True):
            wide, wider = old[: len(b)].copy_(b), new[: len(a)].copy_(a)
            squares[0] += float(wide.dot(wide))
            squares[1] += float(wider.dot(wider))
            wider.sub_(wide)
            squares[2] += float(wider.dot(wider))
    size, now_size, way = map(math.sqrt, squares)
    return size, now_size, way


def trained(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that a run trains: a frozen one never moves, and would hide how far the others do."""
    return [p for p in model.parameters() if p.requires_grad]
