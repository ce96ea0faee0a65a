"""The forward gradient of Baydin et al.: random directions over all weights, one scalar each."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Generator, Tensor

from forwardgrad.derivative import Objective, directional_derivatives
from forwardgrad.estimators.base import Estimate, Estimator, needed
from forwardgrad.tangents import Gaussian, Law


@dataclass(frozen=True)
class ForwardGradient(Estimator):
    """The forward gradient: directional derivatives along random tangents, times the tangents.

    Formula: ĝ = (1/K) Σₖ clip(dₖ) vₖ with dₖ = ∇f·vₖ from one forward pass, vₖ independent with mean 0 and covariance I over all
    parameters, and clip(d) = min(max(d, −c), c) where a clip c is given.

    Bias: none without a clip, E[(∇f·v)v] = E[v vᵀ]∇f = ∇f. With a clip the direction stays right and the length shrinks: for Gaussian
    tangents E[ĝ] = erf(c/(‖∇f‖√2))·∇f.
    Variance: E‖ĝ‖² = (1 + (m − 1)/K)‖∇f‖² where m is the law's second moment: n + 2 (Gaussian) or n (Rademacher, Sphere) over n weights;
    (n/K)‖∇f‖² with Orthogonal tangents, which give ∇f itself at K = n.
    The noise grows with the number of weights; that is what keeps the method from scaling.
    Cost: K + 1 forward passes for K tangents at once; a loop over chunks pays one more primal pass for every chunk.

    Args:
        tangents: K ≥ 1, the number of directions averaged.
        law: where directions are drawn from.
        clip: bound c > 0 on each |dₖ|, in units of the loss; None for no bound.
        chunk_size: tangents evaluated at once, as in `torch.func.vmap`: None for all K (K copies of the parameters are held),
            1 for a loop. The result is the same up to rounding. Orthogonal tangents are drawn, and held, all at once even so.

    Raises ValueError where an argument is outside its limits, `estimate_grad_` was given no generator, or there are fewer weights than
    Orthogonal tangents.

    Source: Baydin et al., "Gradients without Backpropagation" (2022), Definition 1; the clip is that of the paper re-examining it,
    section III.

    >>> ForwardGradient(tangents=4, clip=1.0)
    ForwardGradient(tangents=4, law=Gaussian(), clip=1.0, chunk_size=None)
    """

    name: ClassVar[str] = "forward"

    tangents: int = 1
    law: Law = Gaussian()
    clip: float | None = None
    chunk_size: int | None = None

    def __post_init__(self) -> None:
        for what, value in (("tangents", self.tangents), ("chunk_size", 1 if self.chunk_size is None else self.chunk_size)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{what} must be a whole number of at least 1, not {value!r}")
        if not isinstance(self.law, Law):
            raise ValueError(f"law must be a law of directions such as Gaussian(), not {self.law!r}")
        number = isinstance(self.clip, (int, float)) and not isinstance(self.clip, bool)
        if self.clip is not None and not (number and math.isfinite(self.clip) and self.clip > 0):
            raise ValueError(f"clip must be a positive number or None for no clip, not {self.clip!r}")

    @property
    def unbiased(self) -> bool:
        return self.clip is None

    def estimate(
        self, objective: Objective, generator: Generator | None, state: dict[str, Tensor]
    ) -> tuple[Estimate, dict[str, Tensor | None]]:
        generator = needed(generator)
        size = self.chunk_size or self.tangents
        chunks = math.ceil(self.tangents / size)
        gradients: dict[str, Tensor | None] = {}
        derivatives = []
        for index, tangents in enumerate(self.law.chunks(objective.parameters, self.tangents, size, generator)):
            loss, derivative = directional_derivatives(objective, tangents, commit=index == chunks - 1)
            derivatives.append(derivative)
            weights = (derivative if self.clip is None else derivative.clamp(-self.clip, self.clip)) / self.tangents
            for name, tangent in tangents.items():
                part = _combine_(weights.to(tangent.dtype), tangent)
                so_far = gradients.get(name)
                gradients[name] = part if so_far is None else so_far.add_(part)
        return Estimate(loss, torch.cat(derivatives), self.tangents + chunks), gradients


def _combine_(weights: Tensor, tangents: Tensor) -> Tensor:
    """Σₖ weights[k]·tangents[k]; a single tangent is scaled in place, sparing a copy of the parameters."""
    if len(weights) == 1:
        return tangents[0].mul_(weights[0])
    with torch.autocast(tangents.device.type, enabled=False):  # the sum belongs to the gradient, not to the user's forward pass
        combined: Tensor = torch.tensordot(weights, tangents, dims=1)
    return combined
