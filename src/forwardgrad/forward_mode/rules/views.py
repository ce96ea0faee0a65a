"""Rules of what gives a tensor in another shape or part of it, adds parts up, and of products of matrices: one call for K tangents.

A dimension counted from the end is the same for a tensor and for its K tangents, so each rule counts that way and calls the function once.
"""

from __future__ import annotations

from collections.abc import Callable
from types import EllipsisType
from typing import Any

import torch
from torch import Tensor

from forwardgrad.forward_mode import address
from forwardgrad.forward_mode.rules.base import Args, Rule, Track, Tracking


def _looks(e: Tracking, x: Tensor, track: Track, out: Tensor, moved: Tensor) -> Tensor:
    """A result that may be a view of what it was made of: then neither may be written to from now on."""
    fresh = address(out) != address(x) and address(moved) != address(track.of(x))
    track.fresh = track.fresh and fresh
    return e.attach(out, moved, fresh=fresh)


def _turned(default: tuple[int, ...] | None, *, grows: int = 0) -> Rule:
    """Of a function of dimensions; `default`: those it takes if none are given; `grows`: how many dimensions the result has more."""

    def rule(e: Tracking, func: Callable[..., Any], args: Args, kwargs: dict[str, Any]) -> Any:
        dims = args[1:] or default
        if kwargs or not isinstance(args[0], Tensor) or dims is None or not all(type(dim) is int for dim in dims):
            return NotImplemented
        x: Tensor = args[0]
        track = e.track(x)
        if track is None or not x.dim():
            return NotImplemented
        behind = [dim % (x.dim() + grows) - (x.dim() + grows) for dim in dims]
        return _looks(e, x, track, func(x, *dims), func(track.of(x), *behind))

    return rule


def _permuted(e: Tracking, func: Callable[..., Any], args: Args, kwargs: dict[str, Any]) -> Any:
    x, dims = args[0], args[1] if len(args) == 2 and isinstance(args[1], (tuple, list)) else args[1:]
    track = e.track(x) if isinstance(x, Tensor) else None
    if kwargs or track is None or not all(type(dim) is int for dim in dims):
        return NotImplemented
    return _looks(e, x, track, x.permute(*dims), track.of(x).permute(0, *(dim % x.dim() + 1 for dim in dims)))


def _alike(e: Tracking, func: Callable[..., Any], args: Args, kwargs: dict[str, Any]) -> Any:
    """Of a function that takes no dimension, or the same for every shape: contiguous(), clone(), .mT."""
    x = args[0]
    track = e.track(x)
    if len(args) > 1 or kwargs or track is None or x.dim() < 2:
        return NotImplemented
    return _looks(e, x, track, func(x), func(track.of(x)))


def _transposed(e: Tracking, func: Callable[..., Any], args: Args, kwargs: dict[str, Any]) -> Any:
    """A matrix turned around: t() and .T."""
    x = args[0]
    track = e.track(x)
    if kwargs or track is None or x.dim() != 2:
        return NotImplemented
    return _looks(e, x, track, x.mT, track.of(x).mT)


def _indexed(e: Tracking, func: Callable[..., Any], args: Args, kwargs: dict[str, Any]) -> Any:
    """x[...] by numbers, slices and None, or by one tensor of whole numbers along the first dimension."""
    x, index = args
    track = e.track(x) if isinstance(x, Tensor) else None
    if track is None:
        return NotImplemented
    parts = index if isinstance(index, tuple) else (index,)
    plain = all(part is None or type(part) is int or isinstance(part, (slice, EllipsisType)) for part in parts)
    if not plain or any(isinstance(end, Tensor) for part in parts if isinstance(part, slice) for end in (part.start, part.stop, part.step)):
        return NotImplemented
    return _looks(e, x, track, x[index], track.of(x)[(slice(None), *parts)])


def _parted(e: Tracking, func: Callable[..., Any], args: Args, kwargs: dict[str, Any]) -> Any:
    """chunk and split, into several views."""
    call = {**dict(zip(("input", "size", "dim"), args, strict=False)), **kwargs}
    x, dim = call.pop("input", None), call.pop("dim", 0)
    track = e.track(x) if isinstance(x, Tensor) else None
    if track is None or len(call) != 1:
        return NotImplemented
    (size,) = call.values()
    outs, moved = func(x, size, dim), func(track.of(x), size, dim % x.dim() - x.dim())
    return type(outs)(_looks(e, x, track, out, t) for out, t in zip(outs, moved, strict=True))


