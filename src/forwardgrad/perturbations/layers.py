"""The layers that have rules of their own: linear, convolution, embedding and norms.

A perturbation needs three formulas of a layer: how the output moves along a direction of rank one that all examples share, how it moves
where every example has its own, and how an error at the output becomes gradients of weight and bias (`local`).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from forwardgrad.factored import Factored
from forwardgrad.forward_mode import levels
from forwardgrad.forward_mode.rules import shifted
from forwardgrad.perturbations.outer import added, onto, outer, repeated, scaled, stepped

Caller = Callable[..., Any]
"""Makes a call: the function, and its arguments."""


class Layer(ABC):
    """One use of a layer. `names` gives the trainable parameters by role, `dims` the dimensions along which examples may lie, those that
    input and output share; `along` is the one along which they do, `rows` its size.

    `matrix`: the weight is a matrix [fan_out, fan_in] that multiplies the input (after reshaping), so directions of rank r make sense;
    `turned`: it is kept as [fan_in, fan_out].
    """

    matrix: ClassVar[bool] = True
    turned: ClassVar[bool] = False
    arguments: ClassVar[tuple[str, ...]]
    names: dict[str, str]
    weight_shape: torch.Size
    dims: range
    along: int = 0
    rows: int

    def __init__(self, function: Callable[..., Tensor], call: dict[str, Any], names: dict[str, str]) -> None:
        self.function, self.call, self.names = function, call, names
        weight = call.get("weight")
        self.weight_shape = weight.shape if isinstance(weight, Tensor) else torch.Size()

    @classmethod
    def bind(
        cls, function: Callable[..., Tensor], args: tuple[Any, ...], kwargs: Mapping[str, Any], names: Mapping[int, str]
    ) -> Layer | None:
        """The layer that this call is, or None where none of its parameters is trained or a rule would not hold."""
        call = {**dict(zip(cls.arguments, args, strict=False)), **kwargs}
        found = {role: names[id(call[role])] for role in ("weight", "bias") if id(call.get(role)) in names}
        return cls(function, call, found) if found and cls.holds(call) else None

    @staticmethod
    def holds(call: Mapping[str, Any]) -> bool:
        return True

    def run(self, x: Tensor, calls: Caller) -> tuple[Tensor, Tensor]:
        """The output, by a function that makes the calls, and the input as the rules want to see it."""
        return self.made({**self.call, "input": x}, calls), x

    def ahead(self, x: Tensor, calls: Caller) -> Tensor:
        """The input as the rules want to see it, where the output is not asked for."""
        return x

    def made(self, call: Mapping[str, Any], calls: Caller) -> Tensor:
        """The output of the call with these arguments."""
        out: Tensor = calls(self.function, **call)
        return out

    def lie(self, x: Tensor, dims: int) -> None:
        """Let examples lie along one of the first `dims` dimensions of the input."""
        self.along = self.along if self.along < dims else 0  # what was learned may be about another path
        self.dims, self.rows = range(dims), x.shape[self.along] if dims else 1

    def channels(self, out: Tensor) -> int:
        """The dimension of an output that holds the units of one position."""
        return out.dim() - 1

    @property
    def fan_out(self) -> int:
        return self.weight_shape[0]

    @property
    def fan_in(self) -> int:
        return math.prod(self.weight_shape[1:])

    def as_matrix(self, weight: Tensor) -> Tensor:
        """A tensor of the weight's shape as [fan_out, fan_in]."""
        return weight.T if self.turned else weight.reshape(self.fan_out, self.fan_in)

    def factored(self, left: Tensor, right: Tensor) -> Factored:
        """The gradient left [fan_out, r] @ right.T [r, fan_in] in the shape of the weight."""
        return Factored(right, left, self.weight_shape) if self.turned else Factored(left, right, self.weight_shape)

    @property
    def like(self) -> Tensor:
        """A parameter that is trained: directions and gradients have its precision, whatever autocast computes the output in."""
        parameter: Tensor = self.call[next(iter(self.names))]
        return parameter

    @abstractmethod
    def respond(self, x: Tensor, left: Tensor, right: Tensor) -> Tensor:
        """The output's tangent along left @ right.T, with left [fan_out, r] and right [fan_in, r]."""

    def respond_all(self, x: Tensor, out: Tensor, left: Tensor, right: Tensor, moved: Tensor | None) -> Tensor:
        """The output's tangents [K, *out] along K directions of rank r, added in place to how it moved already.

        A last column of `left` [K, m, r + 1] that has no partner in `right` [K, n, r] is the direction of the bias.
        """
        rank = right.shape[2]
        each = [self.respond(x, a[:, :rank], b) for a, b in zip(left, right, strict=True)]
        if left.shape[2] > rank:
            each = [t + self.shift(out, a[:, rank]) for t, a in zip(each, left, strict=True)]
        along = torch.stack(each) if len(each) > 1 else each[0].unsqueeze(0)
        return along.to(out.dtype) if moved is None else moved.add_(along)

    @abstractmethod
    def respond_each(self, x: Tensor, left: Tensor, right: Tensor) -> Tensor:
        """The output's tangent where example b moves along the outer product of left[b] and right[b]."""

    @abstractmethod
    def shift(self, out: Tensor, bias: Tensor) -> Tensor:
        """A bias [m], or one for every example [rows, m], in a shape that can be added to the output."""

    @abstractmethod
    def local(self, x: Tensor, error: Tensor) -> Mapping[str, Tensor | Factored]:
        """Gradients by role from the error ∂f/∂output and the layer's own input."""


