"""What an estimate is on average, without noise: directions that move one number each, added up."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from tests.support.cases import Loss, seeded
from torch import Tensor, nn

import forwardgrad as fg
from forwardgrad.calls import passes
from forwardgrad.directions.evaluation import Directions


class _Sizes(Directions):
    """Directions of zeros, which note how many numbers move at every place."""

    def __init__(self) -> None:
        self.found: list[int] = []

    def __len__(self) -> int:
        return 1

    def plan(self, shape: tuple[int, ...], like: Tensor) -> Callable[[], Tensor]:
        self.found.append(torch.Size(shape).numel())
        return lambda: torch.zeros((1, *shape), dtype=like.dtype)


class _Units(Directions):
    """As many directions as numbers move, each of which moves a single one by 1."""

    def __init__(self, sizes: list[int]) -> None:
        self.sizes, self._places = sizes, 0

    def __len__(self) -> int:
        return sum(self.sizes)

    def plan(self, shape: tuple[int, ...], like: Tensor) -> Callable[[], Tensor]:
        start, size = sum(self.sizes[: self._places]), self.sizes[self._places]
        self._places += 1
        stack = torch.zeros(len(self), size, dtype=like.dtype)
        stack[start : start + size] = torch.eye(size, dtype=like.dtype)
        return lambda: stack.view(len(self), *shape)


def summed_over_units(model: nn.Module, loss: Loss, perturb: fg.Perturbation, patch: pytest.MonkeyPatch) -> dict[str, Tensor]:
    """Σ d u over directions u that move one number each: E[d u] of directions with covariance I. `perturb` is linear in its numbers."""
    sizes: list[_Sizes] = []

    def noting(*_: object) -> _Sizes:
        sizes.append(_Sizes())
        return sizes[-1]

    patch.setattr(passes, "Directions", noting)
    fg.estimate_grad_(loss, model, fg.ForwardGradient(perturb=perturb), generator=seeded())
    model.zero_grad()
    patch.setattr(passes, "Directions", lambda *_: _Units(sizes[-1].found))
    count = sum(sizes[-1].found)
    fg.estimate_grad_(loss, model, fg.ForwardGradient(tangents=count, perturb=perturb), generator=seeded())
    return {name: torch.zeros_like(p) if p.grad is None else p.grad * count for name, p in model.named_parameters()}
