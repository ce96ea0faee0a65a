"""`Activity`: the output of a layer moves, and the layer's input turns the derivative into a gradient of its weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from forwardgrad.directions import Directions
from forwardgrad.factored import Gradient
from forwardgrad.perturbations.base import Entered, Perturbation, Pick
from forwardgrad.perturbations.examples import Rows
from forwardgrad.perturbations.layers import Caller, Embedding, Layer, Linear
from forwardgrad.perturbations.norms import BatchNorm, Norm, PerExampleNorm
from forwardgrad.perturbations.stages import POOLING, POOLS, RECTIFIERS, RETURN_INDICES, SUMS, VIEWS, Normalised, Pooled, Viewed


@dataclass(frozen=True)
class Activity(Perturbation):
    """The output z = W x + b of a layer moves by u, independently for every example and position.

    Formula: ĝ_W = Σ_b d_b u_b x_bᵀ and ĝ_b = Σ_b d_b u_b, with d_b = ⟨∂f_b/∂z_b, u_b⟩ of example b summed over all layers.
    With `masked`, u is drawn only where it can matter: where the ReLU behind the layer is active, and at the winner of max-pooling;
    elsewhere ∂f/∂z is exactly zero, and so is the estimate.
    Why unbiased: E[d_b u_b] = ∂f_b/∂z_b (on the mask; off it both are 0), and ∂f/∂W = Σ_b ∂f_b/∂z_b x_bᵀ.
    Variance: E‖δ̂_b − δ_b‖² = (q ± 1)‖δ_b‖² with δ the error over all q units that moved (+ for Gaussian u, − for random signs): q grows
    with the units of the model, not with its weights. Dense layers have far fewer units than weights; early convolutions have more.
    Limits: as `PerExample`.
    Cost: q random numbers an example; the inputs of the layers are kept; one more product a layer for the gradient.
    Layers: Linear and addmm, convolutions, Embedding. Gains and biases of norms, being few, move themselves, once an example; all else
    is dense.

    Args:
        masked: whether to leave out units that cannot matter.

    Source: Ren et al. (2023), eq. 3 and section 3.6; Le Cun et al. (1988) and Widrow and Lehr (1990) for perturbing nodes.
    """

    name: ClassVar[str] = "activity"

    masked: bool = True

    def __post_init__(self) -> None:
        if not isinstance(self.masked, bool):
            raise ValueError(f"masked must be True or False, not {self.masked!r}")

    @property
    def weights(self) -> bool:
        return False

    def enter(self, layer: Layer, x: Tensor, out: Tensor, directions: Directions) -> Entered:
        if isinstance(layer, Norm):
            return PerExampleNorm(layer, x, out, directions)
        use = ActivityUse(layer, x.to(out.dtype) if x.is_floating_point() else x, directions, masked=self.masked)  # as autocast sees it
        use.channels = layer.channels(out)
        return use


class ActivityUse(Entered):
    """The place behind a layer where activities move: its output, or what ReLU and max-pooling directly behind it make of that.

    Moving the result of a ReLU or of max-pooling where it is active is the same as moving the layer's output there, so the place is
    put off until something else uses it. With `through`, normalisation behind the layer and the sum with what skips it belong to the
    layer, too: an error at the place reaches the layer, gain and bias by their derivative in closed form. With `views`, so do views that
    leave the `channels`, the dimension of the units of one position, whole.
    """

    kind: ClassVar[str] = "activities"

    def __init__(self, layer: Layer, x: Tensor, directions: Directions, *, masked: bool, through: bool = False) -> None:
        super().__init__()
        self.layer, self.directions, self.masked, self.through = layer, directions, masked, through
        self.rows, self.dims = layer.rows, layer.dims
        self.kept["x"] = x
        self.tail: list[Pooled | Normalised | Viewed] = []  # what stands behind the layer, last one first
        self.channels, self.views, self.turned = 0, False, False  # turned: whether positions lie in another order than in the layer
        self.rectified = self.moved = self.exact = False
        self.read_at: int | None = None  # which of the tensors that the loss is read at it is, where its gradient is exact
        self._numbers: Callable[[], Tensor] | None = None

    @property
    def u(self) -> Tensor:
        """What moves, [K, *shape], before anything is left out. It is drawn anew wherever it is asked for, so that none is held until the
        loss is there, and nobody else's writes in place reach it."""
        assert self._numbers is not None
        return self._numbers()

    def lets_pass(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether this call is a ReLU or max-pooling behind the layer, and not one that also gives its winners away."""
        known = function in RECTIFIERS or (function in POOLS and not kwargs.get("return_indices") and len(args) < RETURN_INDICES)
        if function in VIEWS:
            return self.views and Viewed.of(function, args, kwargs, self.channels) is not None
        return (self.masked and known) or (self.through and self._belongs(function, args, kwargs))

    def _belongs(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        if self.rectified or any(isinstance(stage, Pooled) for stage in self.tail):
            return False  # what was cut off ahead of it would have to be told from what is cut off behind it
        if function is F.batch_norm:
            return not self.tail
        other = args[1] if function in SUMS and len(args) == 2 and not kwargs else None
        return isinstance(other, Tensor) and other is not args[0] and _fits(other.shape, args[0].shape)

    def advance(
        self,
        function: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        calls: Caller,
        primal: Callable[[Tensor], Tensor],
        names: Mapping[int, str],
    ) -> Tensor:
        """Let a call that `lets_pass` named pass, and put the place behind it."""
        if function is F.batch_norm:
            call = {**dict(zip(BatchNorm.arguments, args, strict=False)), **kwargs}
            found = {role: names[id(call[role])] for role in ("weight", "bias") if id(call.get(role)) in names}
            normed, stage = Normalised.made(call, found, calls, primal, self.kept)
            self.tail.insert(0, stage)
            return normed
        if function not in POOLS:
            self.rectified |= function in RECTIFIERS
            out: Tensor = calls(function, *args, **kwargs)
            if function in VIEWS and out is not args[0]:
                self._see(Viewed.of(function, args, kwargs, self.channels), out)
            return out
        out, winners = calls(F.max_pool2d_with_indices, *args, **{**kwargs, "return_indices": True})
        call = {**dict(zip(POOLING, args, strict=False)), **kwargs}
        key, given = f"winners {len(self.tail)}", call.pop("input")
        last = given.is_contiguous(memory_format=torch.channels_last) if given.dim() == 4 else False
        self.kept[key] = winners
        self.tail.insert(0, Pooled(key, given.shape, last, call))
        return out

    def _see(self, view: Viewed | None, out: Tensor) -> None:
        assert view is not None
        if view.order is not None:
            others = [dim for dim in view.order if dim != self.channels]
            self.turned |= others != sorted(others)
        self.channels = out.dim() - 1 if view.order is None else view.order.index(self.channels)
        self.dims = range(min(self.dims.stop, self.channels))
        self.tail.insert(0, view)

    def place_at(self, out: Tensor, *, at_once: bool = False) -> None:
        """Fix the place; what moves there is known from here on. `at_once`: its error comes before `out` can change."""
        self.moved = True
        self.shape = out.shape
        if self.rectified and at_once and not isinstance(self.layer, Embedding):
            self.kept["rectified"] = out  # one kernel cuts an error off by it; to write a mask and to apply it takes five times as long
        elif self.rectified:
            self.kept["active"] = out > 0
        if isinstance(self.layer, Embedding) and self.layer.padding is not None and not self.tail:  # behind a pool words are mixed
            words = (self.kept["x"] != self.layer.padding).unsqueeze(-1).expand_as(out)
            self.kept["active"] = self.kept["active"] & words if self.rectified else words

    def draw(self, out: Tensor) -> None:
        self._numbers, self._home = self.directions.plan(tuple(out.shape), out), out.device

    def tangent(self, pick: Pick) -> Tensor:
        return self.still(pick(self.u))

    def tangents(self, count: int) -> Tensor:
        return self.still(self.u)

    def add_to_(self, tangents: Tensor) -> None:
        tangents.add_(self.tangents(len(tangents)))

    def still(self, t: Tensor) -> Tensor:
        """The tensor with zeros where the place cannot matter."""
        if (out := self.kept.get("rectified")) is not None:
            cut: Tensor = torch.ops.aten.threshold_backward(t, out, 0) if t.dtype == out.dtype else t * (out > 0)
            return cut
        return t if "active" not in self.kept else t * self.kept["active"]

    def counted(self, count: int, each: int = 1) -> Float[Tensor, " units"]:
        """How often each unit moved, over all rows and tangents; there are `each` rows an example."""
        tangents, rows = len(self.directions), count * each
        if "active" not in self.kept:
            return torch.full((self.shape.numel() // rows,), float(tangents * rows), device=self._home)
        return self.of_rows(self.kept["active"].unsqueeze(0), count, each).expand(tangents, -1, -1).sum((0, 1))

    def moves(self, count: int, each: int = 1) -> Float[Tensor, "k rows units"]:
        """What moved of each row."""
        return self.of_rows(self.still(self.u), count, each)

    def positions(self, t: Tensor, count: int, lead: int = 0) -> Float[Tensor, "*lead count positions channels"]:
        """What lies at the place, behind `lead` dimensions, by example and position."""
        t, rows = t.movedim(lead + self.channels, -1), self._rows_behind_channels
        each = t.unsqueeze(lead) if rows is None else rows.gather(t, count, lead)
        return each.reshape(*each.shape[: lead + 1], -1, self.shape[self.channels])

    def at_positions(self, each: Float[Tensor, "count positions channels"]) -> Tensor:
        """The inverse of `positions`, in the place's own shape."""
        shape, rows = [size for dim, size in enumerate(self.shape) if dim != self.channels], self._rows_behind_channels
        shape.append(self.shape[self.channels])
        t = each.reshape(shape) if rows is None else rows.scatter(each.flatten(1), shape)
        return t.movedim(-1, self.channels)

    @property
    def _rows_behind_channels(self) -> Rows | None:
        rows = self.place.rows
        return None if rows is None else Rows(rows.dim - (rows.dim > self.channels), rows.turns)

    def of_rows(self, t: Tensor, count: int, each: int) -> Float[Tensor, "k rows units"]:
        """A stack [k, *shape] of what lies at the place, by example where an example is one row, else by position."""
        return self.of_examples(t, count) if each == 1 else self.positions(t, count, lead=1).flatten(1, 2)

    def at_rows(self, each: Float[Tensor, "rows units"], count: int) -> Tensor:
        """What belongs to each row in the place's own shape."""
        return self.at_place(each) if len(each) == count else self.at_positions(each.unflatten(0, (count, -1)))

    def of_examples(self, t: Tensor, count: int) -> Float[Tensor, "k count units"]:
        """A stack [k, *shape] of what lies at the place, example by example."""
        return t.flatten(1).unsqueeze(1) if self.place.rows is None else self.place.rows.gather(t, count, lead=1)

    def at_place(self, each: Float[Tensor, "count units"]) -> Tensor:
        """What belongs to each example in the place's own shape."""
        return each.reshape(self.shape) if self.place.rows is None else self.place.rows.scatter(each, self.shape)

    @property
    def viewed(self) -> bool:
        """Whether it lies behind a view of the layer's output."""
        return any(isinstance(stage, Viewed) for stage in self.tail)

    @property
    def linear(self) -> bool:
        """Whether it is the output of a layer that is linear in every position, with a weight that is trained, up to views of it."""
        straight = not self.rectified and not self.turned and all(isinstance(stage, Viewed) for stage in self.tail)
        return isinstance(self.layer, Linear) and straight and "weight" in self.layer.names

    def from_error(self, error: Tensor) -> dict[str, Gradient]:
        """Gradients by parameter name from the error at the place, of its shape; each in the precision of its parameter."""
        x = self.kept["x"]
        error = self.still(error.to(x.dtype) if x.is_floating_point() else error)
        gradients: dict[str, Gradient] = {}
        for stage in self.tail:
            error = stage.back(error, self.kept, gradients)
        found = self.layer.local(x, error)
        return gradients | {name: found[role].to(self.layer.call[role].dtype) for role, name in self.layer.names.items()}

    def gradient(self, weights: Tensor) -> Mapping[str, Gradient]:
        u = self.u.to(self.layer.like.dtype)
        weights = weights.to(u.dtype)
        if weights.shape[1] == 1 or self.place.rows is None:
            wide = weights.reshape(len(u), *[1] * (u.dim() - 1))
        else:
            wide = self.place.rows.spread(weights, self.shape)
        return self.from_error((wide * u).sum(0))

    @property
    def names(self) -> list[str]:
        behind = [name for stage in self.tail if isinstance(stage, Normalised) for name in stage.names.values()]
        return [*self.layer.names.values(), *behind]

    def gram(self) -> Tensor:
        u = self.moves(self.rows)
        return torch.einsum("kbi,lbi->klb", u, u)


def _fits(one: torch.Size, other: torch.Size) -> bool:
    """Whether what has one shape can be added to each part of what has the other, which stays as it is."""
    return len(one) <= len(other) and all(size in (1, wide) for size, wide in zip(reversed(one), reversed(other), strict=False))


@dataclass(frozen=True)
class Block(Activity):
    """`Activity` of whole blocks: a layer with the batch normalisation, the sum, the ReLU and the max-pooling behind it, in this order."""

    name: ClassVar[str] = "block"

    def enter(self, layer: Layer, x: Tensor, out: Tensor, directions: Directions) -> Entered:
        entered = super().enter(layer, x, out, directions)
        if isinstance(entered, ActivityUse):
            entered.through = True
        return entered
