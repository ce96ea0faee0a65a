"""What a perturbation is: a choice of what moves in a layer, and how a directional derivative becomes that layer's gradient."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from forwardgrad.draws import drawn
from forwardgrad.perturbations.layers import Layer
from forwardgrad.tangents import Law

Pick = Callable[[Tensor], Tensor]
"""From a stack of K to the one that is being evaluated: `stack[k]`, with k unknown to the code while K are evaluated at once."""


class Directions:
    """K streams of random numbers of one law, one a tangent: K drawn at once are the same bits as K drawn one after the other."""

    def __init__(self, law: Law, seeds: list[int], device: torch.device) -> None:
        self.law = law
        self._streams: list[torch.Generator] = drawn(lambda: [torch.Generator(device).manual_seed(seed) for seed in seeds])

    def __len__(self) -> int:
        return len(self._streams)

    def draw(self, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """A stack [K, *shape] with the dtype and device of `like`."""
        dtype, device = like.dtype, like.device
        return drawn(lambda: self._stack(shape, dtype, device))

    def _stack(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        stack = torch.empty((len(self), *shape), dtype=dtype, device=self._streams[0].device if self._streams else device)
        for tangent, stream in zip(stack.unbind(), self._streams, strict=True):
            self.law.fill_([tangent], stream)
        return stack.to(device)


class Entered(ABC):
    """A perturbation at work at one place of the model, in one evaluation.

    `rows` is the number of examples that moved independently (1 where all share one direction). `kept` holds what the gradient needs of
    the primal pass; while the pass lasts the tensors in it belong to torch's transforms, and are replaced by plain ones at its end.
    """

    rows: int = 1
    apart: bool = True
    """Whether its rows are the examples of the loss."""
    in_weights: ClassVar[bool] = True
    """Whether its directions are changes of weights, with covariance I there."""

    def __init__(self) -> None:
        self.kept: dict[str, Tensor] = {}

    @abstractmethod
    def gradient(self, weights: Float[Tensor, "k rows"]) -> dict[str, Tensor]:
        """Σₖ Σ_b weights[k, b] · (direction k of example b), by parameter name."""

    @abstractmethod
    def gram(self) -> Float[Tensor, "k k rows"]:
        """Inner products of the directions of each example."""

    @property
    @abstractmethod
    def names(self) -> list[str]:
        """The parameters that this perturbation has a gradient for."""

    def inner(self, other: dict[str, Tensor]) -> Float[Tensor, "k rows"]:
        """⟨direction k of example b, other⟩ with `other` given by parameter name."""
        raise NotImplementedError


class Sown(Entered):
    """A perturbation that is added to a layer's output as soon as that is known."""

    @abstractmethod
    def tangent(self, pick: Pick) -> Tensor:
        """What the layer's output moves by along one tangent."""


@dataclass(frozen=True)
class Perturbation(ABC):
    """What is perturbed; its fields are its hyperparameters. Uses of parameters outside the layers with rules get dense tangents."""

    name: ClassVar[str]

    @property
    def weights(self) -> bool:
        """Whether directions lie in the space of the weights, so that a direction there can be compared with them."""
        return True

    @abstractmethod
    def enter(self, layer: Layer, x: Tensor, out: Tensor, directions: Directions) -> Entered | None:
        """Draw for one use of a layer with input x and output out (primal values); None for dense tangents on its parameters."""

    def check(self, law: Law) -> None:
        """Raise ValueError for a law that these directions cannot be drawn from."""
        if getattr(law, "joint", False):
            raise ValueError(f"the law {law.name} couples all weights of a tangent: it goes with perturb=Dense() alone, not {self.name}")
