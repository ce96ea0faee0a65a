"""What a step of training is made of, and every tensor that it reads or writes."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from typing import Any

import torch
from torch import Generator, Tensor, nn

from forwardgrad.empty import estimated
from forwardgrad.engines.batch import Batch
from forwardgrad.estimators import Estimate, Estimator
from forwardgrad.gradient import estimate_grad_
from forwardgrad.objective import Objective

_SIMPLE = (bool, int, float, str, tuple, type(None))
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class Pieces:
    """A loss, a model, its optimizer, an estimator, a generator and a state: all of a step but the batch."""

    def __init__(
        self,
        loss: Callable[..., Tensor],
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        estimator: Estimator,
        generator: Generator | None,
        state: dict[str, Tensor],
    ) -> None:
        self.loss, self.model, self.optimizer, self.estimator = loss, model, optimizer, estimator
        self.generator, self.state = generator, state

    def gradient(self, batch: Batch) -> Estimate:
        """Fill `.grad` as the eager step does."""
        self.optimizer.zero_grad()
        return estimate_grad_(self._on(batch), self.model, self.estimator, generator=self.generator, state=self.state)

    def _on(self, batch: Batch) -> Callable[[nn.Module], Tensor]:
        """The loss on a batch: one function for all, since what is learned of a model is remembered by the code of its loss."""
        return lambda model: self.loss(model, *batch.positional, **batch.named)

    def plainly(self, batch: Batch, gradient: Callable[[Batch], Estimate] | None = None) -> Estimate:
        """The eager step, or one whose gradient comes from elsewhere."""
        if gradient is None and _descends(self.optimizer):
            return self._descend(batch)
        record: list[Estimate] = []

        def closure() -> Tensor:  # an optimizer may look ahead: it moves the parameters, and then asks
            record.append((gradient or self.gradient)(batch))
            return record[-1].loss

        self.optimizer.step(closure)  # type: ignore[arg-type]
        if not record:
            name = type(self.optimizer).__name__
            raise TypeError(f"{name}.step did not call the closure that it was given: call it first, as torch's own optimizers do")
        return record[-1]

    def _descend(self, batch: Batch) -> Estimate:
        """A step of plain gradient descent: each part of the estimate moves its parameter as it is made, and no gradient is held."""
        self.optimizer.zero_grad()
        with torch.inference_mode(False), torch.no_grad():
            objective = Objective(self._on(batch), self.model)
            record, parts = estimated(
                self.estimator, objective, self.state, lambda method, kept: method.parts(objective, self.generator, kept)
            )
            groups = {id(p): group for group in self.optimizer.param_groups for p in group["params"]}
            shrunk = set[int]()
            for name, part in parts:
                p = objective.parameters[name]
                if (group := groups.get(id(p))) is None:
                    continue
                if group["weight_decay"] and id(p) not in shrunk:
                    shrunk.add(id(p))
                    p.mul_(1 - group["lr"] * group["weight_decay"])
                if isinstance(part, Tensor):
                    p.add_(part, alpha=-group["lr"]) if isinstance(group["lr"], float) else p.sub_(part * group["lr"])
                else:
                    part.add_to_(p, -group["lr"])
        self.optimizer._opt_called = True  # type: ignore[attr-defined]  # a schedule asks whether the optimizer was there before it
        return record


def _descends(optimizer: torch.optim.Optimizer) -> bool:
    """Whether a step is θ ← θ(1 − γλ) − γĝ and nothing else, which can be taken part by part."""
    hooks = optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks
    return (
        type(optimizer) is torch.optim.SGD
        and not hooks
        and not any(group["momentum"] or group["maximize"] or group["differentiable"] for group in optimizer.param_groups)
    )


class Survey:
    """The tensors of a step with one batch, each once: parameters, buffers, state and batch.

    `key` tells whether a graph that was made for one survey is right for another: all that a step depends on besides values of tensors
    and what its functions read from elsewhere. `earlier`: the part of the model in a survey before, taken over where it still holds.
    Raises Opaque where the tensors of a batch cannot be told.
    """

    def __init__(self, pieces: Pieces, batch: Batch, earlier: ModelSurvey | None = None) -> None:
        self.pieces = pieces
        self.model = earlier if earlier is not None and earlier.holds(pieces.model) else ModelSurvey(pieces.model)
        self._numbers = dict(self.model.numbers)
        self.tensors = list(self.model.tensors)
        self.trained, self.hooked, self.beside = self.model.trained, self.model.hooked, len(self.tensors)
        key = (self.model.key, *self._state(), *batch.key(self._place), *_settings())
        self.key: Hashable = (pieces.loss, pieces.estimator, key)

    def _state(self) -> Iterator[Hashable]:
        yield tuple((name, self._place(tensor)) for name, tensor in self.pieces.state.items())
        self.given = len(self.tensors)  # where the batch begins

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
        self._root, self._seen = model, [(vars(module), vars(module).copy()) for module in model.modules()]
        held = [d for module in model.modules() for d in _inside(module)]
        self._empty = [d for d in held if not d]
        self._within = [(d, [*map(id, d.values())]) for d in held if d]
        self._held = [list(d.values()) for d in held]  # as long as they live, no other object has their place in memory
        self.key: Hashable = tuple(part for module in model.modules() for part in self._parts(module))
        self._described = [_described(tensor) for tensor in self.tensors]

    def _parts(self, module: nn.Module) -> Iterator[Hashable]:
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
        return within and self._described == [*map(_described, self.tensors)]


def _inside(module: nn.Module) -> list[dict[str, Any]]:
    return [module._parameters, module._buffers, module._modules, *(getattr(module, kind) for kind in _HOOKS)]


def _described(tensor: Tensor) -> Hashable:
    return type(tensor), tensor.shape, tensor.stride(), tensor.dtype, tensor.device, tensor.requires_grad


def _placed(tensor: Tensor, numbers: dict[int, int], tensors: list[Tensor]) -> Hashable:
    """What a tensor is like, or its number if it was there before."""
    if (number := numbers.get(id(tensor))) is not None:
        return number
    numbers[id(tensor)] = len(tensors)
    tensors.append(tensor)
    return _described(tensor)


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


def slots(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """What an optimizer remembers, as far as it is tensors."""
    return [slot for kept in optimizer.state.values() for slot in kept.values() if isinstance(slot, Tensor)]


class Snapshot:
    """All that a step changes, as it is now."""

    def __init__(self, survey: Survey) -> None:
        pieces = survey.pieces
        self._pieces = pieces
        self.tensors, self.values = survey.tensors, [t.detach().clone() for t in survey.tensors]
        self._slots = [(slot, slot.clone()) for slot in slots(pieces.optimizer)]
        self._state = dict(pieces.state)
        self.gradients = [(p, p.grad) for p in survey.trained]
        self.generator = None if pieces.generator is None else pieces.generator.get_state()
        self._global = torch.get_rng_state()
        self._global_gpu = {gpu: torch.cuda.get_rng_state(gpu) for gpu in {t.get_device() for t in survey.tensors if t.is_cuda}}

    @torch.no_grad()
    def keep_state(self) -> None:
        """Let what a step put in the place of a tensor of the state be that tensor's new value: a graph knows no others."""
        state = self._pieces.state
        for name, kept in self._state.items():
            if (now := state.get(name)) is not None and now is not kept and _described(now) == _described(kept):
                state[name] = kept.copy_(now)

    @torch.no_grad()
    def restore(self) -> None:
        for tensor, value in zip(self.tensors, self.values, strict=True):
            if 0 not in tensor.stride():  # an expanded constant
                tensor.copy_(value)
        for slot, value in self._slots:
            slot.copy_(value)
        self._pieces.state.clear()
        self._pieces.state.update(self._state)
        for p, gradient in self.gradients:
            p.grad = gradient
        if self.generator is not None and self._pieces.generator is not None:
            self._pieces.generator.set_state(self.generator)
        torch.set_rng_state(self._global)
        for gpu, state in self._global_gpu.items():
            torch.cuda.set_rng_state(state, gpu)
