"""The random numbers of one step, drawn again on their own: how much of a step is spent on drawing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from forwardgrad.directions import LAWS, Law, planned, streams


@dataclass(frozen=True)
class Draw:
    """A draw that can be made again, and the generators that it is made from."""

    make: Callable[[], object]
    on: tuple[Generator, ...] = ()

    def __call__(self) -> object:
        return self.make()


def recorded(work: Callable[[], object]) -> list[Draw]:
    """Every draw of a piece of work, run once, as something that can be run again: the same law over memory of the same shapes.

    A law's `fill_` is one draw, with all it takes to turn random bits into directions; whatever else draws random numbers (a peer's
    `randn_like`, dropout) is recorded operator by operator. Run again, each draw goes into memory that was not touched before, as in
    the step, and comes from a generator of its own.
    """
    recorder = _Recorder()
    with _laws_watched(recorder), _streams_watched(recorder), recorder:
        work()
    return recorder.draws


def of_a_graph(work: Callable[[], object], *, captured: bool) -> list[Draw]:
    """The draws of an eager step, run once, as they are where the step is one function: what is drawn before it, every place once; as a
    captured graph what can be captured; and the streams that are made inside it, by a compiled function of their own."""
    recorder = _Recorder(compiled=True)
    with planned() as plan, _streams_watched(recorder):
        work()
    inside = plan.in_graph() if captured else set[int]()
    before = [Draw(draw.again, draw.on or ()) for index, draw in enumerate(plan.draws) if index not in inside]
    held = [Draw(plan.draws[index].again, plan.draws[index].on or ()) for index in sorted(inside)]
    return [*before, *_captured(held), *recorder.draws]


class _Recorder(TorchDispatchMode):
    """Notes what draws random numbers; inside a law's draw it looks away."""

    def __init__(self, *, compiled: bool = False) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._compiled = compiled
        self.draws: list[Draw] = []
        self.inside = 0
        self._generators: dict[torch.device, Generator] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if not self.inside and torch.Tag.nondeterministic_seeded in func.tags:
            given = tree_map(self._template, (args, kwargs))
            on = tuple(leaf for leaf in tree_leaves(given) if isinstance(leaf, Generator))
            self.draws.append(Draw(lambda: _again(func, *given), on))
        return func(*args, **kwargs)

    def law(self, law: Law, tangent: list[Tensor]) -> None:
        parts, generator = [_Template(part) for part in tangent], self.generator(tangent[0].device)
        self.draws.append(Draw(lambda: law.fill_([part.empty() for part in parts], generator), (generator,)))

    def stream(self, seeds: streams.Seeds, count: int, dtype: torch.dtype, device: torch.device | None) -> None:
        if not self._compiled:
            same = seeds.clone() if isinstance(seeds, Tensor) else list(seeds)
            self.draws.append(Draw(lambda: streams.normal(same, count, dtype, device)))
            return
        given = torch.arange(len(seeds), device=seeds.device if isinstance(seeds, Tensor) else device)
        made = torch.compile(lambda seeds: streams.normal(seeds, count, dtype), dynamic=False)
        self.draws.append(Draw(lambda: made(given)))

    def generator(self, device: torch.device) -> Generator:
        return self._generators.setdefault(device, Generator(device).manual_seed(0))

    def _template(self, leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            return _Template(leaf)
        return self.generator(leaf.device) if isinstance(leaf, Generator) else leaf


class _Template:
    """Where a tensor lay and how, without its memory."""

    def __init__(self, tensor: Tensor) -> None:
        self.size, self.stride, self.dtype, self.device = tensor.shape, tensor.stride(), tensor.dtype, tensor.device

    def empty(self) -> Tensor:
        return torch.empty_strided(self.size, self.stride, dtype=self.dtype, device=self.device)


def _again(func: Any, args: Any, kwargs: Any) -> object:
    args, kwargs = tree_map(lambda leaf: leaf.empty() if isinstance(leaf, _Template) else leaf, (args, kwargs))
    return func(*args, **kwargs)


@contextmanager
def _streams_watched(recorder: _Recorder) -> Iterator[None]:
    """Inside, the recorder is told what is taken from streams."""

    def normal(seeds: streams.Seeds, count: int, dtype: torch.dtype, device: torch.device | None = None) -> Tensor:
        if not recorder.inside:
            recorder.stream(seeds, count, dtype, device)
        return stream(seeds, count, dtype, device)

    stream = streams.normal
    streams.normal = normal
    try:
        yield
    finally:
        streams.normal = stream


@contextmanager
def _laws_watched(recorder: _Recorder) -> Iterator[None]:
    """Inside, every law tells the recorder what it fills."""

    def watched(fill_: Callable[[Law, list[Tensor], Generator], None]) -> Callable[[Law, list[Tensor], Generator], None]:
        def told(law: Law, tangent: list[Tensor], generator: Generator) -> None:
            if not recorder.inside:
                recorder.law(law, tangent)
            recorder.inside += 1
            try:
                fill_(law, tangent, generator)
            finally:
                recorder.inside -= 1

        return told

    with ExitStack() as stack:
        for kind in LAWS:
            own = kind.__dict__["fill_"]
            stack.callback(setattr, kind, "fill_", own)
            kind.fill_ = watched(own)  # type: ignore[method-assign, assignment]
        yield


def _captured(draws: list[Draw]) -> list[Draw]:
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
    return [Draw(graph.replay)]


def total(draws: list[Draw]) -> Callable[[], None]:
    """All draws of a step as one piece of work."""

    def work() -> None:
        for draw in draws:
            draw()

    return work
