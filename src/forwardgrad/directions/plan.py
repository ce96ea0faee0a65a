"""The plan of a step's random numbers: which draws an eager step made, so that they can be made again for a compiled step.

A compiled or captured step cannot draw from an explicit generator. It is handed its random numbers, or the seeds that they are made from
(`streams`). The plan draws them: by the same calls in the same order as the eager step, so they have the same bits and leave every
generator in the same state. All code that draws from a generator in a step does so through `drawn`; without a plan at work that is an
ordinary call. A captured graph itself makes the draws that need nothing but generators on its GPU (`Plan.in_graph`).
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Generator, Tensor

Made = TypeVar("Made", bound=Tensor | dict[str, Tensor] | list[Any])


class Unplanned(Exception):
    """A step draws other random numbers than the plan says."""


@dataclass(frozen=True)
class Draw:
    """One draw: what makes it, what it made the first time, and the generators that it draws from, None if that is not known.

    Lists (seeds, generators) stay the objects that later draws know, with new content. Of numbers only the shape is kept: while a step
    runs they may belong to torch's transforms.
    """

    make: Callable[[], Any]
    first: Any
    on: tuple[Generator, ...] | None

    def again(self) -> Sequence[Tensor]:
        """Make it once more; the numbers, if it makes numbers."""
        made = self.make()
        if isinstance(self.first, list):
            self.first[:] = made
            return ()
        return (made,) if isinstance(made, Tensor) else tuple(made.values())


@dataclass(frozen=True)
class Growth:
    """Numbers that a step makes of drawn seeds, so that no plan draws them: the first `count` of so many streams (`streams.normal`).

    `on_host`: whether the seeds are integers of the host; else they are a tensor on the device.
    """

    streams: int
    count: int
    dtype: torch.dtype
    device: torch.device
    on_host: bool


class Plan:
    """The draws of one step in order, and what the step makes of the seeds among them."""

    def __init__(self) -> None:
        self.draws: list[Draw] = []
        self.growths: list[Growth] = []
        self._known: set[Hashable] = set()
        self._grown: set[Hashable] = set()

    def grow(self, growth: Growth, once: Hashable) -> None:
        if once is None or once not in self._grown:
            self._grown.add(once)
            self.growths.append(growth)

    def note(self, make: Callable[[], Any], once: Hashable, on: Sequence[Generator] | None) -> Any:
        made = make()
        if once is None or once not in self._known:
            self._known.add(once)
            first = made if isinstance(made, list) else _shapes(made)
            self.draws.append(Draw(make, first, None if on is None else tuple(on)))
        return made

    def again(self) -> list[Tensor]:
        """Make all draws once more and return the numbers, each draw's tensors in a row."""
        return [tensor for draw in self.draws for tensor in draw.again()]

    def in_graph(self) -> set[int]:
        """The draws that a captured graph can make itself, by their place: from generators on a GPU from which the host draws nothing
        after them, since all that is drawn outside the graph is drawn before it."""
        found, barred, all_barred = set[int](), set[int](), False
        for index in reversed(range(len(self.draws))):
            draw = self.draws[index]
            if draw.on is None:
                all_barred = True
                continue
            on_gpu = bool(draw.on) and all(generator.device.type == "cuda" for generator in draw.on)
            names = {id(generator) for generator in draw.on}
            if isinstance(draw.first, list) or not on_gpu or all_barred or names & barred:
                barred |= names
            else:
                found.add(index)
        return found

    def handed(self, tensors: Sequence[Tensor]) -> Handed:
        return Handed(self.draws, tensors)


class Handed:
    """What a step gets where it would draw: these tensors, in the plan's order, each as a copy that it may write to."""

    def __init__(self, draws: Sequence[Draw], tensors: Sequence[Tensor]) -> None:
        self._firsts, self._tensors = (draw.first for draw in draws), iter(tensors)
        self._known: dict[Hashable, Any] = {}

    def note(self, make: Callable[[], Any], once: Hashable, on: Sequence[Generator] | None) -> Any:
        if once is not None and once in self._known:
            return _copied(self._known[once])
        first = next(self._firsts, None)
        if first is None:
            raise Unplanned
        found: Any = first
        if not isinstance(first, list):
            found = next(self._tensors) if isinstance(first, torch.Size) else {name: next(self._tensors) for name in first}
        if once is not None:
            self._known[once] = found
        return _copied(found)

    def end(self) -> None:
        if next(self._firsts, None) is not None:
            raise Unplanned


def drawn(make: Callable[[], Made], once: Hashable = None, on: Sequence[Generator] | None = None) -> Made:
    """What `make` draws: tensors, or a list of whatever later draws are made from.

    `make` is called again for every step of a plan, when the step is over: it must not hold tensors that the step computes. Draws with
    the same `once` in one step are known to be the same numbers. `on`: the generators that it draws from, where it is known to touch
    no other; from those on a GPU it has to draw without a word from the host.
    """
    plan = _at_work.get()
    if plan is None:
        return make()
    with _working(None):  # a law may draw by way of another
        made: Made = plan.note(make, once, on)
    return made


def grown(growth: Growth, once: Hashable = None) -> None:
    """Tell the plan that is being written, if there is one, what a step makes of its seeds; the same `once`: the same numbers again."""
    plan = _at_work.get()
    if isinstance(plan, Plan):
        plan.grow(growth, once)


@contextmanager
def planned(plan: Plan | None = None) -> Iterator[Plan]:
    """Note what is drawn inside, in a new plan or in the one that is given."""
    plan = Plan() if plan is None else plan
    with _working(plan):
        yield plan


@contextmanager
def unplanned() -> Iterator[None]:
    """Inside, draws belong to no plan: for what is done once, and no part of a step."""
    with _working(None):
        yield


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
    if isinstance(found, list):
        return found
    return found.clone() if isinstance(found, Tensor) else {name: tensor.clone() for name, tensor in found.items()}


_at_work: ContextVar[Plan | Handed | None] = ContextVar("plan of draws", default=None)
