"""A user's own model and loss, or estimator: a command is told an import path or a file, and this module loads and checks it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from forwardgrad.lab.errors import UserError
from forwardgrad.lab.studies import STEM, import_path, parse_estimator


def found(where: str, what: str) -> Any:
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


def pair(where: str) -> tuple[Any, Callable[..., Any]]:
    """What a factory returns: (model, loss), the loss a function of the model; UserError for anything else."""
    from torch import nn

    factory = found(where, "factory")
    try:
        made = factory()
    except Exception as error:  # the user's code can raise anything
        raise UserError(f"the factory {where!r} stops with {type(error).__name__}: {_line(error)}") from error
    if not isinstance(made, (tuple, list)) or len(made) != 2:
        raise UserError(f"the factory {where!r} returns {type(made).__name__}: return (model, loss), the loss a function of the model")
    model, loss = made
    if not isinstance(model, nn.Module) or not callable(loss):
        kinds = f"({type(model).__name__}, {type(loss).__name__})"
        raise UserError(f"the factory {where!r} returns {kinds}: return (model, loss), a torch.nn.Module and a function of it")
    return model, loss


def estimator(text: str) -> Any:
    """The estimator that a text describes: 'forward(tangents=8)', or a user's own class as 'module:Class(option=value)'."""
    from forwardgrad.estimators import Estimator, from_config

    name, bracket, options = text.partition("(")
    try:
        if ":" not in name:
            return from_config(parse_estimator(text))
        fields = parse_estimator(f"own{bracket}{options}")
        made = found(name.strip(), "estimator")(**{key: value for key, value in fields.items() if key != "name"})
    except (ValueError, TypeError) as error:
        raise UserError(f"the estimator {text!r} cannot be used: {_line(error)}") from error
    if not isinstance(made, Estimator):
        raise UserError(f"the estimator {text!r} makes {type(made).__name__}: it has to be a forwardgrad.Estimator")
    return made


def _line(error: Exception) -> str:
    return " ".join(str(error).split()) or "no message"
