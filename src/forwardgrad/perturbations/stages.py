"""What may stand behind a layer and belong to it: pooling, batch normalisation and views, with the way back of an error in closed form."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from forwardgrad.factored import Gradient
from forwardgrad.perturbations.layers import Caller


@dataclass(frozen=True)
class Pooled:
    """Max-pooling behind a layer: its winners are kept under `key`, its input had this shape and order in memory."""

    key: str
    shape: torch.Size
    channels_last: bool
    call: Mapping[str, Any]

    def back(self, error: Tensor, kept: Mapping[str, Tensor], gradients: dict[str, Gradient]) -> Tensor:
        """Errors sent back to the winners; windows that overlap add up."""
        order = torch.channels_last if self.channels_last else torch.contiguous_format
        given = torch.empty(self.shape, dtype=error.dtype, device=error.device, memory_format=order)  # nothing but its layout matters
        size = self.call["kernel_size"]
        stride, padding, dilation = self.call.get("stride") or size, self.call.get("padding", 0), self.call.get("dilation", 1)
        options = [[value] if isinstance(value, int) else list(value) for value in (size, stride, padding, dilation)]
        ceil = bool(self.call.get("ceil_mode"))
        send = _as_one_kernel if torch.compiler.is_compiling() else torch.ops.aten.max_pool2d_with_indices_backward
        back: Tensor = send(error, given, *options, ceil, kept[self.key])
        return back


@torch.library.custom_op("forwardgrad::max_pool2d_backward", mutates_args=())
def _as_one_kernel(
    error: Tensor,
    given: Tensor,
    size: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    ceil: bool,
    winners: Tensor,
) -> Tensor:
    """Torch's own kernel, where a compiler would write one that takes seven times as long on a processor."""
    back: Tensor = torch.ops.aten.max_pool2d_with_indices_backward(error, given, size, stride, padding, dilation, ceil, winners)
    return back


@_as_one_kernel.register_fake
def _(error: Tensor, given: Tensor, *_: object) -> Tensor:
    return torch.empty_like(given)


@dataclass(frozen=True)
class Viewed:
    """The same numbers in another shape than this one, or with dimensions in another order. Dropout that drops nothing is one, too."""

    shape: torch.Size
    order: tuple[int, ...] | None = None

    @classmethod
    def of(cls, function: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any], channels: int) -> Viewed | None:
        """What such a call makes of its first argument; None for other calls, and where the dimension of channels would not be whole."""
        given, *rest = args
        if function is F.dropout:
            call = {**dict(zip(("p", "training"), rest, strict=False)), **kwargs}
            return cls(given.shape) if call.get("p", 0.5) == 0 or not call.get("training", True) else None
        if function in UNFLATTENS:
            dim = {**dict(zip(("dim", "sizes"), rest, strict=False)), **kwargs}["dim"]
            ahead = type(dim) is int and dim % given.dim() < channels == given.dim() - 1
            return cls(given.shape) if ahead else None
        rest = [*rest[0]] if len(rest) == 1 and isinstance(rest[0], (tuple, list)) else rest
        numbers = [*rest, *kwargs.values()]
        if function in CASTS:
            return cls(given.shape) if not numbers else None
        if any(type(number) is not int for number in numbers) or (kwargs and function not in FLATTENS):
            return None
        last = channels == given.dim() - 1
        if function in RESHAPES and numbers:
            size = numbers[-1] if numbers[-1] != -1 else given.numel() // -math.prod(numbers) if 0 not in numbers else 0
            return cls(given.shape) if last and size == given.shape[-1] else None
        if function in FLATTENS:
            start, end = ({**dict(zip(("start_dim", "end_dim"), rest, strict=False)), **kwargs}.get(at, to) for at, to in _FLAT)
            return cls(given.shape) if last and given.dim() > 1 and max(start % given.dim(), end % given.dim()) < channels else None
        order = [*range(given.dim())]
        if function in TRANSPOSES and len(numbers) == 2:
            one, other = (number % given.dim() for number in numbers)
            order[one], order[other] = other, one
        elif function in PERMUTES and len(numbers) == given.dim():
            order = [number % given.dim() for number in numbers]
        else:
            return None
        return cls(given.shape, tuple(order))

    def back(self, error: Tensor, kept: Mapping[str, Tensor], gradients: dict[str, Gradient]) -> Tensor:
        if self.order is None:
            return error.reshape(self.shape)
        return error.permute([self.order.index(dim) for dim in range(error.dim())])


