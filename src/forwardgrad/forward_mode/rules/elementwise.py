"""Rules of what is applied to every number by itself, in place and not, and of what adds, scales and normalises.

With f the function and ẋ the tangent of x, f(x)˙ = f'(x) ẋ by the kernel that a backward pass would use, since f' is diagonal; the
Jacobian of softmax is symmetric, so its backward kernel serves too. In place a rule holds only where nothing else sees the tensor.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from forwardgrad.forward_mode.rules.base import Args, Rule, Tracking, owned

_aten = torch.ops.aten


class _Unit(NamedTuple):
    """How a function is called after its input, with defaults, and f'(x) ẋ from ẋ, x (or f(x), where `of_result`) and these options."""

    kernel: Callable[..., Tensor]
    options: tuple[tuple[str, Any], ...] = ()
    of_result: bool = False


def _unit(unit: _Unit, writes: bool) -> Rule:
    """`writes`: the function works in place by its name; others may by their `inplace`."""
    names = ("input", *(name for name, _ in unit.options), "inplace")
    defaults = dict(unit.options)

    def rule(e: Tracking, func: Callable[..., Any], args: Args, kwargs: dict[str, Any]) -> Any:
        call = {**dict(zip(names, args, strict=False)), **kwargs}
        x, in_place = call.pop("input", None), bool(call.pop("inplace", False)) or writes
        track = e.track(x) if isinstance(x, Tensor) else None
        if track is None or len(args) > len(names) or not call.keys() <= defaults.keys() or (in_place and not owned(track)):
            return NotImplemented
        options, t = {**defaults, **call}, track.of(x)
        if not unit.of_result and not in_place:
            y = func(*args, **kwargs)
            return e.attach(y, unit.kernel(t.to(y.dtype), x.to(y.dtype).expand_as(t), **options), fresh=True)
        if unit.of_result:
            y = func(*args, **kwargs)
            moved = unit.kernel(t.to(y.dtype), y.expand_as(t), **options)
        else:
            moved = unit.kernel(t, x.expand_as(t), **options)  # before x is written to
            y = func(*args, **kwargs)
        return e.attach(y, moved, fresh=True)

    return rule


def _elu(t: Tensor, x: Tensor, alpha: float = 1.0, scale: float = 1.0, input_scale: float = 1.0) -> Tensor:
    moved: Tensor = _aten.elu_backward(t, alpha, scale, input_scale, False, x)
    return moved


_SELU = {"alpha": 1.6732632423543772848170429916717, "scale": 1.0507009873554804934193349852946}
_SLOPE = _Unit(lambda t, x, negative_slope: _aten.leaky_relu_backward(t, x, negative_slope, False), (("negative_slope", 0.01),))
_ELU = _Unit(lambda t, x, alpha: _elu(t, x, alpha), (("alpha", 1.0),))
_CELU = _Unit(lambda t, x, alpha: _elu(t, x, alpha, 1.0, 1.0 / alpha), (("alpha", 1.0),))
_SCALED = _Unit(lambda t, x: _elu(t, x, **_SELU))
_CUT = _Unit(lambda t, x, min_val, max_val: _aten.hardtanh_backward(t, x, min_val, max_val), (("min_val", -1.0), ("max_val", 1.0)))
_TANH, _SIGMOID = _Unit(_aten.tanh_backward, of_result=True), _Unit(_aten.sigmoid_backward, of_result=True)
_SOFTPLUS = _Unit(lambda t, x, beta, threshold: _aten.softplus_backward(t, x, beta, threshold), (("beta", 1.0), ("threshold", 20.0)))
_UNITS: dict[Callable[..., Any], _Unit] = {
    **dict.fromkeys((F.tanh, torch.tanh, Tensor.tanh, torch.tanh_, Tensor.tanh_), _TANH),
    **dict.fromkeys((F.sigmoid, torch.sigmoid, Tensor.sigmoid, torch.sigmoid_, Tensor.sigmoid_), _SIGMOID),
    **dict.fromkeys((torch.exp, Tensor.exp, torch.exp_, Tensor.exp_), _Unit(lambda t, y: t * y, of_result=True)),
    **dict.fromkeys((torch.log, Tensor.log, torch.log_, Tensor.log_), _Unit(lambda t, x: t / x)),
    **dict.fromkeys((torch.square, Tensor.square, torch.square_, Tensor.square_), _Unit(lambda t, x: (t * x).mul_(2))),
    **dict.fromkeys((torch.sqrt, Tensor.sqrt, torch.sqrt_, Tensor.sqrt_), _Unit(lambda t, y: (t / y).mul_(0.5), of_result=True)),
    **dict.fromkeys((torch.rsqrt, Tensor.rsqrt, torch.rsqrt_, Tensor.rsqrt_), _Unit(lambda t, y: (t * y**3).mul_(-0.5), of_result=True)),
    **dict.fromkeys((torch.abs, Tensor.abs, torch.abs_, Tensor.abs_), _Unit(lambda t, x: t * x.sign())),
    **dict.fromkeys((torch.neg, Tensor.neg, Tensor.__neg__, torch.neg_, Tensor.neg_), _Unit(lambda t, x: -t)),
    F.gelu: _Unit(lambda t, x, approximate: _aten.gelu_backward(t, x, approximate=approximate), (("approximate", "none"),)),
    F.silu: _Unit(_aten.silu_backward),
    F.mish: _Unit(_aten.mish_backward),
    F.hardswish: _Unit(_aten.hardswish_backward),
    F.hardsigmoid: _Unit(_aten.hardsigmoid_backward),
    F.relu6: _Unit(lambda t, x: _aten.hardtanh_backward(t, x, 0.0, 6.0)),
    **dict.fromkeys((F.hardtanh, F.hardtanh_), _CUT),
    **dict.fromkeys((F.leaky_relu, F.leaky_relu_), _SLOPE),
    **dict.fromkeys((F.elu, F.elu_), _ELU),
    **dict.fromkeys((F.celu, torch.celu, torch.celu_), _CELU),
    **dict.fromkeys((F.selu, torch.selu, torch.selu_), _SCALED),
    F.softplus: _SOFTPLUS,
}


