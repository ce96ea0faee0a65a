"""A user's own model, data, loss, estimator (with its law and perturbation) and optimizer by import path: 'package.module:object'.

A run that names one carries a digest of its source in its description, so that edited code is another run. Only a run that is about to be
trained imports anything: whatever reads stored results does not come here. Loads without torch.
"""

from __future__ import annotations

import ast
import dataclasses
import hashlib
import importlib
import inspect
from types import ModuleType
from typing import Any

from forwardgrad.lab.errors import UserError
from forwardgrad.lab.studies.run import Run, is_path, named


def paths(run: Run) -> dict[str, str]:
    """The parts of a run that a user brings, by what they are."""
    found = {
        "model": run.model,
        "data": run.data,
        "loss": run.loss or "",
        **dict(named(run.estimator)),
        "optimizer": run.optimizer.name,
    }
    return {what: path for what, path in found.items() if is_path(path)}


def find(path: str, what: str) -> Any:
    """The object that an import path names; UserError says which half of it is wrong."""
    module, _, name = path.partition(":")
    found: Any = _module(module, path, what)
    for part in name.split("."):
        if not hasattr(found, part):
            raise UserError(f"the {what} {path!r} is not there: {module} has no {name!r}")
        found = getattr(found, part)
    if not callable(found):
        raise UserError(f"the {what} {path!r} is {found!r}, which cannot be called: name a function or a class")
    return found


def _module(module: str, path: str, what: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except Exception as error:  # importing runs the user's code, which can raise anything
        why = str(error) or type(error).__name__
        raise UserError(f"the {what} {path!r} cannot be imported ({type(error).__name__}: {why})") from error


def signed(run: Run) -> Run:
    """The run with the digest of the user's own code that it depends on; UserError where a part cannot be found."""
    own = paths(run)
    return dataclasses.replace(run, code=digest(own)) if own else run


def digest(own: dict[str, str]) -> str:
    """Twelve hexadecimal digits of the source of all parts, and of what each uses of its own module."""
    text = "\n".join(f"{what} {path}\n{_source(path, find(path, _word(what)))}" for what, path in sorted(own.items()))
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _word(what: str) -> str:
    """What stands in a place of a description, in a word."""
    place = what.rpartition(".")[2]
    return "perturbation" if place == "perturb" else place


def _source(path: str, found: Any) -> str:
    """What a path's module says of its name, and what the module that the object comes from says of it, where that is another one."""
    module, _, name = path.partition(":")
    homes = [(importlib.import_module(module), name.split(".")[0])]
    origin = inspect.getmodule(found)
    if origin is not None and origin is not homes[0][0] and hasattr(found, "__qualname__"):
        homes.append((origin, found.__qualname__.split(".")[0]))
    return "\n".join(_said_of(module, name) for module, name in homes)


def _said_of(module: ModuleType, name: str) -> str:
    """The statements of a module that give a name its meaning, and after them those of every name that they use; '' for what has none."""
    try:
        whole = ast.parse(inspect.getsource(module))
    except (OSError, TypeError, SyntaxError):  # built in, or made by code that is no file's
        return ""
    defined: dict[str, list[ast.stmt]] = {}
    for statement in whole.body:
        for each in _defines(statement):
            defined.setdefault(each, []).append(statement)
    seen, waiting = {name: None}, [name]
    parts: list[str] = []
    while waiting:
        for statement in defined.get(waiting.pop(0), ()):
            parts.append(ast.unparse(statement))
            used = sorted({node.id for node in ast.walk(statement) if isinstance(node, ast.Name)} - seen.keys())
            seen |= dict.fromkeys(used)
            waiting += used
    return "\n".join(parts)


def _defines(statement: ast.stmt) -> list[str]:
    """The names that a statement of a module gives a meaning to."""
    if isinstance(statement, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
        return [statement.name]
    if isinstance(statement, (ast.Import, ast.ImportFrom)):
        return [alias.asname or alias.name.split(".")[0] for alias in statement.names]
    return [node.id for node in ast.walk(statement) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)]
