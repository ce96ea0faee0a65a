"""`Dense`: every weight moves on its own, as in the paper. A parameter that no known layer uses always moves this way."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from forwardgrad.directions import Directions
from forwardgrad.factored import Along, Gradient
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


class DenseUse(Sown):
    """A parameter as a whole, wherever it is used outside a layer with a rule."""

    def __init__(self, name: str, v: Tensor) -> None:
        super().__init__()
        self.name, self.v = name, v

    def tangent(self, pick: Pick) -> Tensor:
        return pick(self.v)

    def gradient(self, weights: Tensor) -> Mapping[str, Gradient]:
        """A single tangent is used up, sparing a copy of the parameters: the directions are gone afterwards."""
        shared = weights.sum(1).to(self.v.dtype)
        return {self.name: Along(self.v[0], shared[0]) if len(self.v) == 1 else torch.tensordot(shared, self.v, dims=1)}

    @property
    def names(self) -> list[str]:
        return [self.name]

    def gram(self) -> Tensor:
        flat = self.v.reshape(len(self.v), -1)
        return (flat @ flat.T).unsqueeze(2)

    def inner(self, other: dict[str, Tensor]) -> Tensor:
        return (self.v.reshape(len(self.v), -1) @ other[self.name].reshape(-1)).unsqueeze(1)
