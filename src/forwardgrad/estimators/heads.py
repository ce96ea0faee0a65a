"""The classifier behind a block of `LocalLosses`: what it sees of the block, how it learns, and the error that it sends back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.optim.adam import adam

from forwardgrad.calls import Scaled
from forwardgrad.ranks import ALONE, Ranks

Sight = Literal["flatten", "pooled", "positions"]
SIGHTS = ("flatten", "pooled", "positions")
MOVES = 4  # numbers in φ for each of them that moves in a step


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
        if h.dim() == 4 and h.is_contiguous(memory_format=torch.channels_last):
            return _shared_out(error.permute(0, 2, 3, 1), h.shape[2:]).permute(0, 3, 1, 2)
        line = h.dim() == 3  # one dimension is a plane of one row
        shared = torch.ops.aten._adaptive_avg_pool3d_backward if h.dim() == 5 else torch.ops.aten._adaptive_avg_pool2d_backward
        back: Tensor = shared(error.unsqueeze(2), h.unsqueeze(2)).squeeze(2) if line else shared(error, h)
        return back

    def _grid(self, sizes: torch.Size) -> tuple[int, ...]:
        return tuple(min(self.cells, size) for size in sizes)


def _shared_out(error: Float[Tensor, "n rows columns channels"], sizes: torch.Size) -> Float[Tensor, "n high wide channels"]:
    """The error of cells as that of their units, channels last: two products with few terms, which keep that order in memory."""
    rows, columns = (_shares(cells, size, error) for cells, size in zip(error.shape[1:3], sizes, strict=True))
    n, high, _, channels = error.shape
    wide = columns @ error.reshape(n * high, -1, channels)
    return (rows @ wide.reshape(n, high, -1)).view(n, sizes[0], sizes[1], channels)


def _shares(cells: int, size: int, like: Tensor) -> Float[Tensor, "size cells"]:
    """What share each unit of a line has in the mean of each of its cells, which adaptive pooling cuts so that they may overlap."""
    unit, cell = torch.arange(size, device=like.device).unsqueeze(1), torch.arange(cells, device=like.device)
    first, end = cell * size // cells, -(-(cell + 1) * size // cells)
    return ((unit >= first) & (unit < end)).to(like.dtype) / (end - first).to(like.dtype)


_POOLS: dict[int, Callable[..., Tensor]] = {1: F.adaptive_avg_pool1d, 2: F.adaptive_avg_pool2d, 3: F.adaptive_avg_pool3d}


@dataclass(frozen=True)
class Head:
    """A linear classifier y = R φ + b that Adam trains and, where errors come back through feedback, a matrix B that learns R from
    derivatives alone. All of it are tensors of the estimator's state."""

    weight: Float[Tensor, "classes width"]
    bias: Float[Tensor, " classes"]
    feedback: Float[Tensor, "classes width"]
    means: tuple[Tensor, Tensor]
    squares: tuple[Tensor, Tensor]
    steps: tuple[Tensor, Tensor]
    turn: Tensor
    ranks: Ranks = ALONE

    @classmethod
    def kept(cls, state: dict[str, Tensor], index: int, classes: int, features: Tensor, ranks: Ranks = ALONE) -> Head:
        """The head of block `index` in the state, made where it is missing: all zeros, so that B is R at first."""
        width, key = features.shape[-1], f"head.{index}"
        weight = state.setdefault(f"{key}.weight", features.new_zeros(classes, width))
        if weight.shape != (classes, width):
            raise ValueError(
                f"the state holds a classifier of {tuple(weight.shape)} for block {index}, but this model needs {(classes, width)}: "
                "use one state for one model"
            )

        def like(name: str, shape: tuple[int, ...]) -> Tensor:
            return state.setdefault(f"{key}.{name}", features.new_zeros(shape))

        def pair(name: str) -> tuple[Tensor, Tensor]:
            return like(f"{name}.weight", (classes, width)), like(f"{name}.bias", (classes,))

        counted = features.device if features.is_cuda else torch.device("cpu")  # where Adam wants its counts of steps
        steps = tuple(state.setdefault(f"{key}.step.{role}", torch.zeros((), device=counted)) for role in ("weight", "bias"))
        feedback = like("feedback", (classes, width))
        turn = state.setdefault(f"{key}.turn", torch.zeros((), dtype=torch.int64, device=features.device))
        return cls(weight, like("bias", (classes,)), feedback, pair("mean"), pair("square"), (steps[0], steps[1]), turn, ranks)

    def error(self, features: Tensor, part: Scaled) -> Tensor:
        """∂f/∂y of the head's own loss, [n, rows, classes]: the model's loss, with the target of an example at each of its rows."""
        logits = features @ self.weight.T + self.bias
        target = part.output.call["target"].repeat_interleave(logits.shape[1])
        own = Scaled(part.output.cross_entropy(target), 0, part.repeated(logits.shape[1]))
        return own.error(logits.flatten(0, -2)).reshape(logits.shape)

    def sent_back(self, error: Tensor) -> Tensor:
        """The error at the features, e B, after B has learned from how y follows moves of single units.

        y follows a move of unit i alone by R u_i, which without noise is what B needs to know of that unit. One in MOVES units moves a
        step, so that B is R as it was in the last MOVES steps.
        """
        moved = torch.arange(self.weight.shape[1], device=self.weight.device) % MOVES == self.turn
        torch.where(moved, self.weight, self.feedback, out=self.feedback)
        self.turn.add_(1).remainder_(MOVES)
        return error @ self.feedback

    def learn(self, features: Tensor, error: Tensor, rate: float) -> None:
        """One step of Adam along the exact gradient, its mean over all processes that learn together."""
        f, e = features.flatten(0, 1), error.flatten(0, 1)
        adam(
            [self.weight, self.bias],
            self.ranks.mean([e.T @ f, e.sum(0)]),
            list(self.means),
            list(self.squares),
            [],
            list(self.steps),
            amsgrad=False,
            capturable=self.steps[0].is_cuda or torch.compiler.is_compiling(),  # nobody waits for a count, and bits differ
            beta1=0.9,
            beta2=0.999,
            lr=rate,
            weight_decay=0.0,
            eps=1e-8,
            maximize=False,
        )


def similarity_error(h: Float[Tensor, "n ..."], target: Float[Tensor, " n"]) -> Tensor:
    """The error at h of ‖S(h) − S(t)‖²/N²: (4/N²)(g_b − (g_b·x_b) x_b)/‖h_b‖ g_b = Σ_c (S − S(t))_bc x_c, x the centred unit vectors."""
    flat = h.flatten(1).to(torch.promote_types(h.dtype, torch.float32))
    centred = flat - flat.mean(1, keepdim=True)
    norm = centred.norm(dim=1, keepdim=True).clamp(min=1e-12)
    x = centred / norm
    pulled = (x @ x.T - (target.unsqueeze(0) == target.unsqueeze(1)).to(x.dtype)) @ x
    error: Tensor = (4 / len(h) ** 2) * (pulled - x * (pulled * x).sum(1, keepdim=True)) / norm
    return (error - error.mean(1, keepdim=True)).reshape(h.shape)
