"""The random numbers of a step of training as a plan: written down while a step runs, drawn again outside the steps that follow.

A compiled or captured step cannot draw from an explicit generator. It is handed its random numbers instead, or the seeds that they follow
from (`streams`), and what draws them is the plan of the step it was made from: the same calls in the same order, so that they are the same
bits and leave every generator in the same state. Whatever draws from a generator in a step does so through `drawn`, which otherwise does
nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

import torch
from torch import Tensor

Made = TypeVar("Made", Tensor, dict[str, Tensor], list[Any])


class Unplanned(Exception):
    """A step draws other random numbers than the plan says."""


class Plan:
    """The draws of one step in order. Lists (seeds, generators) stay the objects that later draws know, with new content."""

    def __init__(self) -> None:
        self._draws: list[tuple[Callable[[], Any], Any]] = []
        self._known: set[Hashable] = set()

    def note(self, make: Callable[[], Any], once: Hashable) -> Any:
        made = make()
        if once is None or once not in self._known:
            self._known.add(once)
            # of numbers only the shape is kept: while a step runs they may belong to torch's transforms
            self._draws.append((make, made if isinstance(made, list) else _shapes(made)))
        return made

    def again(self) -> list[Tensor]:
        """Make all draws once more and return the numbers, each draw's tensors in a row."""
        tensors: list[Tensor] = []
        for make, first in self._draws:
            made = make()
            if isinstance(first, list):
                first[:] = made
            else:
                tensors += [made] if isinstance(made, Tensor) else made.values()
        return tensors

    def handed(self, tensors: Sequence[Tensor]) -> Handed:
        return Handed(self._draws, tensors)


class Handed:
    """What a step gets where it would draw: these tensors, in the plan's order, each as a copy that it may write to."""

    def __init__(self, draws: Sequence[tuple[Callable[[], Any], Any]], tensors: Sequence[Tensor]) -> None:
        self._draws, self._tensors = iter(draws), iter(tensors)
        self._known: dict[Hashable, Any] = {}

    def note(self, make: Callable[[], Any], once: Hashable) -> Any:
        if once is not None and once in self._known:
            return _copied(self._known[once])
        first = next(self._draws, (None, None))[1]
        if first is None:
            raise Unplanned
        if isinstance(first, list):
            return first
        found: Any = next(self._tensors) if isinstance(first, torch.Size) else {name: next(self._tensors) for name in first}
        if once is not None:
            self._known[once] = found
        return _copied(found)

    def end(self) -> None:
        if next(self._draws, None) is not None:
            raise Unplanned


def drawn(make: Callable[[], Made], once: Hashable = None) -> Made:
    """What `make` draws: tensors, or a list of whatever later draws are made from.

    `make` is called again for every step of a plan, when the step is over: it must not hold tensors that the step computes. Draws with
    the same `once` in one step are known to be the same numbers.
    """
    plan = _at_work.get()
    if plan is None:
        return make()
    with _working(None):  # a law may draw by way of another
        made: Made = plan.note(make, once)
    return made


@contextmanager
def planned() -> Iterator[Plan]:
    """Note what is drawn inside."""
    plan = Plan()
    with _working(plan):
        yield plan


@contextmanager
def handed(plan: Plan, tensors: Sequence[Tensor]) -> Iterator[None]:
    """Inside, the draws of the plan are these tensors; raises Unplanned where there are more draws than these, or fewer."""
    work = plan.handed(tensors)
    with _working(work):
        yield
    work.end()


@contextmanager
def _working(what: Plan | Handed | None) -> Iterator[None]:
    token = _at_work.set(what)
    try:
        yield
    finally:
        _at_work.reset(token)


def _shapes(made: Tensor | Mapping[str, Tensor]) -> Any:
    return made.shape if isinstance(made, Tensor) else {name: tensor.shape for name, tensor in made.items()}


def _copied(found: Any) -> Any:
    return found.clone() if isinstance(found, Tensor) else {name: tensor.clone() for name, tensor in found.items()}


_at_work: ContextVar[Plan | Handed | None] = ContextVar("plan of draws", default=None)
