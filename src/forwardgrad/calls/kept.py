"""Put back tensors that a loss or a model keeps outside its buffers, so that evaluations with NaN leave nothing behind."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn

from forwardgrad.forward_mode import check_reach
from forwardgrad.objective import Objective

_DEEP, _MANY = 4, 10_000
_LARGE = 2**24  # numbers: a tensor that is larger is data, not what a loss keeps


@contextmanager
def kept(*roots: Any) -> Iterator[None]:
    """Put back tensors that modules and objects hold which the roots reach: attributes, buffers, and what lists and dictionaries hold.

    A function reaches what it closes over and the globals that it names.
    """
    holders = {id(holder): holder for root in roots for holder in _holders(root, _DEEP, {})}
    before = [(holder, _shallow(holder)) for holder in holders.values()]
    values = [(t, t.detach().clone(), t._version) for _, held in before for t in _tensors(held)]
    try:
        yield
    finally:
        for holder, held in before:
            if isinstance(holder, dict):
                for key, value in held.items():
                    if isinstance(value, Tensor) and holder.get(key) is not value:
                        holder[key] = value
            else:
                for place, value in enumerate(held):
                    if isinstance(value, Tensor) and place < len(holder) and holder[place] is not value:
                        holder[place] = value
        for tensor, value, version in values:
            if tensor._version != version:
                tensor.detach().copy_(value)


def check_uses(objective: Objective, *, live: bool = False, below: bool = True) -> None:
    """`forward_mode.check_reach`, of which nothing is left behind."""
    check_reach(objective, functools.partial(kept, objective.loss, objective.at), live=live, below=below)


def _holders(value: Any, deep: int, seen: dict[int, Any]) -> Iterator[Any]:
    """The dictionaries and lists that hold tensors, as far as they can be reached."""
    if deep < 0 or id(value) in seen or len(seen) > _MANY or isinstance(value, (Tensor, type, str, bytes, int, float, bool, type(None))):
        return
    seen[id(value)] = value
    inner: list[Any] = []
    if isinstance(value, (dict, list)):
        yield value
        inner = list(value.values()) if isinstance(value, dict) else value
    elif isinstance(value, (tuple, set, frozenset)):
        inner = list(value)
    elif isinstance(value, MethodType):
        inner = [value.__self__, value.__func__]
    elif isinstance(value, functools.partial):
        inner = [value.func, value.args, value.keywords]
    elif isinstance(value, FunctionType):
        cells = [cell.cell_contents for cell in value.__closure__ or () if not _empty(cell)]
        inner = cells + [value.__globals__[name] for name in value.__code__.co_names if name in value.__globals__]
    elif isinstance(value, nn.Module):
        for module in value.modules():
            if isinstance(module, torch.jit.ScriptModule):  # whose state lies outside of Python
                continue
            yield from (module.__dict__, module._buffers)
            seen[id(module)] = module
            inner += [part for key, part in module.__dict__.items() if not key.startswith("_")]
    elif hasattr(value, "__dict__") and type(value).__module__.partition(".")[0] not in ("builtins", "torch", "numpy"):
        yield value.__dict__
        inner = list(value.__dict__.values())
    for part in inner:
        yield from _holders(part, deep - 1, seen)


def _empty(cell: Any) -> bool:
    try:
        cell.cell_contents  # noqa: B018  # a name that is bound later
    except ValueError:
        return True
    return False


def _shallow(holder: Any) -> Any:
    return dict(holder) if isinstance(holder, dict) else list(holder)


def _tensors(held: Any) -> list[Tensor]:
    values = [value for value in (held.values() if isinstance(held, dict) else held) if isinstance(value, Tensor)]
    return [t for t in values if not isinstance(t, nn.Parameter) and 0 not in t.stride() and t.numel() <= _LARGE]
