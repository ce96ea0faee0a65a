"""The face of a room: its public names, listed once, in the `__init__.pyi` beside its `__init__.py`, and resolved on first use.

Editors and type checkers read the same list. Resolving late keeps a room's import free: a description of a run does not load torch
because something else in its room does, and rooms may be imported in any order.
"""

from __future__ import annotations

import ast
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from sys import modules
from typing import Any


def attach(package: str, file: str) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """`__getattr__`, `__dir__` and `__all__` of a package, from lines `from module import name as name` of its stub."""
    stub = ast.parse(Path(file).with_suffix(".pyi").read_text(encoding="utf-8"))
    home = {alias.name: str(node.module) for node in stub.body if isinstance(node, ast.ImportFrom) for alias in node.names}

    def __getattr__(name: str) -> Any:
        if name not in home:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        if home[name] == package:
            return import_module(f"{package}.{name}")
        value = getattr(import_module(home[name]), name)
        setattr(modules[package], name, value)
        return value

    names = sorted(home)
    return __getattr__, lambda: sorted(names), names  # one list: what a package adds to its __all__ is in dir() too
