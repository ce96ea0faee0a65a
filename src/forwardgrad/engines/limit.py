"""Run a function with a time limit."""

from __future__ import annotations

import contextvars
import ctypes
from collections.abc import Callable
from threading import Thread
from typing import Any, TypeVar

T = TypeVar("T")


class Late(Exception):
    """The time is over."""


class _Stop(BaseException):
    """Ends a thread: no `except Exception` on the way may keep it."""


def within(seconds: float, make: Callable[[], T]) -> T:
    """What `make` returns, made in a thread of its own, which ends before this returns.

    Raises Late after so many seconds, or a little later: a thread is stopped between two steps of Python, not in a call of other code.
    `make` sees the context variables of its caller, but none of what torch keeps for each thread, such as `no_grad`.
    """
    if seconds <= 0:
        raise Late
    found: list[T] = []
    errors: list[BaseException] = []
    context = contextvars.copy_context()

    def work() -> None:
        try:
            found.append(context.run(make))
        except BaseException as error:
            errors.append(error)

    thread = Thread(target=work, name="forwardgrad limit", daemon=True)
    thread.start()
    try:
        thread.join(seconds)
    finally:  # an interrupt of the caller stops it too
        while thread.is_alive():
            _raise_in(thread, _Stop)
            thread.join(5)  # a second stop too early would break off the clean-up after the first
    if found:
        return found[0]
    if not errors or isinstance(errors[0], _Stop):
        raise Late
    raise errors[0]


def _raise_in(thread: Thread, error: Any) -> None:
    assert thread.ident is not None
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident), ctypes.py_object(error))
