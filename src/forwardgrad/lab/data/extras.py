"""Packages that only some commands need, imported when they are used."""

from __future__ import annotations

import importlib
from typing import Any

from forwardgrad.lab.errors import UserError


def need(module: str, extra: str = "lab") -> Any:
    """A module of an optional dependency; UserError names the extra that installs it where it is missing."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(f"{module.split('.')[0]} cannot be imported ({error}): pip install 'forwardgrad[{extra}]'") from error
