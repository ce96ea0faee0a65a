"""Rules of the layers that networks are made of: products, convolutions, ReLU, max-pooling, changes of shape, sums and losses.

With f the function and ẋ the tangent of x, the rules are

    product   (x W + b)˙ = ẋ W + x Ẇ + ḃ                     rows of x and ẋ in one tensor meet W in one product
    choice    (max over a window)˙ = ẋ at the winner
    shape     (x in another shape)˙ = ẋ in that shape
    loss      f(z)˙ = ⟨∂f/∂z, ż⟩                             with ∂f/∂z in closed form, in float32 at least
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from forwardgrad.forward_mode.rules import images
from forwardgrad.forward_mode.rules.base import Args, Rule, Tracking, owned, rectified
from forwardgrad.forward_mode.rules.losses import bind


def _bound(names: tuple[str, ...], args: Args, kwargs: dict[str, Any]) -> dict[str, Any]:
    return {**dict(zip(names, args, strict=False)), **kwargs}


def _linear(e: Tracking, func: Callable[..., Any], args: Args, kwargs: dict[str, Any]) -> Any:
    call = _bound(("input", "weight", "bias"), args, kwargs)
    x, weight, bias = call["input"], call["weight"], call.get("bias")
    if x.dim() < 2:
        return NotImplemented
    track, v = e.track(x), e.tangents(weight)
    shift = None if bias is None else e.tangents(bias)
    stack = None
    if track is None:
        out, moved = F.linear(x, weight, bias), None
    elif torch.is_autocast_enabled(x.device.type) or e.count * x.numel() > _WORTH_STACKING * weight.numel():
        out, moved = F.linear(x, weight, bias), F.linear(track.of(x), weight)
    else:
        rows = track.stack if track.stack is not None else torch.cat([x.unsqueeze(0), track.of(x)])
        stack = torch.mm(rows.reshape(rows.shape[:-1].numel(), rows.shape[-1]), weight.t()).view(*rows.shape[:-1], len(weight))
        out, moved = stack[0], stack[1:]
        if bias is not None:
            out.add_(bias)
    if v is not None:
        moved = _added(moved, x, v, shift)
    elif shift is not None:
        wide = shift.view(e.count, *[1] * (x.dim() - 1), -1)
        moved = wide.expand(e.count, *out.shape).to(out.dtype).clone() if moved is None else moved.add_(wide)
    assert moved is not None
    return e.attach(out, moved, stack, fresh=True)


def _product(e: Tracking, func: Callable[..., Any], args: Args, kwargs: dict[str, Any]) -> Any:
    """b + x W of matrices: a linear layer with its weight turned around."""
    if len(args) != 3 or kwargs or args[0].dim() != 1 or args[0].shape[0] != args[2].shape[1]:
        return NotImplemented
    bias, x, weight = args
    turned, v = weight.mT, e.tangents(weight)
    if v is not None:
        e.attach(turned, v.mT)
    return _linear(e, F.linear, (x, turned, bias), {})


_WORTH_STACKING = 4  # copying this many times the weight's numbers costs more than reading it twice; in low precision a bias belongs inside


def _added(moved: Tensor | None, x: Tensor, v: Tensor, shift: Tensor | None) -> Tensor:
    """x Vᵀ + ḃ for every tangent, added to what moved already."""
    if len(v) == 1:
        along = F.linear(x, v[0], None if shift is None else shift[0]).unsqueeze(0)
        return along if moved is None else moved.add_(along)
    along = torch.matmul(x.flatten(0, -2), v.mT).view(len(v), *x.shape[:-1], -1)
    along = along if shift is None else along.add_(shift.view(len(v), *[1] * (x.dim() - 1), -1))
    return along if moved is None else moved.add_(along)


def _convolution(e: Tracking, func: Callable[..., Any], args: Args, kwargs: dict[str, Any]) -> Any:
    call = _bound(("input", "weight", "bias", "stride", "padding", "dilation", "groups"), args, kwargs)
    x, weight, bias = call.pop("input"), call.pop("weight"), call.pop("bias", None)
    if x.dim() != weight.dim():
        return NotImplemented
    v, shift, tangents = e.tangents(weight), None if bias is None else e.tangents(bias), e.tangents(x)
    out: Tensor = func(x, weight, bias, **call)
    moved = None
    if tangents is not None:
        moved = func(tangents.flatten(0, 1), weight, None, **call).unflatten(0, (e.count, -1))
    if v is not None:
        along = [func(x, kernel, None if shift is None else shift[k], **call) for k, kernel in enumerate(v)]
        if moved is None:
            moved = along[0].unsqueeze(0) if e.count == 1 else torch.stack(along)
        else:
            for k in range(e.count):
                moved[k].add_(along[k])
    elif shift is not None:
        wide = shift.view(e.count, 1, -1, *[1] * (x.dim() - 2))
        moved = wide.expand(e.count, *out.shape).to(out.dtype).clone() if moved is None else moved.add_(wide)
    assert moved is not None
    return e.attach(out, moved, fresh=True)


def _relu(e: Tracking, func: Callable[..., Any], args: Args, kwargs: dict[str, Any]) -> Any:
    x = args[0] if args else kwargs["input"]
    track = e.track(x)
    assert track is not None
    if func in _RELUS_IN_PLACE or kwargs.get("inplace"):
        if not owned(track):
            return NotImplemented
        F.relu_(x)
        rectified(track.of(x), x, track.of(x))
        return x
    if x.dim() > 2 and track.stack is None:
        return e.follow(torch.relu(x), x)
    stack = torch.empty((1 + e.count, *x.shape), dtype=x.dtype, device=x.device)
    out = torch.clamp_min(x, 0, out=stack[0])
    return e.attach(out, rectified(track.of(x), out, stack[1:]), stack, fresh=True)


_RELUS_IN_PLACE = {torch.relu_, Tensor.relu_, F.relu_}


def _max_pool(e: Tracking, func: Callable[..., Any], args: Args, kwargs: dict[str, Any]) -> Any:
    call = _bound(("input", "kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices"), args, kwargs)
    x, both = call["input"], call.pop("return_indices", False) or func is F.max_pool2d_with_indices
    if x.dim() != 4:
        return NotImplemented
    track = e.track(x)
    assert track is not None
    early = track.behind is not None  # the winner of a ReLU is positive or moves nothing: that can be seen behind the pool
    tangents = track.behind[0].of(x) if track.behind is not None else track.of(x)
    if torch.compiler.is_compiling() and not both and (size := images.windows(call)) is not None:
        out, moved = images.pooled(x, tangents, size, rectified=early)
        return e.attach(out, moved, fresh=True)
    out, winners = F.max_pool2d_with_indices(**call)
    moved = torch.stack([_at(t, winners) for t in tangents]) if e.count > 1 else _at(tangents[0], winners).unsqueeze(0)
    e.attach(out, rectified(moved, out, moved) if early else moved, fresh=True)
    return (out, winners) if both else out


def _at(t: Tensor, winners: Tensor) -> Tensor:
    """Numbers [N, C, H, W] at the places that pooling chose, in the order in memory that they have."""
    if not t.is_contiguous(memory_format=torch.channels_last):
        return t.flatten(2).gather(2, winners.flatten(2)).view(winners.shape)
    last, places = t.permute(0, 2, 3, 1), winners.permute(0, 2, 3, 1)
    return last.flatten(1, 2).gather(1, places.flatten(1, 2)).view(places.shape).permute(0, 3, 1, 2)


def _shape(e: Tracking, func: Callable[..., Any], args: Args, kwargs: dict[str, Any]) -> Any:
    x = args[0] if args else kwargs["input"]
    track = e.track(x)
    if track is None:
        return NotImplemented
    out = func(*args, **kwargs)
    if out.dtype != x.dtype:  # view() can also mean that
        return NotImplemented
    moved = track.of(x).reshape(e.count, *out.shape)
    track.fresh = False  # the result may be a view of it
    return e.attach(out, moved, track.stack if out.shape == x.shape else None)


def _add(e: Tracking, func: Callable[..., Any], args: Args, kwargs: dict[str, Any]) -> Any:
    if len(args) != 2 or kwargs or not isinstance(args[0], Tensor):
        return NotImplemented
    x, y = args
    here, there = e.tangents(x), e.tangents(y) if isinstance(y, Tensor) else None
    out = func(x, y)
    dims = out.dim()
    wide = [t.reshape(e.count, *[1] * (dims + 1 - t.dim()), *t.shape[1:]) for t in (here, there) if t is not None]
    moved = wide[0] + wide[1] if len(wide) == 2 else wide[0].expand(e.count, *out.shape).clone()
    return e.attach(out, moved.to(out.dtype), fresh=True)


def _add_in_place(e: Tracking, func: Callable[..., Any], args: Args, kwargs: dict[str, Any]) -> Any:
    if len(args) != 2 or kwargs:
        return NotImplemented
    x, y = args
    track, there = e.track(x), e.tangents(y) if isinstance(y, Tensor) else None
    if track is None or not owned(track) or track.behind:
        return NotImplemented
    func(x, y)
    if there is not None:
        here = track.of(x)
        here.add_(there.reshape(e.count, *[1] * (here.dim() - there.dim()), *there.shape[1:]))
    return x


def _loss(e: Tracking, func: Callable[..., Any], args: Args, kwargs: dict[str, Any]) -> Any:
    output = bind(func, args, kwargs)
    if output is None or any(isinstance(value, Tensor) and e.track(value) for key, value in output.call.items() if key != "input"):
        return NotImplemented
    logits = output.call["input"]
    tangents = e.tangents(logits)
    if tangents is None or output.call.get("reduction", "mean") == "none":
        return NotImplemented
    return e.attach(func(*args, **kwargs), output.derivative(logits, tangents), fresh=True)


RULES: dict[Callable[..., Any], Rule] = {
    F.linear: _linear,
    **dict.fromkeys((torch.addmm, Tensor.addmm), _product),
    **dict.fromkeys((torch.conv1d, torch.conv2d, torch.conv3d), _convolution),
    **dict.fromkeys((F.relu, torch.relu, Tensor.relu, *_RELUS_IN_PLACE), _relu),
    **dict.fromkeys((F.max_pool2d, torch.max_pool2d, F.max_pool2d_with_indices), _max_pool),
    **dict.fromkeys((torch.flatten, Tensor.flatten, Tensor.reshape, torch.reshape, Tensor.view, Tensor.view_as, Tensor.unflatten), _shape),
    **dict.fromkeys((torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__), _add),
    **dict.fromkeys((Tensor.add_, Tensor.__iadd__), _add_in_place),
    **dict.fromkeys((F.cross_entropy, F.mse_loss, F.binary_cross_entropy_with_logits), _loss),
}
