"""The classifier behind a block of `LocalLosses`: what it sees of the block, how it learns, and the error that it sends back."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.optim.adam import adam

from forwardgrad.calls import Pass, Scaled
from forwardgrad.perturbations import ActivityUse, Entered, Rows
from forwardgrad.ranks import ALONE, Ranks

Sight = Literal["flatten", "pooled", "positions"]
SIGHTS = ("flatten", "pooled", "positions")
MOVES = 4  # numbers in φ for each of them that moves in a step


@dataclass(frozen=True)
class Labels:
    """What classifiers inside a model learn: the part of its loss that is a cross-entropy of class indices, example by example.

    `rows`: where the examples lie in the targets, `count` their number.
    `apart`: places whose positions lie in another order than the targets.
    """

    part: Scaled
    rows: Rows
    count: int
    apart: frozenset[Entered] = frozenset()

    @classmethod
    def of(cls, found: Pass) -> list[Labels]:
        """One for each such part of a loss whose examples were found in its scores."""
        labels, told = list[Labels](), found.reading.told
        for part in found.parts:
            if part.index < len(told) and part.output.classifies and (rows := told[part.index].rows) is not None:
                apart = frozenset(found.entered[index] for index in told[part.index].apart)
                labels.append(cls(part, Rows(rows.dim - (rows.dim > 1), rows.turns), found.count, apart))
        return labels

    @classmethod
    def to_come(cls, part: Scaled) -> Labels:
        """That of a loss that is not there yet, whose targets have the examples first."""
        return cls(part, Rows(0), len(part.output.call["target"]))

    @property
    def positions(self) -> int:
        """How many targets an example has: more than one where it is a text with a target for every token."""
        return self.part.output.call["target"].numel() // self.count  # type: ignore[no-any-return]

    @property
    def tokens(self) -> bool:
        return self.positions > 1

    @cached_property
    def each(self) -> Float[Tensor, "n positions"]:
        """The targets of each example."""
        return self.rows.gather(self.part.output.call["target"], self.count)

    def by_position(self, t: Tensor, lead: int = 0) -> Float[Tensor, "*lead n positions m"]:
        """Numbers [*lead, *targets, m] of every target, example by example."""
        return self.rows.gather(t, self.count, lead).reshape(*t.shape[:lead], self.count, self.positions, t.shape[-1])

    def of_rows(self, rows: int, merged: Tensor | None) -> Scaled:
        """The same loss of other scores, those of so many rows an example: one for each of its targets, or all for its only one."""
        target, factor = self.each.flatten(), self.part.factor
        if not self.tokens:
            target, factor = target.repeat_interleave(rows), self.part.repeated(rows)
        elif isinstance(factor, Tensor) and factor.dim():
            factor = self.rows.gather(factor, self.count).flatten()
        return Scaled(self.part.output.cross_entropy(target, merged), 0, factor)

    def pull(self, features: Tensor) -> Tensor:
        """The error at φ of the similarity term, in which ignored examples have no part."""
        target, call = self.each[:, 0], self.part.output.call
        return similarity_error(features, target, self.part.output.classes, target != call.get("ignore_index", -100))


def merged_classes(classes: int, fewer: int, device: torch.device) -> Tensor:
    """For each of so many classes, the one of fewer that stands for it: evenly, and unlike the order that the classes have.

    Steps of the golden section go round all classes (Fibonacci hashing), so that neighbours, which are alike in many vocabularies, part.
    """
    step = next(step for step in range(int(0.618034 * classes), 2 * classes) if math.gcd(step, classes) == 1)
    return torch.arange(classes, device=device) * step % classes % fewer


def follow_(feedback: Float[Tensor, "outputs units"], weight: Float[Tensor, "outputs units"], turn: Tensor) -> None:
    """Let feedback learn a linear layer from how its output follows moves of single units.

    y follows a move of unit i alone by R u_i, which without noise is what B needs to know of that unit. One in MOVES units moves a step,
    so that B is R as it was in the last MOVES steps.
    """
    moved = torch.arange(weight.shape[1], device=weight.device) % MOVES == turn
    torch.where(moved, weight, feedback, out=feedback)
    turn.add_(1).remainder_(MOVES)


@dataclass(frozen=True)
class Features:
    """φ, a linear map of a block's activities h [n, channels, *positions]: [n, rows, width], one row but for "positions".

    "flatten" is h itself, "pooled" its means over a grid of cells (cut as by adaptive pooling), "positions" the channels of every position.
    `tokens`: whether every position has a target of its own; h is then [n, positions, channels], and φ is h itself.
    """

    sight: Sight
    cells: int
    tokens: bool = False

    def in_front(self, t: Tensor, end: ActivityUse, count: int, lead: int = 0) -> Tensor:
        """h with so many examples, of what lies at the end of a block."""
        rows = end.place.rows
        if self.tokens:
            return end.positions(t, count, lead)
        if self._turned(end, count):
            return end.positions(t, count, lead).transpose(-1, -2)
        if rows is None or end.shape[rows.dim] == count:
            return t.movedim(lead + (0 if rows is None else rows.dim), lead)
        return rows.gather(t, count, lead)

    def put_back(self, t: Tensor, end: ActivityUse) -> Tensor:
        """The inverse of `in_front`."""
        rows = end.place.rows
        if self.tokens:
            return end.at_positions(t)
        if self._turned(end, len(t)):
            return end.at_positions(t.transpose(-1, -2))
        if rows is None or end.shape[rows.dim] == len(t):
            return t.movedim(0, 0 if rows is None else rows.dim)
        return rows.scatter(t, end.shape)

    def _turned(self, end: ActivityUse, count: int) -> bool:
        """Whether positions stand in front of the channels, as behind a linear layer, and φ tells them from these."""
        rows = end.place.rows
        behind = rows is not None and (rows.dim, end.channels) != (0, 1)
        return self.sight != "flatten" and len(end.shape) > 2 and behind

    def of(self, h: Tensor, lead: int = 1) -> Tensor:
        """φ(h) with `lead` dimensions before the channels, in float32 at least."""
        if self.tokens:
            return h.to(torch.promote_types(h.dtype, torch.float32))
        if h.dim() - lead > 1 and self.sight == "pooled":
            h = _POOLS[h.dim() - lead - 1](h.flatten(0, lead - 1), self._grid(h.shape[lead + 1 :])).unflatten(0, h.shape[:lead])
        h = h.to(torch.promote_types(h.dtype, torch.float32))
        if h.dim() - lead > 1 and self.sight == "positions":
            return h.flatten(lead + 1).transpose(lead, lead + 1)
        return h.flatten(lead).unsqueeze(lead)

    def back(self, error: Float[Tensor, "n rows width"], h: Tensor) -> Tensor:
        """The error at h from that at φ(h): each unit of a cell has its share, as the winner has all in max-pooling."""
        if h.dim() < 3 or self.sight == "flatten" or self.tokens:
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

    def error(self, features: Tensor, labels: Labels) -> Tensor:
        """∂f/∂y of the head's own loss, [n, rows, classes]: the model's loss, with the target of an example at each of its rows."""
        logits = features @ self.weight.T + self.bias
        classes, fewer = labels.part.output.classes, len(self.weight)
        own = labels.of_rows(logits.shape[1], merged_classes(classes, fewer, logits.device) if fewer < classes else None)
        return own.error(logits.flatten(0, -2)).reshape(logits.shape)

    def sent_back(self, error: Tensor) -> Tensor:
        """The error at the features, e B, after B has learned from how y follows moves of single units."""
        follow_(self.feedback, self.weight, self.turn)
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


def similarity_error(features: Float[Tensor, "n ..."], target: Tensor, classes: int, used: Tensor) -> Tensor:
    """The error at φ of ‖S(φ) − S(t)‖²/N²: (4/N²)(g_b − (g_b·x_b) x_b)/‖φ_b‖, g_b = Σ_c (S − S(t))_bc x_c, x the centred unit vectors.

    S(t) are the cosines of centred one-hot vectors: 1 for a pair of the same class, −1/(classes − 1) for another. `target` and `used`
    [n]: the class of each example, and whether it is one of the N that are compared.
    """
    flat = features.flatten(1)
    centred = flat - flat.mean(1, keepdim=True)
    norm = centred.norm(dim=1, keepdim=True).clamp(min=1e-12)
    x, used = centred / norm, used.to(flat.dtype)
    apart = -1 / max(classes - 1, 1)
    wanted = (target.unsqueeze(0) == target.unsqueeze(1)).to(x.dtype) * (1 - apart) + apart
    pulled = (x @ x.T - wanted) @ (x * used.unsqueeze(1)) * used.unsqueeze(1)
    error: Tensor = (4 / used.sum().clamp(min=1) ** 2) * (pulled - x * (pulled * x).sum(1, keepdim=True)) / norm
    return (error - error.mean(1, keepdim=True)).reshape(features.shape)
