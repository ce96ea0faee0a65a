"""What every estimator of a gradient offers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Generator, Tensor

from forwardgrad.derivative import Objective


@dataclass(frozen=True)
class Estimate:
    """What one step found out, all on the model's device: reading a value waits for the device, keeping the record does not.

    `loss`: the loss of the batch, detached. `derivatives`: the directional derivatives ∇f·v before any clip, one a tangent (none
    for backpropagation). `forward_passes`: forward passes of work, a primal pass and each tangent pass counting one; a backward pass
    is not among them.
    """

    loss: Float[Tensor, ""]
    derivatives: Float[Tensor, " k"]
    forward_passes: int


@dataclass(frozen=True)
class Estimator(ABC):
    """An estimator of ∇f; its fields are its hyperparameters, so the object is its own configuration."""

    name: ClassVar[str]

    @property
    @abstractmethod
    def unbiased(self) -> bool:
        """Whether E[ĝ] = ∇f with these fields."""

    @abstractmethod
    def estimate(self, objective: Objective, generator: Generator | None) -> tuple[Estimate, dict[str, Tensor | None]]:
        """The record of the step and an estimate for every parameter (None where the loss does not depend on it)."""
