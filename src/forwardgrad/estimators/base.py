"""What every estimator of a gradient offers."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Generator, Tensor

from forwardgrad.factored import Gradient
from forwardgrad.objective import Objective


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
    reverse: ClassVar[bool] = False
    """Whether an estimate makes a backward pass, and so saves activations for it."""

    @property
    @abstractmethod
    def unbiased(self) -> bool:
        """Whether E[ĝ] = ∇f with these fields."""

    @property
    def stateful(self) -> bool:
        """Whether the estimator learns from step to step, and so needs a state that is kept between them."""
        return False

    def variance(self, gradient: Mapping[str, Tensor]) -> float | None:
        """E‖ĝ − Eĝ‖²/‖∇f‖² where a formula gives it, from the exact gradient by parameter; None where there is none."""
        return None

    @abstractmethod
    def estimate(
        self, objective: Objective, generator: Generator | None, state: dict[str, Tensor]
    ) -> tuple[Estimate, dict[str, Tensor | None]]:
        """The record of the step and an estimate for every parameter: None where the loss does not depend on it, or nothing is known yet.

        `state` is what a stateful estimator remembers: it fills an empty one and updates a filled one in place; others leave it alone.
        """

    def parts(
        self, objective: Objective, generator: Generator | None, state: dict[str, Tensor]
    ) -> tuple[Estimate, Iterator[tuple[str, Gradient]]]:
        """As `estimate`, in parts by parameter that add up to it: each is made when it is asked for, so that not all have to be held.

        None of them depends on the parameters any more, so a part may be taken off its parameter before the next one is asked for.
        """
        record, gradients = self.estimate(objective, generator, state)
        return record, ((name, gradient) for name, gradient in gradients.items() if gradient is not None)


def needed(generator: Generator | None) -> Generator:
    """The generator that directions are drawn from; ValueError where none was given."""
    if not isinstance(generator, Generator):
        raise ValueError("directions need an explicit generator: pass generator=torch.Generator().manual_seed(seed)")
    return generator


def check_count(what: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{what} must be a whole number of at least 1, not {value!r}")


def check_number(what: str, value: object, low: float, high: float = math.inf, *, closed: bool = False) -> None:
    """ValueError unless low < value < high (low ≤ value where the lower limit is `closed`)."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not (number and (low <= value if closed else low < value) and value < high):  # type: ignore[operator]
        limits = f"at least {low:g}" if closed else f"above {low:g}"
        raise ValueError(f"{what} must be a number {limits}{f' and below {high:g}' if math.isfinite(high) else ''}, not {value!r}")
