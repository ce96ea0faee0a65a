"""What every perturbation offers: it says what moves in a layer, and turns a directional derivative into the layer's gradient."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor
from torch.func import vmap

from forwardgrad.directions import Directions, Law
from forwardgrad.factored import Gradient
from forwardgrad.perturbations.examples import ExamplesPlace
from forwardgrad.perturbations.layers import Layer

Pick = Callable[[Tensor], Tensor]
"""From a stack of K to the one that is being evaluated: `stack[k]`, with k unknown to the code while K are evaluated at once."""

Step = float | Tensor
"""How far to go along a direction: a number, or one that is unknown to the code while several points are evaluated at once."""


class Entered(ABC):
    """One use of a layer or parameter that moves, in one evaluation: its random directions, and the gradient that follows from them.

    `rows` is the number of directions that are independent of one another (1 where all examples share one), `dims` the dimensions along
    which examples may lie there, `place` what is known of that. `kept` holds what the gradient needs of the primal pass; while the pass
    lasts the tensors in it belong to torch's transforms, and are replaced by plain ones at its end.
    """

    kind: ClassVar[str] = "whole weights"
    """What moves, in words."""
    rows: int = 1
    dims: range = range(0)
    place: ExamplesPlace = ExamplesPlace("")
    shape: torch.Size
    """That of what moves."""

    def __init__(self) -> None:
        self.kept: dict[str, Tensor] = {}

    def by_row(self, weights: Float[Tensor, "k n"]) -> Float[Tensor, "k rows"]:
        """A number of each example, or one for all, as one of every row."""
        if weights.shape[1] == 1 or self.place.rows is None:
            return weights.expand(-1, self.rows)
        return self.place.rows.along(weights, self.rows)

    @abstractmethod
    def tangent(self, pick: Pick) -> Tensor:
        """What stands at the place moves by this along one tangent."""

    def displaced(self, tensor: Tensor, step: Step, pick: Pick) -> Tensor:
        """What stands at the place, a step further along one tangent. It may be written into `tensor`, a result that nobody else has."""
        moved = self.tangent(pick)
        if isinstance(step, Tensor):
            return tensor + (moved * step).to(tensor.dtype)
        return torch.add(tensor, moved.to(tensor.dtype), alpha=step)

    def displaced_together(self, tensor: Tensor, steps: Float[Tensor, " n"]) -> Tensor | None:
        """As `displaced`, of all members of the batch that is evaluated; None where nothing is gained over what `vmap` makes of that.

        Members go through the directions once for each of the sizes of step.
        """
        return None

    @abstractmethod
    def gradient(self, weights: Float[Tensor, "k n"]) -> Mapping[str, Gradient]:
        """Σₖ Σ_b weights[k, b] · (direction k of example b), by parameter name; a single weight is that of all examples."""

    def along(self, directions: Directions) -> Entered:
        """The same use of the same place, once more along other directions, of which a gradient is asked alone."""
        raise NotImplementedError(f"{type(self).__name__} has no `along`, which ranks that divide the directions need")

    def gram(self) -> Float[Tensor, "k k rows"]:
        """Inner products of the directions of each row: what combine="projection" needs, and nothing else."""
        raise NotImplementedError(f"{type(self).__name__} has no `gram`, which combine='projection' needs")

    @property
    @abstractmethod
    def names(self) -> list[str]:
        """The parameters that this perturbation has a gradient for."""


class Sown(Entered):
    """Weights that move: their directions have covariance I, and the move of the layer's output is added when the layer is called.

    `moves`: whether any direction of the evaluation moves them.
    """

    moves: bool = True

    def once_more(self, layer: Layer, x: Tensor, out: Tensor) -> Sown:
        """The same use, its directions too, in a call for other rows of the batch; only where the perturbation is `parted`."""
        raise NotImplementedError(f"{type(self).__name__} has no `once_more`, which a layer that is called for a few rows at a time needs")

    def inner(self, other: dict[str, Tensor]) -> Float[Tensor, "k rows"]:
        """⟨direction k of row b, other⟩ with `other` given by parameter name: what a control variate needs, and nothing else."""
        raise NotImplementedError(f"{type(self).__name__} has no `inner`, which a control variate needs: let `weights` be False")

    def tangents(self, count: int) -> Tensor:
        """What it moves by along each of `count` tangents."""
        if count == 1:
            return self.tangent(lambda stack: stack[0]).unsqueeze(0)
        each = vmap(lambda index: self.tangent(lambda stack: stack.index_select(0, index.reshape(1)).squeeze(0)))
        moved: Tensor = each(torch.arange(count))
        return moved

    def add_to_(self, tangents: Tensor) -> None:
        """Add that to what the output moves by already."""
        tangents.add_(self.tangents(len(tangents)))


@dataclass(frozen=True)
class Perturbation(ABC):
    """What is perturbed; its fields are its hyperparameters. Uses of parameters outside the layers with rules get dense tangents."""

    name: ClassVar[str]

    @property
    def apart(self) -> bool:
        """Whether examples move on their own, so that it matters which of them a part of the loss belongs to."""
        return True

    @property
    def parted(self) -> bool:
        """Whether a use of a layer can be made of calls for a few rows each, all of which move along the same directions (`once_more`)."""
        return False

    @property
    def weights(self) -> bool:
        """Whether directions lie in the space of the weights and have an `inner` product with others there, as a control variate asks."""
        return True

    @property
    def unbiased(self) -> bool:
        """Whether the mean of the estimates with these directions is the gradient."""
        return True

    @property
    def least(self) -> int:
        """The fewest directions that an estimate needs."""
        return 1

    def variance(self, law: Law, gradient: Mapping[str, Tensor], count: int) -> float | None:
        """E‖ĝ − ∇f‖²/‖∇f‖² of the mean of `count` directions where a formula gives it, from the exact gradient by parameter."""
        return None

    def among(self, parameters: Mapping[str, Tensor], first: int, total: int) -> Perturbation:
        """What moves in an evaluation along the directions from `first` on, of `total` in all, where these parameters are trained."""
        return self

    def whole(self, name: str, directions: Directions, make: Callable[[Directions], Sown]) -> Sown:
        """A parameter that moves as a whole: what `make` makes of the directions that move it."""
        return make(directions)

    def rules(self, layer: Layer) -> bool:
        """Whether this can be a layer with a rule, and not one whose parameters move as a whole."""
        return True

    @abstractmethod
    def enter(self, layer: Layer, x: Tensor, out: Tensor, directions: Directions) -> Entered | None:
        """Draw for one use of a layer with input x and output out (primal values); None for dense tangents on its parameters."""

    def check(self, law: Law) -> None:
        """Raise ValueError for a law that these directions cannot be drawn from."""
        if getattr(law, "joint", False):
            raise ValueError(f"the law {law.name} couples all weights of a tangent: it goes with perturb=Dense() alone, not {self.name}")
