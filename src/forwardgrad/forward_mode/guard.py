"""`Guard` watches an explicit evaluation. It raises where an operation reads a tensor that moves and the evaluation does not know of it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any
from weakref import ref

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from forwardgrad.forward_mode.levels import unwrapped
from forwardgrad.forward_mode.rules import Tracking
from forwardgrad.forward_mode.structure import Marks, leaves


class Unfollowed(Exception):
    """The explicit way does not know how tangents go on from here; the plain way does."""


def address(tensor: Tensor) -> int:
    try:
        return tensor.untyped_storage().data_ptr()
    except NotImplementedError as error:  # a wrapper has no memory of its own
        raise Unfollowed("torch.func works inside the model or the loss") from error


class Guard(TorchDispatchMode):
    """Sees the operations of a guarded evaluation: none may reach what moves unless a call is being made that the evaluation knows of.

    While such a call is made, the evaluation's own mode is off the stack of function modes; an operation under the full stack passes by.
    A tensor that does not move, but has the memory of one that does, was made by something that passed by, too.
    """

    def __init__(self, parameters: Iterable[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._full = 0
        self._parameters = {address(p) for p in parameters}  # which may be used as they are, and moving, one after the other
        self._memories: dict[int, ref[Any]] = {}  # of what moves, as long as it lives
        self.stills = Marks("_forwardgrad_still")  # the views that stand still on purpose

    def begin(self) -> None:
        # the height with the evaluation's own mode on the stack: torch takes a mode off while it handles a call
        self._full = torch._C._len_torch_function_stack()
        self.__enter__()  # type: ignore[no-untyped-call]

    def end(self) -> None:
        self.__exit__(None, None, None)  # type: ignore[no-untyped-call]

    def add(self, tensor: Tensor) -> None:
        if (place := address(tensor)) not in self._parameters:
            self._memories[place] = ref(tensor.untyped_storage())

    def leave_still(self, tensors: Iterable[Tensor]) -> None:
        """Know that these stand still, though they may share memory with something that moves."""
        for tensor in tensors:
            self.stills.put(tensor, self)

    def knows_still(self, tensor: Tensor) -> bool:
        return self.stills.of(tensor) is self

    def look(self, evaluation: Tracking, values: Any) -> None:
        """Raise Unfollowed where a tensor among these got its memory unseen."""
        for tensor in leaves(values):
            # it looks still, but lies in the memory of what moves: a view that was made unseen. Taken for still, it would drop a part of
            # the derivative. Views that the evaluation made itself on purpose, by detach(), are among the stills.
            if self._shares(tensor) and not self.knows_still(tensor) and evaluation.track(tensor) is None:
                raise Unfollowed("something made a tensor out of one that moves, and was not seen")

    def _shares(self, tensor: Tensor) -> bool:
        try:
            tensor = unwrapped(tensor)
            known = self._memories.get(address(tensor))
        except (RuntimeError, Unfollowed):  # it has no memory of its own
            return False
        return known is not None and known() is tensor.untyped_storage()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        # At full height nobody handles a call, so this operation comes from code below torch's functions: a scripted module, a function
        # in C++, a custom autograd function. If it reads what moves, its result would stand still, and the derivative be wrong in silence.
        if torch._C._len_torch_function_stack() < self._full:
            return func(*args, **(kwargs or {}))
        with torch._C.DisableTorchFunction():  # else the modes that passed it by would see what is done here
            if any(self._shares(tensor) for tensor in leaves((args, kwargs or {}))):
                raise Unfollowed(f"{func} was made unseen")
            return func(*args, **(kwargs or {}))
