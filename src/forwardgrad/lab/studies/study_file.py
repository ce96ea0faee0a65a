"""Reads a study from a user's Python file: finds the function that returns it, and sets its arguments from the command line."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from forwardgrad.lab.errors import UserError
from forwardgrad.lab.studies.study import Study

STEM = re.compile(r"[A-Za-z_]\w*")


def load(where: str, settings: Mapping[str, str]) -> tuple[Study, Path]:
    """The study that FILE.py, or FILE.py:function, describes, and the folder that its import paths start from.

    The file is imported under its own name with its folder first on sys.path, as `python FILE.py` would have it: so 'FILE:object' is the
    import path of what it defines. Raises UserError for a file that is not there, that cannot be imported, or that has no study.
    """
    text, _, name = where.partition(":")
    path = Path(text).expanduser().resolve()
    if path.suffix != ".py" or not path.is_file():
        raise UserError(f"{text} is no Python file: name one that holds a function returning a Study")
    if not STEM.fullmatch(path.stem):
        raise UserError(f"{path.name} cannot be imported under its name: call the file by letters, digits and underscores")
    known = sys.modules.get(path.stem)
    if path.stem in sys.stdlib_module_names or (known and Path(getattr(known, "__file__", None) or "").resolve() != path):
        raise UserError(f"{path.name} has the name of another module, so it cannot be imported: give the file another name")
    function = _function(_module(path), name, path)
    return _call(function, settings, path), path.parent


def _module(path: Path) -> ModuleType:
    sys.path.insert(0, str(path.parent))
    sys.modules.pop(path.stem, None)
    try:
        module = importlib.import_module(path.stem)
    except Exception as error:
        raise UserError(_said(path, error)) from error
    return module


def _said(path: Path, error: Exception) -> str:
    """An exception in the user's file as one sentence, with the line of the file that it came from."""
    if isinstance(error, SyntaxError):
        return f"{path.name} is no Python that can be read (line {error.lineno}: {error.msg})"
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if Path(frame.filename).resolve() == path]
    at = f" at line {lines[-1]}" if lines else ""
    moved = isinstance(error, ImportError) and (error.name or "").startswith("forwardgrad.lab")
    remedy = "; a study imports what it needs from forwardgrad.lab itself" if moved else ""
    return f"{path.name} stops{at} with {type(error).__name__}: {' '.join(str(error).split()) or 'no message'}{remedy}"


def _is_study(annotation: object, module: ModuleType) -> bool:
    """Whether a return annotation stands for Study, as text too: `from __future__ import annotations` makes all of them text."""
    if not isinstance(annotation, str) or annotation == "Study":
        return annotation in (Study, "Study")
    named: Any = module
    for name in annotation.split("."):
        named = getattr(named, name, None)
    return named is Study


def _function(module: ModuleType, name: str, path: Path) -> Callable[..., Any]:
    local = {key: value for key, value in vars(module).items() if inspect.isfunction(value) and value.__module__ == module.__name__}
    found = {key: value for key, value in local.items() if _is_study(inspect.get_annotations(value).get("return"), module)}
    if name:
        if name not in local:
            raise UserError(f"{path.name} has no function {name!r}: its studies are {', '.join(found) or 'none'}")
        return local[name]
    if len(found) != 1:
        say = f"has {len(found)} studies, {', '.join(found)}: name one as {path.name}:{next(iter(found))}" if found else "has no study"
        raise UserError(f"{path.name} {say}" + ("" if found else ": write a function whose return annotation is Study"))
    return next(iter(found.values()))


def _call(function: Callable[..., Any], settings: Mapping[str, str], path: Path) -> Study:
    known = inspect.signature(function).parameters
    if unknown := [name for name in settings if name not in known]:
        raise UserError(f"{path.name}:{function.__name__} has no argument {unknown[0]!r}: it has {', '.join(known) or 'none'}")
    if missing := [
        name for name, p in known.items() if p.default is p.empty and name not in settings and p.kind is p.POSITIONAL_OR_KEYWORD
    ]:
        raise UserError(f"{path.name}:{function.__name__} needs {missing[0]!r}: give it with --set {missing[0]}=VALUE, or a default")
    try:
        study = function(**{name: _value(text) for name, text in settings.items()})
    except UserError:
        raise
    except Exception as error:
        raise UserError(_said(path, error)) from error
    if not isinstance(study, Study):
        raise UserError(f"{path.name}:{function.__name__} returns {type(study).__name__}: return a forwardgrad.lab.Study")
    return study


def _value(text: str) -> Any:
    """A number, a list, True, None … where the text is one in Python's own writing; else the text."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return text
