"""`Dense`: every weight moves on its own, as in the paper. A parameter that no known layer uses always moves this way."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from forwardgrad.directions import Directions, Law
from forwardgrad.factored import Along, Gradient
from forwardgrad.forward_mode import levels
from forwardgrad.perturbations.base import Entered, Perturbation, Pick, Sown
from forwardgrad.perturbations.layers import Layer


@dataclass(frozen=True)
class Dense(Perturbation):
    """Every weight moves on its own: V with independent entries of mean 0 and variance 1, shared by the batch.

    Formula: ĝ = d·V, d = ⟨∇f, V⟩.
    Bias: none. Variance: E‖ĝ‖² = (n + 2)‖∇f‖² (Gaussian) or n‖∇f‖² (Rademacher) over all n weights of the model.
    Cost: n random numbers a tangent and a second matrix product in every layer.
    Source: Baydin et al. (2022), Definition 1; Ren et al. (2023), eq. 2.
    """

    name: ClassVar[str] = "dense"

    @property
    def apart(self) -> bool:
        return False

    def enter(self, layer: Layer, x: Tensor, out: Tensor, directions: Directions) -> Entered | None:
        return None

    def check(self, law: object) -> None:
        pass

    def variance(self, law: Law, gradient: Mapping[str, Tensor], count: int) -> float | None:
        return law.second_moment(sum(g.numel() for g in gradient.values()), count) - 1

    def masked_(self, directions: Tensor, parameter: Tensor) -> Tensor:
        """Set to zero what stands still of the directions for a parameter, in place: nothing does."""
        return directions


class DenseUse(Sown):
    """A parameter as a whole, wherever it is used outside a layer with a rule."""

    def __init__(self, name: str, v: Tensor, directions: Directions | None = None, number: int = 0) -> None:
        """`directions`, `number`: what the tangents were drawn from at which place, where they were."""
        super().__init__()
        self.name, self.v, self.directions, self.number = name, v, directions, number

    def tangent(self, pick: Pick) -> Tensor:
        return pick(self.v)

    def gradient(self, weights: Tensor) -> Mapping[str, Gradient]:
        """A single tangent is used up, sparing a copy of the parameters: the directions are gone afterwards."""
        shared = weights.sum(1).to(self.v.dtype)
        return {self.name: Along(self.v[0], shared[0]) if len(self.v) == 1 else torch.tensordot(shared, self.v, dims=1)}

    def along(self, directions: Directions) -> DenseUse:
        directions.next_place = self.number
        return DenseUse(self.name, directions.draw(tuple(self.v.shape[1:]), self.v), directions, self.number)

    @property
    def names(self) -> list[str]:
        return [self.name]

    def gram(self) -> Tensor:
        flat = self.v.reshape(len(self.v), -1)
        return (flat @ flat.T).unsqueeze(2)

    def inner(self, other: dict[str, Tensor]) -> Tensor:
        return (self.v.reshape(len(self.v), -1) @ other[self.name].reshape(-1)).unsqueeze(1)


class WholeUse(Sown):
    """As `DenseUse`, its directions drawn again wherever they are needed: none is held of more than a few numbers."""

    def __init__(self, name: str, parameter: Tensor, directions: Directions) -> None:
        super().__init__()
        self.name, self._parameter, self.directions, self.number = name, parameter, directions, directions.next_place
        held = parameter.numel() <= _FEW
        self._numbers = (directions.plan if held else directions.replayed)(tuple(parameter.shape), parameter)

    def tangent(self, pick: Pick) -> Tensor:
        return pick(self._numbers())

    def displaced_together(self, tensor: Tensor, steps: Tensor) -> Tensor:
        def moved(parameter: levels.Members) -> Tensor:
            v = self._numbers()
            by = steps.view(-1, len(v), *[1] * (v.dim() - 1))
            return parameter.all + (v * by).flatten(0, 1).to(parameter.all.dtype)

        return levels.together(moved, tensor)

    def gradient(self, weights: Tensor) -> Mapping[str, Gradient]:
        numbers = self._numbers()
        return DenseUse(self.name, numbers.clone() if len(numbers) == 1 else numbers).gradient(weights)  # which uses up a single one

    def along(self, directions: Directions) -> WholeUse:
        directions.next_place = self.number
        return WholeUse(self.name, self._parameter, directions)

    @property
    def names(self) -> list[str]:
        return [self.name]


_FEW = 4096  # numbers, such as a gain: to draw them takes as long as all else that is done with them
