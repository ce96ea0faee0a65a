"""Commands for the data sets: download and check."""

from __future__ import annotations

from typing import Annotated

import typer

from forwardgrad.lab.commands.options import DataDir
from forwardgrad.lab.errors import UserError
from forwardgrad.lab.studies import DataName, check_choice


def fetch(
    names: Annotated[list[str] | None, typer.Argument(help="mnist, cifar10; both if left out.")] = None, data_dir: DataDir = None
) -> None:
    """Download the official files, check them, and lay them out; what is there and good is not downloaded again."""
    from forwardgrad.lab.data import fetch as download

    for name in names or []:  # all of them, before the first is downloaded
        check_choice(name, DataName, "data set")
    for name in names or ["mnist", "cifar10"]:
        for path in download(name, data_dir):
            print(path)


def verify(
    names: Annotated[list[str] | None, typer.Argument(help="mnist, cifar10; both if left out.")] = None, data_dir: DataDir = None
) -> None:
    """Check the data files against their checksums; status 2 where one is missing or damaged."""
    from forwardgrad.lab.data import folder
    from forwardgrad.lab.data import verify as check

    states = check(data_dir, names)
    for name, state in states:
        print(f"{state:8} {name}")
    if wrong := [name for name, state in states if state != "ok"]:
        count = f"{len(wrong)} of {len(states)} files are"
        raise UserError(f"{count} missing or damaged in {folder(data_dir)}: `forwardgrad data fetch` brings them")
