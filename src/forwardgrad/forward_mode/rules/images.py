"""Max-pooling and sums of shifted images, written element by element, so that a compiler makes a single pass over memory of them.

A compiler loops over a result in the order of its dimensions. Where the channels lie last in memory they come last here, or it would
transpose every image twice. The numbers are those of the rules elsewhere: to the bit, but for the order of sums.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_MANY = 9  # elements of a window beyond which comparing them one by one is no gain


def channels_last(x: Tensor) -> bool:
    return x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)


def rows(images: Tensor) -> Tensor:
    """[..., C, H, W] as [..., H, W, C]."""
    return images.movedim(-3, -1)


def images(rows: Tensor) -> Tensor:
    """[..., H, W, C] as [..., C, H, W]."""
    return rows.movedim(-1, -3)


def apart(t: Tensor) -> Tensor:
    """The same numbers: a compiler is to write them down once, not to work them out again at every use."""
    t = t.contiguous()
    return t.as_strided(t.shape, t.stride())


def windows(call: Mapping[str, Any]) -> tuple[int, int] | None:
    """The height and width of the windows of a call of max-pooling, if they are few elements each and stand side by side."""
    size = _pair(call["kernel_size"])
    beside = (
        _pair(call.get("stride") or size) == size and _pair(call.get("padding", 0)) == (0, 0) and _pair(call.get("dilation", 1)) == (1, 1)
    )
    spare = [whole % part for whole, part in zip(call["input"].shape[2:], size, strict=True)]
    fits = all(whole >= part for whole, part in zip(call["input"].shape[2:], size, strict=True)) and not (
        call.get("ceil_mode") and any(spare)
    )
    return size if beside and fits and 1 < size[0] * size[1] <= _MANY else None


def pooled(x: Tensor, tangents: Tensor, size: tuple[int, int], *, rectified: bool) -> tuple[Tensor, Tensor]:
    """The largest element of every window of x [N, C, H, W], and its tangents, from [K, N, C, H, W].

    As torch has it, the first of equals is taken, and what is not a number before all else. `rectified`: x is a ReLU of what the tangents
    are those of, so a largest element of zero does not move.
    """
    last = channels_last(x)
    values, moves = (rows(x), rows(tangents)) if last else (x, tangents)
    ends = [whole // part * part for whole, part in zip(x.shape[2:], size, strict=True)]
    best = moved = None
    for corner in product(*map(range, size)):
        steps = [slice(first, end, step) for first, end, step in zip(corner, ends, size, strict=True)]
        place: tuple[Any, ...] = (..., *steps, slice(None)) if last else (..., *steps)
        value, tangent = values[place], moves[place]
        if best is None or moved is None:
            if not rectified:
                best, moved = value, tangent
                continue
            best, moved = torch.zeros_like(value), torch.zeros_like(tangent)
        better = (value > best) | (value != value)
        best, moved = torch.where(better, value, best), torch.where(better, tangent, moved)
    assert best is not None
    assert moved is not None
    return (images(best), images(moved)) if last else (best, moved)


def shifted(
    each: Tensor, count: int, size: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
) -> Tensor:
    """The responses [N, K, H', W'] to K filters, as a sum of shifted images, from those of all taps at every place [N, H, W, taps · K]."""
    wide = F.pad(each, (0, 0, padding[1], padding[1], padding[0], padding[0])).to(torch.promote_types(each.dtype, torch.float32))
    wide = wide.unflatten(3, (-1, count))
    spans = [whole - d * (part - 1) for whole, part, d in zip(wide.shape[1:3], size, dilation, strict=True)]
    total: Tensor | None = None
    for tap, corner in enumerate(product(*map(range, size))):
        down, across = (slice(i * d, i * d + span, s) for i, d, span, s in zip(corner, dilation, spans, stride, strict=True))
        one = wide[:, down, across, tap]
        total = one if total is None else total + one
    assert total is not None
    return images(apart(total.to(each.dtype)))


def _pair(value: Any) -> tuple[int, int]:
    first, *others = value if isinstance(value, (tuple, list)) else (value,)
    return first, others[0] if others else first
