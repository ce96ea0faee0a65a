"""What every estimator of a gradient offers."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Generator, Tensor

from forwardgrad.factored import Gradient
from forwardgrad.objective import Objective
from forwardgrad.recipe import Measured, Recipe

Move = Callable[[Mapping[str, Gradient]], None]
"""Takes gradients by parameter, and does with them and the parameters what an optimizer does."""

UNREPLAYABLE = (
    "{0!r} cannot be made again from seeds and numbers: "
    "ZerothOrder() and ZerothOrder(perturb=LowRank()) can, and ForwardGradient(perturb=LowRank())"
)
UNLOGGABLE = (
    "{0!r} cannot be taken again from a log: ForwardGradient and ZerothOrder can that move weights by Dense(), Sparse(), "
    "LowRank() of period 1 or SplitWeights() of these, without a control variate"
)


UNDIVIDED = (
    "{0!r} is not told by numbers alone, so ranks cannot divide its directions: take directions=1, or "
    "ForwardGradient() or ZerothOrder() with Dense(), LowRank() or Sparse()"
)


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

    @property
    def told_by_numbers(self) -> bool:
        """Whether several processes that draw the same directions make one estimate by telling one another a number for each of them, and
        `estimate` has that told, by `objective.ranks`. Of all other estimators processes average the gradients."""
        return False

    def check_divided(self, parts: int) -> None:
        """ValueError where so many processes cannot divide the directions of a step among them."""
        if parts > 1 and not self.told_by_numbers:
            raise ValueError(UNDIVIDED.format(self))

    same_draws: ClassVar[bool] = False
    """Whether processes that average gradients draw the same numbers, where they would draw numbers of their own."""

    def learned_apart(self, state: Mapping[str, Tensor]) -> list[str]:
        """What in the state follows from the examples of one process, and is averaged over all of them after a step."""
        return []

    @property
    def layerwise(self) -> bool:
        """Whether `learn` moves layers while the pass goes on, so that no gradient of the whole model is ever there."""
        return False

    def learn(self, objective: Objective, generator: Generator | None, state: dict[str, Tensor], move: Move) -> Estimate:
        """As `estimate`: every gradient goes to `move`, each parameter's once and whole, when nothing of the step reads the parameter any
        more. `move` may change it."""
        record, gradients = self.estimate(objective, generator, state)
        move({name: gradient for name, gradient in gradients.items() if gradient is not None})
        return record

    @property
    def replayable(self) -> bool:
        """Whether `recipe` has an answer: an estimate is a sum of random directions that follow from seeds."""
        return False

    def recipe(self, objective: Objective, generator: Generator | None, state: dict[str, Tensor]) -> tuple[Estimate, Recipe]:
        """As `estimate`, as seeds and numbers from which it can be made again parameter by parameter. ValueError unless `replayable`."""
        if not self.replayable:
            raise ValueError(UNREPLAYABLE.format(self))
        before = twin(needed(generator))
        record, found = self.measured(objective, generator, state)
        return record, self.sown(objective.parameters, found, before)

    @property
    def loggable(self) -> bool:
        """Whether `measured` and `again` have an answer: a step can be taken again from a generator and a few numbers, without data."""
        return False

    def measured(self, objective: Objective, generator: Generator | None, state: dict[str, Tensor]) -> tuple[Estimate, Measured]:
        """As `estimate`, as what the passes found out alone: `again` makes the estimate of it. ValueError unless `loggable`."""
        raise ValueError(UNLOGGABLE.format(self))

    def weigh(self, derivatives: Float[Tensor, " k"]) -> Float[Tensor, " k"]:
        """The weights that `measured` gives, from the derivatives along all directions. ValueError where these do not tell."""
        raise ValueError(UNLOGGABLE.format(self))

    def again(self, parameters: Mapping[str, Tensor], found: Measured, generator: Generator) -> Iterator[tuple[str, Gradient]]:
        """The parts of an estimate from what `measured` gave, the directions drawn again: the bits of `parts`.

        `parameters` are those that are trained, as they were for the passes. `generator` stands where it stood before them, and is left
        where they left it.
        """
        raise ValueError(UNLOGGABLE.format(self))

    def sown(self, parameters: Mapping[str, Tensor], found: Measured, generator: Generator) -> Recipe:
        """As `again`, as a recipe. ValueError unless `replayable`."""
        raise ValueError(UNREPLAYABLE.format(self))

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


def twin(generator: Generator) -> Generator:
    """Another generator in the same state."""
    return Generator(generator.device).set_state(generator.get_state())


def check_count(what: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{what} must be a whole number of at least 1, not {value!r}")


def check_number(what: str, value: object, low: float, high: float = math.inf, *, closed: bool = False) -> None:
    """ValueError unless low < value < high (low ≤ value where the lower limit is `closed`)."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not (number and (low <= value if closed else low < value) and value < high):  # type: ignore[operator]
        limits = f"at least {low:g}" if closed else f"above {low:g}"
        raise ValueError(f"{what} must be a number {limits}{f' and below {high:g}' if math.isfinite(high) else ''}, not {value!r}")