def _unbound(e: Tracking, func: Callable[..., Any], args: Args, kwargs: dict[str, Any]) -> Any:
    call = {**dict(zip(("input", "dim"), args, strict=False)), **kwargs}
    x, dim = call["input"], call.get("dim", 0)
    track = e.track(x)
    if track is None:
        return NotImplemented
    return tuple(_looks(e, x, track, out, t) for out, t in zip(x.unbind(dim), track.of(x).unbind(dim % x.dim() - x.dim()), strict=True))


def _joined(e: Tracking, func: Callable[..., Any], args: Args, kwargs: dict[str, Any]) -> Any:
    call = {**dict(zip(("tensors", "dim"), args, strict=False)), **kwargs}
    tensors, dim = call.pop("tensors"), call.pop("dim", 0)
    if call or not isinstance(tensors, (tuple, list)) or type(dim) is not int or len({x.dtype for x in tensors}) > 1:
        return NotImplemented
    out = func(tensors, dim)
    if any(x.dim() != tensors[0].dim() for x in tensors) or torch.is_autocast_enabled(out.device.type):
        return NotImplemented
    tangents = [e.tangents(x) for x in tensors]
    whole = [x.new_zeros((e.count, *x.shape)) if t is None else t for x, t in zip(tensors, tangents, strict=True)]
    return e.attach(out, func(whole, dim % out.dim() - out.dim()), fresh=True)


def _summed(e: Tracking, func: Callable[..., Any], args: Args, kwargs: dict[str, Any]) -> Any:
    """sum and mean, over all or some dimensions."""
    call = {**dict(zip(("input", "dim", "keepdim"), args, strict=False)), **kwargs}
    x, dim, keep = call.pop("input"), call.pop("dim", None), call.pop("keepdim", False)
    track = e.track(x) if isinstance(x, Tensor) else None
    if len(args) > 3 or call or track is None or not x.dim() or not isinstance(keep, bool):
        return NotImplemented
    out = func(x) if dim is None else func(x, dim, keep)
    dims = [dim] if isinstance(dim, int) else list(dim or range(x.dim()))
    if out.dtype != x.dtype:  # under autocast
        return NotImplemented
    return e.attach(out, func(track.of(x), [one % x.dim() - x.dim() for one in dims], keep), fresh=True)


def _matrix_product(e: Tracking, func: Callable[..., Any], args: Args, kwargs: dict[str, Any]) -> Any:
    """(A B)˙ = Ȧ B + A Ḃ, of matrices or batches of them."""
    if len(args) != 2 or kwargs or min(args[0].dim(), args[1].dim()) < 2 or torch.is_autocast_enabled(args[0].device.type):
        return NotImplemented
    a, b = args
    out = func(a, b)
    moved: Tensor | None = None
    for t, left in ((e.tangents(a), True), (e.tangents(b), False)):
        if t is not None:
            wide = t.reshape(len(t), *[1] * (out.dim() + 1 - t.dim()), *t.shape[1:])
            part = torch.matmul(wide, b) if left else torch.matmul(a, wide)
            moved = part if moved is None else moved.add_(part)
    assert moved is not None
    return e.attach(out, moved, fresh=True)


def _getter(name: str) -> Callable[..., Any]:
    getter: Callable[..., Any] = getattr(Tensor, name).__get__
    return getter


RULES: dict[Callable[..., Any], Rule] = {
    **dict.fromkeys((torch.transpose, Tensor.transpose, torch.swapaxes, Tensor.swapaxes), _turned(None)),
    **dict.fromkeys((torch.unsqueeze, Tensor.unsqueeze), _turned(None, grows=1)),
    **dict.fromkeys((torch.squeeze, Tensor.squeeze), _turned(None)),
    **dict.fromkeys((torch.permute, Tensor.permute), _permuted),
    **dict.fromkeys((Tensor.contiguous, torch.clone, Tensor.clone, _getter("mT")), _alike),
    **dict.fromkeys((torch.t, Tensor.t, _getter("T")), _transposed),
    Tensor.__getitem__: _indexed,
    **dict.fromkeys((torch.chunk, Tensor.chunk, torch.split, Tensor.split), _parted),
    **dict.fromkeys((torch.unbind, Tensor.unbind), _unbound),
    **dict.fromkeys((torch.cat, torch.concat), _joined),
    **dict.fromkeys((torch.sum, Tensor.sum, torch.mean, Tensor.mean), _summed),
    **dict.fromkeys((torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.bmm, Tensor.bmm, torch.mm, Tensor.mm), _matrix_product),
}
