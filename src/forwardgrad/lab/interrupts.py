"""Ctrl-C that cannot be lost.

Python raises KeyboardInterrupt wherever the main thread happens to be. Where that is the callback of a weak reference or a `__del__`, the
exception is printed and dropped, and training would go on: torch's forward mode runs such callbacks at every step. So the signal is
also remembered, and whoever works for long asks now and then.
"""

from __future__ import annotations

import signal
import sys
import threading
from types import FrameType

_asked = False


def listen() -> None:
    """Remember every Ctrl-C from here on, in the main thread of a command."""
    global _asked
    _asked = False
    if threading.current_thread() is not threading.main_thread():
        return
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:  # a background job of a shell is not to be interrupted
        signal.signal(signal.SIGINT, _interrupt)
        sys.unraisablehook = _dropped


def check() -> None:
    """Raise KeyboardInterrupt where one was asked for, and got lost."""
    if _asked:
        raise KeyboardInterrupt


def _interrupt(signum: int, frame: FrameType | None) -> None:
    global _asked
    _asked = True
    raise KeyboardInterrupt


def _dropped(what: sys.UnraisableHookArgs) -> None:
    """Python's report of an exception that it drops: nothing is lost with an interrupt, which is remembered."""
    if what.exc_type is not KeyboardInterrupt:
        sys.__unraisablehook__(what)