def _wide(t: Tensor, dims: int) -> Tensor:
    """Tangents [K, *shape] with ones behind K, for a result of so many dimensions."""
    return t.reshape(len(t), *[1] * (dims + 1 - t.dim()), *t.shape[1:])


def _arithmetic(derivative: Callable[[Tensor, Any, Tensor | None, Tensor | None], Tensor], in_place: bool) -> Rule:
    """The rule of a function of two, from x, y and their tangents, of which one may be None."""

    def rule(e: Tracking, func: Callable[..., Any], args: Args, kwargs: dict[str, Any]) -> Any:
        if len(args) != 2 or kwargs or not isinstance(args[0], Tensor) or not isinstance(args[1], (Tensor, int, float)):
            return NotImplemented
        x, y = args
        track, there = e.track(x), e.tangents(y) if isinstance(y, Tensor) else None
        if in_place and (track is None or not owned(track)):
            return NotImplemented
        here = None if track is None else track.of(x)
        shape = torch.broadcast_shapes(x.shape, y.shape) if isinstance(y, Tensor) else x.shape
        wide = [None if t is None else _wide(t, len(shape)) for t in (here, there)]
        moved = derivative(x, y, *wide)
        out = func(x, y)
        if out.dtype != moved.dtype or moved.shape[1:] != shape:
            moved = moved.to(out.dtype).expand(len(moved), *shape).clone()
        return e.attach(out, moved, fresh=True)

    return rule


def _product(x: Any, y: Any, here: Tensor | None, there: Tensor | None) -> Tensor:
    parts: list[Tensor] = [t * factor for t, factor in ((here, y), (there, x)) if t is not None]
    return parts[0] + parts[1] if len(parts) == 2 else parts[0]


def _quotient(x: Any, y: Any, here: Tensor | None, there: Tensor | None) -> Tensor:
    parts: list[Tensor] = [t / y for t in (here, None if there is None else there * (x / y).neg()) if t is not None]
    return parts[0] + parts[1] if len(parts) == 2 else parts[0]


def _difference(x: Any, y: Any, here: Tensor | None, there: Tensor | None) -> Tensor:
    if there is None:
        assert here is not None
        return here.clone()
    return -there if here is None else here - there


def _softmax(e: Tracking, func: Callable[..., Any], args: Args, kwargs: dict[str, Any]) -> Any:
    call = {**dict(zip(("input", "dim"), args, strict=False)), **kwargs}
    x, dim, known = call["input"], call.get("dim"), {"input", "dim", "_stacklevel"}
    if len(args) > 2 or not isinstance(dim, int) or any(call[key] is not None for key in call.keys() - known) or not x.dim():
        return NotImplemented
    out, t = func(*args, **kwargs), e.tangents(x)
    assert t is not None
    t, axis = t.to(out.dtype), dim % x.dim() - x.dim()
    if func in _LOGS:
        return e.attach(out, t - (out.exp() * t).sum(axis, keepdim=True), fresh=True)
    return e.attach(out, _aten._softmax_backward_data(t, out.expand_as(t), axis, out.dtype), fresh=True)


