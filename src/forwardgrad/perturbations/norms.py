"""How the gain and bias of a normalisation move: each example has a direction of its own, since they are few numbers."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from forwardgrad.directions import Directions
from forwardgrad.perturbations.base import Pick, Sown
from forwardgrad.perturbations.layers import Norm


class PerExampleNorm(Sown):
    """One use of a norm: a direction for every example is no more than a vector for every example."""

    kind: ClassVar[str] = "weights of every example"

    def __init__(self, layer: Norm, x: Tensor, out: Tensor, directions: Directions) -> None:
        super().__init__()
        self.layer, self.rows, self.dims = layer, layer.rows, layer.dims
        self.x, self.out = x.movedim(layer.along, 0), out.movedim(layer.along, 0)
        shape = (layer.rows, *layer.weight_shape)
        self.directions = {role: directions.draw(shape, layer.like) for role in layer.names}

    def tangent(self, pick: Pick) -> Tensor:
        moved: Tensor | float = 0.0
        if "weight" in self.directions:
            moved = self.layer.scale_each(self.x, pick(self.directions["weight"]))
        if "bias" in self.directions:
            moved = moved + self.layer.shift(self.out, pick(self.directions["bias"]))
        moved = torch.as_tensor(moved).expand_as(self.out)
        del self.x, self.out
        return moved.movedim(0, self.layer.along)

    def gradient(self, weights: Tensor) -> dict[str, Tensor]:
        weights = self.by_row(weights)
        return {
            self.layer.names[role]: torch.tensordot(weights.to(v.dtype).flatten(), v.flatten(0, 1), dims=1)
            for role, v in self.directions.items()
        }

    @property
    def names(self) -> list[str]:
        return list(self.layer.names.values())

    def gram(self) -> Tensor:
        flat = torch.cat([v.flatten(2) for v in self.directions.values()], dim=2)
        return torch.einsum("kbi,lbi->klb", flat, flat)

    def inner(self, other: dict[str, Tensor]) -> Tensor:
        parts = [v.flatten(2) @ other[self.layer.names[role]].reshape(-1) for role, v in self.directions.items()]
        return torch.stack(parts).sum(0) / self.rows
