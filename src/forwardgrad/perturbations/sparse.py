"""`Sparse`: of every parameter a part of the weights moves, those of smallest magnitude as they are now."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from forwardgrad.directions import Law
from forwardgrad.perturbations.base import Perturbation
from forwardgrad.perturbations.dense import Dense


@dataclass(frozen=True)
class Sparse(Dense):
    """Of every parameter a part of the weights moves, each on its own; the others stand still in this step.

    Formula: ĝ = d·(μ ⊙ V) with d = ⟨∇f, μ ⊙ V⟩ and V as in `Dense`. μ is 1 for the ⌈fraction·n⌉ weights of a parameter of n that have the
    smallest (or largest) magnitude, for those that are as small (or large) as the last of them, and 0 for the others.
    Bias: E[ĝ] = μ ⊙ ∇f: exact where μ is 1, nothing where it is 0. μ follows from the weights alone, so it does not depend on V.
    Variance: E‖ĝ‖² = (s + 2)‖μ ⊙ ∇f‖² (Gaussian) or s‖μ ⊙ ∇f‖² (Rademacher) with s the number of weights that move: a longer step can be
    taken than with all n, and if small weights have more of the gradient than their share, it gains more than it leaves out.
    Cost: that of `Dense`, and the value of one weight found by its rank wherever a parameter is moved. μ is never stored: it is made
    again for one parameter at a time, from the values that this has before the step.

    Args:
        fraction: the part of the weights that moves, above 0 and at most 1.
        of: "smallest" or "largest", in magnitude.

    Raises ValueError for another fraction or word.

    Source: Liu et al., "Sparse MeZO: Less Parameters for Better Performance in Zeroth-Order LLM Fine-Tuning" (2024), eq. 4.
    """

    name: ClassVar[str] = "sparse"

    fraction: float = 0.25
    of: Literal["smallest", "largest"] = "smallest"

    def __post_init__(self) -> None:
        number = isinstance(self.fraction, (int, float)) and not isinstance(self.fraction, bool)
        if not (number and 0 < self.fraction <= 1):
            raise ValueError(f"fraction must be a number above 0 and at most 1, not {self.fraction!r}")
        if self.of not in ("smallest", "largest"):
            raise ValueError(f"of must be 'smallest' or 'largest', not {self.of!r}")

    @property
    def unbiased(self) -> bool:
        return self.fraction == 1

    def check(self, law: Law) -> None:  # type: ignore[override]
        Perturbation.check(self, law)

    def masked_(self, directions: Float[Tensor, "*k shape"], parameter: Tensor) -> Tensor:
        """Set the directions of weights that stand still to zero, in place: [*shape] or a stack of them."""
        if self.unbiased or not parameter.numel():
            return directions
        size = parameter.detach().abs()
        count = math.ceil(self.fraction * size.numel() - 1e-9)  # 0.1 of 30 is 3, whatever the product rounds to
        rank = count if self.of == "smallest" else size.numel() - count + 1
        last = torch.kthvalue(size.flatten(), rank).values
        return directions.masked_fill_(size > last if self.of == "smallest" else size < last, 0)
