"""What is known of a loss before it is computed, from an earlier step on the same path: blocks then learn while the pass goes on."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from forwardgrad.calls.sums import Scaled
from forwardgrad.forward_mode.rules import Output
from forwardgrad.perturbations import ActivityUse, Entered, Told

AtEnd = Callable[[int, ActivityUse, Tensor, Scaled], None]
"""Called with the number of a block, its place, its values and the labelled part of the loss, as soon as the block has ended."""


@dataclass(frozen=True)
class Ahead:
    """The labelled part of a loss, but for the values: its options, its factor, and which tensor of the batch has the labels.

    `prefixes`: the calls up to the end of each block. Where they are others the path is another one, and nothing here holds.
    """

    target: int
    classes: int
    options: Mapping[str, Any]
    factor: float
    prefixes: tuple[int, ...]
    dtype: torch.dtype
    dims: int

    @classmethod
    def of(
        cls,
        parts: Sequence[Scaled],
        given: Sequence[Tensor],
        count: int,
        entered: Sequence[Entered],
        prefixes: Sequence[int],
        read: Collection[str],
        told: Sequence[Told],
    ) -> Ahead | None:
        """What an evaluation of so many examples tells about the next on its path. None where the labels are no tensor of the batch or do
        not have the examples first, a factor is one that may change, something ends no block, or a parameter is used twice, so that its
        gradient is whole at the end alone.

        `read`: parameters whose values were read besides, perhaps behind their block, where they would have moved. `told`: where the
        examples lie in the scores, and so in the labels.
        """
        labelled = [part for part in parts if part.output.labelled]
        if len(labelled) != 1 or not isinstance(labelled[0].factor, float):
            return None
        where = told[labelled[0].index] if labelled[0].index < len(told) else None
        if where is None or where.apart or where.rows is None or where.rows.dim:
            return None
        names = [name for one in entered for name in one.names]
        simple = all(isinstance(one, ActivityUse) for one in entered) and len(set(names)) == len(names) and not set(names) & set(read)
        exact = sum(isinstance(one, ActivityUse) and one.exact for one in entered)
        call = labelled[0].output.call
        index = next((index for index, tensor in enumerate(given) if tensor is call["target"]), None)
        if not simple or index is None or len(prefixes) + exact != len(entered):
            return None
        target = call["target"]
        if not labelled[0].output.classifies or len(target) != count:
            return None
        return cls(
            index,
            call["input"].shape[1],
            _options(call),
            labelled[0].factor,
            tuple(prefixes),
            target.dtype,
            target.dim(),
        )

    def fits(self, given: Sequence[Tensor]) -> bool:
        """Whether a batch has what may be labels in their place."""
        return self.target < len(given) and (given[self.target].dtype, given[self.target].dim()) == (self.dtype, self.dims)

    def part(self, given: Sequence[Tensor]) -> Scaled:
        """The part of the loss that is to come, of logits that nobody has seen yet."""
        target = given[self.target]
        logits = target.new_empty(1).expand(len(target), self.classes, *target.shape[1:])  # only its shape is asked for
        return Scaled(Output({**self.options, "input": logits, "target": target}, None, True).cross_entropy(target), 0, self.factor)  # type: ignore[arg-type]

    def holds(self, parts: Sequence[Scaled], given: Sequence[Tensor]) -> bool:
        """Whether the loss came as expected."""
        found = [part for part in parts if part.output.labelled]
        if len(found) != 1 or found[0].output.call["target"] is not given[self.target]:
            return False
        options = _options(found[0].output.call)
        same = options.keys() == self.options.keys() and all(_same(value, self.options[key]) for key, value in options.items())
        return same and isinstance(found[0].factor, float) and found[0].factor == self.factor


def _options(call: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in call.items() if key not in ("input", "target")}


def _same(one: Any, other: Any) -> bool:
    return one is other if isinstance(one, Tensor) or isinstance(other, Tensor) else one == other
