"""A check while a step is traced: a number may be read off a tensor only where it is the same at every step."""

from __future__ import annotations

import linecache
import traceback
from collections.abc import Iterator
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten


class Untraceable(Exception):
    """Why a step cannot be a graph, as the end of a sentence."""


class Reads(TorchDispatchMode):
    """Lets a step that is traced read a value off a tensor if it follows from shapes and Python numbers alone. Such a value, say the
    largest of the positions that a model counts by itself, is the same in every step that the graph is for.

    A value that follows from the batch, the model or another tensor may change from step to step, and random numbers do. Tensors are
    known by the memory that they lie in, not by their name in the graph: a view may have been written to.

    Raises Untraceable where another value is read, or a shape depends on one.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._known: dict[int, ref[Any]] = {}  # the memory that holds what is the same at every step

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        same = all(map(self._is_known, given)) and torch.Tag.nondeterministic_seeded not in func.tags
        if func in _READING:
            return self._read(func, args, same)
        if _shaped_by_values(func, args):
            raise Untraceable(f"a shape depends on the values of a tensor ({_KINDS.get(func, func)})")
        found = func(*args, **(kwargs or {}))
        made = [leaf for leaf in tree_leaves(found) if isinstance(leaf, Tensor)]
        if same:
            for tensor in made:
                if memory := _memory(tensor):
                    self._known[memory] = ref(tensor.untyped_storage())
        elif func._schema.is_mutable:
            for tensor in given:
                self._known.pop(_memory(tensor), None)
        return found

    def _read(self, func: Any, args: tuple[Any, ...], same: bool) -> Any:
        if same:
            with disable_proxy_modes_tracing():
                return func(*args)
        try:
            return func(*args)  # of a constant
        except RuntimeError as error:
            if "value out of a tracing tensor" not in str(error):
                raise
            raise Untraceable("a value is read off a tensor (.item(), bool(), a Python branch)") from error

    def _is_known(self, tensor: Tensor) -> bool:
        known = self._known.get(_memory(tensor))
        return known is not None and known() is tensor.untyped_storage()


_READING = {aten._local_scalar_dense.default, aten.equal.default}
_KINDS = {aten.index.Tensor: "indexing with a mask"}


def _shaped_by_values(func: Any, args: tuple[Any, ...]) -> bool:
    if func is aten.index.Tensor:  # by whole numbers it is harmless
        return any(isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8) for index in args[1])
    return torch.Tag.dynamic_output_shape in func.tags or torch.Tag.data_dependent_output in func.tags


def _memory(tensor: Tensor) -> int:
    """Where a tensor lies; 0 where it has no place, as the zeros that forward mode only writes down."""
    return 0 if tensor._is_zerotensor() or tensor.layout is not torch.strided else tensor.untyped_storage().data_ptr()


def located(error: Untraceable) -> Untraceable:
    """The same reason with the line of the user's code, and the module that it is in, and what to do about it."""
    frames = [(frame, line) for frame, line in traceback.walk_tb(error.__traceback__) if not _internal(frame.f_code.co_filename)]
    if not frames:
        return error
    frame, number = frames[-1]
    name = "/".join(Path(frame.f_code.co_filename).parts[-2:])
    text = linecache.getline(frame.f_code.co_filename, number).strip()
    where = f" at {name}:{number}{_module(error.__traceback__, frame)}: `{text}`"
    return Untraceable(f"{error}{where}; give the loss what it decides as a number in the batch, or an option that avoids it")


_INTERNAL = (str(Path(torch.__file__).parent), str(Path(__file__).parents[1]))


def _internal(file: str) -> bool:
    return file.startswith((*_INTERNAL, "<")) or Path(file).name in ("contextlib.py", "functools.py")


def _module(trace: TracebackType | None, last: FrameType) -> str:
    """Which module of the model a line belongs to, by the name that the model has for it."""
    inside = list(_called(trace, last))
    if len(inside) < 2:
        return ""
    name = next((name for name, module in inside[0].named_modules() if module is inside[-1]), "")
    return f" in {name} ({type(inside[-1]).__name__})" if name else f" in {type(inside[-1]).__name__}"


def _called(trace: TracebackType | None, last: FrameType) -> Iterator[nn.Module]:
    """The modules that were being evaluated down to a line, without the library's own."""
    for frame, _ in traceback.walk_tb(trace):
        module = frame.f_locals.get("self")
        if isinstance(module, nn.Module) and not type(module).__module__.startswith("forwardgrad"):
            yield module
        if frame is last:
            return
