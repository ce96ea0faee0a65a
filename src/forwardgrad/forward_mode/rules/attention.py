"""The rule of `scaled_dot_product_attention`, whose fused kernels have no forward mode in torch; its plain formula holds T × T numbers.

Here a call with tangents is made by `tiles`, which hold a bounded part of them. So is a call of many numbers without tangents. Under
torch's dual numbers the values are made by tiles, and torch derives each tile: the two ways are independent, and neither holds T × T.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from forwardgrad.forward_mode.levels import level
from forwardgrad.forward_mode.rules import tiles
from forwardgrad.forward_mode.rules.base import Args, Rule, Tracking
from forwardgrad.forward_mode.rules.tiles import AttentionCall, Laid

FUNCTION: Callable[..., Tensor] = F.scaled_dot_product_attention
_NAMES = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")


def bound(args: Args, kwargs: dict[str, Any]) -> AttentionCall | None:
    """A call as it is made by tiles; None where it is of a kind that is left to torch, or one that torch refuses."""
    call = {**dict(zip(_NAMES, args, strict=False)), **kwargs}
    tensors = [call[name] for name in _NAMES[:4] if call.get(name) is not None]
    if not call.keys() <= set(_NAMES) or len(tensors) < 3 or not all(type(t) in (Tensor, nn.Parameter) for t in tensors):
        return None
    if any(t.layout != torch.strided or not t.numel() for t in tensors):
        return None
    query, key, value, *masks = map(_as_autocast, tensors)
    grouped, causal = bool(call.get("enable_gqa")), bool(call.get("is_causal"))
    if not _fit(query, key, value, grouped) or not all(_is_mask(mask, query, key, grouped) and not causal for mask in masks):
        return None
    groups = (key.shape[-3], query.shape[-3] // key.shape[-3]) if grouped else None
    try:
        batch = tuple(torch.broadcast_shapes(*(_batch(t, groups) for t in (query, key, value, *masks))))
    except RuntimeError:
        return None
    scale = 1 / math.sqrt(query.shape[-1]) if call.get("scale") is None else float(call["scale"])
    mask = masks[0] if masks else None
    return AttentionCall(query, key, value, mask, float(call.get("dropout_p", 0.0)), causal, scale, groups, batch)


def _as_autocast(tensor: Tensor) -> Tensor:
    """As autocast hands it to attention."""
    kind = tensor.device.type
    if not torch.is_autocast_enabled(kind) or not tensor.is_floating_point() or tensor.dtype == torch.float64:
        return tensor
    return tensor.to(torch.get_autocast_dtype(kind))


def _fit(query: Tensor, key: Tensor, value: Tensor, grouped: bool) -> bool:
    three = (query, key, value)
    if (
        not query.is_floating_point()
        or len({(t.dtype, t.device) for t in three}) > 1
        or min(t.dim() for t in three) < (3 if grouped else 2)
    ):
        return False
    if grouped and (key.shape[-3] != value.shape[-3] or query.shape[-3] % key.shape[-3]):
        return False
    return query.shape[-1] == key.shape[-1] and key.shape[-2] == value.shape[-2]


def _is_mask(mask: Tensor, query: Tensor, key: Tensor, grouped: bool) -> bool:
    if not mask.dim() or not (mask.dtype == torch.bool or mask.is_floating_point()) or mask.device != query.device:
        return False
    rows, keys = (1, *mask.shape)[-2:]
    whole = not grouped or mask.dim() < 3 or mask.shape[-3] in (1, query.shape[-3])
    return whole and rows in (1, query.shape[-2]) and keys in (1, key.shape[-2])


def _batch(tensor: Tensor, groups: tuple[int, int] | None) -> tuple[int, ...]:
    """Its dimensions in front of the matrices, with heads in groups of those that share keys."""
    batch = tuple(tensor.shape[:-2])
    if groups is None or not batch:
        return batch
    return (*batch[:-1], *(groups if batch[-1] == math.prod(groups) else (batch[-1], 1)))


@contextmanager
def _precisely(device: torch.device) -> Iterator[None]:
    """Inside, sums over keys are made in the precision that `tiles` chooses."""
    if not torch.is_autocast_enabled(device.type):
        yield
        return
    with torch.autocast(device.type, enabled=False):
        yield


def _attention(e: Tracking, func: Callable[..., Any], args: Args, kwargs: dict[str, Any]) -> Any:
    call = bound(args, kwargs)
    if call is None:
        return NotImplemented
    given = {**dict(zip(_NAMES, args, strict=False)), **kwargs}
    moves = Laid(*(None if given.get(name) is None else e.tangents(given[name]) for name in _NAMES[:4]))
    with _precisely(call.query.device):
        if torch.compiler.is_compiling() and len(tiles.cuts(call)) > 1:
            out, moved = _as_one_node(call, moves, e.count)
        else:
            out, moved = tiles.with_tangents(call, moves, e.count)
    return e.attach(out, moved, fresh=True)


RULES: dict[Callable[..., Any], Rule] = {FUNCTION: _attention}


def values(args: Args, kwargs: dict[str, Any], *, derived: bool) -> Any:
    """The result of a call in which nothing moves here; NotImplemented where torch may make it, since it has no more numbers than a tile.

    `derived`: torch derives it, by its dual numbers. Then its dropout is made here, too: torch would draw other masks than in an ordinary
    pass.
    """
    call = bound(args, kwargs)
    if call is None or (len(tiles.cuts(call)) == 1 and not (derived and call.drop)):
        return NotImplemented
    with _precisely(call.query.device):
        if torch.compiler.is_compiling() and not (derived or level() or torch.is_grad_enabled()):
            return _as_one_node(call, Laid(None, None, None, None), 0)[0]
        return tiles.values(call)


def attention_by_tiles(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """As torch's `scaled_dot_product_attention`, for your own `torch.func.jvp`: what is held grows with the length, not with its square.

    It is made of calls that torch's dual numbers, `jvp` and `vmap` go through; torch's own function has forward mode in its plain formula
    alone. Inside this library's estimators no model needs it. A backward pass works, and keeps every tile: T × T numbers. With more than
    262,144 numbers in all scores (16.8 million on a GPU) dropout draws a mask for each tile, so not those of torch's own function.

    >>> x = torch.ones(1, 2, 600, 8)
    >>> out, moved = torch.func.jvp(lambda x: attention_by_tiles(x, x, x, is_causal=True), (x,), (x,))
    >>> torch.allclose(moved, x)  # all keys are alike, so only the values move the result
    True
    """
    call = bound((query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa), {})
    if call is None:
        return FUNCTION(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
    with _precisely(call.query.device):
        return tiles.values(call)


# Inside a compiled step ---------------------------------------------------------------------------------------------------------------


def _as_one_node(call: AttentionCall, moves: Laid, count: int) -> tuple[Tensor, Tensor]:
    """The same as one operator, which a compiler leaves whole: a loop over tiles would be written out in a graph."""
    shared = [] if call.groups is None else list(call.groups)
    found: tuple[Tensor, Tensor] = _operator(bool(call.drop))(
        call.query, call.key, call.value, call.mask, *moves, call.drop, call.causal, call.scale, shared, list(call.batch), count
    )
    return found


_SCHEMA = (
    "(Tensor query, Tensor key, Tensor value, Tensor? mask, Tensor? query_moves, Tensor? key_moves, Tensor? value_moves, "
    "Tensor? mask_moves, float drop, bool causal, float scale, SymInt[] groups, SymInt[] batch, SymInt count) -> (Tensor, Tensor)"
)


@cache
def _operator(draws: bool) -> Callable[..., Any]:
    """torch.ops.forwardgrad.attention, or of that name with dropout, which draws from the global generator."""
    name = "forwardgrad::attention_with_dropout" if draws else "forwardgrad::attention"
    tags = (torch.Tag.nondeterministic_seeded,) if draws else ()
    operator = torch.library.custom_op(name, _computed, mutates_args=(), schema=_SCHEMA, tags=tags)
    operator.register_fake(_shaped)
    return operator


def _call_of(args: Sequence[Any]) -> AttentionCall:
    query, key, value, mask, _, _, _, _, drop, causal, scale, groups, batch, _ = args
    return AttentionCall(query, key, value, mask, drop, causal, scale, (groups[0], groups[1]) if groups else None, tuple(batch))


def _computed(*args: Any) -> tuple[Tensor, Tensor]:
    return tiles.with_tangents(_call_of(args), Laid(*args[4:8]), args[-1])


def _shaped(*args: Any) -> tuple[Tensor, Tensor]:
    call = _call_of(args)
    return call.query.new_empty(call.shape), call.query.new_empty((args[-1], *call.shape))
