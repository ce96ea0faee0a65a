"""Torch's own forward mode, dual numbers: what the explicit way is compared with, and what takes over where it cannot follow."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode

from forwardgrad.forward_mode.explicit import READS
from forwardgrad.forward_mode.notes import Way, counter, name_of
from forwardgrad.forward_mode.rules import dropout
from forwardgrad.forward_mode.structure import leaves


class Source(Protocol):
    """Something that moves a tensor: by one tangent, or by all K at once."""

    def tangent(self, pick: Callable[[Tensor], Tensor]) -> Tensor: ...

    def tangents(self, count: int) -> Tensor: ...

    def add_to_(self, tangents: Tensor) -> None: ...


class _Injection(torch.autograd.Function):
    """Adds a tangent without touching the values, so that K tangents at once still share one primal pass."""

    generate_vmap_rule = True

    @staticmethod
    def forward(tensor: Tensor, scale: Tensor, tangent: Tensor) -> Tensor:
        return tensor.view_as(tensor)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_forward(inputs[2])

    @staticmethod
    def jvp(ctx: Any, carried: Tensor | None, scale: Tensor, tangent: Any) -> Tensor:
        added: Tensor = ctx.saved_tensors[0]
        return added.clone() if carried is None else carried + added


@dataclass(frozen=True)
class Plain:
    """An evaluation by torch's own forward mode, along the one tangent that `pick` takes from a stack."""

    scale: Tensor
    pick: Callable[[Tensor], Tensor]

    def inject(self, tensor: Tensor, source: Source) -> Tensor:
        moved: Tensor = _Injection.apply(tensor, self.scale, source.tangent(self.pick).to(tensor.dtype))  # type: ignore[no-untyped-call]
        return moved

    def carries(self, tensor: Tensor) -> bool:
        return forward_ad.unpack_dual(tensor).tangent is not None

    def primal(self, tensor: Tensor) -> Tensor:
        value: Tensor = forward_ad.unpack_dual(tensor).primal
        return value

    def call(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return func(*args, **kwargs)


_OURS = {"_unpack_dual", "custom_function_call"}  # calls that are made here, not by the model


class Alike(TorchFunctionMode):
    """Inside, dropout has the mask of an ordinary pass, and nothing asks for reverse mode; calls are noted if somebody asks."""

    def __init__(self) -> None:
        super().__init__()
        self.ways = counter()

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if func is Tensor.requires_grad_ and not torch._C._functorch.get_inplace_requires_grad_allowed():
            return args[0]  # a model prepares for checkpoints, and torch.func would refuse it; its own grad() is allowed to
        if func in dropout.OPENED:
            with self:
                return dropout.opened(func)(*args, **kwargs)
        if dropout.holds_dropout(func, args, kwargs):
            with self:
                return dropout.attention(*args, **kwargs)
        if self.ways is not None and func not in READS and (name := name_of(func)) not in _OURS:
            moves = any(forward_ad.unpack_dual(tensor).tangent is not None for tensor in leaves((args, kwargs)))
            self.ways[Way(name, "dual numbers", "all calls go this way")] += moves
        return dropout.masked(func, args, kwargs) if func in dropout.DROPOUTS else func(*args, **kwargs)
