"""Batches without examples: the gradient of what is left of the loss, or an error where the loss has no value."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from forwardgrad.estimators import Backprop, Estimate, Estimator, ForwardGradient, Readout, ZerothOrder
from forwardgrad.forward_mode import Redo, plainly
from forwardgrad.objective import Objective

T = TypeVar("T")
Estimation = Callable[[Estimator, dict[str, Tensor]], tuple[Estimate, T]]


class _NoExamples(Redo):
    """The model was called without examples."""


def estimated(estimator: Estimator, objective: Objective, state: dict[str, Tensor], call: Estimation[T]) -> tuple[Estimate, T]:
    """`call(estimator, state)`; where the model is given no examples, the same by a method that needs none, the state left alone.

    Terms of the loss that are sums over examples are zero then, and so is their gradient; a penalty on weights has the gradient it has.
    Raises ValueError where the loss has no value without examples, or other processes have some.
    """
    try:
        with _noticing(objective.at):
            return call(estimator, state)
    except _NoExamples:
        if objective.ranks.many:
            raise ValueError("a batch without examples on one of several ranks: give every rank examples at every step") from None
        with plainly():  # rules of the explicit way divide by numbers of examples
            record, found = call(instead(estimator), {})
        check_value(record.loss)
        return record, found


def instead(estimator: Estimator) -> Estimator:
    """What stands in for an estimator where there are no examples for it to tell apart or to learn from."""
    if isinstance(estimator, (Backprop, Readout, ZerothOrder)):
        return estimator
    return ForwardGradient(tangents=getattr(estimator, "tangents", 1))


def check_value(loss: Tensor) -> None:
    """ValueError unless the loss of no examples is a number."""
    if not bool(torch.isfinite(loss).all()):
        raise ValueError("the batch has no examples, and their mean loss is nan: leave empty batches out, or sum the loss over examples")


def is_empty(values: Any) -> bool:
    """Whether the first tensor among some arguments has no elements."""
    first = next(_tensors(values), None)
    return first is not None and first.numel() == 0


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, Mapping):  # such as the batch of a tokenizer
            yield from _tensors(value.values())
        elif isinstance(value, (tuple, list)):
            yield from _tensors(value)


@contextmanager
def _noticing(at: object) -> Iterator[None]:
    """Inside, the model raises where it is called without examples."""
    if not isinstance(at, nn.Module) or isinstance(at, torch.jit.ScriptModule):
        yield
        return
    handle = at.register_forward_pre_hook(_look, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def _look(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    if is_empty((*args, *kwargs.values())):
        raise _NoExamples
