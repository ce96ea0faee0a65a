"""How a pass becomes a gradient: each place that moved gives a part for its parameters, and the parts of a parameter are added up.

In: a `Pass`, and what each direction of each example is multiplied by, which is the estimator's business. Out: sums by parameter.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from torch import Tensor

from forwardgrad.calls import Pass
from forwardgrad.factored import Gradient, dense


def parts_of(found: Pass, weights: Sequence[Tensor]) -> Iterator[tuple[str, Gradient]]:
    """Σ weights · directions of every place that moved, by parameter; `weights` has one tensor [k, n] a place."""
    exact = found.exact
    for entered, weight in zip(found.entered, weights, strict=True):
        if entered not in exact:
            yield from entered.gradient(weight).items()


def exact_parts_of(found: Pass) -> Iterator[tuple[str, Gradient]]:
    """The exact gradient of the layers whose output is the model's own, by parameter."""
    for point in found.exact:
        yield from point.from_error(found.error_of(point)).items()


def add_parts(gradients: dict[str, Tensor | None], found: Pass, weights: Sequence[Tensor]) -> None:
    """Add `parts_of` a pass to the gradients."""
    for name, part in parts_of(found, weights):
        _add_one(gradients, name, part)


def add_exact(gradients: dict[str, Tensor | None], found: Pass) -> None:
    """Add `exact_parts_of` a pass to the gradients."""
    for name, part in exact_parts_of(found):
        _add_one(gradients, name, part)


def add(gradients: dict[str, Tensor | None], parts: Mapping[str, Gradient]) -> None:
    """Add parts to the gradients, in place where a parameter has one already."""
    for name, part in parts.items():
        _add_one(gradients, name, part)


def _add_one(gradients: dict[str, Tensor | None], name: str, part: Gradient) -> None:
    so_far = gradients.get(name)
    gradients[name] = dense(part) if so_far is None else so_far.add_(dense(part))
