"""Freed memory stays with the commands of the laboratory."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

SCRIPT = """
import sys
import torch
from forwardgrad.lab.training import allocation

if "keep" in sys.argv:
    assert allocation.keep()
block = torch.empty(2**26, dtype=torch.uint8)
with open("/proc/self/maps") as maps:
    low, high = next(line.split()[0].split("-") for line in maps if "[heap]" in line)
print(int(low, 16) <= block.data_ptr() < int(high, 16))
"""


@pytest.mark.some(1)
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc is told")
@pytest.mark.parametrize("keep", [True, False])
def test_large_blocks_come_from_memory_that_is_kept(keep: bool) -> None:
    """What lies on the heap is handed out again when it is freed; a mapping of its own goes back to the system."""
    words = [sys.executable, "-c", SCRIPT, *(["keep"] if keep else [])]
    found = subprocess.run(words, capture_output=True, text=True, timeout=100, check=True)
    assert found.stdout.strip() == str(keep)
