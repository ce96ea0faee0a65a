"""What every rule is made with: how a tensor moves (`Track`), what a rule is asked with, and what it may write to.

A rule takes the evaluation, the function and its arguments, of which at least one moves. It returns the result, moving; or NotImplemented
where it does not hold, and torch's dual numbers are asked instead.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol
from weakref import ref

import torch
from torch import Tensor

from forwardgrad.forward_mode.rules import images

Args = tuple[Any, ...]


class Track:
    """How a tensor moves: K tangents [K, *shape]; the `stack` [1 + K, *shape] in which it stands before them, if there is one.

    `fresh` says that nothing else sees either. Where a tensor is a ReLU, its tangents may still be those `behind` it, to be set to zero
    where it is zero: whoever needs them first does that, in place if the tensor behind is gone by then, and max-pooling only for its
    winners.
    """

    __slots__ = ("_tangents", "behind", "fresh", "lent", "owner", "stack")

    def __init__(self, owner: object, tangents: Tensor | None, stack: Tensor | None = None, fresh: bool = False) -> None:
        self.owner, self._tangents, self.stack, self.fresh = owner, tangents, stack, fresh
        self.behind: tuple[Track, ref[Tensor]] | None = None
        self.lent = 0  # tensors that have this one behind them

    def of(self, tensor: Tensor) -> Tensor:
        """The tangents, for the tensor that this is the track of."""
        if self._tangents is None:
            assert self.behind is not None
            track, alive = self.behind
            t = track.of(tensor)
            into = t if alive() is None and track.fresh and track.lent == 1 else torch.empty_like(t)
            self._tangents = rectified(t, tensor, into)
            self.behind = None
        return self._tangents


def rectified(t: Tensor, values: Tensor, into: Tensor) -> Tensor:
    """Tangents with zeros where a ReLU is zero."""
    if torch.compiler.is_compiling() and images.channels_last(values):
        of_rows = [images.rows(one) for one in (t, values, into)]
        torch.ops.aten.threshold_backward.grad_input(of_rows[0], of_rows[1].expand_as(of_rows[0]), 0, grad_input=of_rows[2])
        return into
    return torch.ops.aten.threshold_backward.grad_input(t, values, 0, grad_input=into)  # type: ignore[no-any-return]


class Tracking(Protocol):
    """What a rule needs of the evaluation it is part of: how tensors move in it, and to let others move."""

    count: int

    def track(self, tensor: Tensor) -> Track | None: ...

    def tangents(self, tensor: Tensor) -> Tensor | None: ...

    def attach(self, tensor: Tensor, tangents: Tensor, stack: Tensor | None = None, *, fresh: bool = False) -> Tensor: ...

    def follow(self, tensor: Tensor, behind: Tensor) -> Tensor: ...


Rule = Callable[[Tracking, Callable[..., Any], Args, dict[str, Any]], Any]


def owned(track: Track) -> bool:
    """Whether a tensor may be written to: nothing else sees its values or tangents."""
    return track.fresh and not track.lent
