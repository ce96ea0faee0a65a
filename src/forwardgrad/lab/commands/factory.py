"""A user's own model and loss, or estimator: a command is told an import path or a file, and this module loads and checks it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from forwardgrad.lab.errors import UserError
from forwardgrad.lab.studies import find_here, parse_estimator


def pair(where: str) -> tuple[Any, Callable[..., Any]]:
    """What a factory returns: (model, loss), the loss a function of the model; UserError for anything else."""
    from torch import nn

    factory = find_here(where, "factory")
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
    """The estimator that a text describes: 'forward(tangents=8)', or one of a user's own classes as 'module:Class(option=value)'.

    The same holds for its components. In place of the module there may be a file, 'FILE.py:Class'.
    """
    from forwardgrad.estimators import from_config

    try:
        return from_config(read(text), find_here)
    except (ValueError, TypeError) as error:
        raise UserError(f"the estimator {text!r} cannot be used: {_line(error)}") from error


def read(text: str) -> dict[str, Any]:
    """The description that a text gives of an estimator; the file in front of a class may have any name, spaces too."""
    head, bracket, options = text.partition("(")
    return {**parse_estimator(f"own{bracket}{options}"), "name": head.strip()} if ":" in head else parse_estimator(text)


def _line(error: Exception) -> str:
    return " ".join(str(error).split()) or "no message"
