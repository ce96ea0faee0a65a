"""Where on a line a loss is evaluated, and how its slope follows from the values there."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class Stencil:
    """Points at ±ε on both sides of θ, or at ε on one side, which are compared with one value at θ."""

    epsilon: float
    two_sided: bool

    @property
    def steps(self) -> tuple[float, ...]:
        return (self.epsilon, -self.epsilon) if self.two_sided else (self.epsilon,)

    def slopes(self, values: Float[Tensor, "s k ..."], base: Tensor | None) -> Float[Tensor, "k ..."]:
        """Rates of change along k lines, from what was found at the steps and, on one side, at θ."""
        return (values[0] - values[1]) / (2 * self.epsilon) if base is None else (values[0] - base) / self.epsilon

    def middle(self, values: Float[Tensor, "s k ..."], base: Tensor | None) -> Float[Tensor, "k ..."]:
        """What is taken for the value at θ, for each of the lines."""
        return values[0] / 2 + values[1] / 2 if base is None else base.expand_as(values[0])
