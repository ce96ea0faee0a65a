"""Reverse-mode AD: the exact gradient, and the arm every other is compared with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Generator, Tensor

from forwardgrad.derivative import Objective
from forwardgrad.estimators.base import Estimate, Estimator


@dataclass(frozen=True)
class Backprop(Estimator):
    """The exact gradient by backpropagation: ĝ = ∇f.

    Bias and variance: none beyond the choice of the batch.
    Cost: one forward pass and one backward pass (about two more forward passes of work), with the activations kept in between.
    Source: Rumelhart, Hinton and Williams (1986).
    """

    name: ClassVar[str] = "backprop"

    @property
    def unbiased(self) -> bool:
        return True

    def estimate(self, objective: Objective, generator: Generator | None = None) -> tuple[Estimate, dict[str, Tensor | None]]:
        with torch.enable_grad():
            loss = objective.live()
        gradients = torch.autograd.grad(loss, list(objective.parameters.values()), allow_unused=True)
        return Estimate(loss.detach(), loss.new_empty(0), 1), dict(zip(objective.parameters, gradients, strict=True))
