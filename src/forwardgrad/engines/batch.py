"""`Batch`: the arguments of one step, and what in them decides whether a graph fits."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from enum import Enum
from types import BuiltinFunctionType, FunctionType
from typing import Any

import torch
from torch import Tensor

_NUMBERS = (bool, int, float, complex, str, bytes, type(None))
_PLAIN = (*_NUMBERS, type, Enum, range, torch.dtype, torch.device, FunctionType, BuiltinFunctionType)


class Opaque(Exception):
    """Why the tensors of a batch cannot be told, as the end of a sentence."""


@dataclass(frozen=True)
class Batch:
    """The arguments of a step: its loss is called as `loss(model, *positional, **named)`."""

    positional: tuple[Any, ...] = ()
    named: Mapping[str, Any] = field(default_factory=dict)

    def tensors(self) -> tuple[Tensor, ...]:
        """The tensors, in an order that the same nesting has again; those of an object that is not looked into are left out."""
        found: list[Tensor] = []
        for part in (*self.positional, *self.named.values()):
            try:
                for _ in _parts(part, lambda tensor: found.append(tensor)):
                    pass
            except Opaque:
                pass
        return tuple(found)

    def key(self, place: Callable[[Tensor], Hashable]) -> Iterator[Hashable]:
        """All that is not a tensor, how it is nested, and where each tensor has its place; raises Opaque."""
        for part in self.positional:
            yield place(part) if isinstance(part, Tensor) else tuple(_parts(part, place))
        for name, part in self.named.items():
            yield name, *_parts(part, place)


def _parts(value: Any, place: Callable[[Tensor], Hashable]) -> Iterator[Hashable]:
    if isinstance(value, Tensor):
        yield place(value)
    elif isinstance(value, Mapping):  # such as the batch of a tokenizer
        yield type(value), tuple(map(repr, value))
        for item in value.values():
            yield from _parts(item, place)
    elif isinstance(value, (tuple, list)):
        yield type(value), len(value)
        for item in value:
            yield from _parts(item, place)
    elif is_dataclass(value) and not isinstance(value, type):
        yield type(value)
        for one in fields(value):
            yield from _parts(getattr(value, one.name), place)
    elif isinstance(value, _PLAIN):
        yield type(value), value
    else:  # an object may be another one at the next step, or hold another tensor
        raise Opaque(f"the batch holds a {type(value).__name__}: give tensors, numbers and texts, or lists, tuples and dicts of them")
