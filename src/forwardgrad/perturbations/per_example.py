"""`PerExample`: every example of a batch moves the weights along a direction of its own, of rank one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from forwardgrad.directions import Directions
from forwardgrad.factored import Gradient
from forwardgrad.perturbations.activity import Activity
from forwardgrad.perturbations.base import Entered, Perturbation, Pick, Sown
from forwardgrad.perturbations.layers import Embedding, Layer
from forwardgrad.perturbations.norms import Norm, PerExampleNorm


@dataclass(frozen=True)
class PerExample(Perturbation):
    """Example b sees the weight matrix move along its own a_b b_bᵀ: one batched evaluation, as many directions as examples.

    Formula: the output of example b moves by (x_b · b_b) a_b, its own loss by d_b, and ĝ = Σ_b d_b a_b b_bᵀ = Aᵀ diag(d) B.
    Why unbiased: f = Σ_b f_b, each f_b sees only the direction of b, and E[d_b a_b b_bᵀ] = ∂f_b/∂W.
    Variance: E‖ĝ − ∇f‖² = Σ_b ((n − 1)‖∇f_b‖²) (random signs, n weights; f_b the part of example b), which is smaller than that of one
    shared direction, (n − 1)‖Σ_b ∇f_b‖², by up to the batch size where the gradients of the examples agree. Where they are unrelated
    it gains nothing, and d costs nothing more.
    Limits: where examples meet (batch norm in training, attention over the batch), or the loss cannot be told apart by example, every
    example is scored by the whole loss: still unbiased, with the batch's noise added. Where they lie is found out: see `survey`.
    Cost: (m + n) random numbers an example and layer; the forward pass gains one product x_b · b_b an example; N(m + n) numbers are kept.
    Layers: Linear and addmm, convolutions, gains and biases of norms; Embedding has its output perturbed (see `Activity`); all else
    is dense.
    Source: independent weight perturbation of Ren et al. (2023), Table 1, who hold that it cannot be batched; directions of rank one can.
    """

    name: ClassVar[str] = "per-example"

    def enter(self, layer: Layer, x: Tensor, out: Tensor, directions: Directions) -> Entered:
        if isinstance(layer, Norm):
            return PerExampleNorm(layer, x, out, directions)
        if isinstance(layer, Embedding):  # a direction over the whole vocabulary for every example would be larger than its output
            return Activity(masked=False).enter(layer, x, out, directions)
        return PerExampleUse(layer, x, out, directions)


class PerExampleUse(Sown):
    """One use of a layer, with a direction for every example."""

    kind: ClassVar[str] = "weights of every example"

    def __init__(self, layer: Layer, x: Tensor, out: Tensor, directions: Directions) -> None:
        super().__init__()
        self.layer, self.rows, self.dims = layer, layer.rows, layer.dims
        self.x, self.out = x.movedim(layer.along, 0), out.movedim(layer.along, 0)
        self.left = self.right = self.bias = None
        if "weight" in layer.names:
            self.left = directions.draw((layer.rows, layer.fan_out), layer.like)
            self.right = directions.draw((layer.rows, layer.fan_in), layer.like)
        if "bias" in layer.names:
            self.bias = directions.draw((layer.rows, layer.fan_out), layer.like)

    def tangent(self, pick: Pick) -> Tensor:
        moved: Tensor | None = None
        if self.left is not None and self.right is not None:
            moved = self.layer.respond_each(self.x, pick(self.left), pick(self.right))
        if self.bias is not None:
            shift = self.layer.shift(self.out, pick(self.bias))
            moved = shift.expand_as(self.out) if moved is None else moved + shift
        del self.x, self.out
        assert moved is not None
        return moved.movedim(0, self.layer.along)

    def gradient(self, weights: Tensor) -> Mapping[str, Gradient]:
        found: dict[str, Gradient] = {}
        weights = self.by_row(weights)
        names = self.layer.names
        if self.left is not None and self.right is not None:
            scaled = self.left * weights.to(self.left.dtype).unsqueeze(2)
            found[names["weight"]] = self.layer.factored(scaled.flatten(0, 1).T, self.right.flatten(0, 1).T)
        if self.bias is not None:
            found[names["bias"]] = torch.einsum("kb,kbm->m", weights.to(self.bias.dtype), self.bias)
        return found

    @property
    def names(self) -> list[str]:
        return list(self.layer.names.values())

    def gram(self) -> Tensor:
        total: Tensor | float = 0.0
        if self.left is not None and self.right is not None:
            a, b = (torch.einsum("kbi,lbi->klb", t, t) for t in (self.left, self.right))
            total = a * b
        if self.bias is not None:
            total = total + torch.einsum("kbi,lbi->klb", self.bias, self.bias)
        return torch.as_tensor(total)

    def inner(self, other: dict[str, Tensor]) -> Tensor:
        """With the part of `other` that is each row's: one over the number of rows."""
        total: Tensor | float = 0.0
        if self.left is not None and self.right is not None:
            matrix = self.layer.as_matrix(other[self.layer.names["weight"]])
            total = ((self.left @ matrix) * self.right).sum(2)
        if self.bias is not None:
            total = total + self.bias @ other[self.layer.names["bias"]]
        return torch.as_tensor(total) / self.rows
