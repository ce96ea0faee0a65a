"""One evaluation of a loss with a perturbation at work: what moved, by how much the loss followed, example by example."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from functools import cached_property
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float
from torch import Tensor, nn

from forwardgrad.derivative import RandomState, derivatives_under
from forwardgrad.objective import Objective
from forwardgrad.outputs import Output, spread
from forwardgrad.perturbations.activity import Point
from forwardgrad.perturbations.base import Entered, Perturbation
from forwardgrad.perturbations.directions import Directions
from forwardgrad.perturbations.watch import ModelWatch, Transformed, UsedAgain
from forwardgrad.tangents import Law

_Learned = tuple[frozenset[int], frozenset[str]]
_NOTHING: _Learned = (frozenset(), frozenset())
_learned: WeakKeyDictionary[nn.Module, dict[Hashable, _Learned]] = WeakKeyDictionary()  # of a model's structure: see ModelWatch


@dataclass(frozen=True)
class Pass:
    """What one evaluation found out, all of it plain tensors.

    `loss` is one number; `derivatives` [k] those of the loss; `terms` [k, n] the part of each of n losses, where the loss was not one
    number. `output` is what the model gave to a loss with a closed-form error, `moved` [k, *output] how that moved. `ended` are the
    places where blocks end, with their values and moves (None where nothing moved), `blocks` the block of each perturbation.
    """

    loss: Float[Tensor, ""]
    derivatives: Float[Tensor, " k"]
    terms: Float[Tensor, "k n"] | None
    entered: list[Entered]
    coupled: bool
    known: Output | None
    output: Tensor | None
    moved: Tensor | None
    blocks: tuple[int, ...] = ()
    ended: tuple[tuple[Point, Tensor, Tensor | None], ...] = ()

    @cached_property
    def error(self) -> Tensor:
        assert self.known is not None
        assert self.output is not None
        return self.known.error(self.output)

    @cached_property
    def rows(self) -> Float[Tensor, "k n"] | None:
        """The part of each of the n terms of the loss in its derivatives, None where they cannot be told apart."""
        if self.known is None or self.moved is None:
            return self.terms
        parts = self.error * self.moved
        return parts.flatten(min(2, parts.dim() - 1)).sum(2) if parts.dim() > 2 else parts.sum(1, keepdim=True)

    def of(self, entered: Entered) -> Float[Tensor, "k rows"]:
        """The derivatives that belong to each example of one perturbed place."""
        if entered.rows == 1:
            return self.derivatives.unsqueeze(1)
        return self.share(self.derivatives.unsqueeze(1) if self.rows is None else self.rows, entered)

    def share(self, rows: Float[Tensor, "k n"], entered: Entered) -> Float[Tensor, "k rows"]:
        """What of n numbers, one a term of the loss, belongs to each example of one perturbed place."""
        if rows.shape[1] == 1 or self.coupled or not entered.apart:
            return rows.sum(1, keepdim=True).expand(-1, entered.rows)
        return spread(rows, entered.rows)

    def entered_in(self, block: int) -> list[Entered]:
        """What moved in one block, without the layer whose gradient is exact."""
        exact = self.exact
        return [entered for entered, number in zip(self.entered, self.blocks, strict=True) if number == block and entered not in exact]

    @property
    def exact(self) -> list[Point]:
        return [entered for entered in self.entered if isinstance(entered, Point) and entered.exact]


def perturbed_pass(
    objective: Objective,
    perturbation: Perturbation,
    law: Law,
    seeds: list[int],
    device: torch.device,
    *,
    exact_output: bool = False,
    commit: bool = True,
    ends: Callable[[Point], bool] = lambda _: False,
    still_ends: bool = False,
) -> Pass:
    """Evaluate the loss once with one tangent for every seed, sharing the primal pass; with no seed, an ordinary pass that only watches.

    Where a layer's output turns out to be used besides the ReLU behind it, the pass is made again without putting its place off; that is
    remembered for the model under this loss, so it happens in the first step alone.
    """
    perturbation.check(law)
    learned: dict[Hashable, _Learned] = _learned.setdefault(objective.at, {}) if isinstance(objective.at, nn.Module) else {}
    key = getattr(objective.loss, "__code__", type(objective.loss)), repr(perturbation), exact_output  # a lambda is new at every step
    at_once, whole = learned.get(key, _NOTHING)

    def watch() -> ModelWatch:
        directions = Directions(law, seeds, device)
        return ModelWatch(
            perturbation, directions, exact_output=exact_output, at_once=at_once, whole=whole, ends=ends, still_ends=still_ends
        )

    random = RandomState(objective)
    while True:
        try:
            stands, derived = derivatives_under(objective, watch, len(seeds), key, commit=commit)
            break
        except UsedAgain as found:
            at_once |= {found.index}
            random.restore()
        except Transformed as found:
            if found.blocks:
                raise
            whole |= found.names
            random.restore()
    if whole - learned.get(key, _NOTHING)[1]:
        names = ", ".join(sorted(name.removeprefix("model.") for name in whole))
        warnings.warn(
            f"the loss uses {names} inside torch.func.grad, vmap or jvp: they move as whole weights, with the noise of Dense()",
            stacklevel=2,
        )
    if at_once or whole:
        learned[key] = at_once, whole
    return gathered(derived.values, derived.derivatives, stands)


def gathered(values: dict[str, Tensor], derivatives: dict[str, Tensor], watch: ModelWatch) -> Pass:
    """What a watch saw and what was derived, together."""
    loss, terms, moved = values["loss"], None, derivatives.get("output") if watch.output is not None else None
    total = derivatives.get("loss", loss.new_empty(0))
    if total.dim() > 1:
        terms = total / total.shape[1]
        loss, total = loss.mean(), total.mean(1)
    names = [f"block {index}" for index in range(len(watch.ending))]
    ended = tuple(
        (point, {**values, **watch.unmoved}[name], derivatives.get(name)) for name, point in zip(names, watch.ending, strict=True)
    )
    output = values.get("output")
    return Pass(loss, total, terms, watch.entered, watch.coupled, watch.output, output, moved, tuple(watch.blocks), ended)
