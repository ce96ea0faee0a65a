"""`LowRank`: the weights of a layer move along a matrix of rank r, which takes far fewer random numbers than a dense one."""

from __future__ import annotations

from collections.abc import Mapping
from copy import copy
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from forwardgrad.directions import Directions
from forwardgrad.factored import Factored, Gradient
from forwardgrad.forward_mode import levels
from forwardgrad.perturbations.base import Perturbation, Pick, Sown, Step
from forwardgrad.perturbations.layers import Embedding, Layer, Linear


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
    Layers: Linear and addmm, convolutions (a filter bank as a matrix of channels × patches), Embedding; all else is dense. In
    F.linear_cross_entropy the read-out is a Linear, all of whose parts move along one direction.

    With a period ν > 1, B stays the same for ν steps and A is drawn at each: the estimates of a period lie in one subspace, and given B
    their mean is E[ĝ | B] = G B Bᵀ/r, the gradient seen from it. Averaged over B it is G. The estimator then needs `state`.

    Args:
        rank: r ≥ 1.
        period: ν ≥ 1, the number of steps for which B is kept.

    Raises ValueError for another rank or period.

    Source: the direction is that of Sarkar et al., EGGROLL (2025), used here for forward-mode derivatives, too; the kept factor: Chen et
    al., "Enhancing Zeroth-order Fine-tuning for Language Models with Low-rank Structures", LOZO (2024), algorithm 1.
    """

    name: ClassVar[str] = "low-rank"

    rank: int = 1
    period: int = 1

    def __post_init__(self) -> None:
        for what, value in (("rank", self.rank), ("period", self.period)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{what} must be a whole number of at least 1, not {value!r}")

    def __repr__(self) -> str:
        return f"LowRank(rank={self.rank})" if self.period == 1 else f"LowRank(rank={self.rank}, period={self.period})"

    @property
    def apart(self) -> bool:
        return False

    @property
    def parted(self) -> bool:
        return True

    def rules(self, layer: Layer) -> bool:
        return layer.matrix

    def enter(self, layer: Layer, x: Tensor, out: Tensor, directions: Directions) -> LowRankUse | None:
        return LowRankUse(layer, x, out, directions, self.rank) if layer.matrix else None


class LowRankUse(Sown):
    """One use of a layer, with a direction of rank r for the whole batch. Its factors are drawn again when the gradient is asked for.

    The direction of the bias stands beside A as one more column, so that one product moves the output by both.
    """

    kind: ClassVar[str] = "weights of low rank"

    def __init__(self, layer: Layer, x: Tensor, out: Tensor, directions: Directions, rank: int, width: int | None = None) -> None:
        super().__init__()
        self.layer, self.x, self.out = layer, x, out
        self.rank, self.shifts = rank if "weight" in layer.names else 0, "bias" in layer.names
        self.number, self.width = directions.next_place, layer.fan_in if width is None else width  # numbers that a column of B follows from
        self._number_kept = 0 if directions.kept is None else directions.kept.next_place
        self._plan(directions)

    def _plan(self, directions: Directions) -> None:
        layer, self.directions = self.layer, directions
        left, right = layer.fan_out * (self.rank + self.shifts), self.width * self.rank
        self._kept = None if directions.kept is None else directions.kept.plan((right,), layer.like)
        self._drawn = directions.plan((left if self._kept is not None else left + right,), layer.like)

    def along(self, directions: Directions) -> LowRankUse:
        other = copy(self)
        directions.next_place = self.number
        if directions.kept is not None:
            directions.kept.next_place = self._number_kept
        other._plan(directions)
        return other

    def once_more(self, layer: Layer, x: Tensor, out: Tensor) -> LowRankUse:
        other = copy(self)
        other.layer, other.x, other.out = layer, x, out
        return other

    def factors(self) -> tuple[Tensor, Tensor]:
        """A and the bias's direction as its last column [K, m, r + 1], and B [K, n, r], over the root of r."""
        numbers = self._drawn() if self._kept is None else torch.cat([self._drawn(), self._kept()], 1)
        return low_rank_factors(numbers, self.layer.fan_out, self.rank, self.shifts)

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

    def displaced(self, tensor: Tensor, step: Step, pick: Pick) -> Tensor:
        if not isinstance(step, Tensor):  # one direction alone: its factors are added in place
            return self._responded(tensor.unsqueeze(0), step)[0]
        return super().displaced(tensor, step, pick)

    def displaced_together(self, tensor: Tensor, steps: Tensor) -> Tensor | None:
        layer, x = self.layer, self.x
        if not self.rank or not isinstance(layer, (Linear, Embedding)):
            return None
        del self.x, self.out

        def moved(out: levels.Members, x: levels.Members) -> Tensor:
            return layer.displaced(out, x, *self.factors(), steps)

        return levels.together(moved, tensor, x)

    def tangents(self, count: int) -> Tensor:
        return self._responded(None)

    def add_to_(self, tangents: Tensor) -> None:
        self._responded(tangents)

    def _responded(self, moved: Tensor | None, step: float | None = None) -> Tensor:
        left, right = self.factors()
        left = left if step is None else left * step
        if self.rank:
            found = self.layer.respond_all(self.x, self.out, left, right, moved)
        else:
            shift = torch.stack([self.layer.shift(self.out, b) for b in left.squeeze(2)])
            shift = shift.reshape(len(left), *[1] * (self.out.dim() + 1 - shift.dim()), *shift.shape[1:])
            found = shift.expand(len(left), *self.out.shape).clone() if moved is None else moved.add_(shift)
        del self.x, self.out
        return found

    def gradient(self, weights: Tensor) -> Mapping[str, Gradient]:
        return self._summed(*self.factors(), weights.sum(1))

    def _summed(self, left: Tensor, right: Tensor, weights: Tensor) -> Mapping[str, Gradient]:
        found = low_rank_sum(left, right, weights, self.layer.weight_shape, self.layer.turned)
        return {self.layer.names[role]: part for role, part in found.items()}

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
            matrix = self.layer.as_matrix(other[self.layer.names["weight"]])
            total = (left * (matrix @ right)).sum((1, 2))
        if bias is not None:
            total = total + bias @ other[self.layer.names["bias"]]
        return torch.as_tensor(total).unsqueeze(1)


def low_rank_factors(numbers: Tensor, fan_out: int, rank: int, shifts: bool) -> tuple[Tensor, Tensor]:
    """What a place draws: A, with the direction of the bias as its last column [K, m, r + 1], and B [K, n, r] over the root of r."""
    columns = rank + shifts
    left = numbers[:, : fan_out * columns].view(len(numbers), columns, -1).mT  # a column is read in one go
    right = numbers[:, fan_out * columns :].view(len(numbers), -1, rank) if rank else left[:, :0, :0]
    return left, right if rank < 2 else right / rank**0.5


def low_rank_sum(left: Tensor, right: Tensor, weights: Tensor, shape: torch.Size, turned: bool = False) -> dict[str, Gradient]:
    """Σₖ weights[k] · direction k by role, of directions as `low_rank_factors` gives them; `shape` is that of the weight, which may be
    `turned`."""
    rank, found = right.shape[2], dict[str, Gradient]()
    left = left * weights.to(left.dtype)[:, None, None]
    if rank:
        each = [t[0] if len(t) == 1 else t.transpose(0, 1).flatten(1) for t in (left[:, :, :rank], right)]
        found["weight"] = Factored(*((each[1], each[0]) if turned else (each[0], each[1])), shape)
    if left.shape[2] > rank:
        found["bias"] = left[0, :, -1] if len(left) == 1 else left[:, :, -1].sum(0)
    return found