class Linear(Layer):
    """y = x Wᵀ + b over the last dimension."""

    arguments = ("input", "weight", "bias")

    def run(self, x: Tensor, calls: Caller) -> tuple[Tensor, Tensor]:
        self.lie(x, x.dim() - 1)
        return super().run(x, calls)

    def respond(self, x: Tensor, left: Tensor, right: Tensor) -> Tensor:
        return (x @ right) @ left.T

    def respond_all(self, x: Tensor, out: Tensor, left: Tensor, right: Tensor, moved: Tensor | None) -> Tensor:
        count = len(left)
        along = x.reshape(-1, self.fan_in) @ (right[0] if count == 1 else right.transpose(0, 1).flatten(1))
        along = along.unsqueeze(0) if count == 1 else along.unflatten(1, (count, -1)).transpose(0, 1)
        return outer(along, left, moved, out).view(count, *out.shape)

    def displaced(self, out: levels.Members, x: levels.Members, left: Tensor, right: Tensor, steps: Tensor) -> Tensor:
        """The outputs of the members of a batch, each a step along its direction; see `Entered.displaced_together`."""
        left, right = stepped(left, steps), repeated(right, steps)
        return added(out, onto(x, right), left)

    def respond_each(self, x: Tensor, left: Tensor, right: Tensor) -> Tensor:
        along = torch.bmm(x.reshape(self.rows, -1, self.fan_in), right.unsqueeze(2))
        return (along * left.unsqueeze(1)).reshape(*x.shape[:-1], self.fan_out)

    def shift(self, out: Tensor, bias: Tensor) -> Tensor:
        return bias if bias.dim() == 1 else bias.reshape(*[self.rows, *[1] * out.dim()][: out.dim() - 1], out.shape[-1])

    def local(self, x: Tensor, error: Tensor) -> Mapping[str, Tensor | Factored]:
        flat = error.reshape(-1, self.fan_out)
        return {"weight": self.factored(flat.T, x.reshape(-1, self.fan_in).T), "bias": flat.sum(0)}


class Product(Linear):
    """y = b + x W of matrices, by `addmm`: a linear layer whose weight is kept as [fan_in, fan_out], as GPT-2 of transformers has it."""

    turned = True
    arguments = ("bias", "input", "weight")

    @staticmethod
    def holds(call: Mapping[str, Any]) -> bool:
        plain = call.keys() == {"bias", "input", "weight"}  # no factors, and nothing by name: `input` is another one there
        return plain and call["bias"].dim() == 1 and call["bias"].shape[0] == call["weight"].shape[-1]

    def made(self, call: Mapping[str, Any], calls: Caller) -> Tensor:
        out: Tensor = calls(self.function, call["bias"], call["input"], call["weight"])
        return out

    @property
    def fan_out(self) -> int:
        return self.call["weight"].shape[1]  # type: ignore[no-any-return]

    @property
    def fan_in(self) -> int:
        return self.call["weight"].shape[0]  # type: ignore[no-any-return]


