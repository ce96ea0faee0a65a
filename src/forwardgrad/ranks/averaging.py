"""The mean over ranks of gradients that are more than a few numbers: as thin factors where that is less to send, else whole."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from forwardgrad.factored import Factored, Gradient, dense
from forwardgrad.ranks.wire import Wire

_NONE, _WHOLE = -2, -1


def averaged(wire: Wire, parameters: Mapping[str, Tensor], parts: Iterable[tuple[str, Gradient]]) -> Iterator[tuple[str, Gradient]]:
    """The mean over ranks of gradients in parts by parameter.

    First the ranks tell one another the form of each parameter's gradient. A matrix of m × n whose gradient is a product of rank r on every
    rank is sent as its factors, r(m + n) numbers, where that is less than what a sum of mn numbers over R ranks costs. All others are one
    sum. A parameter that has a gradient on some ranks alone counts as zero on the others.
    """
    found = {name: list[Gradient]() for name in parameters}
    for name, part in parts:
        found[name].append(part)
    first = next(iter(parameters.values()))
    forms = torch.tensor([float(_form(found[name])) for name in parameters], dtype=torch.float32, device=first.device)
    ranks = wire.gathered(forms).long().T.tolist()
    thin = dict[str, int]()
    whole = list[str]()
    for (name, p), each in zip(parameters.items(), ranks, strict=True):
        if max(each) == _NONE:
            continue
        rank = max(each)
        factored = all(form >= 0 for form in each) and rank * (len(p) + p.numel() // len(p)) * wire.size < 2 * p.numel()
        if factored:
            thin[name] = rank
        else:
            whole.append(name)
    yield from _by_factors(wire, parameters, found, thin)
    yield from _whole(wire, parameters, found, whole)


def _form(parts: Sequence[Gradient]) -> int:
    """The rank of a gradient that is a sum of thin products, or what it is instead."""
    if not parts:
        return _NONE
    if all(isinstance(part, Factored) for part in parts):
        return sum(part.left.shape[1] for part in parts if isinstance(part, Factored))
    return _WHOLE


def _by_factors(
    wire: Wire, parameters: Mapping[str, Tensor], found: dict[str, list[Gradient]], thin: Mapping[str, int]
) -> Iterator[tuple[str, Gradient]]:
    if not thin:
        return
    flat = list[Tensor]()
    kinds = {name: next(part.left.dtype for part in found[name] if isinstance(part, Factored)) for name in thin}
    for name, rank in thin.items():
        products = [part for part in found.pop(name) if isinstance(part, Factored)]
        for side in (torch.cat([one.left for one in products], 1), torch.cat([one.right for one in products], 1)):
            padded = side.new_zeros(len(side), rank)
            padded[:, : side.shape[1]] = side
            flat.append(padded.reshape(-1))
    wide = max((t.dtype for t in flat), key=lambda dtype: dtype.itemsize)
    rows = wire.gathered(torch.cat([t.to(wide) for t in flat]))
    at = 0
    for name, rank in thin.items():
        p = parameters[name]
        high, long = len(p), p.numel() // len(p)
        left = rows[:, at : at + high * rank].view(-1, high, rank).to(kinds[name])
        right = rows[:, at + high * rank : at + (high + long) * rank].view(-1, long, rank).to(kinds[name])
        at += (high + long) * rank
        yield name, Factored(left.transpose(0, 1).flatten(1) / wire.size, right.transpose(0, 1).flatten(1), p.shape)


def _whole(
    wire: Wire, parameters: Mapping[str, Tensor], found: dict[str, list[Gradient]], names: Sequence[str]
) -> Iterator[tuple[str, Gradient]]:
    """One sum for every type of number."""
    for dtype in {parameters[name].dtype: None for name in names}:
        some = [name for name in names if parameters[name].dtype == dtype]
        flat = torch.cat([_added_up(parameters[name], found.pop(name)).reshape(-1) for name in some])
        total = wire.summed(flat) / wire.size
        for name, part in zip(some, total.split([parameters[name].numel() for name in some]), strict=True):
            yield name, part.view(parameters[name].shape)


def _added_up(parameter: Tensor, parts: Sequence[Gradient]) -> Tensor:
    total: Tensor | None = None
    for part in parts:
        total = dense(part).to(parameter.dtype) if total is None else total.add_(dense(part))
    return torch.zeros_like(parameter) if total is None else total
