"""Record the calls behind a model's last layer, to evaluate the loss again as a function of the model's outputs alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.func import jvp, vmap
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves, tree_unflatten

from forwardgrad.calls.paths import writes

MOST_NUMBERS = 2048  # numbers of the outputs: as many forward derivatives of the loss alone are taken at every step
AT_ONCE = 512

Slot = tuple[int, int]
"""A tensor that a call was given: the number of the call, and which of its arguments, counted through lists and tuples."""


_RANDOM = {"bernoulli", "multinomial", "normal", "poisson", "rand_like", "randint_like", "randn_like", "rrelu"}

LossOf = Callable[[Sequence[Tensor], Mapping[Slot, Tensor]], Tensor]
"""A loss as a function of the outputs and of what else its calls were given."""


class Unrepeatable(Exception):
    """Why the calls cannot be made again, as the end of a sentence."""


class _Id(int):
    """What stands for a tensor among the arguments of a call."""


class _Call(NamedTuple):
    """A call: what it was given, with an id for every tensor, and the ids of the tensors that it returned."""

    func: Callable[..., Any]
    given: list[Any]
    spec: TreeSpec
    made: list[int]
    writes: bool

    def follows(self, known: set[int]) -> bool:
        """Whether it was given one of these tensors."""
        return any(isinstance(leaf, _Id) and leaf in known for leaf in self.given)


class Recording:
    """The calls of one evaluation from some point on."""

    def __init__(self) -> None:
        self._calls: list[_Call] = []
        self._tensors: dict[int, Tensor] = {}  # all of them, so that no other object gets the id of one
        self._made: set[int] = set()
        self.given: dict[Slot, Tensor] = {}
        """Tensors that a call was given and no call here made."""
        self.flaw: str | None = None

    def add(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        """A call that was made."""
        leaves, spec = tree_flatten((args, kwargs))
        made = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        for place, leaf in enumerate(leaves):
            if isinstance(leaf, Tensor):
                self._tensors[id(leaf)] = leaf
                if id(leaf) not in self._made:
                    self.given[len(self._calls), place] = leaf
        self._tensors.update((id(one), one) for one in made)
        self._made |= {id(one) for one in made}
        names = [_Id(id(leaf)) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        self._calls.append(_Call(func, names, spec, [id(one) for one in made], writes(func, args, kwargs)))

    def again(self, slots: Sequence[Slot], loss: Tensor) -> tuple[LossOf, dict[Slot, Tensor]]:
        """The loss as a function of the tensors at these slots and of others by slot, and those others.

        Only calls that follow from the tensors at the slots are made again. Raises Unrepeatable where that cannot be.
        """
        if any(slot not in self.given for slot in slots):
            raise Unrepeatable("the calls behind the last layer are not the same at every step")
        inputs = [id(self.given[slot]) for slot in slots]
        following, chosen = set(inputs), list[tuple[int, _Call]]()
        for number, call in enumerate(self._calls):
            if call.follows(following):
                name = getattr(call.func, "__name__", "a call")
                if call.writes:
                    self.flaw = f"{name} writes into a tensor in place"
                if name in _RANDOM or "dropout" in name:
                    self.flaw = f"{name} draws random numbers"
                chosen.append((number, call))
                following.update(call.made)
        if self.flaw is not None:
            raise Unrepeatable(self.flaw)
        if id(loss) not in following:
            raise Unrepeatable("the loss is not what a torch function behind the last layer returned")
        others, wanted = dict[Slot, Tensor](), id(loss)
        for number, call in chosen:
            named = [(place, leaf) for place, leaf in enumerate(call.given) if isinstance(leaf, _Id) and leaf not in following]
            others.update(((number, place), self._tensors[leaf]) for place, leaf in named)

        def loss_of(values: Sequence[Tensor], others: Mapping[Slot, Tensor]) -> Tensor:
            known = dict(zip(inputs, values, strict=True))
            for number, call in chosen:
                leaves = [
                    (known[leaf] if leaf in known else others[number, place]) if isinstance(leaf, _Id) else leaf
                    for place, leaf in enumerate(call.given)
                ]
                args, kwargs = tree_unflatten(leaves, call.spec)
                found = [leaf for leaf in tree_leaves(call.func(*args, **kwargs)) if isinstance(leaf, Tensor)]
                known.update(zip(call.made, found, strict=True))
            return known[wanted].mean() if known[wanted].dim() else known[wanted]

        return loss_of, others


def errors(loss_of: LossOf, outputs: Sequence[Tensor], others: Mapping[Slot, Tensor]) -> list[Tensor]:
    """∂loss/∂output of each output, by one forward derivative of the loss alone for each of its numbers."""
    wide = tuple(_wide(t.detach()) for t in outputs)
    others = {slot: _wide(t) if t.is_floating_point() else t for slot, t in others.items()}

    def error(index: int) -> Tensor:
        def value(one: Tensor) -> Tensor:
            return loss_of([one if place == index else t for place, t in enumerate(wide)], others)

        def along(direction: Tensor) -> Tensor:
            derivative: Tensor = jvp(value, (wide[index],), (direction,))[1]
            return derivative

        each = torch.eye(wide[index].numel(), dtype=wide[index].dtype, device=wide[index].device).reshape(-1, *wide[index].shape)
        found: Tensor = vmap(along, chunk_size=AT_ONCE, randomness="same")(each)
        return found.reshape(wide[index].shape)

    with torch.no_grad(), torch.autocast(outputs[0].device.type, enabled=False):
        return [error(index) for index in range(len(wide))]


def _wide(t: Tensor) -> Tensor:
    return t.to(torch.promote_types(t.dtype, torch.float32))
