"""Processes that work for this one: they end with it, and how they ended is told in words."""

from __future__ import annotations

import os
import signal
import threading
import time


def how(code: int) -> str:
    """How a process ended, of its exit code."""
    if code >= 0:
        return f"ended with status {code}"
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = f"signal {-code}"
    return f"was killed by {name}" + (", as is done where memory runs out" if -code == signal.SIGKILL else "")


def follow_parent(parent: int) -> None:
    threading.Thread(target=_follow, args=(parent,), daemon=True).start()


def _follow(parent: int) -> None:
    """End this worker once its parent is gone: nobody would take its results, and its runs would stay locked."""
    while os.getppid() == parent:
        time.sleep(1.0)
    os._exit(1)
