"""All estimators, and the way between an estimator and its JSON form.

An estimator, a law or a perturbation that comes with the project is called by its short name. One that a user wrote is called by the
import path of its class, 'package.module:Class'. Nothing is imported here: whoever reads such a description hands in what finds the class.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from typing import Any, get_args, get_type_hints

from forwardgrad.directions import LAWS, Law
from forwardgrad.estimators.backprop import Backprop
from forwardgrad.estimators.base import Estimate, Estimator
from forwardgrad.estimators.feedback import LearnedFeedback
from forwardgrad.estimators.fixed_feedback import FixedFeedback, Readout
from forwardgrad.estimators.forward import ForwardGradient
from forwardgrad.estimators.guess import Guess
from forwardgrad.estimators.local import LocalLosses
from forwardgrad.estimators.zeroth_order import ZerothOrder
from forwardgrad.perturbations import PERTURBATIONS, Perturbation

ESTIMATORS: tuple[type[Estimator], ...] = (
    Backprop,
    ForwardGradient,
    LearnedFeedback,
    LocalLosses,
    Guess,
    ZerothOrder,
    FixedFeedback,
    Readout,
)

__all__ = [
    "ESTIMATORS",
    "Backprop",
    "Estimate",
    "Estimator",
    "FixedFeedback",
    "ForwardGradient",
    "Guess",
    "LearnedFeedback",
    "LocalLosses",
    "Readout",
    "ZerothOrder",
    "from_config",
    "to_config",
]


Find = Callable[[str, str], Any]
"""From an import path and what stands there, in a word, to the class; it raises an error of its own where there is none."""

_KINDS: dict[type[Any], tuple[type[Any], ...]] = {Estimator: ESTIMATORS, Law: LAWS, Perturbation: PERTURBATIONS}
"""What can be described, and which of it comes with the project."""

_NAMED = inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY


def to_config(estimator: Estimator) -> dict[str, Any]:
    """An estimator as plain JSON values: its name and every field, components by their name, with their fields where they have any.

    What a user wrote is named by the import path of its class.

    >>> to_config(Backprop())["name"]
    'backprop'
    """
    return {"name": _name(estimator), **_fields(estimator)}


def _name(value: Any) -> str:
    kind = type(value)
    ours = any(kind in kinds for kinds in _KINDS.values())
    return str(value.name) if ours else f"{kind.__module__}:{kind.__qualname__}"


def _fields(value: Any) -> dict[str, Any]:
    return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value) if field.init}


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return dict(value)
    if not isinstance(value, tuple(_KINDS)):
        return value
    name, fields = _name(value), _fields(value)
    return {"name": name, **fields} if fields or ":" in name else name


def from_config(config: Mapping[str, Any], find: Find | None = None) -> Estimator:
    """The estimator that `to_config` described; fields left out take their defaults.

    `find`: called with an import path and what stands there ("estimator", "law" or "perturbation"), where the description names a class of
    a user's; it returns the class. Without it nothing but what comes with the project is made.

    Raises ValueError for an unknown name or field (listing the known ones), for a class of another kind, and for values outside their
    limits.
    """
    estimator: Estimator = _made(Estimator, config, "estimator", find)
    return estimator


def _made(base: type[Any], config: object, what: str, find: Find | None) -> Any:
    """The object of this kind that is described; `what` is the option that it stands in."""
    word = base.__name__.lower()
    fields = dict(config) if isinstance(config, Mapping) else {"name": config}
    name = fields.pop("name", None)
    if isinstance(name, str) and ":" in name:
        if not isinstance(config, Mapping):
            raise ValueError(f"the {word} {name!r} is an import path: write it as {{'name': {name!r}}}")
        return _users(base, name, fields, find)
    if not (found := [kind for kind in _KINDS[base] if kind.name == name]):
        known = ", ".join(kind.name for kind in _KINDS[base])
        raise ValueError(f"unknown {what} {name!r}: choose one of {known}")
    return found[0](**_options(found[0], fields, f"the {name} {what}", find))


def _users(base: type[Any], path: str, fields: dict[str, Any], find: Find | None) -> Any:
    """The same for what a user wrote: a class, or a function that makes the object."""
    word = base.__name__.lower()
    if find is None:
        raise ValueError(f"the {word} {path!r} is named by an import path, and nothing is imported here: pass find=")
    kind = find(path, word)
    if isinstance(kind, type):
        if not issubclass(kind, base):
            raise ValueError(f"the {word} {path!r} is no subclass of forwardgrad.{base.__name__}: derive the class from that")
        fields = _options(kind, fields, f"the {word} {path!r}", find)
    try:
        made = kind(**fields)
    except TypeError as error:
        raise ValueError(f"the {word} {path!r} cannot be made: {error}") from error
    if not isinstance(made, base):
        raise ValueError(f"the {word} {path!r} makes {type(made).__name__}: it has to be a forwardgrad.{base.__name__}")
    return made


def _options(kind: type[Any], fields: Mapping[str, Any], who: str, find: Find | None) -> dict[str, Any]:
    """The options of a class from their JSON form; ValueError for one that it does not have."""
    known = {field.name: field for field in dataclasses.fields(kind) if field.init}
    taken = inspect.signature(kind).parameters  # those of an `__init__` that a user wrote by hand need not be fields
    options = [name for name, parameter in taken.items() if parameter.kind in _NAMED]
    anything = any(parameter.kind is parameter.VAR_KEYWORD for parameter in taken.values())
    if unknown := [key for key in fields if key not in options and not anything]:
        raise ValueError(f"{who} has no option {unknown[0]!r}: its options are {', '.join(options) or 'none'}")
    made = dict(fields)
    for key, value in fields.items():
        if key not in known:
            continue
        if isinstance(value, list) and isinstance(known[key].default, tuple):  # JSON has lists alone
            made[key] = tuple(value)
        base = _component(kind, known[key])
        if base is not None and not (value is None and known[key].default is None):
            made[key] = _made(base, value, key, find)
    return made


def _component(kind: type[Any], field: dataclasses.Field[Any]) -> type[Any] | None:
    """Of which kind the component is that a field holds, None for a plain value: told by the default, or by the annotation."""
    for base in _KINDS:
        if isinstance(field.default, base):
            return base
    try:
        hint = get_type_hints(kind).get(field.name)
    except Exception:  # annotations may use names that only a type checker knows
        return None
    parts = [part for part in (hint, *get_args(hint)) if isinstance(part, type)]
    return next((base for base in _KINDS for part in parts if issubclass(part, base)), None)
