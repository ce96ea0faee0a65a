"""Why an evaluation has to be made once more: what was known of the model did not hold."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

from forwardgrad.forward_mode import Redo
from forwardgrad.perturbations import ActivityUse, Entered

BELOW = -1
"""Stands among the numbers of places for calls that no watch sees, which may use the output of any layer."""
BARE = -2
"""Less the number of a place: stands among these numbers for a place that is put off, but not behind views of its values."""


class UsedAgain(Redo):
    """The output of a layer was used by something besides the ReLU, pooling, view or loss behind it: its place is put off too far."""

    def __init__(self, entered: Sequence[Entered], index: int) -> None:
        """Of the place of this number. Where it lies behind a view it stays ahead of views from now on, else it moves at once."""
        point = entered[index]
        self.index = BARE - index if isinstance(point, ActivityUse) and point.viewed else index


class OtherPath(Redo):
    """The model took other calls than those that its reading was made for."""

    def __init__(self, path: Hashable) -> None:
        self.path = path


class Transformed(Redo, RuntimeError):
    """Parameters went through a transform of torch.func, inside of which nothing can begin to move: they have to do so before it.

    `blocks`: whether blocks of the model ended on the way, so that a move from the start would be seen by the losses of other blocks.
    """

    def __init__(self, names: frozenset[str], blocks: bool) -> None:
        self.names, self.blocks = names, blocks
        which = ", ".join(sorted(name.removeprefix("model.") for name in names))
        super().__init__(
            f"the loss uses {which} inside torch.func.grad, vmap or jvp: use ForwardGradient(perturb=Dense()) or ZerothOrder()"
        )


class WrittenTo(Redo):
    """The values of a block were written to behind its end, before its loss had seen them."""


class Strayed(Redo):
    """Blocks learned ahead of the loss, and then the model took another path than the one that this was known for."""
