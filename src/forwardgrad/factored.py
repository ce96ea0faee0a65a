"""Gradients in a compact form: a matrix as the product of two thin ones, a direction and how far to go along it, or what makes blocks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class Factored:
    """The gradient left @ right.T of a weight of `shape`, whose first dimension is the rows of that matrix."""

    left: Float[Tensor, "m r"]
    right: Float[Tensor, "n r"]
    shape: torch.Size

    def to(self, dtype: torch.dtype) -> Factored:
        return Factored(self.left.to(dtype), self.right.to(dtype), self.shape)

    def dense(self) -> Tensor:
        if self.left.shape[1] == 1:  # element by element, a compiler can put it where it is used
            return (self.left * self.right.T).reshape(self.shape)
        return (self.left @ self.right.T).reshape(self.shape)

    def add_to_(self, weight: Tensor, scale: float | Tensor) -> None:
        """weight += scale · left @ right.T in place, without making that matrix; `scale` may lie on the device, and is not waited for."""
        left, right = self.left * scale, self.right
        if weight.is_contiguous():
            matrix = weight.view(len(left), -1)
        elif weight.dim() == 4 and weight.is_contiguous(memory_format=torch.channels_last):
            matrix = weight.permute(0, 2, 3, 1).view(len(left), -1)
            right = right.view(*self.shape[1:], -1).permute(1, 2, 0, 3).reshape(right.shape)
        else:
            weight.add_((left @ right.T).reshape(self.shape))
            return
        matrix.addmm_(left, right.T)


@dataclass(frozen=True)
class Along:
    """The gradient length · direction: one number, and a tensor of the shape of the weight, which `dense` overwrites."""

    direction: Tensor
    length: Float[Tensor, ""]

    def dense(self) -> Tensor:
        return self.direction.mul_(self.length)

    def add_to_(self, weight: Tensor, scale: float | Tensor) -> None:
        """weight += scale · length · direction in place, in one go; the device is not waited for."""
        weight.addcmul_(self.direction, (self.length * scale).to(weight.dtype))


@dataclass(frozen=True)
class InBlocks:
    """A gradient of the shape of `like` that is made a block at a time: `add(weight, scale)` does weight += scale · gradient in place."""

    like: Tensor
    add: Callable[[Tensor, float], None]

    def dense(self) -> Tensor:
        total = torch.zeros_like(self.like)
        self.add(total, 1.0)
        return total

    def add_to_(self, weight: Tensor, scale: float | Tensor) -> None:
        """weight += scale · gradient in place; a `scale` that lies on a device is waited for."""
        self.add(weight, float(scale))


Gradient = Tensor | Factored | Along | InBlocks


def dense(gradient: Gradient) -> Tensor:
    """The gradient as a tensor of the shape of its weight."""
    return gradient if isinstance(gradient, Tensor) else gradient.dense()
