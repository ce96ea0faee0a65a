"""Tensors in lists, tuples and dictionaries, as calls take and return them; and what an evaluation knows of single tensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from weakref import ref

from torch import Tensor


def named(like: Any, items: list[Any]) -> Any:
    """A sequence of the type of `like` with other items."""
    return type(like)(*items) if hasattr(like, "_fields") else type(like)(items)  # torch's own return types take one sequence


def exchanged(value: Any, instead: Mapping[int, Tensor]) -> Any:
    """The same with other tensors in place of some, by their id."""
    if isinstance(value, Tensor):
        return instead.get(id(value), value)
    if isinstance(value, (tuple, list)):
        items = [exchanged(item, instead) for item in value]
        return type(value)(items) if type(value) in (tuple, list) else named(value, items)
    if isinstance(value, dict):
        return {key: exchanged(item, instead) for key, item in value.items()}
    return value


def leaves(value: Any) -> list[Tensor]:
    """The tensors in it."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    return [leaf for item in value for leaf in leaves(item)] if isinstance(value, (tuple, list)) else []


def rebuilt(like: Any, real: Any, rest: Any) -> Any:
    """A result of the structure of `like` with the tensors of `real` and `rest` in it."""
    if isinstance(like, Tensor):
        return next(real) if like.is_floating_point() or like.is_complex() else next(rest)
    if isinstance(like, (tuple, list)):
        items = [rebuilt(item, real, rest) for item in like]
        return type(like)(items) if type(like) in (tuple, list) else named(like, items)
    if isinstance(like, dict):
        return {key: rebuilt(item, real, rest) for key, item in like.items()}
    return like


class Marks:
    """What one evaluation knows of tensors, kept with each tensor, so that it goes where the tensor goes.

    A model may keep its outputs beyond the evaluation. They are let go of by `clear`: a mark would hold memory, and cannot be saved.
    """

    def __init__(self, name: str) -> None:
        self._name, self._marked = name, list[ref[Tensor]]()

    def put(self, tensor: Tensor, mark: Any) -> None:
        tensor.__dict__[self._name] = mark
        self._marked.append(ref(tensor))

    def of(self, tensor: Tensor) -> Any:
        return tensor.__dict__.get(self._name)

    def clear(self) -> None:
        for marked in self._marked:
            if (tensor := marked()) is not None:
                tensor.__dict__.pop(self._name, None)
        self._marked = []
