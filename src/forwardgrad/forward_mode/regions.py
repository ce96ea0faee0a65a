"""Parts of a loss under `torch.no_grad()`: what they make is constant, in forward mode as in reverse mode.

An estimate is made without reverse mode, so torch itself cannot tell such a part from all others: the switch stands as it stood before.
Torch calls function modes whenever a model turns the switch, and the frame of that call knows whether a part begins or ends.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch
from torch.autograd import grad_mode

from forwardgrad.forward_mode.structure import exchanged, leaves

SWITCH: Any = torch._C._set_grad_enabled


@dataclass
class _Part:
    """A part of the loss, the context it is in, and whether it is differentiated."""

    owner: Any
    differentiated: bool


class Regions:
    """The parts under `no_grad`, `enable_grad` and `set_grad_enabled` that evaluations of a loss are in."""

    def __init__(self) -> None:
        self._open, self._before = list[_Part](), True

    @property
    def still(self) -> bool:
        """Whether the innermost open part is one under `no_grad`."""
        return bool(self._open) and not self._open[-1].differentiated

    def turned(self, differentiated: bool, frame: FrameType) -> None:
        """The switch was turned by a context that this frame or one around it belongs to."""
        found = _of_context(frame)
        if found is None:
            return
        owner = found.f_locals.get("self")
        if not self._open:
            self._before = torch._C._is_fwd_grad_enabled()
        if found.f_code.co_name == "__exit__":
            at = next((at for at, part in enumerate(self._open) if part.owner is owner), len(self._open))
            del self._open[at:]
        elif not self._open or self._open[-1].owner is not owner:  # one turns it when it is made, and again when it is entered
            self._open.append(_Part(owner, differentiated))
        torch._C._set_fwd_grad_enabled(self._before and not self.still)

    def close(self) -> None:
        if self._open:
            self._open.clear()
            torch._C._set_fwd_grad_enabled(self._before)


_now: ContextVar[Regions | None] = ContextVar("regions", default=None)


@contextmanager
def followed() -> Iterator[None]:
    """Inside, evaluations know the parts of a loss under `no_grad`."""
    token = _now.set(made := Regions())
    try:
        yield
    finally:
        made.close()
        _now.reset(token)


def switched(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The switch is turned, as a mode sees it."""
    result = SWITCH(*args, **kwargs)
    if (found := _now.get()) is not None:
        found.turned(bool(args[0]), sys._getframe(1))
    return result


def still() -> bool:
    """Whether a loss that is being evaluated is in a part under `no_grad`."""
    return not torch._C._is_fwd_grad_enabled() and (found := _now.get()) is not None and found.still


def constant(result: Any, given: Any) -> Any:
    """What a call made in a part under `no_grad`, its views of what moves without their tangents; what it was given itself moves on."""
    known = {id(tensor) for tensor in leaves(given)}
    return exchanged(result, {id(tensor): tensor.detach() for tensor in leaves(result) if id(tensor) not in known})


def _of_context(frame: FrameType | None) -> FrameType | None:
    """The outermost frame of the context that turned the switch; None where something else did."""
    while frame is not None and frame.f_globals is not vars(grad_mode):
        frame = frame.f_back
    while frame is not None and frame.f_back is not None and frame.f_back.f_globals is vars(grad_mode):
        frame = frame.f_back
    return frame
