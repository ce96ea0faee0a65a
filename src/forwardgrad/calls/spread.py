"""How NaN spreads through calls that pick numbers by index or mask, while a survey looks for the examples of a batch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from forwardgrad.perturbations import Caller


def call(make: Caller, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], counts: Mapping[int, Tensor]) -> Any:
    """The result of a call. `counts`: what `torch.arange` returned; picking by it picks every example itself.

    A source that holds NaN is spoiled along the dimensions that are picked from, a result along those that are written to.
    """
    name = getattr(func, "__name__", "")
    if name in _KEEPERS:
        return _kept(make, func, name, args, kwargs)
    source = args[0] if args and isinstance(args[0], Tensor) else None
    if source is None or not (name in _READS or name in _WRITES or _sparse(args)):
        return make(func, *args, **kwargs)
    dims = _dims(name, source, args[1:], kwargs, counts)
    if name in _READS and dims:
        args = (_spoiled(source, dims), *args[1:])
    result = make(func, *args, **kwargs)
    if name == "__setitem__" and dims:
        source.copy_(_spoiled(source, dims))
    elif isinstance(result, Tensor) and (name in _WRITES or _sparse(args)):
        spoiled = _spoiled(result, dims or list(range(result.dim())))
        return result.copy_(spoiled) if name.endswith("_") else spoiled
    return result


_BY_SIZES = {"repeat_interleave", "split", "split_with_sizes"}
_READS = {"__getitem__", "index_select", "gather", "take_along_dim", "take", "masked_select", *_BY_SIZES}
_KEEPERS = {"where", "masked_fill", "masked_fill_", "nan_to_num", "nan_to_num_", "fmax", "fmin", "nansum", "nanmean"}
"""Calls that could hide NaN, by data or on purpose."""
_WRITES = {
    *("__setitem__", "index_put", "index_put_", "masked_scatter", "masked_scatter_", "put", "put_"),
    *(f"{name}{end}" for name in ("index_add", "index_copy", "index_fill", "index_reduce") for end in ("", "_")),
    *(f"{name}{end}" for name in ("scatter", "scatter_add", "scatter_reduce") for end in ("", "_")),
}


def _kept(make: Caller, func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The result with NaN wherever one went in."""
    if name in ("nansum", "nanmean"):
        return make(getattr(torch, name.removeprefix("nan")), *args, **kwargs)
    given = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor) and value.is_floating_point()]
    holes = [value.isnan() for value in given]  # before the call, which may write
    result = make(func, *args, **kwargs)
    if not isinstance(result, Tensor) or not result.is_floating_point():
        return result
    for hole in holes:
        if hole.dim() <= result.dim():
            spoiled = torch.where(hole, torch.full((), math.nan, dtype=result.dtype, device=result.device), result)
            result = result.copy_(spoiled) if name.endswith("_") else spoiled
    return result


def _sparse(args: Sequence[Any]) -> bool:
    return any(isinstance(value, Tensor) and value.layout != torch.strided for value in args[:3])


def _dims(name: str, source: Tensor, args: Sequence[Any], kwargs: Mapping[str, Any], counts: Mapping[int, Tensor]) -> list[int]:
    """The dimensions of the source that are picked from, or of the result that are written to, by data."""
    every = list(range(source.dim()))
    if name in ("__getitem__", "__setitem__"):
        return _indexed(source, args[0] if isinstance(args[0], tuple) else (args[0],), counts)
    given = [value for value in (*args, *kwargs.values()) if type(value) is int]
    index = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
    if name in _BY_SIZES:  # by a list of sizes, which is data
        lists = [value for value in (*args, *kwargs.values()) if isinstance(value, (list, tuple, Tensor))]
        return [given[-1] if given else 0] if lists else []
    if not given or name in ("take", "masked_select", "put", "put_"):
        return every
    return [] if index and id(index[0]) in counts else [given[0] % max(1, source.dim())]


def _indexed(source: Tensor, index: Sequence[Any], counts: Mapping[int, Tensor]) -> list[int]:
    taken = sum(_taken(item) for item in index)
    dims, at = list[int](), 0
    for item in index:
        if item is Ellipsis:
            at += source.dim() - taken
            continue
        by_data = isinstance(item, (int, list, Tensor)) and id(item) not in counts
        if by_data:
            dims += range(at, at + _taken(item))
        at += _taken(item)
    return dims


def _taken(item: Any) -> int:
    """How many dimensions a part of an index takes."""
    if item is None or item is Ellipsis:
        return 0
    return item.dim() if isinstance(item, Tensor) and item.dtype in (torch.bool, torch.uint8) else 1


def _spoiled(tensor: Tensor, dims: Sequence[int]) -> Tensor:
    """The tensor with NaN wherever there is one along these dimensions."""
    if not tensor.is_floating_point() or tensor.layout != torch.strided:
        return tensor
    other = tensor.isnan().any(tuple(dims), keepdim=True) if tensor.dim() else tensor.isnan()
    return torch.where(other, torch.full((), math.nan, dtype=tensor.dtype, device=tensor.device), tensor)