@dataclass(frozen=True)
class Normalised:
    """Batch normalisation behind a layer, y = γ (x − μ)/σ + β: its input, μ and 1/σ are kept."""

    names: Mapping[str, str]
    training: bool
    eps: float
    dtypes: Mapping[str, torch.dtype]

    @classmethod
    def made(
        cls, call: Mapping[str, Any], names: Mapping[str, str], make: Caller, primal: Callable[[Tensor], Tensor], kept: dict[str, Tensor]
    ) -> tuple[Tensor, Normalised]:
        """The result of a call whose parameters have these names by role, and the stage; what it needs is put to what is kept.

        `make` makes the call, by torch's function or by the kernel below that.
        """
        x, eps = primal(call["input"]), float(call.get("eps", 1e-5))
        training = bool(call.get("training", False)) or call.get("running_mean") is None
        stage = cls(names, training, eps, {role: call[role].dtype for role in names})
        if call.get("weight") is not None:
            kept["normal weight"] = primal(call["weight"])
        if training and x is call["input"] and x.dtype.itemsize >= 4 and _several(x):
            # the kernel of torch works statistics out on the way: to find them again costs as much as eight such calls on a processor
            out, mean, root, *_ = make(torch._batch_norm_impl_index, *_whole(call), torch.backends.cudnn.enabled)
        else:
            wide = x.to(torch.promote_types(x.dtype, torch.float32))
            if training:
                variance, mean = torch.var_mean(wide, [0, *range(2, x.dim())], correction=0)
            else:
                mean, variance = primal(call["running_mean"]).clone(), primal(call["running_var"])
            root, out = (variance + eps).rsqrt(), make(F.batch_norm, **call)
        kept["normal x"], kept["normal mean"], kept["normal root"] = x, mean, root
        return out, stage

    def back(self, error: Tensor, kept: Mapping[str, Tensor], gradients: dict[str, Gradient]) -> Tensor:
        """The error at the input, γ/σ (e − Σe/n − x̂ Σ(e x̂)/n) in training, and those of gain and bias, Σ e x̂ and Σ e, over each channel."""
        x, mean, root, weight = kept["normal x"], kept["normal mean"], kept["normal root"], kept.get("normal weight")
        over = [0, *range(2, x.dim())]
        scale: Tensor | None = None
        shift: Tensor | None = None
        back: Tensor
        if self.training:  # one kernel, with no tensor between
            gained, given = weight is not None, [error, x, weight]
            if (x if weight is None else weight).dtype != root.dtype:  # the kernel takes half gains with half statistics alone
                given = [None if t is None else t.to(root.dtype) for t in given]
            back, scale, shift = torch.ops.aten.native_batch_norm_backward(
                *given, None, None, mean, root, True, self.eps, [True, gained, gained]
            )
            back = back.to(x.dtype)
        else:
            channels, e = [1, -1, *[1] * (x.dim() - 2)], error.to(root.dtype)
            if "weight" in self.names:
                scale = (e * (x.to(root.dtype) - mean.view(channels)) * root.view(channels)).sum(over)
            back = (e * (root if weight is None else root * weight.to(root.dtype)).view(channels)).to(x.dtype)
        if shift is None and "bias" in self.names:
            shift = error.sum(over)
        found = {"weight": scale, "bias": shift}
        for role, name in self.names.items():
            part = found[role]
            assert part is not None
            gradients[name] = part.to(self.dtypes[role])
        return back


def _several(x: Tensor) -> bool:
    """Whether each channel has more than one number; torch refuses one in training, with a sentence."""
    return x.dim() > 1 and x.numel() > x.shape[1]


def _whole(call: Mapping[str, Any]) -> list[Any]:
    """All arguments of the kernel, but the last."""
    usual = {"running_mean": None, "running_var": None, "weight": None, "bias": None, "momentum": 0.1, "eps": 1e-5}
    given = {**usual, **call, "training": True}
    return [given[name] for name in ("input", "weight", "bias", "running_mean", "running_var", "training", "momentum", "eps")]


RECTIFIERS: frozenset[Callable[..., Any]] = frozenset({F.relu, torch.relu, torch.relu_, Tensor.relu, Tensor.relu_, F.relu_})
SUMS: frozenset[Callable[..., Any]] = frozenset({torch.add, Tensor.add, Tensor.__add__, Tensor.add_, Tensor.__iadd__})
INTO_FIRST: frozenset[Callable[..., Any]] = frozenset({Tensor.add_, Tensor.__iadd__})
"""Sums that are written into their first argument, which so has to be the layer's own output."""
POOLING = ("input", "kernel_size", "stride", "padding", "dilation", "ceil_mode")
RETURN_INDICES = len(POOLING) + 1  # place of that argument of max-pooling, counted from one
POOLS: frozenset[Callable[..., Any]] = frozenset({F.max_pool2d, torch.max_pool2d})
CASTS: frozenset[Callable[..., Any]] = frozenset({Tensor.float, Tensor.double, Tensor.contiguous})
RESHAPES: frozenset[Callable[..., Any]] = frozenset({Tensor.view, Tensor.reshape, torch.reshape})
FLATTENS: frozenset[Callable[..., Any]] = frozenset({Tensor.flatten, torch.flatten})
UNFLATTENS: frozenset[Callable[..., Any]] = frozenset({Tensor.unflatten, torch.unflatten})
TRANSPOSES: frozenset[Callable[..., Any]] = frozenset({Tensor.transpose, torch.transpose})
PERMUTES: frozenset[Callable[..., Any]] = frozenset({Tensor.permute, torch.permute})
VIEWS: frozenset[Callable[..., Any]] = CASTS | RESHAPES | FLATTENS | UNFLATTENS | TRANSPOSES | PERMUTES | {F.dropout}
_FLAT = (("start_dim", 0), ("end_dim", -1))
BEHIND: frozenset[Callable[..., Any]] = RECTIFIERS | POOLS | {F.batch_norm}
"""Calls that belong to the layer in front of them."""
