"""Where a number was measured: versions, hardware, commit and command. No path of the machine is among them."""

from __future__ import annotations

import functools
import os
import platform
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

import forwardgrad
from forwardgrad.lab.errors import UserError

SAME_MACHINE = ("device", "threads", "torch", "commit")  # what has to agree for measurements to stand in one file


def device(name: str) -> torch.device:
    """The torch device of this name; UserError for an unknown name, or a GPU that is not there."""
    try:
        chosen = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"unknown device {name!r}: choose cpu, cuda or cuda:N") from error
    if chosen.type == "cuda":
        found = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (chosen.index or 0) >= found:
            raise UserError(f"no GPU for --device {name}: torch sees {found} of them on this machine; use --device cpu")
    elif chosen.type != "cpu":
        raise UserError(f"the device {name!r} is not supported: choose cpu, cuda or cuda:N")
    return chosen


def describe(on: torch.device) -> dict[str, Any]:
    """Versions, hardware, threads, commit and command, for environment.json."""
    found: dict[str, Any] = {
        "forwardgrad": forwardgrad.__version__,
        "commit": commit(),
        "command": command(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "platform": f"{platform.system()} {platform.machine()}",
        "device": torch.cuda.get_device_name(on) if on.type == "cuda" else processor(),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
    }
    if on.type == "cuda":
        from forwardgrad.engines import tf32  # takes a second to load

        found["tf32"] = tf32()
    return found


def command() -> str:
    """The command line, without the folder where the data lay on this machine."""
    words = sys.argv[1:]
    private = {i + 1 for i, word in enumerate(words) if word == "--data-dir"}
    shown = ["DIR" if i in private else "--data-dir=DIR" if word.startswith("--data-dir=") else word for i, word in enumerate(words)]
    return shlex.join(["forwardgrad", *shown])


def processor() -> str:
    """The processor's name, such as 'AMD EPYC'."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


@functools.cache
def commit() -> str | None:
    """The commit of the checkout that this package runs from ('+' where it was changed since); None for an installed wheel.

    Asked once a process: what runs is what was imported, whatever is done to the checkout later.
    """
    home = Path(forwardgrad.__file__).parent

    def git(*words: str) -> str:
        return subprocess.run(["git", "-C", str(home), *words], capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        if git("ls-files", "--error-unmatch", "__init__.py") != "__init__.py":
            return None
        return git("rev-parse", "--short=12", "HEAD") + ("+" if git("status", "--porcelain", "--untracked-files=no", ".") else "")
    except (OSError, subprocess.SubprocessError):
        return None