_LOGS: set[Callable[..., Any]] = {torch.log_softmax, Tensor.log_softmax, F.log_softmax}


def _layer_norm(e: Tracking, func: Callable[..., Any], args: Args, kwargs: dict[str, Any]) -> Any:
    """With x̂ the normalised input and 1/s its scale: ẋ̂ = (ẋ − mean ẋ − x̂ mean(x̂ ẋ)) / s, then as a gain and a shift move it."""
    call: dict[str, Any] = {"weight": None, "bias": None, "eps": 1e-5}
    call |= {**dict(zip(("input", "normalized_shape", "weight", "bias", "eps"), args, strict=False)), **kwargs}
    x, weight = call["input"], call["weight"]
    if torch.is_autocast_enabled(x.device.type):
        return NotImplemented
    dims = tuple(range(-len(call["normalized_shape"]), 0))
    out, mean, rstd = torch.native_layer_norm(x, call["normalized_shape"], weight, call["bias"], call["eps"])
    normal, t, moved = (x - mean) * rstd, e.tangents(x), None
    if t is not None:
        moved = (t - t.mean(dims, keepdim=True)).sub_(normal * (t * normal).mean(dims, keepdim=True)).mul_(rstd)
    return e.attach(out, _gained(e, moved, normal, weight, call["bias"], tuple(call["normalized_shape"])).to(out.dtype), fresh=True)


def _gained(e: Tracking, moved: Tensor | None, normal: Tensor, weight: Any, bias: Any, shape: tuple[int, ...]) -> Tensor:
    """The tangents of x̂ w + b from those of x̂; `shape` is that of w and b as they meet x̂."""
    if moved is not None and weight is not None:
        moved = moved.mul_(weight.view(shape))
    for parameter, factor in ((weight, normal), (bias, None)):
        if parameter is not None and (v := e.tangents(parameter)) is not None:
            part = _wide(v.view(len(v), *shape), normal.dim())
            part = part.expand(len(v), *normal.shape) if factor is None else part * factor
            moved = part.clone() if moved is None else moved.add_(part)
    assert moved is not None
    return moved


def _batch_norm(e: Tracking, func: Callable[..., Any], args: Args, kwargs: dict[str, Any]) -> Any:
    """With statistics that stand still a batch norm is a scale and a shift."""
    names = ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")
    call = {"weight": None, "bias": None, "training": False, "eps": 1e-5, **dict(zip(names, args, strict=False)), **kwargs}
    x, mean, variance = call["input"], call["running_mean"], call["running_var"]
    still = isinstance(mean, Tensor) and isinstance(variance, Tensor) and e.track(mean) is None and e.track(variance) is None
    if call["training"] or not still or torch.is_autocast_enabled(x.device.type):
        return NotImplemented
    shape = (-1, *[1] * (x.dim() - 2))
    rstd = (variance + call["eps"]).rsqrt().view(shape)
    out, t = func(*args, **kwargs), e.tangents(x)
    moved = None if t is None else t * rstd
    return e.attach(out, _gained(e, moved, (x - mean.view(shape)) * rstd, call["weight"], call["bias"], shape).to(out.dtype), fresh=True)


RULES: dict[Callable[..., Any], Rule] = {
    **{function: _unit(unit, function.__name__.endswith("_")) for function, unit in _UNITS.items()},
    **dict.fromkeys((torch.mul, Tensor.mul, Tensor.__mul__, Tensor.__rmul__), _arithmetic(_product, False)),
    **dict.fromkeys((Tensor.mul_, Tensor.__imul__), _arithmetic(_product, True)),
    **dict.fromkeys((torch.div, Tensor.div, Tensor.__truediv__, torch.true_divide), _arithmetic(_quotient, False)),
    **dict.fromkeys((Tensor.div_, Tensor.__itruediv__), _arithmetic(_quotient, True)),
    **dict.fromkeys((torch.sub, Tensor.sub, Tensor.__sub__), _arithmetic(_difference, False)),
    **dict.fromkeys((Tensor.sub_, Tensor.__isub__), _arithmetic(_difference, True)),
    **dict.fromkeys((torch.softmax, Tensor.softmax, F.softmax, *_LOGS), _softmax),
    F.layer_norm: _layer_norm,
    F.batch_norm: _batch_norm,
}
