"""The classifier behind a block: what it sees of the block, how it learns, and how its error comes back without its weights transposed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Generator, Tensor

from forwardgrad.perturbations.outputs import Output
from forwardgrad.tangents import Law

Sight = Literal["flatten", "pooled", "positions"]
SIGHTS = ("flatten", "pooled", "positions")


@dataclass(frozen=True)
class Features:
    """φ, a linear map of a block's activities h [n, channels, *positions]: [n, rows, width], one row but for "positions".

    "flatten" is h itself, "pooled" its means over a grid of cells (cut as by adaptive pooling), "positions" the channels of every position.
    """

    sight: Sight
    cells: int

    def of(self, h: Tensor, lead: int = 1) -> Tensor:
        """φ(h) with `lead` dimensions before the channels, in float32 at least."""
        if h.dim() - lead > 1 and self.sight == "pooled":
            h = _POOLS[h.dim() - lead - 1](h.flatten(0, lead - 1), self._grid(h.shape[lead + 1 :])).unflatten(0, h.shape[:lead])
        h = h.to(torch.promote_types(h.dtype, torch.float32))
        if h.dim() - lead > 1 and self.sight == "positions":
            return h.flatten(lead + 1).transpose(lead, lead + 1)
        return h.flatten(lead).unsqueeze(lead)

    def back(self, error: Float[Tensor, "n rows width"], h: Tensor) -> Tensor:
        """The error at h from that at φ(h): each unit of a cell has its share, as the winner has all in max-pooling."""
        if h.dim() < 3 or self.sight == "flatten":
            return error.reshape(h.shape)
        if self.sight == "positions":
            return error.transpose(1, 2).reshape(h.shape)
        error = error.to(h.dtype).reshape(*h.shape[:2], *self._grid(h.shape[2:]))
        line = h.dim() == 3  # one dimension is a plane of one row
        shared = torch.ops.aten._adaptive_avg_pool3d_backward if h.dim() == 5 else torch.ops.aten._adaptive_avg_pool2d_backward
        back: Tensor = shared(error.unsqueeze(2), h.unsqueeze(2)).squeeze(2) if line else shared(error, h)
        return back

    def _grid(self, sizes: torch.Size) -> tuple[int, ...]:
        return tuple(min(self.cells, size) for size in sizes)


_POOLS: dict[int, Callable[..., Tensor]] = {1: F.adaptive_avg_pool1d, 2: F.adaptive_avg_pool2d, 3: F.adaptive_avg_pool3d}


@dataclass(frozen=True)
class Head:
    """A linear classifier y = R φ + b and, where errors come back through feedback, a matrix B that learns R from derivatives alone."""

    weight: Float[Tensor, "classes width"]
    bias: Float[Tensor, " classes"]
    feedback: Float[Tensor, "classes width"] | None

    @classmethod
    def kept(cls, state: dict[str, Tensor], index: int, classes: int, features: Tensor, generator: Generator, *, feedback: bool) -> Head:
        """The head of block `index` in the state: random where only a random error could come of zeros, else zeros, as B is."""
        width, key = features.shape[-1], f"head.{index}"
        if f"{key}.weight" not in state:
            made = torch.zeros(classes, width, dtype=features.dtype, device=generator.device)
            if not feedback:
                made = made.normal_(generator=generator) / width**0.5
            state[f"{key}.weight"], state[f"{key}.bias"] = made.to(features.device), features.new_zeros(classes)
            if feedback:
                state[f"{key}.feedback"] = features.new_zeros(classes, width)
        if state[f"{key}.weight"].shape != (classes, width) or (f"{key}.feedback" in state) != feedback:
            raise ValueError(
                f"the state holds a classifier of {tuple(state[f'{key}.weight'].shape)} for block {index}, but this model needs "
                f"{(classes, width)}{' with feedback' if feedback else ''}: use one state for one model and one estimator"
            )
        return cls(state[f"{key}.weight"], state[f"{key}.bias"], state.get(f"{key}.feedback"))

    def error(self, features: Tensor, known: Output) -> Tensor:
        """∂f/∂y of the head's own loss, [n, rows, classes]: the model's loss, with the target of an example at each of its rows."""
        logits = features @ self.weight.T + self.bias
        target = known.call["target"]
        if known.formula.__name__ != "_cross_entropy" or target.is_floating_point() or target.dim() != 1:
            raise ValueError("LocalLosses needs F.cross_entropy with one class index an example: its classifiers learn those classes")
        call = {**known.call, "target": target.repeat_interleave(logits.shape[1])}
        return Output(call, known.formula).error(logits.flatten(0, -2)).reshape(logits.shape)

    def sent_back(self, error: Tensor, law: Law, generator: Generator, count: int) -> Tensor:
        """The error at the features, e B, after B has learned from how y follows `count` moves u of every row of the features.

        B ← B + Σ (R u − B u) uᵀ/(n + w + 1) over all n moves of w numbers: R u is linear in u, so there is no noise to average away,
        and the squared distance to R shrinks by 1 − n/(n + w + 1) a step.
        """
        assert self.feedback is not None
        u = torch.empty(count * error[..., 0].numel(), self.weight.shape[1], dtype=error.dtype, device=generator.device)
        law.fill_([u], generator)
        u = u.to(error.device)
        residual = u @ self.weight.T - u @ self.feedback.T
        self.feedback.add_(residual.T @ u, alpha=1 / (sum(u.shape) + 1))
        return error @ self.feedback

    def learn(self, features: Tensor, error: Tensor, rate: float) -> None:
        """One step along the exact gradient, as a share of the largest step that is stable: 2/(1 + mean‖φ‖²) for a mean of losses."""
        f, e = features.flatten(0, 1), error.flatten(0, 1)
        step = rate / (1 + f.square().sum(1).mean())
        self.weight.sub_(step * (e.T @ f))
        self.bias.sub_(step * e.sum(0))


def similarity_error(h: Float[Tensor, "n ..."], target: Float[Tensor, " n"]) -> Tensor:
    """The error at h of ‖S(h) − S(t)‖²/N²: (4/N²)(g_b − (g_b·x_b) x_b)/‖h_b‖ g_b = Σ_c (S − S(t))_bc x_c, x the centred unit vectors."""
    flat = h.flatten(1).to(torch.promote_types(h.dtype, torch.float32))
    centred = flat - flat.mean(1, keepdim=True)
    norm = centred.norm(dim=1, keepdim=True).clamp(min=1e-12)
    x = centred / norm
    pulled = (x @ x.T - (target.unsqueeze(0) == target.unsqueeze(1)).to(x.dtype)) @ x
    error: Tensor = (4 / len(h) ** 2) * (pulled - x * (pulled * x).sum(1, keepdim=True)) / norm
    return (error - error.mean(1, keepdim=True)).reshape(h.shape)
