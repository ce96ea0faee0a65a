"""Commands that read what is stored."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Annotated

import typer

from forwardgrad.lab.commands.options import write_report
from forwardgrad.lab.store import Store


def report(directory: Annotated[Path, typer.Argument(metavar="DIR", help="An output folder.")]) -> None:
    """Write the report of an output folder again, from its stored runs."""
    write_report(Store(directory, create=False))


def watch(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="An output folder, also one that another process writes.")],
    once: Annotated[bool, typer.Option("--once", help="Show it as it is now, and end.")] = False,
) -> None:
    """Show how far the runs of an output folder are, until all are done; Ctrl-C ends the watching and nothing else."""
    from forwardgrad.lab.progress import watch as show

    with contextlib.suppress(KeyboardInterrupt):
        show(Store(directory, create=False), once=once)
