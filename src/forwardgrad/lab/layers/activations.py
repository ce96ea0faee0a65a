"""The activations between the layers of a network, as features of a bounded number for a probe."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from forwardgrad.lab.errors import UserError

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)  # channels are dimension 1; everywhere else they come last
_POOLS: dict[int, Callable[..., Tensor]] = {1: F.adaptive_avg_pool1d, 2: F.adaptive_avg_pool2d, 3: F.adaptive_avg_pool3d}


def layers(model: nn.Module, inputs: Tensor) -> list[str]:
    """The names of the layers with a weight of two dimensions or more, in the order in which the model calls them first."""
    found: dict[str, None] = {}

    def note(name: str, *_: Any) -> None:
        found.setdefault(name)

    with _hooked(model, note), _still(model):
        model(inputs)
    return list(found)


def features(model: nn.Module, names: list[str], batches: Iterable[Tensor], most: int) -> list[Tensor | None]:
    """What the first layer takes in, and what lies behind every layer: features [examples, at most `most`] of each place.

    Behind a layer is what the next layer takes in, nonlinearity, pooling and normalisation included; behind the last is its output. A
    place that holds no real numbers, such as words before an embedding, has None. The network is in evaluation mode meanwhile.

    Raises UserError where a place has no row for every example.
    """
    kept: list[list[Tensor | None]] = [[] for _ in range(len(names) + 1)]
    modules = dict(model.named_modules())
    for inputs in batches:
        places: dict[str, Tensor] = {}
        last: list[Any] = []

        def note(name: str, arguments: Any, output: Any, places: dict[str, Tensor] = places, last: list[Any] = last) -> None:
            places.setdefault(name, arguments[0])  # of a layer that is called twice the first call counts
            if name == names[-1]:
                last.append(output[0] if isinstance(output, tuple) else output)

        with _hooked(model, note), _still(model):
            model(inputs)
        read = [(places[name], modules[name], f"in front of {name}") for name in names]
        for index, (held, module, where) in enumerate([*read, (last[0], modules[names[-1]], f"behind {names[-1]}")]):
            if held.dim() == 0 or len(held) != len(inputs):
                raise UserError(f"the activations {where} have shape {tuple(held.shape)}, no row for each of {len(inputs)} examples")
            kept[index].append(
                pooled(held, most, channels_first=isinstance(module, CONVOLUTIONS)).cpu() if held.is_floating_point() else None
            )
    return [torch.cat(parts) if None not in parts else None for parts in kept]  # type: ignore[arg-type]


def pooled(held: Tensor, most: int, *, channels_first: bool) -> Tensor:
    """Activations [n, ...] as [n, at most `most`], in float32: means over the finest grid of positions that has so few numbers.

    What has one dimension an example, or more channels than that, is averaged over neighbours.
    """
    held = held.float()
    held = held if held.dim() > 1 else held.unsqueeze(1)
    if held.dim() > 2 and not channels_first:
        held = held.movedim(-1, 1)
    if held.dim() > 5:
        held = held.flatten(2)
    if held.dim() > 2 and held[0].numel() > most:
        sizes = held.shape[2:]
        cells = max(1, math.floor((most / held.shape[1]) ** (1 / len(sizes))))
        held = _POOLS[len(sizes)](held, tuple(min(cells, size) for size in sizes))
    flat = held.flatten(1)
    return flat if flat.shape[1] <= most else F.adaptive_avg_pool1d(flat.unsqueeze(1), most).squeeze(1)


@contextmanager
def _hooked(model: nn.Module, note: Callable[..., None]) -> Iterator[None]:
    """Inside, every call of a layer with a matrix of weights is noted: its name, what it takes, and what it returns."""
    handles = []
    for name, module in model.named_modules():
        if any(p.dim() > 1 for p in module.parameters(recurse=False)):
            hook = lambda _, arguments, output, name=name: note(name, arguments, output)  # noqa: E731
            handles.append(module.register_forward_hook(hook))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _still(model: nn.Module) -> Iterator[None]:
    """Inside, the network is in evaluation mode and records nothing."""
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, before in training.items():
            module.training = before
