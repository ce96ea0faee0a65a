"""The path that a model takes through its calls: which functions it calls, on which results, along which dimensions.

On one path the examples of a batch always lie in the same dimensions, so what was found out once holds. Sizes are left out: a batch with
another number of examples takes the same path.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves

from forwardgrad.forward_mode import Marks

SMALL = 8  # whole numbers below may choose a dimension; larger ones are sizes
_PERHAPS_NOTHING = {"to", "float", "double", "half", "bfloat16", "type", "type_as", "contiguous", "dropout", "alpha_dropout"}
"""Calls that may return what they were given, or a tensor that is the same but for its name under torch's own forward mode."""
_evaluations = itertools.count()


class Calls:
    """The calls of one evaluation. `names` gives those of parameters by the id of what stands for them."""

    def __init__(self, names: Mapping[int, str]) -> None:
        self._names, self._mine = names, next(_evaluations)
        self._seen: list[Hashable] = []
        self._given: dict[int, tuple[Tensor, int]] = {}  # tensors that no call here made, kept so that their ids stay theirs
        self._results, self._numbers = 0, Marks("_forwardgrad_number")

    def name(self, tensors: Mapping[str, Tensor]) -> None:
        """Know what stands for parameters besides."""
        self._names = {**self._names, **{id(tensor): name for name, tensor in tensors.items()}}

    @property
    def count(self) -> int:
        return len(self._seen)

    def close(self) -> None:
        """Let go of all tensors."""
        self._given = {}
        self._numbers.clear()

    def seen(self) -> int:
        """All of them as one number."""
        return hash(tuple(self._seen))

    def begin(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """A call that is about to be made."""
        first = args[0] if args and isinstance(args[0], Tensor) else None
        parts = [self._part(value, first) for value in (*args, *kwargs.values())]
        self._seen.append((getattr(func, "__code__", func), *parts))

    def end(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Any) -> None:
        """What it returned: later calls are told by which of these they are given."""
        first = args[0] if args and isinstance(args[0], Tensor) else None
        for leaf in (result,) if isinstance(result, Tensor) else tree_leaves(result):
            if not isinstance(leaf, Tensor):
                continue
            if first is not None and _perhaps_the_same(func, args, kwargs) and (leaf.shape, leaf.dtype) == (first.shape, first.dtype):
                self._numbers.put(leaf, (self._mine, self._number(first)))
                continue
            self._numbers.put(leaf, (self._mine, self._results))
            self._results += 1

    def _part(self, value: Any, first: Tensor | None) -> Hashable:
        if isinstance(value, Tensor):
            return self._number(value), ones(value.shape)
        if isinstance(value, (tuple, list)):
            return tuple([_cut(part, first, at) if isinstance(part, slice) else self._part(part, first) for at, part in enumerate(value)])
        if isinstance(value, slice):
            return _cut(value, first, 0)
        small = type(value) is int and first is not None and -SMALL < value < SMALL  # without a tensor it may make a batch, by its size
        kind: Any = type(value)
        told: Hashable = value if small or kind in (bool, str, type(None)) else kind
        return told

    def _number(self, tensor: Tensor) -> Hashable:
        if (name := self._names.get(id(tensor))) is not None:
            return name
        number = self._numbers.of(tensor)
        if number is not None and number[0] == self._mine:
            told: Hashable = number[1]
            return told
        return "given", self._given.setdefault(id(tensor), (tensor, len(self._given)))[1]


def writes(func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Whether a call may write into what it is given, as its name and options tell."""
    name = getattr(func, "__name__", "")
    in_place = name.startswith("__i") or name == "__setitem__" or (name.endswith("_") and not name.endswith("__"))
    return in_place or kwargs.get("inplace") is True or kwargs.get("out") is not None


def _perhaps_the_same(func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Whether a call may return what it was given: it does not in every kind of evaluation."""
    named = getattr(func, "__name__", "") in _PERHAPS_NOTHING
    return named or writes(func, args, kwargs) or any(value is True for value in args)  # which may stand for inplace


def ones(shape: Sequence[int]) -> Hashable:
    """The number of dimensions, and which of them have size 1."""
    return tuple([size == 1 for size in shape])


def _cut(part: slice, first: Tensor | None, dim: int) -> Hashable:
    """A slice, by the size of what it cuts where it is a simple part of that."""
    size = first.shape[dim] if first is not None and dim < first.dim() else 0
    known = {None: None, 0: 0, size: "size", size // 2: "half"} if size > 1 else {}
    return tuple(
        [known.get(bound, bound) if isinstance(bound, (int, type(None))) else type(bound) for bound in (part.start, part.stop, part.step)]
    )
