"""`Nesterov`: momentum whose gradient is taken at the look-ahead point, which torch's optimizers lack."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.optim import Optimizer


class Nesterov(Optimizer):
    """Nesterov's accelerated gradient, the gradient taken at the look-ahead point θ + μv.

    Formula: v ← μv − γ·g(θ + μv); θ ← θ + v.

    `torch.optim.SGD(nesterov=True)` is the re-parametrised form: it stores the look-ahead point as its parameters and keeps γ out of its
    buffer. While γ is constant the two walk the same path (torch's parameters are this optimizer's θ + μv); once γ changes they part,
    because v here carries the learning rates of the past steps and torch's buffer is rescaled by the present one.

    Args:
        params: parameters or groups of them, as for any `torch.optim` optimizer.
        lr: learning rate γ > 0.
        momentum: μ in [0, 1).

    Raises ValueError where lr or momentum are outside these limits, and where `step` is called without a closure.

    Source: Sutskever et al., "On the importance of initialization and momentum in deep learning" (2013), eqs. 3-4; the paper's appendix,
    whose printed sign before γ is a slip.
    """

    def __init__(self, params: Any, lr: float, momentum: float) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        lr, momentum = (param_group.get(name, self.defaults[name]) for name in ("lr", "momentum"))
        if not lr > 0:
            raise ValueError(f"lr must be positive, not {lr}")
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum must lie in [0, 1), not {momentum}")
        super().add_param_group(param_group)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Move to the look-ahead point, call `closure` (which clears and fills the gradients there and returns the loss), step.

        If the closure raises, the parameters go back to θ, up to rounding.
        """
        if closure is None:
            raise ValueError("look-ahead Nesterov needs a closure that fills the gradients: optimizer.step(closure)")
        self._look_ahead(1)
        try:
            with torch.enable_grad():
                loss = closure()
        except BaseException:
            self._look_ahead(-1)
            raise
        for group in self.param_groups:
            lr, momentum = group["lr"], group["momentum"]
            for p in group["params"]:
                velocity = self.state[p].get("velocity")
                if p.grad is None:
                    if velocity is not None:  # θ + μv is where a step with g = 0 ends
                        velocity.mul_(momentum)
                    continue
                if velocity is None:
                    velocity = self.state[p]["velocity"] = torch.zeros_like(p, memory_format=torch.preserve_format)
                p.add_(p.grad, alpha=-lr)  # (θ + μv) − γg is θ + the new v
                velocity.mul_(momentum).add_(p.grad, alpha=-lr)
        return loss

    def _look_ahead(self, sign: int) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if "velocity" in self.state[p]:
                    p.add_(self.state[p]["velocity"], alpha=sign * group["momentum"])
