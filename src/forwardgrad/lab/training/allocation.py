"""Freed memory that stays with the process, for a command whose steps free and ask for the same memory over and over."""

from __future__ import annotations

import ctypes
import platform

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # of mallopt(3)


def keep() -> bool:
    """Have glibc hand freed memory out again; whether it does, and where there is no glibc nothing changes.

    It hands blocks of 32 MB and more back to the system as soon as they are freed, and every page of the next such block is a fault: with
    K > 1 directions on convolutional networks that is a third of the time of a step. Backpropagation gains as much as it has such blocks.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return bool(mallopt(_MMAP_MAX, 0) and mallopt(_TRIM_THRESHOLD, 2**31 - 1))
