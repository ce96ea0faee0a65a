"""A user's own part as a command names it: 'module:name', looked for in the current folder first, or 'FILE.py:name'.

Descriptions of runs hold import paths alone (`import_path`). A command turns a file into one, with the file's folder on `sys.path`.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from forwardgrad.lab.errors import UserError
from forwardgrad.lab.studies import import_path
from forwardgrad.lab.studies.run import Run
from forwardgrad.lab.studies.study_file import STEM


def find_here(where: str, what: str) -> Any:
    """The object that 'module:name' or 'FILE.py:name' names; modules are looked for in the current folder first, as `python -m` does.

    Raises UserError for what is not there or cannot be imported.
    """
    text, colon, name = where.rpartition(":")
    if not colon or not text or not name:
        raise UserError(f"the {what} {where!r} is no import path: write module:name or FILE.py:name")
    path = Path(text).expanduser()
    if path.suffix != ".py":
        _first(Path.cwd())
        return import_path.find(where, what)
    path = path.resolve()
    if not path.is_file():
        raise UserError(f"the {what} {where!r} is not there: {text} is no file")
    known = sys.modules.get(path.stem)
    taken = path.stem in sys.stdlib_module_names or (known and Path(getattr(known, "__file__", None) or "").resolve() != path)
    if taken or not STEM.fullmatch(path.stem):
        raise UserError(f"{path.name} cannot be imported under its name: give the file another one, of letters, digits and underscores")
    _first(path.parent)
    return import_path.find(f"{path.stem}:{name}", what)


def _first(folder: Path) -> None:
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))


def folder_of(run: Run) -> Path | None:
    """The folder that other processes need on `sys.path` for a run's own parts, which were found here; None where it has none."""
    for path in import_path.paths(run).values():
        top = sys.modules.get(path.partition(":")[0].split(".")[0])
        file = Path(getattr(top, "__file__", None) or "nowhere")
        return file.parent.parent if file.name == "__init__.py" else file.parent
    return None
