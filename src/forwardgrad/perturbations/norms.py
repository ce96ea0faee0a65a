"""Layers with a gain and bias behind a normalisation, and how these move: each example has a direction of its own, since they are few."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from forwardgrad.directions import Directions
from forwardgrad.forward_mode import levels
from forwardgrad.perturbations.base import Pick, Sown
from forwardgrad.perturbations.layers import Caller, Layer


class Norm(Layer):
    """The gain and bias behind a normalisation: y = γ x̂ + β, the rules seeing x̂."""

    matrix = False
    arguments: ClassVar[tuple[str, ...]] = ()

    def run(self, x: Tensor, calls: Caller) -> tuple[Tensor, Tensor]:
        normal = self.ahead(x, calls)
        return self.scaled(normal, self.call.get("weight"), self.call.get("bias"), calls), normal

    def ahead(self, x: Tensor, calls: Caller) -> Tensor:
        plain = {**self.call, "input": x, "weight": None}
        if "bias" in self.arguments:
            plain["bias"] = None
        normal: Tensor = calls(self.function, **plain)
        self.lie(x, self.outer(x))
        self.inner = self.inside(x)
        return normal

    def scaled(self, normal: Tensor, weight: Tensor | None, bias: Tensor | None, calls: Caller) -> Tensor:
        """The output with this gain and bias, in the precision that the normalisation gives."""
        out = normal if weight is None else calls(torch.mul, normal, calls(self._spread, weight))
        out = out if bias is None else calls(torch.add, out, calls(self._spread, bias))
        return out if out.dtype == normal.dtype else calls(Tensor.to, out, normal.dtype)

    def scaled_together(self, normal: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        """As `scaled`, of all members of the batch under `vmap` that is evaluated, in place of the normalised numbers of each."""
        given = {role: t for role, t in (("weight", weight), ("bias", bias)) if t is not None}

        def made(out: levels.Members, *vectors: levels.Members) -> Tensor:
            found, own = out.all, not out.shared
            for role, vector in zip(given, vectors, strict=True):
                spread = vector.all.reshape(len(vector.all), *[1] * (found.dim() - 1 - len(self.inner)), *self.inner)
                own = own and torch.result_type(found, spread) == found.dtype
                operation = torch.mul if role == "weight" else torch.add
                found, own = operation(found, spread, out=found if own else None), True
            return found.to(normal.dtype)

        return levels.together(made, normal, *given.values())

    def inside(self, x: Tensor) -> list[int]:
        """The shape that makes one gain for every channel broadcast against an example."""
        return [-1, *[1] * (x.dim() - 2)]

    def outer(self, x: Tensor) -> int:
        """How many dimensions stand before those that are normalised together."""
        return min(x.dim() - 1, 1)

    def _spread(self, vector: Tensor) -> Tensor:
        return vector.reshape(*vector.shape[: vector.dim() - len(self.weight_shape)], *self.inner)

    def respond(self, x: Tensor, left: Tensor, right: Tensor) -> Tensor:
        raise NotImplementedError  # a vector has no rank

    def respond_each(self, x: Tensor, left: Tensor, right: Tensor) -> Tensor:
        raise NotImplementedError

    def scale_each(self, x: Tensor, gain: Tensor) -> Tensor:
        """The output's tangent along one gain [rows, *shape] for every example."""
        return x * self.shift(x, gain)

    def shift(self, out: Tensor, bias: Tensor) -> Tensor:
        inner = [size if size > 0 else bias.shape[-1] for size in self.inner]
        return bias.reshape(self.rows, *[1] * (out.dim() - 1 - len(inner)), *inner)

    def local(self, x: Tensor, error: Tensor) -> dict[str, Tensor]:
        return {"weight": self._gather(error * x), "bias": self._gather(error)}

    def _gather(self, full: Tensor) -> Tensor:
        kept = [i for i, size in enumerate(self.inner, full.dim() - len(self.inner)) if size != 1]
        return full.sum([i for i in range(full.dim()) if i not in kept]).reshape(self.weight_shape)


class LayerNorm(Norm):
    """Normalised over the last dimensions, one gain for every place there."""

    arguments: ClassVar[tuple[str, ...]] = ("input", "normalized_shape", "weight", "bias", "eps")

    def inside(self, x: Tensor) -> list[int]:
        return list(self.weight_shape)

    def outer(self, x: Tensor) -> int:
        return x.dim() - len(self.weight_shape)

    def _gather(self, full: Tensor) -> Tensor:
        return full.reshape(-1, *self.weight_shape).sum(0)

    @staticmethod
    def holds(call: Mapping[str, Any]) -> bool:
        return isinstance(call.get("weight"), Tensor) and call["input"].dim() > call["weight"].dim()


class RMSNorm(LayerNorm):
    """As LayerNorm, without a mean or a bias."""

    arguments: ClassVar[tuple[str, ...]] = ("input", "normalized_shape", "weight", "eps")


class GroupNorm(Norm):
    """Normalised over groups of channels, one gain a channel."""

    arguments: ClassVar[tuple[str, ...]] = ("input", "num_groups", "weight", "bias", "eps")

    @staticmethod
    def holds(call: Mapping[str, Any]) -> bool:
        return isinstance(call.get("weight"), Tensor)


class BatchNorm(GroupNorm):
    """Normalised over the batch in training, by running statistics otherwise; one gain a channel."""

    arguments: ClassVar[tuple[str, ...]] = ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")


class PerExampleNorm(Sown):
    """One use of a norm: a direction for every example is no more than a vector for every example."""

    kind: ClassVar[str] = "weights of every example"

    def __init__(self, layer: Norm, x: Tensor, out: Tensor, directions: Directions) -> None:
        super().__init__()
        self.layer, self.rows, self.dims = layer, layer.rows, layer.dims
        self.x, self.out = x.movedim(layer.along, 0), out.movedim(layer.along, 0)
        shape = (layer.rows, *layer.weight_shape)
        self.directions = {role: directions.draw(shape, layer.like) for role in layer.names}

    def tangent(self, pick: Pick) -> Tensor:
        moved: Tensor | float = 0.0
        if "weight" in self.directions:
            moved = self.layer.scale_each(self.x, pick(self.directions["weight"]))
        if "bias" in self.directions:
            moved = moved + self.layer.shift(self.out, pick(self.directions["bias"]))
        moved = torch.as_tensor(moved).expand_as(self.out)
        del self.x, self.out
        return moved.movedim(0, self.layer.along)

    def gradient(self, weights: Tensor) -> dict[str, Tensor]:
        weights = self.by_row(weights)
        return {
            self.layer.names[role]: torch.tensordot(weights.to(v.dtype).flatten(), v.flatten(0, 1), dims=1)
            for role, v in self.directions.items()
        }

    @property
    def names(self) -> list[str]:
        return list(self.layer.names.values())

    def gram(self) -> Tensor:
        flat = torch.cat([v.flatten(2) for v in self.directions.values()], dim=2)
        return torch.einsum("kbi,lbi->klb", flat, flat)

    def inner(self, other: dict[str, Tensor]) -> Tensor:
        parts = [v.flatten(2) @ other[self.layer.names[role]].reshape(-1) for role, v in self.directions.items()]
        return torch.stack(parts).sum(0) / self.rows
