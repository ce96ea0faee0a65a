"""Every tensor that a step reads or writes, and the key that tells whether a graph made for one step is right for another."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from forwardgrad.engines.batch import Batch
from forwardgrad.engines.eager import EagerStep

_SIMPLE = (bool, int, float, str, tuple, type(None))
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class StepSurvey:
    """The tensors of a step with one batch, each once: parameters, buffers, state and batch.

    `key` tells whether a graph that was made for one survey is right for another: all that a step depends on besides values of tensors
    and what its functions read from elsewhere. `earlier`: the part of the model in a survey before, taken over where it still holds.
    Raises Opaque where the tensors of a batch cannot be told.
    """

    def __init__(self, step: EagerStep, batch: Batch, earlier: ModelSurvey | None = None) -> None:
        self.step = step
        self.model = earlier if earlier is not None and earlier.holds(step.model) else ModelSurvey(step.model)
        self._numbers = dict(self.model.numbers)
        self.tensors = list(self.model.tensors)
        self.trained, self.hooked, self.beside = self.model.trained, self.model.hooked, len(self.tensors)
        key = (self.model.key, *self._state(), *batch.key(self._place), *_settings())
        self.key: Hashable = (step.loss, step.estimator, key)

    def _state(self) -> Iterator[Hashable]:
        yield tuple((name, self._place(tensor)) for name, tensor in self.step.state.items())
        self.given = len(self.tensors)  # where the batch begins: the key is made in order, and the batch has its place after the state

    def number_of(self, tensor: Tensor) -> int | None:
        """Where a tensor stands among those of the step."""
        return self._numbers.get(id(tensor))

    def _place(self, tensor: Tensor) -> Hashable:
        return _placed(tensor, self._numbers, self.tensors)


class ModelSurvey:
    """The part of a survey that is the model's, and how to see that it holds still."""

    def __init__(self, model: nn.Module) -> None:
        self.numbers: dict[int, int] = {}
        self.tensors: list[Tensor] = []
        self.trained: list[Tensor] = []
        self.hooked = False
        # `vars` of a module hold its options, its mode and what users set on it. Copies are kept, since they are changed in place.
        self._root, self._seen = model, [(vars(module), vars(module).copy()) for module in model.modules()]
        held = [d for module in model.modules() for d in _inside(module)]
        self._empty = [d for d in held if not d]
        self._within = [(d, [*map(id, d.values())]) for d in held if d]
        self._held = [list(d.values()) for d in held]  # as long as they live, no other object has their place in memory
        self.key: Hashable = tuple(part for module in model.modules() for part in self._parts(module))
        self._described = [described(tensor) for tensor in self.tensors]

    def _parts(self, module: nn.Module) -> Iterator[Hashable]:
        # What a graph was made with is written into it. An option that is missing here, such as p of a dropout, would go on at its old
        # value when it is changed; objects other than these are taken to stay what they are.
        yield tuple((name, value) for name, value in vars(module).items() if type(value) in _SIMPLE and _hashable(value))
        self.hooked |= any(getattr(module, kind) for kind in _HOOKS)
        before = len(self.tensors)
        yield tuple(None if p is None else _placed(p, self.numbers, self.tensors) for p in module._parameters.values())
        self.trained += [p for p in self.tensors[before:] if p.requires_grad]
        yield tuple(None if b is None else _placed(b, self.numbers, self.tensors) for b in module._buffers.values())

    def holds(self, model: nn.Module) -> bool:
        """Whether it is this model, and all modules and tensors are as they were: asked at every step, and so in few words."""
        try:
            if model is not self._root or any(self._empty) or any(now != then for now, then in self._seen):
                return False
        except Exception:  # what a module keeps need not have an equality
            return False
        within = all([*map(id, now.values())] == then for now, then in self._within)
        return within and self._described == [*map(described, self.tensors)]


def _inside(module: nn.Module) -> list[dict[str, Any]]:
    return [module._parameters, module._buffers, module._modules, *(getattr(module, kind) for kind in _HOOKS)]


def described(tensor: Tensor) -> Hashable:
    return type(tensor), tensor.shape, tensor.stride(), tensor.dtype, tensor.device, tensor.requires_grad


def _placed(tensor: Tensor, numbers: dict[int, int], tensors: list[Tensor]) -> Hashable:
    """What a tensor is like, or its number if it was there before."""
    # By number and not by id: a model of the same kind then has the same key. A tensor in two places (tied weights, one batch given twice)
    # has one number, and a graph that was made for two tensors is not used for it.
    if (number := numbers.get(id(tensor))) is not None:
        return number
    numbers[id(tensor)] = len(tensors)
    tensors.append(tensor)
    return described(tensor)


def _hashable(value: Any) -> bool:
    try:
        hash(value)
    except TypeError:
        return False
    return True


def _settings() -> Iterator[Hashable]:
    """What of torch's global state a forward pass depends on."""
    for device in ("cpu", "cuda"):
        yield torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device)
    yield torch.get_default_dtype()