class Convolution(Layer):
    """A convolution of one, two or three dimensions: a linear layer over the patches of the input."""

    arguments = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")

    @staticmethod
    def holds(call: Mapping[str, Any]) -> bool:
        weight, padding = call["weight"], call.get("padding", 0)
        odd = all(size % 2 for size in weight.shape[2:])
        return padding != "same" or odd  # an even kernel pads one side more: no single number says that

    def run(self, x: Tensor, calls: Caller) -> tuple[Tensor, Tensor]:
        spatial = len(self.weight_shape) - 2
        self.groups = int(self.call.get("groups", 1))
        self.dilation = _each(self.call.get("dilation", 1), spatial)
        self.stride = _each(self.call.get("stride", 1), spatial)
        padding = self.call.get("padding", 0)
        same = [d * (size - 1) // 2 for d, size in zip(self.dilation, self.weight_shape[2:], strict=True)]
        self.padding = same if padding == "same" else [0] * spatial if padding == "valid" else _each(padding, spatial)
        self.lie(x, int(x.dim() == len(self.weight_shape)))
        return super().run(x, calls)

    def channels(self, out: Tensor) -> int:
        return out.dim() - len(self.weight_shape) + 1

    def _convolve(self, x: Tensor, weight: Tensor, groups: int) -> Tensor:
        return self.function(x, weight, None, self.stride, self.padding, self.dilation, groups)

    def respond(self, x: Tensor, left: Tensor, right: Tensor) -> Tensor:
        rank, lead = right.shape[1], x.shape[: x.dim() - len(self.weight_shape) + 1]
        kernels = right.T.reshape(rank, *self.weight_shape[1:]).repeat(self.groups, *[1] * (len(self.weight_shape) - 1))
        along = self._convolve(x, kernels, self.groups)
        along = along.reshape(*lead, self.groups, rank, *along.shape[len(lead) + 1 :])
        left = left.reshape(self.groups, -1, rank)
        if rank == 1:
            tangent = along * left.reshape(*left.shape[:2], *[1] * (len(self.weight_shape) - 2))
        else:
            tangent = torch.einsum("...grs,gmr->...gms", along.flatten(len(lead) + 2), left).unflatten(-1, along.shape[len(lead) + 2 :])
        return tangent.flatten(len(lead), len(lead) + 1)

    def respond_all(self, x: Tensor, out: Tensor, left: Tensor, right: Tensor, moved: Tensor | None) -> Tensor:
        count, spatial = len(left), len(self.weight_shape) - 2
        if right.shape[2] > 1 or self.groups > 1 or out.dim() != len(self.weight_shape):
            return super().respond_all(x, out, left, right, moved)
        if spatial == 2 and all(t.is_contiguous(memory_format=torch.channels_last) for t in (out, *(() if moved is None else moved))):
            along = self._along(x, right).permute(0, 2, 3, 1).reshape(-1, count, 1).transpose(0, 1).contiguous()
            found = outer(along, left, None if moved is None else moved.permute(0, 1, 3, 4, 2), out)
            return found.view(count, len(out), *out.shape[2:], -1).permute(0, 1, 4, 2, 3)
        along, columns = self._along(x, right), left.view(*left.shape, *[1] * spatial)
        each = [scaled(along[:, k : k + 1], columns[k], None if moved is None else moved[k]) for k in range(count)]
        return moved if moved is not None else torch.stack(each).to(out.dtype)

    def _along(self, x: Tensor, kernels: Tensor) -> Tensor:
        """The convolution of a batch with K kernels [K, fan_in, 1]."""
        if len(self.weight_shape) == 4 and self.weight_shape[1] >= _MANY_CHANNELS:
            return self._taps(x, kernels.squeeze(2))
        return self._convolve(x, kernels.view(-1, *self.weight_shape[1:]), 1)

    def _taps(self, x: Tensor, kernels: Tensor) -> Tensor:
        """The convolution of images with K kernels [K, fan_in]: a product for all taps at once, and a sum of what they give, shifted.

        A convolution to so few channels wastes most of what a processor computes with.
        """
        count, size = len(kernels), self.weight_shape[2:]
        taps, images = kernels.view(count, self.weight_shape[1], -1), x.permute(0, 2, 3, 1)
        if torch.compiler.is_compiling():  # which adds up faster than a convolution where what it adds lies side by side
            each = images @ taps.permute(2, 0, 1).reshape(-1, self.weight_shape[1]).T
            return shifted(each, count, size, self.stride, self.padding, self.dilation)
        each = images @ taps.transpose(1, 2).reshape(-1, self.weight_shape[1]).T
        places = torch.eye(math.prod(size), dtype=each.dtype, device=x.device).view(1, -1, *size).repeat(count, 1, 1, 1)
        return self._convolve(each.permute(0, 3, 1, 2), places.to(memory_format=torch.channels_last), count)

    def respond_each(self, x: Tensor, left: Tensor, right: Tensor) -> Tensor:
        batched = x.reshape(self.rows, *x.shape[-len(self.weight_shape) + 1 :])
        kernels = right.reshape(self.rows, *self.weight_shape[1:]).repeat_interleave(self.groups, 0)
        along = self._convolve(batched.reshape(1, -1, *batched.shape[2:]), kernels, self.rows * self.groups)
        along = along.reshape(self.rows, self.groups, 1, *along.shape[2:])
        tangent = along * left.reshape(self.rows, self.groups, -1, *[1] * (along.dim() - 3))
        return tangent.reshape(*x.shape[: x.dim() - len(self.weight_shape) + 1], self.fan_out, *along.shape[3:])

    def shift(self, out: Tensor, bias: Tensor) -> Tensor:
        per_channel = bias.reshape(*bias.shape[:-1], self.fan_out, *[1] * (len(self.weight_shape) - 2))
        return per_channel if out.dim() == len(self.weight_shape) else per_channel.reshape(per_channel.shape[-out.dim() :])

    def local(self, x: Tensor, error: Tensor) -> dict[str, Tensor]:
        x, error = (t.reshape(self.rows, *t.shape[-len(self.weight_shape) + 1 :]) for t in (x, error))
        still = torch.empty_like(self.call["weight"], dtype=x.dtype)  # its shape and order in memory: the input's error is not asked for
        _, weight, bias = torch.ops.aten.convolution_backward(
            error,
            x,
            still,
            [self.fan_out],
            self.stride,
            self.padding,
            self.dilation,
            False,
            [0] * len(self.stride),
            self.groups,
            [False, True, True],
        )
        return {"weight": weight, "bias": bias}


class Embedding(Layer):
    """Row y = W[i] for an index i: a linear layer over one-hot inputs, its weight [vocabulary, width] transposed."""

    arguments = ("input", "weight", "padding_idx", "max_norm", "norm_type", "scale_grad_by_freq", "sparse")

    @staticmethod
    def holds(call: Mapping[str, Any]) -> bool:
        return call.get("max_norm") is None and not call.get("scale_grad_by_freq") and not call.get("sparse")

    def run(self, x: Tensor, calls: Caller) -> tuple[Tensor, Tensor]:
        self.lie(x, x.dim())
        padding = self.call.get("padding_idx")
        self.padding = None if padding is None else padding % self.weight_shape[0]
        return super().run(x, calls)

    def moving(self, x: Tensor, tangent: Tensor) -> Tensor:
        """The tangent with the padding row held still."""
        return tangent if self.padding is None else tangent.masked_fill((x == self.padding).unsqueeze(-1), 0)

    def respond(self, x: Tensor, left: Tensor, right: Tensor) -> Tensor:
        return self.moving(x, left[x] @ right.T)

    def displaced(self, out: levels.Members, x: levels.Members, left: Tensor, right: Tensor, steps: Tensor) -> Tensor:
        """As `Linear.displaced`."""
        left, right, indices = repeated(left, steps), stepped(right, steps), x.all.flatten(1)
        along = left[:, indices[0]] if x.shared else left[torch.arange(len(left), device=left.device).unsqueeze(1), indices]
        if self.padding is not None:
            along = along.masked_fill((indices == self.padding).unsqueeze(2), 0)
        return added(out, along, right)

    def respond_each(self, x: Tensor, left: Tensor, right: Tensor) -> Tensor:
        raise NotImplementedError  # a direction over the whole vocabulary for every example: see PerExample

    def shift(self, out: Tensor, bias: Tensor) -> Tensor:
        raise NotImplementedError  # an embedding has no bias

    def local(self, x: Tensor, error: Tensor) -> dict[str, Tensor]:
        weight = torch.zeros(self.weight_shape, dtype=error.dtype, device=error.device)
        return {"weight": weight.index_add_(0, x.reshape(-1), self.moving(x, error).reshape(-1, self.fan_in))}


_MANY_CHANNELS = 16  # from here on all taps in one product are faster than a convolution to one channel


def _each(value: Any, count: int) -> list[int]:
    return [int(v) for v in value] if isinstance(value, (tuple, list)) else [int(value)] * count
