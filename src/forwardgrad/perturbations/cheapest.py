"""`Cheapest`: layer by layer the weights move or the activities, whichever are fewer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import ClassVar

from torch import Tensor

from forwardgrad.directions import Directions
from forwardgrad.perturbations.activity import Activity
from forwardgrad.perturbations.base import Entered, Perturbation
from forwardgrad.perturbations.dense import Dense
from forwardgrad.perturbations.layers import Layer
from forwardgrad.perturbations.low_rank import LowRank
from forwardgrad.perturbations.per_example import PerExample

_CHOICES: dict[str, Perturbation] = {choice.name: choice for choice in (Dense(), LowRank(), PerExample(), Activity())}


@dataclass(frozen=True)
class Cheapest(Perturbation):
    """Per-example weights where a layer has fewer weights than units an example, masked activities elsewhere.

    Formula, bias and cost: those of `PerExample` and `Activity`, layer by layer; unbiased, as each of them is.
    Variance: (n − 1)‖δ‖² with n the numbers that move for one example, which this choice makes small: early convolutions have fewer
    weights than activities, dense layers the reverse. About half of the units behind a ReLU are taken to be active.

    Args:
        overrides: what to perturb in layers whose weight's name matches a pattern, the first match counting, such as
            {"0.weight": "activity", "features.*": "per-example"}. Values: dense, low-rank, per-example, activity.

    Raises ValueError for an unknown value.

    Source: the count of units against weights follows Züge et al. (2023), who compare both kinds of perturbation.
    """

    name: ClassVar[str] = "cheapest"

    overrides: Mapping[str, str] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        if not isinstance(self.overrides, Mapping):
            raise ValueError(f"overrides must map patterns of names to perturbations, not {self.overrides!r}")
        for value in self.overrides.values():
            if value not in _CHOICES:
                raise ValueError(f"unknown perturbation {value!r}: choose one of {', '.join(_CHOICES)}")

    @property
    def weights(self) -> bool:
        return False

    def enter(self, layer: Layer, x: Tensor, out: Tensor, directions: Directions) -> Entered | None:
        name = next(iter(layer.names.values()))
        for pattern, value in self.overrides.items():
            if any(fnmatchcase(known, pattern) for known in (name, name.removeprefix("model."))):
                return _CHOICES[value].enter(layer, x, out, directions)
        units = out.numel() / layer.rows / 2
        weights = layer.weight_shape.numel()
        chosen: Perturbation = PerExample() if weights < units else Activity()
        return chosen.enter(layer, x, out, directions)
