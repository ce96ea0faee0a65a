"""`perturbed_pass` evaluates a loss once under a perturbation. Its `Pass` holds what moved, and the derivative example by example."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from forwardgrad.calls.ahead import Ahead, AtEnd
from forwardgrad.calls.kept import check_uses
from forwardgrad.calls.replay import Slot, errors
from forwardgrad.calls.retakes import BELOW, OtherPath, Strayed, Transformed, UsedAgain, WrittenTo
from forwardgrad.calls.sums import Scaled
from forwardgrad.calls.surveyed import ATTEMPTS, Surveyed, unsteady
from forwardgrad.calls.watch import ModelWatch
from forwardgrad.directions import Directions, Law
from forwardgrad.forward_mode import RandomState, derivatives_under, notes
from forwardgrad.objective import Objective
from forwardgrad.perturbations import WHOLE, ActivityUse, Entered, Perturbation, Reading, Rows


@dataclass(frozen=True)
class Pass:
    """What one evaluation with k tangents found out, as plain tensors.

    loss: one number.
    derivatives: of the loss, along each tangent.
    entered: every use of a layer or parameter that moved.
    reading: how the loss is told apart by example.
    terms: where the loss function returned n losses, the derivative of each.
    read, moved: the tensors that the loss is read at, and their tangents [k, *shape].
    parts: the loss functions that the loss is a sum of, where that is known.
    replay: the loss as a function of `read`, where the calls behind the last layer are made again.
    blocks, ended: for local losses, the block of each use; and the places where blocks end, with values and tangents (None: unmoved).
    told: the part of each example in the derivatives, where whoever made the evaluations knows it.
    learned: how many blocks, from the first one, were handed to `at_end` on the way.
    classified: how many losses of class indices were called, whether or not they are among the parts.
    hidden: the tangents of what the last layer was given, where its gradient is exact; None where that did not move.
    """

    loss: Float[Tensor, ""]
    derivatives: Float[Tensor, " k"]
    entered: list[Entered]
    reading: Reading = WHOLE
    terms: Float[Tensor, "k n"] | None = None
    read: tuple[Tensor, ...] = ()
    moved: tuple[Tensor, ...] = ()
    parts: tuple[Scaled, ...] = ()
    replay: tuple[Callable[..., Tensor], Mapping[Slot, Tensor]] | None = None
    blocks: tuple[int, ...] = ()
    ended: tuple[tuple[ActivityUse, Tensor, Tensor | None], ...] = ()
    told: Float[Tensor, "k count"] | None = None
    learned: int = 0
    hidden: Tensor | None = None
    classified: int = 0

    @cached_property
    def errors(self) -> list[Tensor]:
        """The derivative of the loss with respect to each tensor that it is read at."""
        if self.replay is not None:
            return errors(self.replay[0], self.read, self.replay[1])
        found: list[Tensor | None] = [None] * len(self.read)
        for part in self.parts:
            error, before = part.error(self.read[part.index]), found[part.index]
            found[part.index] = error if before is None else before + error
        return [error for error in found if error is not None]

    @cached_property
    def count(self) -> int:
        """The number of examples."""
        read = [self.terms.shape[1:]] if self.terms is not None and self.reading.way == "examples" else [t.shape for t in self.read]
        return self.reading.examples(read, [entered.shape for entered in self.entered])

    @cached_property
    def rows(self) -> Float[Tensor, "k count"] | None:
        """The part of each example in the derivatives of the loss, None where they cannot be told apart."""
        if self.told is not None:
            return self.told
        if self.reading.way == "examples" and self.terms is not None:
            return self.reading.read[0].gather(self.terms, self.count, lead=1).sum(2)
        if not self.read or not self.moved:
            return None
        parts = [
            rows.gather(error * moved, self.count, lead=1).sum(2)
            for rows, error, moved in zip(self.reading.read, self.errors, self.moved, strict=True)
        ]
        total = torch.stack(parts).sum(0) if len(parts) > 1 else parts[0]
        return total + self.beyond(total).unsqueeze(1) if self.reading.rest else total  # it may belong to any example

    def scored(self, entered: Entered) -> notes.Scored:
        """Which part of the loss scores a place, in words."""
        place, layer = entered.place, ", ".join(name.removeprefix("model.") for name in entered.names)
        if isinstance(entered, ActivityUse) and entered.exact:
            return notes.Scored(layer, "nothing", "exactly", "the error at the output is known")
        if place.apart and self.count > 1 and place.rows is not None:
            return notes.Scored(
                layer, entered.kind, "by example", f"examples lie along dimension {place.rows.dim} of {tuple(entered.shape)}"
            )
        if place.why or (entered.rows > 1 and self.reading.why):
            return notes.Scored(layer, entered.kind, "by the whole loss", place.why or self.reading.why)
        return notes.Scored(layer, entered.kind, "by the loss", "all examples share what moves")

    def beyond(self, rows: Float[Tensor, "k count"]) -> Float[Tensor, " k"]:
        """The derivatives of the loss less the parts of all examples: those of a penalty on weights, for one."""
        return self.derivatives.to(rows.dtype) - rows.sum(1)

    def of(self, entered: Entered) -> Float[Tensor, "k n"]:
        """The derivatives that belong to each example at one perturbed place, or one for all that moved there."""
        if not entered.place.apart or self.rows is None:
            return self.derivatives.unsqueeze(1)
        return self.rows

    def share(self, rows: Float[Tensor, "k count"], entered: Entered, beyond: Float[Tensor, " k"] | None = None) -> Float[Tensor, "k n"]:
        """What of one number an example belongs to each example at one perturbed place: all of it to each where they meet.

        `beyond` is the derivative of what is none of the examples' parts of the loss.
        """
        shared = rows if entered.place.apart else rows.sum(1, keepdim=True)
        counts = beyond is not None and (self.reading.rest or not entered.place.apart)
        return shared + beyond.unsqueeze(1) if counts and beyond is not None else shared

    def shared_out(self, entered: Entered, parts: Float[Tensor, "k rows"], count: int) -> Float[Tensor, "k count"]:
        """What is predicted of the rows of one place, as what is predicted of each example: of one that is not apart, an equal share."""
        if count > 1 and entered.place.apart and entered.place.rows is not None:
            along = Rows(0, entered.place.rows.turns)
            return along.gather(parts, count, lead=1).sum(2)
        return parts.sum(1, keepdim=True).expand(-1, count) / count

    def entered_in(self, block: int) -> list[Entered]:
        """What moved in one block, without the layer whose gradient is exact."""
        exact = self.exact
        return [entered for entered, number in zip(self.entered, self.blocks, strict=True) if number == block and entered not in exact]

    @property
    def exact(self) -> list[ActivityUse]:
        return [entered for entered in self.entered if isinstance(entered, ActivityUse) and entered.exact]

    def error_of(self, point: ActivityUse) -> Tensor:
        """The error at a place whose gradient is exact."""
        assert point.read_at is not None
        return self.errors[point.read_at]


def perturbed_pass(
    objective: Objective,
    perturbation: Perturbation,
    law: Law,
    seeds: Sequence[int],
    device: torch.device,
    *,
    who: str = "",
    exact_output: bool = False,
    commit: bool = True,
    ends: Callable[[ActivityUse], bool] = lambda _: False,
    still_ends: bool = False,
    at_end: AtEnd | None = None,
    kept: Sequence[int] | None = None,
    first: int = 0,
    total: int | None = None,
    below: bool = True,
) -> Pass:
    """Evaluate the loss once with one tangent for every seed, sharing the primal pass; with no seed, an ordinary pass that only watches.

    Where each example moves on its own, a survey finds out which dimension the examples are, when the model takes a path of calls for the
    first time. Where a layer's output turns out to be used by something besides the ReLU behind it, the pass is made again, with that
    output moving at once. Both are remembered for the model under this loss, so they happen in the first step alone. Warnings about what
    it costs where examples influence one another name `who`; there are none if it is left out. `kept` are the seeds of the factors that
    the directions keep for some steps.

    `at_end` is called with every block as soon as it ended, where all of the loss but its values is known from an earlier pass, and what
    it does may change the parameters of that block: nothing uses them any more. No value of a block is then held after it.

    `first`, `total`: the tangents are those from number `first` on, of so many in all.

    `below`: whether a parameter that is used below torch's functions, where it gets no gradient, is refused.
    """
    perturbation.check(law)
    check_uses(objective, below=below)
    perturbation = perturbation.among(objective.parameters, first, len(seeds) if total is None else total)
    surveyed = Surveyed.of(objective, perturbation, exact_output=exact_output, who=who)
    random, early = RandomState(objective), _Early(objective, at_end)
    ahead = None if at_end is None else surveyed.ahead(ends)
    for _ in range(ATTEMPTS):
        try:
            reading = surveyed.reading()

            def watch(reading: Reading = reading, ahead: Ahead | None = ahead) -> ModelWatch:
                return ModelWatch(
                    perturbation,
                    Directions(law, seeds if ahead is None else [], device, kept),
                    reading=reading,
                    exact_output=exact_output,
                    at_once=surveyed.memory.at_once,
                    whole=surveyed.memory.whole,
                    ends=ends,
                    still_ends=still_ends,
                    apart=surveyed.memory.apart,
                    ahead=ahead,
                    at_end=early,
                )

            count = len(seeds) if ahead is None else 0
            early.ahead = ahead
            stands, derived = derivatives_under(objective, watch, count, (surveyed.key, reading.way), commit=commit)
        except UsedAgain as found:
            surveyed.used_again(found.index)
        except OtherPath as found:
            surveyed.went(found.path)
        except Strayed:
            pass
        except WrittenTo:
            surveyed.memory.apart = True
        except Transformed as found:
            if found.blocks:
                raise
            surveyed.went_through(found.names)
        else:
            exact = any(isinstance(entered, ActivityUse) and entered.exact for entered in stands.entered)
            if stands.prefixes and exact_output and not exact and BELOW in surveyed.memory.at_once:
                raise unsteady(objective)  # the last layer is not known as such, and would learn like any block
            one = gathered(derived.values, derived.derivatives, stands)
            one = replace(one, learned=early.learned)
            surveyed.took(stands.path_taken)
            if at_end is not None:
                surveyed.came(stands, one.parts, one.count, ends, ahead, one.reading.told)
            if (asked := notes.asked.get()) is not None:
                asked.layers[:] = [one.scored(entered) for entered in one.entered]
            return one
        if early.learned:
            surveyed.strayed()
        random.restore()
        ahead = None  # what was learned stays learned, and the rest follows when the loss is there
    raise unsteady(objective)


class _Early:
    """Hands each block on once, in however many attempts."""

    def __init__(self, objective: Objective, at_end: AtEnd | None) -> None:
        self._given, self._at_end = objective.given, at_end
        self.ahead: Ahead | None = None
        self.learned = 0

    def __call__(self, index: int, point: ActivityUse, values: Tensor) -> None:
        if self._at_end is not None and self.ahead is not None:
            self._at_end(index, point, values, self.ahead.part(self._given))
            self.learned = index + 1


def gathered(values: dict[str, Tensor], derivatives: dict[str, Tensor], watch: ModelWatch) -> Pass:
    """What a watch saw and what was derived, together."""
    loss, terms = values["loss"], None
    total = derivatives.get("loss", loss.new_empty(0))
    if total.dim() > 1:
        terms = total / total.shape[1]
        total = total.mean(1)
    loss = loss.mean() if loss.dim() else loss
    read = numbered(values, "output")
    moved = numbered(derivatives, "output")
    names = [f"block {index}" for index in range(len(watch.ending))]
    ended = tuple(
        (point, {**values, **watch.unmoved}[name], derivatives.get(name)) for name, point in zip(names, watch.ending, strict=True)
    )
    replay = None if watch.loss.loss_of is None else (watch.loss.loss_of, watch.loss.constants)
    hidden = derivatives.get("hidden")
    found = Pass(loss, total, watch.entered, watch.reading, terms, read, moved, watch.loss.parts, replay, tuple(watch.blocks), ended)
    return replace(found, hidden=hidden, classified=watch.loss.classified)


def numbered(found: Mapping[str, Tensor], what: str) -> tuple[Tensor, ...]:
    """Those of some tensors by name that are called `what` and a number, in order."""
    names: Sequence[str] = [f"{what} {index}" for index in range(sum(name.startswith(f"{what} ") for name in found))]
    return tuple(found[name] for name in names)
