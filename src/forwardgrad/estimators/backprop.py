"""Reverse-mode AD: the exact gradient, and the arm every other is compared with."""

from __future__ import annotations

from collections.abc import Mapping
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

    def variance(self, gradient: Mapping[str, Tensor]) -> float:
        return 0.0

    def estimate(
        self, objective: Objective, generator: Generator | None, state: dict[str, Tensor]
    ) -> tuple[Estimate, dict[str, Tensor | None]]:
        parameters = objective.parameters
        held = {name: p.grad for name, p in parameters.items()}
        try:  # through .grad, not autograd.grad: only accumulation copies what shares memory with other tensors, and runs hooks
            for p in parameters.values():
                p.grad = None
            with torch.enable_grad():
                loss = objective.live()
                loss.backward(inputs=list(parameters.values()))
            gradients = {name: p.grad for name, p in parameters.items()}
        finally:
            for name, p in parameters.items():
                p.grad = held[name]
        if all(gradient is None for gradient in gradients.values()):
            raise RuntimeError("the loss does not depend on any trainable parameter: there is nothing to differentiate")
        return Estimate(loss.detach(), loss.new_empty(0), 1), gradients
