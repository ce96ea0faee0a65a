"""All estimators, and the way between an estimator and its JSON form."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from forwardgrad.estimators.backprop import Backprop
from forwardgrad.estimators.base import Estimate, Estimator
from forwardgrad.estimators.forward import ForwardGradient
from forwardgrad.estimators.guess import Guess
from forwardgrad.estimators.zeroth_order import ZerothOrder
from forwardgrad.tangents import LAWS, Law

ESTIMATORS: tuple[type[Estimator], ...] = (Backprop, ForwardGradient, Guess, ZerothOrder)

__all__ = ["ESTIMATORS", "Backprop", "Estimate", "Estimator", "ForwardGradient", "Guess", "ZerothOrder", "from_config", "to_config"]


def to_config(estimator: Estimator) -> dict[str, Any]:
    """An estimator as plain JSON values: its name and every field, laws by their name.

    >>> to_config(ForwardGradient(clip=1.0))
    {'name': 'forward', 'tangents': 1, 'law': 'gaussian', 'clip': 1.0, 'chunk_size': None}
    """
    fields = {field.name: getattr(estimator, field.name) for field in dataclasses.fields(estimator)}
    return {"name": estimator.name, **{key: value.name if isinstance(value, Law) else value for key, value in fields.items()}}


def from_config(config: Mapping[str, Any]) -> Estimator:
    """The estimator that `to_config` described; fields left out take their defaults.

    Raises ValueError for an unknown name or field (listing the known ones) and for values outside their limits.
    """
    fields = dict(config)
    kind = _named(ESTIMATORS, fields.pop("name", None), "estimator")
    known = [field.name for field in dataclasses.fields(kind)]
    if unknown := [key for key in fields if key not in known]:
        raise ValueError(f"the {kind.name} estimator has no option {unknown[0]!r}: its options are {', '.join(known) or 'none'}")
    if "law" in fields:
        fields["law"] = _named(LAWS, fields["law"], "law")()
    estimator: Estimator = kind(**fields)
    return estimator


def _named(kinds: tuple[Any, ...], name: object, what: str) -> Any:
    for kind in kinds:
        if kind.name == name:
            return kind
    raise ValueError(f"unknown {what} {name!r}: choose one of {', '.join(kind.name for kind in kinds)}")
