"""Commands that read what is stored."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from forwardgrad.lab.commands.options import write_report
from forwardgrad.lab.store import Store


def report(directory: Annotated[Path, typer.Argument(metavar="DIR", help="An output folder.")]) -> None:
    """Write the report of an output folder again, from its stored runs."""
    write_report(Store(directory, create=False))
