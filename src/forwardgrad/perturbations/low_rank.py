"""`LowRank`: the weights of a layer move along a matrix of rank r, which takes far fewer random numbers than a dense one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from forwardgrad.directions import Directions
from forwardgrad.factored import Factored, Gradient
from forwardgrad.perturbations.base import Perturbation, Pick, Sown
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

    @property
    def apart(self) -> bool:
        return False

    def enter(self, layer: Layer, x: Tensor, out: Tensor, directions: Directions) -> LowRankUse | None:
        return LowRankUse(layer, x, out, directions, self.rank) if layer.matrix else None


class LowRankUse(Sown):
    """One use of a layer, with a direction of rank r for the whole batch. Its factors are drawn again when the gradient is asked for.

    The direction of the bias stands beside A as one more column, so that one product moves the output by both.
    """

    kind: ClassVar[str] = "weights of low rank"

    def __init__(self, layer: Layer, x: Tensor, out: Tensor, directions: Directions, rank: int) -> None:
        super().__init__()
        self.layer, self.x, self.out = layer, x, out
        self.rank, self.shifts = rank if "weight" in layer.names else 0, "bias" in layer.names
        self._drawn = directions.plan((layer.fan_out * (self.rank + self.shifts) + layer.fan_in * self.rank,), layer.like)

    def factors(self) -> tuple[Tensor, Tensor]:
        """A and the bias's direction as its last column [K, m, r + 1], and B [K, n, r], over the root of r."""
        numbers = self._drawn()
        columns = self.rank + self.shifts
        left = numbers[:, : self.layer.fan_out * columns].view(len(numbers), columns, -1).mT  # a column is read in one go
        right = numbers[:, left[0].numel() :].view(len(numbers), -1, self.rank) if self.rank else left[:, :0]
        return left, right if self.rank < 2 else right / self.rank**0.5

    def separate(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """A, B, and the bias's direction [K, m]: None of what is not trained."""
        left, right = self.factors()
        bias = left[:, :, -1] if self.shifts else None
        return (left[:, :, : self.rank], right, bias) if self.rank else (None, None, bias)

    def tangent(self, pick: Pick) -> Tensor:
        left, right, bias = self.separate()
        moved: Tensor | None = None
        if left is not None and right is not None:
            moved = self.layer.respond(self.x, pick(left), pick(right))
        if bias is not None:
            shift = self.layer.shift(self.out, pick(bias))
            moved = shift.expand_as(self.out) if moved is None else moved + shift
        del self.x, self.out  # nothing of the pass is kept
        assert moved is not None
        return moved

    def tangents(self, count: int) -> Tensor:
        return self._responded(None)

    def add_to_(self, tangents: Tensor) -> None:
        self._responded(tangents)

    def _responded(self, moved: Tensor | None) -> Tensor:
        left, right = self.factors()
        if self.rank:
            found = self.layer.respond_all(self.x, self.out, left, right, moved)
        else:
            shift = torch.stack([self.layer.shift(self.out, b) for b in left.squeeze(2)])
            shift = shift.reshape(len(left), *[1] * (self.out.dim() + 1 - shift.dim()), *shift.shape[1:])
            found = shift.expand(len(left), *self.out.shape).clone() if moved is None else moved.add_(shift)
        del self.x, self.out
        return found

    def gradient(self, weights: Tensor) -> Mapping[str, Gradient]:
        left, right = self.factors()
        left = left * weights.sum(1).to(left.dtype)[:, None, None]
        found: dict[str, Gradient] = {}
        if self.rank:
            each = [t[0] if len(t) == 1 else t.transpose(0, 1).flatten(1) for t in (left[:, :, : self.rank], right)]
            found[self.layer.names["weight"]] = Factored(each[0], each[1], self.layer.weight_shape)
        if self.shifts:
            found[self.layer.names["bias"]] = left[0, :, -1] if len(left) == 1 else left[:, :, -1].sum(0)
        return found

    @property
    def names(self) -> list[str]:
        return list(self.layer.names.values())

    def gram(self) -> Tensor:
        left, right, bias = self.separate()
        total: Tensor | float = 0.0
        if left is not None and right is not None:
            a, b = (torch.einsum("kir,lis->klrs", t, t) for t in (left, right))
            total = (a * b).sum((2, 3))
        if bias is not None:
            total = total + bias @ bias.T
        return torch.as_tensor(total).unsqueeze(2)

    def inner(self, other: dict[str, Tensor]) -> Tensor:
        left, right, bias = self.separate()
        total: Tensor | float = 0.0
        if left is not None and right is not None:
            matrix = other[self.layer.names["weight"]].reshape(self.layer.fan_out, self.layer.fan_in)
            total = (left * (matrix @ right)).sum((1, 2))
        if bias is not None:
            total = total + bias @ other[self.layer.names["bias"]]
        return torch.as_tensor(total).unsqueeze(1)
