"""Dropout in forward mode: from the same seed its mask is that of an ordinary forward pass, whichever way derivatives are made.

Under `torch.func` torch draws a mask in the order of indices. Outside it draws in the order of memory, on a GPU by another kernel. From one
seed the two masks differ wherever a tensor is transposed, as behind attention. Here a mask is always drawn as outside: `masked` leaves
the levels of `torch.func` for it. K tangents share the mask.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from types import FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from forwardgrad.forward_mode.rules.base import Args, Rule, Tracking, owned

DROPOUTS: dict[Callable[..., Any], Callable[..., Any]] = {  # each with its form out of place
    **{getattr(torch, name): getattr(torch, name) for name in ("dropout", "feature_dropout", "alpha_dropout", "feature_alpha_dropout")},
    torch.dropout_: torch.dropout,
    torch.feature_dropout_: torch.feature_dropout,
    torch.alpha_dropout_: torch.alpha_dropout,
    torch.feature_alpha_dropout_: torch.feature_alpha_dropout,
}
_IN_PLACE = {torch.dropout_, torch.feature_dropout_, torch.alpha_dropout_, torch.feature_alpha_dropout_}
OPENED = frozenset(
    (F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout, F.multi_head_attention_forward)
)
"""Functions of torch in Python that hold a dropout: they are followed call by call, see `opened`."""


@cache
def opened(function: Any) -> Callable[..., Any]:
    """The same function, which does not offer itself to a function mode as one call: the calls inside it are seen instead."""
    asks = ("has_torch_function", "has_torch_function_unary", "has_torch_function_variadic")
    within = {**function.__globals__, **dict.fromkeys(asks, _never)}
    inner = FunctionType(function.__code__, within, function.__name__, function.__defaults__, function.__closure__)
    inner.__kwdefaults__ = function.__kwdefaults__
    return inner


def _never(*_: Any) -> bool:
    return False


def bound(args: Args, kwargs: dict[str, Any]) -> tuple[Tensor, float, bool]:
    """Input, p and whether dropout is on, of a call of a function in `DROPOUTS`."""
    call = {**dict(zip(("input", "p", "train"), args, strict=False)), **kwargs}
    return call["input"], call["p"], call["train"] and call["p"] > 0 and call["input"].numel() > 0


def with_mask(kind: Callable[..., Any], x: Tensor, p: float, *, fused: bool = True) -> tuple[Tensor, Tensor]:
    """What an ordinary call gives, and the factor [broadcast to x] that its tangents have. `fused` says that it may use a GPU's own kernel.

    Follows torch's `aten/src/ATen/native/Dropout.cpp` operation by operation, so that the numbers are the same to the bit.
    """
    if p == 1:  # nothing is drawn
        zero = x.new_zeros(())
        return x * zero, zero
    if fused and kind is torch.dropout and x.is_cuda:
        out, mask = torch.native_dropout(x, p, True)
        return out, mask / (1 - p)
    whole = kind in (torch.dropout, torch.alpha_dropout)
    factor = (torch.empty_like(x) if whole else x.new_empty((*x.shape[:2], *[1] * (x.dim() - 2)))).bernoulli_(1 - p)
    if kind in (torch.dropout, torch.feature_dropout):
        factor = factor.div_(1 - p)
        return x * factor, factor
    scale = 1.0 / math.sqrt((_ALPHA * _ALPHA * p + 1) * (1 - p))
    shift = factor.add(-1).mul_(_ALPHA * scale).add_(_ALPHA * scale * p)
    return x * factor.mul_(scale) + shift, factor


_ALPHA = 1.7580993408473766  # what SELU tends to for large negative numbers


class _Masked(torch.autograd.Function):
    """Dropout whose forward pass runs below all levels of torch.func, and so draws as an ordinary call does."""

    @staticmethod
    def forward(x: Tensor, kind: Callable[..., Any], p: float, fused: bool) -> tuple[Tensor, Tensor]:
        return with_mask(kind, x, p, fused=fused)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_forward(output[1])
        ctx.save_for_backward(output[1])

    @staticmethod
    def jvp(ctx: Any, t: Tensor | None, *_: Any) -> tuple[Tensor | None, None]:
        return None if t is None else t * ctx.saved_tensors[0], None

    @staticmethod
    def backward(ctx: Any, g: Tensor, _: Any) -> tuple[Tensor, None, None, None]:
        return g * ctx.saved_tensors[0], None, None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], x: Tensor, kind: Any, p: float, fused: bool) -> Any:
        if info.randomness == "error":
            raise RuntimeError("dropout inside vmap needs vmap(..., randomness='different') or 'same'")
        rows = x.movedim(in_dims[0], 0)
        if info.randomness == "different":
            found = [_Masked.apply(row, kind, p, fused) for row in rows]  # type: ignore[no-untyped-call]
            return tuple(torch.stack(part) for part in zip(*found, strict=True)), (0, 0)
        _, factor = _Masked.apply(rows[0], kind, p, fused)  # type: ignore[no-untyped-call]
        return (_shifted(kind, rows, factor, p), factor), (0, None)


def _shifted(kind: Any, x: Tensor, factor: Tensor, p: float) -> Tensor:
    """Dropout with a factor that was drawn before."""
    if kind in (torch.dropout, torch.feature_dropout) or p == 1:
        return x * factor
    scale = 1.0 / math.sqrt((_ALPHA * _ALPHA * p + 1) * (1 - p))
    return x * factor + ((factor / scale - 1) * (_ALPHA * scale) + _ALPHA * scale * p)


def masked(function: Callable[..., Any], args: Args, kwargs: dict[str, Any]) -> Any:
    """A call of a function in `DROPOUTS` under torch's own forward mode, with the mask of an ordinary pass."""
    x, p, on = bound(args, kwargs)
    if not on:
        return function(*args, **kwargs)
    out = _Masked.apply(x, DROPOUTS[function], p, function not in _IN_PLACE)[0]  # type: ignore[no-untyped-call]
    return x.copy_(out) if function in _IN_PLACE else out


def _dropout(e: Tracking, func: Callable[..., Any], args: Args, kwargs: dict[str, Any]) -> Any:
    x, p, on = bound(args, kwargs)
    track = e.track(x)
    if track is None:
        return NotImplemented
    if not on:
        return func(*args, **kwargs)  # torch returns what it was given
    in_place = func in _IN_PLACE
    if in_place and not owned(track):
        return NotImplemented
    out, factor = with_mask(DROPOUTS[func], x, p, fused=not in_place)
    return e.attach(x.copy_(out) if in_place else out, track.of(x) * factor, fresh=True)


RULES: dict[Callable[..., Any], Rule] = dict.fromkeys(DROPOUTS, _dropout)
