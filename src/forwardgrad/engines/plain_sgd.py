"""Plain gradient descent, θ ← θ(1 − γλ) − γĝ: which optimizers do that and nothing else, and the move itself.

Every engine asks `is_plain_sgd`, and where it says yes moves the parameters by `descend` instead of `optimizer.step`. The eager engine
then needs no gradient in full, the others have the move inside their graph, and in all of them `.grad` is empty after the step.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.optim import optimizer as torch_optimizer

from forwardgrad.factored import Gradient


def is_plain_sgd(optimizer: torch.optim.Optimizer) -> bool:
    """Whether a step of the optimizer is θ ← θ(1 − γλ) − γĝ and nothing else, γ its learning rate and λ its weight decay.

    That is `torch.optim.SGD` itself without momentum (Nesterov's needs some), `maximize`, `differentiable` or hooks around the step. The
    learning rate may be a tensor; `foreach` and `fused` are ways to compute the same. A subclass may do anything, so it is not plain.
    """
    extras = ("momentum", "maximize", "differentiable")
    settings = (group.get(extra) for group in optimizer.param_groups for extra in extras)
    return type(optimizer) is torch.optim.SGD and not has_step_hooks(optimizer) and not any(settings)


def has_step_hooks(optimizer: torch.optim.Optimizer) -> bool:
    """Whether functions of the user's are called around a step: only `optimizer.step` itself calls them."""
    own = optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks
    return bool(own or torch_optimizer._global_optimizer_pre_hooks or torch_optimizer._global_optimizer_post_hooks)


class Rate(NamedTuple):
    """How the parameters of a group move: θ ← θ · keep − lr · ĝ. `keep` is 1 − γλ, or None without weight decay.

    For Adam, `lr` is γ/(1 − β₁ᵗ) of the step t to come, and `root` 1/√(1 − β₂ᵗ).
    """

    lr: float | Tensor
    keep: float | Tensor | None
    root: float | Tensor | None = None


def rates_of(optimizer: torch.optim.Optimizer) -> list[Rate]:
    """The rates of each group, as they are now."""
    rates = []
    for group in optimizer.param_groups:
        lr, decay = (_scalar(group[name]) for name in ("lr", "weight_decay"))
        decays = isinstance(decay, Tensor) or decay != 0  # to look into a tensor would wait for the device
        rates.append(Rate(lr, 1 - lr * decay if decays else None))
    return rates


def _scalar(number: float | Tensor) -> float | Tensor:
    """A number without dimensions: a tensor with one would hand it on to a parameter that has none."""
    return number.reshape(()) if isinstance(number, Tensor) else number


@torch.no_grad()
def descend(optimizer: torch.optim.Optimizer, parts: Iterable[tuple[Tensor, Gradient]], rates: Sequence[Rate] | None = None) -> None:
    """Move parameters by parts of the estimate of their gradients, in place, each part as it is made: no gradient has to be held in full.

    A parameter may have several parts, or none and then stays where it is, as one without a gradient does. Parameters that are not the
    optimizer's stay too. `rates`: those to go by where they are not numbers of the optimizer, but tensors that a graph reads.
    """
    of_groups = zip(optimizer.param_groups, rates_of(optimizer) if rates is None else rates, strict=True)
    rate_of = {id(p): rate for group, rate in of_groups for p in group["params"]}
    begun = set[int]()
    for p, part in parts:
        if (rate := rate_of.get(id(p))) is None:
            continue
        if rate.keep is not None and id(p) not in begun:  # once a step, however many parts there are
            p.mul_(rate.keep)
        begun.add(id(p))
        if not isinstance(part, Tensor):
            part.add_to_(p, -rate.lr)
        elif isinstance(rate.lr, float):
            p.add_(part, alpha=-rate.lr)
        else:  # alpha would wait for the device to read the tensor
            p.sub_(part * rate.lr)
    optimizer._opt_called = True  # type: ignore[attr-defined]  # schedulers warn where they see no step of the optimizer before theirs


class HeldRates:
    """The rates of an optimizer as tensors that stay the same objects, for a graph to read, and are written to when a rate changes."""

    def __init__(self) -> None:
        self._held: dict[tuple[int, str], tuple[float | None, Tensor]] = {}

    def written(self, rates: Sequence[Rate], device: torch.device) -> list[Rate]:
        """These rates of each group in the tensors; nothing waits for the device."""
        return [
            Rate(*(None if value is None else self._write((index, name), value, device) for name, value in rate._asdict().items()))  # type: ignore[arg-type]
            for index, rate in enumerate(rates)
        ]

    def _write(self, key: tuple[int, str], value: float | Tensor, device: torch.device) -> Tensor:
        last, tensor = self._held.get(key, (None, None))
        if tensor is None:
            tensor = torch.empty((), dtype=torch.float64, device=device)
        if isinstance(value, Tensor):
            tensor.copy_(value)
            self._held[key] = None, tensor
        elif value != last:
            tensor.fill_(value)
            self._held[key] = float(value), tensor
        return tensor


def tensors_of(rates: Sequence[Rate]) -> list[Tensor]:
    """The tensors among some rates, in order."""
    return [number for rate in rates for number in rate if isinstance(number, Tensor)]
