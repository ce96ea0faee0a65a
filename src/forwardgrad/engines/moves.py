"""The moves of torch's own optimizers, parameter by parameter: as `optimizer.step` makes them, and inside a graph."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from forwardgrad.engines.plain_sgd import Rate, has_step_hooks, rates_of

_ADAMS = (torch.optim.Adam, torch.optim.AdamW)


def is_by_parameter(optimizer: torch.optim.Optimizer) -> bool:
    """Whether an optimizer moves each parameter by its own gradient and state alone, and its arithmetic is known here.

    That is `torch.optim.SGD`, `Adam` and `AdamW` themselves, without `differentiable` or hooks around the step.
    """
    known = type(optimizer) in (torch.optim.SGD, *_ADAMS)
    return known and not has_step_hooks(optimizer) and not any(group.get("differentiable") for group in optimizer.param_groups)


def settings_of(optimizer: torch.optim.Optimizer) -> Hashable:
    """All that a graph has of an optimizer written into it: its options but the learning rates."""
    return tuple(
        tuple((name, id(value) if isinstance(value, Tensor) else value) for name, value in group.items() if name not in ("params", "lr"))
        for group in optimizer.param_groups
    )


def rates_by_parameter(optimizer: torch.optim.Optimizer) -> list[Rate] | None:
    """The rates of each group at the step to come, for a graph to read.

    None where parameters of one group have taken different numbers of steps of Adam: no single number says what their rate is. None too
    where an option is a tensor, which a graph would have to read.
    """
    options = [value for group in optimizer.param_groups for name, value in group.items() if name not in ("params", "lr")]
    if any(isinstance(part, Tensor) for value in options for part in (value if isinstance(value, tuple) else (value,))):
        return None
    rates = rates_of(optimizer)
    if not isinstance(optimizer, _ADAMS):
        return rates
    counts = [{float(state["step"]) for p in group["params"] if (state := optimizer.state.get(p))} for group in optimizer.param_groups]
    if any(len(steps) > 1 for steps in counts):
        return None
    groups = zip(optimizer.param_groups, rates, counts, strict=True)
    return [_adam_rate(group, rate, steps.pop() + 1 if steps else 1) for group, rate, steps in groups]


def _adam_rate(group: dict[str, Any], rate: Rate, step: float) -> Rate:
    beta1, beta2 = group["betas"]
    return Rate(rate.lr / (1 - beta1**step), rate.keep, (1 - beta2**step) ** -0.5)


@torch.no_grad()
def move(optimizer: torch.optim.Optimizer, parameters: Sequence[Tensor], rates: Sequence[Rate] | None = None) -> None:
    """Let an optimizer that goes by parameter move these by their `.grad`, and drop that. All other parameters stay as they are.

    `rates`: tensors that a graph reads in place of the numbers of the optimizer; every parameter has its state then.
    """
    chosen = {id(p) for p in parameters}
    if rates is None:
        with _only(optimizer, chosen):
            optimizer.step()
    else:
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            for p in group["params"]:
                if id(p) in chosen:
                    (_adam if isinstance(optimizer, _ADAMS) else _sgd)(p, optimizer.state[p], group, rate)
    for p in parameters:
        p.grad = None
    optimizer._opt_called = True  # type: ignore[attr-defined]  # schedulers warn where they see no step of the optimizer before theirs


@contextmanager
def _only(optimizer: torch.optim.Optimizer, chosen: set[int]) -> Iterator[None]:
    """Inside, the optimizer has the chosen parameters alone."""
    before = [group["params"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["params"] = [p for p in group["params"] if id(p) in chosen and p.grad is not None]
    try:
        yield
    finally:
        for group, parameters in zip(optimizer.param_groups, before, strict=True):
            group["params"] = parameters


def _adam(p: Tensor, state: dict[str, Any], group: dict[str, Any], rate: Rate) -> None:
    """A step of Adam or AdamW, its corrections numbers from outside: in a compiler's loop they would be computed for every element."""
    assert p.grad is not None
    assert rate.root is not None
    beta1, beta2 = group["betas"]
    step = -p.grad if group["maximize"] else p.grad
    if rate.keep is not None and group["decoupled_weight_decay"]:
        p.mul_(rate.keep)
    elif group["weight_decay"] != 0:
        step = step.add(p, alpha=group["weight_decay"])
    mean, square = state["exp_avg"], state["exp_avg_sq"]
    mean.lerp_(step, 1 - beta1)
    square.mul_(beta2).addcmul_(step, step, value=1 - beta2)
    if group["amsgrad"]:
        square = state["max_exp_avg_sq"].copy_(torch.maximum(state["max_exp_avg_sq"], square))
    p.sub_(mean * rate.lr / (square.sqrt() * rate.root + group["eps"]))
    state["step"].add_(1)


def _sgd(p: Tensor, state: dict[str, Any], group: dict[str, Any], rate: Rate) -> None:
    """A step of SGD with momentum whose rate may be a tensor, which torch's own would read."""
    assert p.grad is not None
    step = -p.grad if group["maximize"] else p.grad
    if group["weight_decay"] != 0:
        step = step.add(p, alpha=group["weight_decay"])
    if group["momentum"] != 0:
        kept = state["momentum_buffer"].mul_(group["momentum"]).add_(step, alpha=1 - group["dampening"])
        step = step.add(kept, alpha=group["momentum"]) if group["nesterov"] else kept
    p.sub_(step * rate.lr)
