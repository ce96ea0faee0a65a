"""The random numbers of one step, drawn again on their own: this tells how much of a step is spent on drawing."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from forwardgrad.directions import Growth, Plan, planned, streams


@dataclass(frozen=True)
class Redraw:
    """A draw that can be made again, and the generators that it is made from."""

    make: Callable[[], object]
    on: tuple[Generator, ...] = ()

    def __call__(self) -> object:
        return self.make()


def of_an_eager_step(step: Callable[[], object]) -> list[Redraw]:
    """Every draw of an eager step, which is taken once, as something that can be made again.

    The plan of draws knows what the library draws, and what it makes of seeds. A draw that the step makes twice is there twice. Whatever
    else draws random numbers (a peer's `randn_like`, dropout) is recorded operator by operator. Made again, each draw goes into memory
    that was not touched before, as in the step. It moves the generators of the step: hand over one that nobody else needs.
    """
    plan = _EveryDraw()
    operators = _Operators(plan)
    with planned(plan), operators:
        step()
    return [*_planned(plan, range(len(plan.draws))), *(Redraw(_eagerly(growth)) for growth in plan.growths), *operators.draws]


def of_a_graph(step: Callable[[], object], *, captured: bool) -> list[Redraw]:
    """The draws of an eager step, which is taken once, as they are made where that step is one function.

    Draws before the function are made once for every place. Those that a captured graph can make itself are made by a graph. Streams are
    made inside the function, so here by a compiled function of their own.
    """
    with planned() as plan:
        step()
    inside = plan.in_graph() if captured else set[int]()
    before = _planned(plan, (index for index in range(len(plan.draws)) if index not in inside))
    return [*before, *_captured(_planned(plan, sorted(inside))), *(Redraw(_compiled(growth)) for growth in plan.growths)]


class _EveryDraw(Plan):
    """The plan of a step that does not keep what it draws: the same numbers drawn again are noted again."""

    drawing = False

    def note(self, make: Callable[[], Any], once: Hashable, on: Sequence[Generator] | None) -> Any:
        self.drawing = True
        try:
            return super().note(make, None, on)
        finally:
            self.drawing = False

    def grow(self, growth: Growth, once: Hashable) -> None:
        super().grow(growth, None)


class _Operators(TorchDispatchMode):
    """Notes the operators that draw random numbers outside the draws of a plan."""

    def __init__(self, plan: _EveryDraw) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.draws: list[Redraw] = []
        self._plan = plan
        self._generators: dict[torch.device, Generator] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if not self._plan.drawing and torch.Tag.nondeterministic_seeded in func.tags:
            given = tree_map(self._template, (args, kwargs))
            on = tuple(leaf for leaf in tree_leaves(given) if isinstance(leaf, Generator))
            self.draws.append(Redraw(lambda: _again(func, *given), on))
        return func(*args, **kwargs)

    def _template(self, leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            return _Template(leaf)
        return self._generators.setdefault(leaf.device, Generator(leaf.device).manual_seed(0)) if isinstance(leaf, Generator) else leaf


class _Template:
    """Where a tensor lay and how, without its memory."""

    def __init__(self, tensor: Tensor) -> None:
        self.size, self.stride, self.dtype, self.device = tensor.shape, tensor.stride(), tensor.dtype, tensor.device

    def empty(self) -> Tensor:
        return torch.empty_strided(self.size, self.stride, dtype=self.dtype, device=self.device)


def _again(func: Any, args: Any, kwargs: Any) -> object:
    args, kwargs = tree_map(lambda leaf: leaf.empty() if isinstance(leaf, _Template) else leaf, (args, kwargs))
    return func(*args, **kwargs)


def _planned(plan: Plan, places: Iterable[int]) -> list[Redraw]:
    """The draws of a plan at some places."""
    return [Redraw(plan.draws[place].again, plan.draws[place].on or ()) for place in places]


def _seeds(growth: Growth) -> streams.Seeds:
    """Seeds like those of a growth: whatever they are, what follows from them takes as long."""
    return list(range(growth.streams)) if growth.on_host else torch.arange(growth.streams, device=growth.device)


def _eagerly(growth: Growth) -> Callable[[], object]:
    seeds = _seeds(growth)
    return lambda: streams.normal(seeds, growth.count, growth.dtype, growth.device)


def _compiled(growth: Growth) -> Callable[[], object]:
    seeds = torch.arange(growth.streams, device=growth.device)
    made = torch.compile(lambda seeds: streams.normal(seeds, growth.count, growth.dtype), dynamic=False)
    return lambda: made(seeds)


def _captured(draws: list[Redraw]) -> list[Redraw]:
    """All draws as one captured graph; what cannot be captured stays as it is."""
    if not draws:
        return []
    work, graph = total(draws), torch.cuda.CUDAGraph()
    try:
        work()
        torch.cuda.synchronize()
        for generator in {id(one): one for draw in draws for one in draw.on}.values():
            graph.register_generator_state(generator)
        with torch.cuda.graph(graph):
            work()
    except RuntimeError:
        return draws
    return [Redraw(graph.replay)]


def total(draws: Sequence[Redraw]) -> Callable[[], None]:
    """All draws of a step as one piece of work."""

    def work() -> None:
        for draw in draws:
            draw()

    return work
