"""`Backprop`: the exact gradient by reverse-mode AD, which every other method is compared with; with `checkpoint` for less memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar, TypeGuard

import torch
from torch import Generator, Tensor, nn
from torch.utils.checkpoint import checkpoint

from forwardgrad.estimators.base import Estimate, Estimator
from forwardgrad.objective import Objective, as_written


@dataclass(frozen=True)
class Backprop(Estimator):
    """The exact gradient by backpropagation: ĝ = ∇f.

    Bias and variance: none beyond the choice of the batch.
    Cost: one forward pass and one backward pass (about two more forward passes of work), with the activations kept in between. With
    `checkpoint`, a second forward pass and fewer activations: a chain of n layers keeps about √n of them and those of one segment.

    What `checkpoint` cuts, wherever it stands in the model: a chain of layers (`nn.Sequential`, those inside it counted with it) into
    about √n segments, and an `nn.ModuleList` or `nn.ModuleDict` into its elements. A model with neither is cut into its children. Each
    piece is evaluated again when the backward pass comes to it, with the dropout and the buffers of the first time; the model's own
    buffers are updated once. Forward hooks inside a piece run twice.

    Args:
        checkpoint: whether to recompute activations instead of keeping them.

    Raises RuntimeError where the loss does not depend on anything trained; with `checkpoint`, ValueError where there are no layers to
    cut between, or the loss calls none of the pieces.

    Source: Rumelhart, Hinton and Williams (1986); the √n segments: Chen, Xu, Zhang and Guestrin, "Training Deep Nets with Sublinear
    Memory Cost" (2016), section 4.

    >>> Backprop()
    Backprop(checkpoint=False)
    """

    name: ClassVar[str] = "backprop"
    reverse: ClassVar[bool] = True

    checkpoint: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.checkpoint, bool):
            raise ValueError(f"checkpoint must be True or False, not {self.checkpoint!r}")

    @property
    def unbiased(self) -> bool:
        return True

    def variance(self, gradient: Mapping[str, Tensor]) -> float:
        return 0.0

    def estimate(
        self, objective: Objective, generator: Generator | None, state: dict[str, Tensor]
    ) -> tuple[Estimate, dict[str, Tensor | None]]:
        parameters = objective.parameters
        held = {name: p.grad for name, p in parameters.items()}
        try:  # through .grad, not autograd.grad: only accumulation copies what shares memory with other tensors, and runs hooks
            for p in parameters.values():
                p.grad = None
            with torch.enable_grad(), _checkpointed(objective.at) if self.checkpoint else nullcontext():
                loss = objective.live()
                loss.backward(inputs=list(parameters.values()))
            gradients = {name: p.grad for name, p in parameters.items()}
        finally:
            for name, p in parameters.items():
                p.grad = held[name]
        if all(gradient is None for gradient in gradients.values()):
            raise RuntimeError("the loss does not depend on any trainable parameter: there is nothing to differentiate")
        return Estimate(loss.detach(), loss.new_empty(0), 2 if self.checkpoint else 1), gradients


Forward = Callable[..., Any]


@contextmanager
def _checkpointed(at: object) -> Iterator[None]:
    """Inside, the forwards of a model's pieces keep no activations."""
    pieces = _pieces(at) or _whole(list(at.children())) if isinstance(at, nn.Module) else {}
    if not pieces:
        raise ValueError("checkpoint=True needs a module made of several layers: there is nothing here to cut between")
    own = {module: vars(module).get("forward") for module in pieces}
    called = set()

    def noted(module: nn.Module, forward: Forward) -> Forward:
        def call(*args: Any, **kwargs: Any) -> Any:
            called.add(module)
            return forward(*args, **kwargs)

        return call

    try:
        for module, forward in pieces.items():
            vars(module)["forward"] = noted(module, forward)
        with as_written():  # a compiler knows nothing of checkpoints of another's making
            yield
    finally:
        for module, before in own.items():
            del vars(module)["forward"]
            if before is not None:
                vars(module)["forward"] = before
    if not called:
        raise ValueError("checkpoint=True did nothing: the loss never calls the forward of a piece, only that of the layers inside it")


def _pieces(module: nn.Module) -> dict[nn.Module, Forward]:
    """The modules whose forward is exchanged, outermost first, and what it is exchanged for."""
    if _is_chain(module) and len(layers := _layers(module)) > 1:
        return {module: _in_segments(layers)}
    found: dict[nn.Module, Forward] = {}
    for child in module.children():
        pieces = _whole([child]) if isinstance(module, (nn.ModuleList, nn.ModuleDict)) else {}
        found.update(pieces or _pieces(child))
    return found


def _whole(modules: list[nn.Module]) -> dict[nn.Module, Forward]:
    """Each module that can be called, as one piece."""

    def recomputed(module: nn.Module) -> Forward:
        forward: Forward = module.forward  # bound now: it is about to be exchanged
        return lambda *args, **kwargs: _recomputed([module], forward, args, kwargs)

    return {module: recomputed(module) for module in modules if type(module).forward is not nn.Module.forward}


def _is_chain(module: nn.Module) -> TypeGuard[nn.Sequential]:
    return isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward and "forward" not in vars(module)


def _layers(chain: nn.Sequential) -> list[nn.Module]:
    """The layers of a chain, those of chains inside it in its place; a chain with hooks is a layer, or its hooks would not be called."""
    layers: list[nn.Module] = []
    for child in chain:
        hooked = child._forward_hooks or child._forward_pre_hooks or child._backward_hooks or child._backward_pre_hooks
        layers += _layers(child) if _is_chain(child) and not hooked else [child]
    return layers


def _in_segments(layers: list[nn.Module]) -> Forward:
    count = max(2, round(math.sqrt(len(layers))))
    bounds = [len(layers) * index // count for index in range(count + 1)]
    segments = [layers[start:stop] for start, stop in pairwise(bounds)]

    def forward(input: Any) -> Any:
        for segment in segments:
            input = _recomputed(segment, lambda value, segment=segment: _chained(segment, value), (input,), {})
        return input

    return forward


def _chained(layers: list[nn.Module], value: Any) -> Any:
    for layer in layers:
        value = layer(value)
    return value


def _recomputed(modules: list[nn.Module], forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The forward of these modules without its activations, which are computed again when the backward pass asks for them."""
    copies: dict[int, Tensor] = {}  # a buffer in several places stays one
    before = {
        (module, key): copies.setdefault(id(buffer), buffer.clone())
        for root in modules
        for module in root.modules()
        for key, buffer in module._buffers.items()
        if buffer is not None
    }

    def again(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return forward(*args, **kwargs)

    # args as one argument: checkpoint looks inside it for the devices whose random state it has to keep, but not into **kwargs
    return checkpoint(again, args, kwargs, use_reentrant=False, context_fn=lambda: (nullcontext(), _with_buffers(before)))


@contextmanager
def _with_buffers(before: dict[tuple[nn.Module, str], Tensor]) -> Iterator[None]:
    """Inside, modules have these buffers; exchanged rather than written to, since a backward pass may still need the others."""
    now = {(module, key): module._buffers[key] for module, key in before}
    try:
        for (module, key), buffer in before.items():
            module._buffers[key] = buffer
        yield
    finally:
        for (module, key), kept in now.items():
            module._buffers[key] = kept
