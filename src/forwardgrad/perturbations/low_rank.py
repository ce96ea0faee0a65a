"""Weights along directions of rank r, shared by the batch: the dense variance for the random numbers of two vectors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from forwardgrad.perturbations.base import Directions, Perturbation, Pick, Sown
from forwardgrad.perturbations.layers import Layer


@dataclass(frozen=True)
class LowRank(Perturbation):
    """The weight matrix of a layer moves along V = A Bᵀ/√r, with A [m, r], B [n, r] of independent entries of mean 0 and variance 1.

    Formula: ĝ = d·A Bᵀ/√r and d = ⟨G, V⟩; the layer's output moves by (x B) Aᵀ/√r, and no second matrix product is needed.
    Why unbiased: E[V_ij V_kl] = (1/r) Σ_st E[A_is A_kt] E[B_js B_lt] = δ_ik δ_jl at every r: the entries of V are uncorrelated and have
    variance 1, so E[⟨G, V⟩ V] = G. They are not independent, which the mean does not notice.
    Variance: for one m × n matrix E‖ĝ‖² = ((1 − 1/r)(mn + 2) + c/r)‖G‖², with c = E‖ĝ‖²/‖G‖² at rank 1: (m + 2)(n + 2) for Gaussian
    entries, mn for Rademacher ones. So rank 1 with random signs has exactly the dense factor mn. Across layers d sums over all of them,
    as with dense tangents: a model of n weights has n (signs, rank 1).
    Cost: r(m + n) random numbers a layer and tangent, an output tangent of r(m + n) products an example, an update of rank r.
    Layers: Linear, convolutions (a filter bank as a matrix of channels × patches), Embedding; all else is dense.

    Args:
        rank: r ≥ 1.

    Raises ValueError for another rank.

    Source: the direction is that of Sarkar et al., EGGROLL (2025), used here for forward-mode derivatives.
    """

    name: ClassVar[str] = "low-rank"

    rank: int = 1

    def __post_init__(self) -> None:
        if isinstance(self.rank, bool) or not isinstance(self.rank, int) or self.rank < 1:
            raise ValueError(f"rank must be a whole number of at least 1, not {self.rank!r}")

    def enter(self, layer: Layer, x: Tensor, out: Tensor, directions: Directions) -> LowRankUse | None:
        return LowRankUse(layer, x, out, directions, self.rank) if layer.matrix else None


class LowRankUse(Sown):
    """One use of a layer, with a direction of rank r for the whole batch."""

    def __init__(self, layer: Layer, x: Tensor, out: Tensor, directions: Directions, rank: int) -> None:
        super().__init__()
        self.layer, self.x, self.out = layer, x, out
        self.left = self.right = self.bias = None
        if "weight" in layer.names:
            self.left = directions.draw((layer.fan_out, rank), layer.like)
            self.right = directions.draw((layer.fan_in, rank), layer.like) / rank**0.5
        if "bias" in layer.names:
            self.bias = directions.draw((layer.fan_out,), layer.like)

    def tangent(self, pick: Pick) -> Tensor:
        moved: Tensor | None = None
        if self.left is not None and self.right is not None:
            moved = self.layer.respond(self.x, pick(self.left), pick(self.right))
        if self.bias is not None:
            shift = self.layer.shift(self.out, pick(self.bias))
            moved = shift.expand_as(self.out) if moved is None else moved + shift
        del self.x, self.out  # nothing of the pass is kept
        assert moved is not None
        return moved

    def gradient(self, weights: Tensor) -> dict[str, Tensor]:
        shared, names, found = weights.sum(1), self.layer.names, {}
        if self.left is not None and self.right is not None:
            left, right = (t.transpose(0, 1).flatten(1) for t in (self._weighted(shared), self.right))
            found[names["weight"]] = (left @ right.T).reshape(self.layer.weight_shape)
        if self.bias is not None:
            found[names["bias"]] = shared.to(self.bias.dtype) @ self.bias
        return found

    def _weighted(self, weights: Tensor) -> Tensor:
        assert self.left is not None
        return self.left * weights.to(self.left.dtype)[:, None, None]

    @property
    def names(self) -> list[str]:
        return list(self.layer.names.values())

    def gram(self) -> Tensor:
        total: Tensor | float = 0.0
        if self.left is not None and self.right is not None:
            a, b = (torch.einsum("kir,lis->klrs", t, t) for t in (self.left, self.right))
            total = (a * b).sum((2, 3))
        if self.bias is not None:
            total = total + self.bias @ self.bias.T
        return torch.as_tensor(total).unsqueeze(2)

    def inner(self, other: dict[str, Tensor]) -> Tensor:
        total: Tensor | float = 0.0
        if self.left is not None and self.right is not None:
            matrix = other[self.layer.names["weight"]].reshape(self.layer.fan_out, self.layer.fan_in)
            total = (self.left * (matrix @ self.right)).sum((1, 2))
        if self.bias is not None:
            total = total + self.bias @ other[self.layer.names["bias"]]
        return torch.as_tensor(total).unsqueeze(1)
