"""The list of all estimators and components with their options, read from the classes themselves."""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Iterator, Mapping
from typing import Any

import forwardgrad as fg
from forwardgrad.lab.studies import format_value

COMPONENTS: tuple[tuple[str, tuple[type[Any], ...]], ...] = (("laws of directions", fg.LAWS), ("perturbations", fg.PERTURBATIONS))

OWN = "your own stand where a name stands, by import path: 'module:Class(option=value)', or 'forward(perturb=module:Class)'"


def listing() -> str:
    """Every estimator, then every component: name, what it is, and its options with their defaults."""
    parts = ["estimators:", *(line for kind in fg.ESTIMATORS for line in _kind(kind))]
    for title, kinds in COMPONENTS:
        parts += ["", f"{title}:", *(line for kind in kinds for line in _kind(kind))]
    return "\n".join([*parts, "", OWN])


def _kind(kind: type[Any]) -> Iterator[str]:
    document = inspect.getdoc(kind) or ""
    arguments = _arguments(document)
    yield f"  {kind.name}: {_sentence(document)}"
    for field in dataclasses.fields(kind):
        yield f"    {field.name}{_default(field)}: {arguments.get(field.name, 'no description')}"


def _arguments(document: str) -> dict[str, str]:
    """The first sentence on every argument in a docstring's section `Args:`."""
    section = re.search(r"^Args:\n((?:[ ]+.*\n?|\n)*)", document, re.MULTILINE)
    entries = re.findall(r"^    (\w+): ((?:.*\n?)(?:^     +.*\n?)*)", section[1] if section else "", re.MULTILINE)
    return {name: _sentence(text) for name, text in entries}


def _sentence(text: str) -> str:
    """The first sentence of a text, on one line, without its full stop."""
    paragraph = " ".join(text.split("\n\n")[0].split())
    return re.split(r"\.(?: (?=[A-Z])|$)", paragraph, maxsplit=1)[0]


def _default(field: dataclasses.Field[Any]) -> str:
    value = field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default
    if value is dataclasses.MISSING:
        return " (required)"
    if isinstance(value, Mapping):
        return f"={dict(value)}"
    return f"={format_value(_plain(value))}"


def _plain(value: Any) -> Any:
    """A component as its configuration."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {"name": value.name, **{field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}}  # type: ignore[attr-defined]
    return value
