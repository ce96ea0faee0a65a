"""Calls that write into what they are given: which tensors these are, and how what is trained is kept from being lost that way.

Backpropagation lets a loss write to a parameter outside of its graph alone: such a write has no derivative, and what follows uses the new
values. Forward mode does the same here. Differences cannot: they evaluate the loss at other values, and the write would be lost with them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode

from forwardgrad.forward_mode.levels import level, storage, unwrapped
from forwardgrad.forward_mode.structure import exchanged, leaves
from forwardgrad.objective import Objective

_IN_PLACE = {f"__i{name}__" for name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor", "lshift", "rshift")}
_IN_PLACE |= {"__setitem__", "__set__"}
_DESCRIBING = {"requires_grad_", "share_memory_", "detach_"}
_SET_DATA: Any = Tensor.data.__set__  # type: ignore[attr-defined]
EMBEDDINGS = (F.embedding, F.embedding_bag)


def writes(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a call writes into what it was given; two functions are asked to by their modules in their last argument."""
    name = getattr(func, "__name__", "")
    if (name.endswith("_") and not name.endswith("__")) or name in _IN_PLACE or kwargs.get("out") is not None or kwargs.get("inplace"):
        return True
    return func in (F.threshold, F.rrelu) and args[-1] is True


def written(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """The tensors that a call writes values into."""
    if not writes(func, args, kwargs):
        return []
    name = getattr(func, "__name__", "")
    if name in _DESCRIBING or (name == "__set__" and func.__self__.__name__ not in ("data", "real", "imag")):
        return []
    if (out := kwargs.get("out")) is not None:
        return leaves(out)
    return leaves(args[0] if args else next(iter(kwargs.values()), None))


class Live:
    """The memory of what is trained, by name, and writes to it: through a parameter, or through whatever shares its memory."""

    def __init__(self, parameters: Mapping[str, Tensor]) -> None:
        self._names = {key: name for name, p in parameters.items() if (key := storage(p))}

    def write(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A call that writes to a parameter, with values alone: nothing that moves goes in or comes out. Else NotImplemented."""
        targets = written(func, args, kwargs)
        names = {self._names[key] for tensor in targets if (key := storage(tensor)) in self._names}
        if not names:
            return NotImplemented
        bare = {id(tensor): tensor.detach() for tensor in leaves((args, kwargs))}
        bare |= {id(tensor): _reached(tensor).detach() for tensor in targets}
        given, options = exchanged(args, bare), exchanged(kwargs, bare)
        log, before = _log.get(), [bare[id(tensor)].clone() for tensor in targets]
        alike = func == _SET_DATA and (given[0].shape, given[0].dtype) == (given[1].shape, given[1].dtype)
        result = given[0].copy_(given[1]) if alike else func(*given, **options)  # torch exchanges no memory inside its transforms
        if log is not None:
            close = (torch.allclose(old, bare[id(t)], rtol=1e-5, equal_nan=True) for old, t in zip(before, targets, strict=True))
            for name in names if not all(close) else ():
                log.changed(name, func)
        return exchanged(result, {id(bare[id(tensor)]): tensor for tensor in leaves((args, kwargs))})


def _reached(tensor: Tensor) -> Tensor:
    """The same memory as a tensor of the transform at work, which lets nothing else be written to."""
    plain, inside = unwrapped(tensor), level()
    wrapped: Tensor = torch._C._functorch._wrap_for_grad(plain, inside) if inside else plain
    return wrapped


class Repeated:
    """What was written to in evaluations of one loss that should all have the same value: a write that changes it again is refused."""

    def __init__(self) -> None:
        self._before, self._now = set[str](), set[str]()

    @contextmanager
    def noted(self) -> Iterator[None]:
        token = _log.set(self)
        try:
            yield
        finally:
            _log.reset(token)

    def again(self) -> None:
        """Another evaluation begins."""
        self._before |= self._now
        self._now = set()

    def changed(self, name: str, func: Any) -> None:
        self._now.add(name)
        if name in self._before:
            raise refused(name, func, "changes it again whenever the loss is evaluated, as a step does several times")


_log: ContextVar[Repeated | None] = ContextVar("writes", default=None)


class Unwritten(TorchFunctionMode):
    """Refuses calls that write to parameters, or to what stands for them in an evaluation of moved values: such a write would be lost."""

    def __init__(self, parameters: Mapping[str, Tensor]) -> None:
        super().__init__()
        self._standing = dict[int, tuple[StorageWeakRef, str]]()
        for name, p in parameters.items():
            self.add(name, p)

    def add(self, name: str, tensor: Tensor) -> None:
        """The reference does not hold memory, and keeps its name from being given to other memory."""
        if not torch.compiler.is_compiling() and storage(tensor):
            reference = StorageWeakRef(unwrapped(tensor).untyped_storage())
            self._standing[reference.cdata] = reference, name

    def check(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if torch.compiler.is_compiling():  # an eager step came before
            return
        targets = written(func, args, kwargs)
        if func in EMBEDDINGS and kwargs.get("max_norm") is not None:
            targets = [args[1]]
        for tensor in targets:
            if (found := self._standing.get(storage(tensor))) is not None:
                raise refused(found[1], func, "would be lost, as the loss is evaluated at moved values")

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.check(func, args, kwargs or {})
        return func(*args, **(kwargs or {}))


class _Kept(Unwritten):
    """Refuses calls that write to frozen parameters, such as a teacher's that follows the model."""

    def check(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if torch.compiler.is_compiling():
            return
        for tensor in written(func, args, kwargs):
            if (found := self._standing.get(storage(tensor))) is not None:
                why = "is frozen, and a step evaluates the loss several times and would write to it in each"
                raise refused(found[1], func, why, ", or make it a buffer (register_buffer), which a step updates once")


def frozen_kept(objective: Objective) -> AbstractContextManager[Any]:
    """Inside, a write to a frozen parameter of the model is refused ahead of it."""
    return _Kept(frozen) if (frozen := objective.frozen) else nullcontext()


def refused(name: str, func: Any, why: str, otherwise: str = "") -> RuntimeError:
    how = getattr(func, "__name__", "a call")
    return RuntimeError(
        f"the loss writes to {name.removeprefix('model.')} ({'an assignment' if how.startswith('__') else how}), which {why}: "
        f"write to it ahead of the step, outside of the loss and of forward(){otherwise}"
    )


def renormed(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], live: Tensor) -> dict[str, Any]:
    """The options of an embedding whose `max_norm` was seen to: its rows were made that short where they are, ahead of all moves."""
    with torch.no_grad():
        torch.embedding_renorm_(live.detach(), args[0].contiguous(), kwargs["max_norm"], kwargs.get("norm_type", 2.0))
    return {**kwargs, "max_norm": None}
