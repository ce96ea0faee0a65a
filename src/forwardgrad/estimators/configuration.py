"""All estimators, and the way between an estimator and its JSON form."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from forwardgrad.directions import LAWS
from forwardgrad.estimators.backprop import Backprop
from forwardgrad.estimators.base import Estimate, Estimator
from forwardgrad.estimators.feedback import LearnedFeedback
from forwardgrad.estimators.fixed_feedback import FixedFeedback, Readout
from forwardgrad.estimators.forward import ForwardGradient
from forwardgrad.estimators.guess import Guess
from forwardgrad.estimators.local import LocalLosses
from forwardgrad.estimators.zeroth_order import ZerothOrder
from forwardgrad.perturbations import PERTURBATIONS

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


_KINDS: dict[str, tuple[type[Any], ...]] = {"law": LAWS, "perturb": PERTURBATIONS}
"""Fields that hold a component instead of a number, and what can stand there."""


def to_config(estimator: Estimator) -> dict[str, Any]:
    """An estimator as plain JSON values: its name and every field, components by their name, with their fields where they have any.

    >>> to_config(Backprop())["name"]
    'backprop'
    """
    config = {field.name: getattr(estimator, field.name) for field in dataclasses.fields(estimator)}
    return {"name": estimator.name, **{key: _component(value) if key in _KINDS else value for key, value in config.items()}}


def _component(value: Any) -> Any:
    fields = dataclasses.asdict(value)
    return {"name": value.name, **fields} if fields else value.name


def from_config(config: Mapping[str, Any]) -> Estimator:
    """The estimator that `to_config` described; fields left out take their defaults.

    Raises ValueError for an unknown name or field (listing the known ones) and for values outside their limits.
    """
    estimator: Estimator = _made(ESTIMATORS, config, "estimator")
    return estimator


def _made(kinds: tuple[Any, ...], config: object, what: str) -> Any:
    fields = dict(config) if isinstance(config, Mapping) else {"name": config}
    name = fields.pop("name", None)
    if not (found := [kind for kind in kinds if kind.name == name]):
        raise ValueError(f"unknown {what} {name!r}: choose one of {', '.join(kind.name for kind in kinds)}")
    known = [field.name for field in dataclasses.fields(found[0])]
    if unknown := [key for key in fields if key not in known]:
        raise ValueError(f"the {name} {what} has no option {unknown[0]!r}: its options are {', '.join(known) or 'none'}")
    return found[0](**{key: _made(_KINDS[key], value, key) if key in _KINDS else value for key, value in fields.items()})
