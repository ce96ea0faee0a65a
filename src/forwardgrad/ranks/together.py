"""`Ranks`: what a step asks of the processes that take it together. This is one process on its own, which has nobody to ask."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import Generator, Tensor

from forwardgrad.factored import Gradient


def share_of(tangents: int, parts: int) -> int:
    """How many of some directions each of so many processes evaluates; ValueError where they cannot be divided."""
    if tangents % parts:
        raise ValueError(
            f"{parts} ranks divide the directions of a batch, and {tangents} cannot be divided by that: take a multiple of {parts} for "
            "tangents"
        )
    return tangents // parts


class Ranks:
    """One process. `directions` is the number of processes that divide the directions of a batch among them, `many` whether there are more
    than one in all."""

    directions: int = 1
    many: bool = False

    def share(self, tangents: int) -> int:
        """How many of the directions of a step this process evaluates; ValueError where they cannot be divided."""
        return tangents

    def part(self, count: int) -> range:
        """Which of `count` directions this process evaluates."""
        return range(count)

    def together(self, loss: Tensor, derivatives: Tensor) -> tuple[Tensor, Tensor]:
        """The loss and the derivatives along all directions, from those that this process found along its own: one number for each."""
        return loss, derivatives

    def mean(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The means of some tensors over all processes."""
        return list(tensors)

    def gradients(self, parameters: Mapping[str, Tensor], parts: Iterable[tuple[str, Gradient]]) -> Iterator[tuple[str, Gradient]]:
        """The mean over all processes of gradients in parts by parameter, in parts again."""
        return iter(parts)

    def check(self, parameters: Mapping[str, Tensor], generator: Generator | None, method: str) -> None:
        """Called ahead of every step: RuntimeError where processes have come to differ."""

    def finished(self) -> None:
        """Called where a step has told the other processes all that it has to."""

    def own(self, generator: Generator | None) -> Generator | None:
        """Where a process draws numbers that are its own."""
        return generator


ALONE = Ranks()


class Apart(Ranks):
    """One of several processes that divide directions, before they have told one another anything: what others evaluate counts as zero."""

    many = True

    def __init__(self, ranks: Ranks) -> None:
        self._ranks, self.directions = ranks, ranks.directions

    def share(self, tangents: int) -> int:
        return self._ranks.share(tangents)

    def part(self, count: int) -> range:
        return self._ranks.part(count)

    def together(self, loss: Tensor, derivatives: Tensor) -> tuple[Tensor, Tensor]:
        if self.directions == 1:
            return loss, derivatives
        count = len(derivatives) * self.directions
        mine = self.part(count)
        return loss, torch.cat([derivatives.new_zeros(mine.start), derivatives, derivatives.new_zeros(count - mine.stop)])
