"""Torch's own forward mode, dual numbers: what the explicit way is compared with, and what takes over where it cannot follow."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode

from forwardgrad.forward_mode import regions
from forwardgrad.forward_mode.explicit import READS
from forwardgrad.forward_mode.notes import Way, counter, name_of
from forwardgrad.forward_mode.quotients import Call, Differenced, attempt
from forwardgrad.forward_mode.rules import attention, composed, dropout
from forwardgrad.forward_mode.structure import leaves
from forwardgrad.forward_mode.writes import Live


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
    """Inside, dropout has the mask of an ordinary pass, and nothing asks for reverse mode; calls are noted if somebody asks.

    `live`: what is trained; a write to it is one of values.
    """

    def __init__(self, live: Live | None = None) -> None:
        super().__init__()
        self.ways = counter()
        self.live = live

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if func is regions.SWITCH:
            return regions.switched(args, kwargs)
        result = self._made(func, args, kwargs)
        return regions.constant(result, (args, kwargs)) if regions.still() else result

    def _made(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self.live is not None and (result := self.live.write(func, args, kwargs)) is not NotImplemented:
            return result
        if func is Tensor.requires_grad_ and not torch._C._functorch.get_inplace_requires_grad_allowed():
            return args[0]  # a model prepares for checkpoints, and torch.func would refuse it; its own grad() is allowed to
        if func in dropout.OPENED:
            with self:
                return dropout.opened(func)(*args, **kwargs)
        if func in READS:
            return func(*args, **kwargs)
        if (composition := composed.composition_of(func)) is not None and _moves(args, kwargs):
            with self:
                result = composition(*args, **kwargs)
            if result is not NotImplemented:
                return result
        if self.ways is not None and (name := name_of(func)) not in _OURS:
            self.ways[Way(name, "dual numbers", "all calls go this way")] += _moves(args, kwargs)
        if func is attention.FUNCTION and (made := attention.values(args, kwargs, derived=True)) is not NotImplemented:
            return made
        if func in dropout.DROPOUTS:
            return dropout.masked(func, args, kwargs)
        return attempt(func, args, kwargs, lambda: func(*args, **kwargs), self._by_differences, lambda: _moves(args, kwargs))

    def _by_differences(self, call: Call) -> Any:
        """One call by central differences, if something in it moves."""
        if not _moves(call.args, call.kwargs):
            return call.function(*call.args, **call.kwargs)
        call.say()
        if self.ways is not None:
            self.ways[Way(call.name, "differences", "torch has no forward mode for it")] += 1
        return call.rebuilt(Differenced.apply(call, *call.tensors))  # type: ignore[no-untyped-call]


def _moves(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    return any(_is_dual(tensor) for tensor in leaves((args, kwargs)))


def _is_dual(tensor: Tensor) -> bool:
    while torch._C._functorch.is_batchedtensor(tensor):  # by a vmap of the loss's own, under which torch cannot look
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return forward_ad.unpack_dual(tensor).tangent is not None
