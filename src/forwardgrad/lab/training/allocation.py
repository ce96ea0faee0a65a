"""Keeps freed memory in the process: training steps free the same memory and ask for it again, over and over."""

from __future__ import annotations

import ctypes
import platform

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # of mallopt(3)


def keep() -> bool:
    """Have glibc keep freed memory for the next request; returns whether it does. Without glibc nothing changes.

    By itself it hands blocks of 32 MB and more back to the system as soon as they are freed, and every page of the next such block is a
    fault. With K > 1 directions on convolutional networks that is a third of the time of a step. Backpropagation gains as well, as far as
    it has such blocks.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return bool(mallopt(_MMAP_MAX, 0) and mallopt(_TRIM_THRESHOLD, 2**31 - 1))
