"""A survey finds out by trying which dimension of every tensor holds the examples of a batch, and whether examples influence one another.

Why: an estimate may score what moved for an example by that example's part of the loss alone. It is unbiased only where no other part of
the loss depends on what moved. Whether one does (attention over the batch, batch norm, a contrastive loss) cannot be read off a module. So
it is observed, in ordinary forward passes, before the first step on each path of calls:

- Numbers of half of the examples are replaced by NaN at every place that may move. NaN passes through every sum, product and maximum, also
  where a weight is zero today. The loss is read where each example has a part of its own. No part of the other half may be NaN.
- To try every ordered pair of G examples, 2 log₂ G passes are enough: the halves are chosen by the binary digits of the examples' numbers.
- A comparison can hide NaN (`torch.where(x > 0, ...)`). So some passes replace the numbers by other finite ones, and some move them in
  forward mode: no part of the other half may change, and none may move.
- Numbers that are picked by data (`h[edges]`) may be others in the next batch. So NaN is spread over all that might have been picked.

Where that fails, bisection finds the places behind which examples influence one another. What moved there is scored by the whole loss,
as is what cannot be tried: the estimate is then noisier, and still unbiased.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from forwardgrad.calls import spread
from forwardgrad.calls.replay import MOST_NUMBERS, Slot, errors
from forwardgrad.calls.retakes import BARE
from forwardgrad.calls.trials import LabelTrials, Option, Trials, rows_in
from forwardgrad.calls.watch import Mark, ModelWatch
from forwardgrad.directions import Still
from forwardgrad.forward_mode import Evaluation, Redo, derivatives_under, levels
from forwardgrad.objective import Objective
from forwardgrad.perturbations import (
    WHOLE,
    ActivityUse,
    Block,
    DenseUse,
    Entered,
    ExamplesPlace,
    Memory,
    Perturbation,
    Pick,
    Reading,
    Rows,
    Told,
)


@dataclass(frozen=True)
class _Seen:
    """What one pass gave: the tensors that the loss is read at, the loss, and the watch over the pass."""

    watch: _SurveyWatch
    read: list[Tensor]
    loss: Tensor

    @property
    def at_scores(self) -> bool:
        """Whether the loss is read at what its loss functions were given, and at nothing else."""
        return [_memory(t) for t in self.read] == [_memory(t) for t in self.watch.scores]


def _memory(tensor: Tensor) -> Hashable:
    return levels.storage(tensor) or id(tensor), tensor.storage_offset(), tensor.shape, tensor.stride()


class _SurveyWatch(ModelWatch):
    """A watch that tells what it saw of the loss."""

    def open(self, evaluation: Evaluation, parameters: Mapping[str, Tensor]) -> AbstractContextManager[Any]:
        self.evaluation, self._counts = evaluation, dict[int, Tensor]()
        return super().open(evaluation, parameters)

    def _call(self, func: Any, *args: Any, **kwargs: Any) -> Any:
        if func is F.binary_cross_entropy:  # which refuses NaN; the same of logits has the same form and arguments
            func = F.binary_cross_entropy_with_logits
        result = spread.call(super()._call, func, args, kwargs, self._counts)
        if func is torch.arange:
            self._counts[id(result)] = result
        return result

    def close(self, loss: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        values, kept = super().close(loss)
        self.seen_path, self.found = self.path, self.loss.sums.of(loss)
        parts, rest = (self.found.parts, self.found.rest) if self.found is not None else ((), ())
        factors = [part.factor for part in parts if isinstance(part.factor, Tensor)]
        self.beside_follows = any(self._follows(tensor) for tensor in (*self.loss.beside, *factors))
        self.rest_follows = any(self._follows(tensor) for tensor in rest)
        used = self.found.only()[1] if self.found is not None else []
        self.scores = [self.evaluation.primal(self._now(self.loss.outputs[index])) for index in used]
        self.following: dict[Slot, int] = {}  # what follows among the inputs of recorded calls, and how many numbers it has
        named = set[int]()
        for slot, tensor in () if self.loss.recording is None else self.loss.recording.given.items():
            if id(tensor) not in named and self._follows(tensor):
                named.add(id(tensor))
                self.following[slot] = tensor.numel()
        return values, kept

    def _follows(self, tensor: Tensor) -> bool:
        """Whether a tensor follows from what moves: it does so itself, or is not a number where that is none."""
        now = self._now(tensor)
        return now.is_floating_point() and (self.evaluation.carries(now) or bool(self.evaluation.primal(now).isnan().any()))


class _Half(NamedTuple):
    """What moves a place in a trial: a source for an evaluation in forward mode."""

    numbers: Tensor

    def tangent(self, pick: Pick) -> Tensor:
        return pick(self.numbers.unsqueeze(0))


class Survey:
    """One survey: the passes that it makes, and what follows from them."""

    def __init__(self, objective: Objective, perturbation: Perturbation, memory: Memory, exact: bool) -> None:
        self._objective, self._perturbation, self._memory, self._exact = objective, perturbation, memory, exact
        self.runs = 0
        self.count = 1
        self.entered: list[Entered] = []
        self.names: list[str] = []
        self._path: Hashable = None
        self._scores_tried = False  # whether examples were looked for in what loss functions were given

    def read(self, way: Reading, mark: Mark) -> list[Tensor]:
        """What the loss is read at, in a pass with something changed; RuntimeError where the model takes other calls then."""
        seen = self._pass(way, mark, exact=self._exact)
        if seen.watch.seen_path != self._path:
            raise RuntimeError(_BRANCHES)
        return seen.read

    def scores(self, way: Reading, mark: Mark, bare: frozenset[int]) -> list[Tensor]:
        """What loss functions were given, in a pass with something changed; RuntimeError where the model takes other calls then.

        Places of the numbers in `bare` do not lie behind views.
        """
        at_once = frozenset(BARE - index for index in bare)
        seen = self._evaluated(way, lambda: self._watch(way, mark, False, at_once), 0)[0]
        if seen.watch.seen_path != self._path:
            raise RuntimeError(_BRANCHES)
        return seen.watch.scores

    def _pass(self, reading: Reading, mark: Mark | None = None, *, exact: bool = False) -> _Seen:
        def watch() -> _SurveyWatch:
            return self._watch(reading, mark or _leave, exact)

        return self._evaluated(reading, watch, 0)[0]

    def _watch(self, reading: Reading, mark: Mark, exact: bool, at_once: frozenset[int] = frozenset()) -> _SurveyWatch:
        options: dict[str, Any] = {"at_once": self._memory.at_once | at_once, "whole": self._memory.whole, "mark": mark}
        watch = _SurveyWatch(self._perturbation, Still(), reading=reading, exact_output=exact, **options)
        watch.views = self._exact  # so that places lie alike in all passes
        return watch

    def _evaluated(self, reading: Reading, watch: Callable[[], _SurveyWatch], count: int) -> tuple[_Seen, dict[str, Tensor]]:
        """One pass that leaves nothing behind, with `count` tangents: what was seen, and derivatives by name."""
        self.runs += 1
        # Without a key what moves is followed by torch's own forward mode: the explicit way is trusted for paths that it was compared on.
        # Without a commit buffers, such as running statistics, never see the NaN.
        stands, (values, derivatives) = derivatives_under(self._objective, watch, count, None, commit=False)
        read = [values[f"output {index}"] for index in range(sum(name.startswith("output ") for name in values))]
        return _Seen(stands, read if reading.way != "examples" else [values["loss"]], values["loss"]), derivatives

    def derivatives(self, way: Reading, chosen: Callable[[int, Tensor], Tensor | None]) -> list[Tensor]:
        """How what the loss is read at follows where the numbers that are chosen at each place move."""
        seen, derived = self._moving(way, chosen, exact=self._exact)
        if seen.watch.seen_path != self._path:
            raise RuntimeError(_BRANCHES)
        names = ["loss"] if way.way == "examples" else [f"output {index}" for index in range(len(seen.read))]
        return [derived[name][0] for name in names]

    def _moving(
        self, way: Reading, chosen: Callable[[int, Tensor], Tensor | None], *, exact: bool = False
    ) -> tuple[_Seen, dict[str, Tensor]]:
        """A pass in torch's own forward mode: what it knows to move does, whatever the numbers are."""
        generator = torch.Generator().manual_seed(0)

        def watch() -> _SurveyWatch:
            def mark(index: int, entered: Entered, tensor: Tensor) -> Tensor:
                if not entered.dims or (inside := chosen(index, tensor)) is None:
                    return tensor
                numbers = torch.randn(tensor.shape, generator=generator).to(tensor.device, tensor.dtype)
                return stands.evaluation.inject(tensor, _Half(numbers * inside))

            stands = self._watch(way, mark, exact)
            return stands

        return self._evaluated(way, watch, 1)

    def reading(self) -> Reading:
        """What is found out of the path of calls that the model takes now."""
        plain = self._pass(WHOLE)
        self.entered, path = plain.watch.entered, plain.watch.seen_path
        self._path = path
        self.names = [", ".join(name.removeprefix("model.") for name in entered.names) for entered in self.entered]
        if not any(entered.dims for entered in self.entered):  # one example, or nothing that moves for each
            return self._single(path, plain)
        best: Reading | None = None
        why = ""
        for way in self._ways(plain):
            if isinstance(way, str):
                why = why or way
                continue
            found = self._laid_out(replace(way, path=path))
            if found is None:
                continue
            if best is None or _apart(found) > _apart(best):
                best = found
            if not self._unsettled(found.places):  # every place is told apart: no other way of reading can do better
                break
        if best is not None:
            return best
        whole = [ExamplesPlace(name) for name in self.names]
        return Reading(path, "whole", tuple(whole), why=why or "examples could not be told apart in it")

    def _single(self, path: Hashable, plain: _Seen) -> Reading:
        places = tuple(ExamplesPlace(name) for name in self.names)
        for way in self._ways(plain):
            if not isinstance(way, str):
                found = plain.watch.found
                told = tuple(Told(Rows(0)) for _ in found.only()[1]) if found is not None else ()
                read = tuple(Rows(0) for _ in self._pass(way, exact=self._exact).read)
                return replace(way, path=path, places=places, read=read, told=told)
        return Reading(path, "whole", places, why="it is one number")

    def _ways(self, plain: _Seen) -> Iterator[Reading | str]:
        """The ways in which the loss can be read, the best first; a sentence for each that cannot be."""
        watch = plain.watch
        try:
            everything = self._pass(replace(WHOLE, since=watch.last_layer), _everywhere).watch
        except Redo:
            raise
        except Exception as error:
            yield f"the model does not run with numbers that are not finite ({type(error).__name__}: {_first_line(error)})"
            return
        if everything.seen_path != self._path:  # it looks at its numbers: with NaN it is another model
            yield _BRANCHES
            return
        self._add_what_moves(everything, watch.last_layer)
        closed = self._closed(everything)
        vector = plain.loss.dim() == 1
        direct = closed is not None and not closed.rest and (not self._exact or self._ends_in_layers(closed))
        if direct and closed is not None:
            yield closed
        if vector and not self._exact:
            yield Reading(None, "examples")
        yield self._replayed(everything, watch.last_layer)
        if closed is not None and not direct:
            yield closed
        if vector and self._exact:
            yield Reading(None, "examples")

    def _add_what_moves(self, everything: _SurveyWatch, since: int) -> None:
        """Add what follows from activities by torch's own forward mode, from which no comparison can hide it."""
        try:
            moving = self._moving(replace(WHOLE, since=since), lambda index, tensor: torch.ones_like(tensor))[0].watch
        except Redo:
            raise
        except Exception:  # an operator without a rule: the estimate itself will say so
            return
        if moving.seen_path == self._path:
            everything.beside_follows |= moving.beside_follows
            everything.rest_follows |= moving.rest_follows
            everything.following = {**moving.following, **everything.following}

    def _ends_in_layers(self, way: Reading) -> bool:
        """Whether all that loss functions were given is what layers returned, whose gradient is then exact."""
        seen = self._pass(way, exact=True)
        return len(seen.read) == sum(isinstance(entered, ActivityUse) and entered.exact for entered in seen.watch.entered)

    def _closed(self, marked: _SurveyWatch) -> Reading | None:
        """The loss as a sum of losses with a closed-form error, if nothing but the outputs in it follows from what moves."""
        if marked.found is None or not marked.found.parts or marked.beside_follows:
            return None
        penalty, scaled = bool(marked.found.rest), any(isinstance(part.factor, Tensor) for part in marked.found.parts)
        whole = any(isinstance(entered, DenseUse) for entered in marked.entered)  # it may be part of a target
        return Reading(None, "outputs", beyond=penalty or scaled or whole, penalty=penalty, rest=marked.rest_follows)

    def _replayed(self, marked: _SurveyWatch, since: int) -> Reading | str:
        """The loss as the calls after the last layer, if they can be made again and have few numbers to go by."""
        cut, numbers = tuple(sorted(marked.following)), sum(marked.following.values())
        if not cut:
            return "it does not follow from any layer where examples move"
        if numbers > MOST_NUMBERS:
            return f"it is one number of {numbers:,} outputs, whose derivative takes as many forward derivatives (at most {MOST_NUMBERS:,})"
        reading = Reading(None, "replay", beyond=True, since=since, cut=cut)
        try:
            seen = self._pass(reading, exact=self._exact)
            if seen.watch.loss.loss_of is None:
                return f"it is one number, and the calls behind the last layer cannot be made again ({seen.watch.loss.flaw})"
            again = seen.watch.loss.loss_of(seen.read, seen.watch.loss.constants)
            if not any(bool(error.any()) for error in errors(seen.watch.loss.loss_of, seen.read, seen.watch.loss.constants)):
                return "it is one number, and its derivative with respect to the outputs is zero"
        except Redo:
            raise
        except Exception as error:
            return f"it is one number, and its derivative with respect to the outputs cannot be found ({_first_line(error)})"
        loss = seen.loss.mean() if seen.loss.dim() else seen.loss
        close = torch.allclose(again.double(), loss.double(), rtol=1e-2 if loss.dtype.itemsize < 4 else 1e-4, equal_nan=True)
        if close:
            return replace(reading, behind=seen.watch.loss.transformed)
        return "it is one number, and the calls behind the last layer give another one when they are made again"

    def _laid_out(self, way: Reading) -> Reading | None:
        """The same way with where examples lie; None where no dimension of what is read can be them, or another way read the same."""
        free = replace(way, path=None)
        plain = self._pass(free, exact=self._exact)
        if plain.at_scores:
            if self._scores_tried:
                return None
            self._scores_tried = True
        self.entered = plain.watch.entered  # as large as they are where the loss is read this way
        best: Reading | None = None
        for option in self._options(plain):
            trials = Trials(self, free, plain.read, option)
            found = trials.search()
            if best is None or sum(place.apart for place in found) > sum(place.apart for place in best.places):
                best = replace(way, places=found, read=option.read, count=option.source)
                shapes = [t.shape for t in plain.read], [entered.shape for entered in self.entered]
                best = replace(best, even=tuple(size == 1 for size in best.sizes(*shapes)))
                self.count = option.count
            if not self._unsettled(found):
                break
        return best if best is None else replace(best, told=self._told(best, plain, self.count))

    def _told(self, way: Reading, plain: _Seen, count: int) -> tuple[Told, ...]:
        """Where examples lie in the scores that loss functions were given, for those who let classifiers learn their targets."""
        parts = plain.watch.found.only()[0] if plain.watch.found is not None else ()
        scored = {part.index for part in parts if part.output.classifies}
        if not scored or not (self._exact or isinstance(self._perturbation, Block)):
            return ()
        before = self._pass(replace(way, path=None)).watch.scores
        return LabelTrials(self, replace(way, path=None), count, before).told([index in scored for index in range(len(before))])

    def _unsettled(self, places: Sequence[ExamplesPlace]) -> bool:
        """Whether another number of examples might tell more of them apart."""
        pairs = zip(places, self.entered, strict=True)
        return any(not place.apart and entered.dims and entered.shape[0] > 1 for place, entered in pairs)

    def _options(self, plain: _Seen) -> Iterator[Option]:
        """How many examples there may be, and where in what is read, the likeliest first."""
        shapes = [t.shape for t in plain.read]
        if not shapes or any(not shape for shape in shapes):
            return
        if shapes[0][0] == 1:
            yield Option(1, tuple(Rows(0) for _ in shapes), None)
            return
        batched = [entered.shape for entered in self.entered if len(entered.dims) > 1]
        if batched and all(shape[0] == 1 for shape in batched):  # one sentence, whose words have losses of their own
            yield Option(1, tuple(Rows(0) for _ in shapes), None)
        tried = set[tuple[int, tuple[Rows | None, ...]]]()
        for dim in range(min(3, len(shapes[0]))):
            count = shapes[0][dim]
            rows = [rows_in(shape, count, dim) for shape in shapes]
            if count > 1 and None not in rows and (count, tuple(rows)) not in tried:
                tried.add((count, tuple(rows)))
                yield Option(count, tuple(r for r in rows if r is not None), ("read", 0, dim))
        for count, source in self._factors(shapes[0][0]):
            for turns in (False, True):
                rows = [Rows(0, turns) if Rows(0, turns).fits(shape, count) else None for shape in shapes]
                if None not in rows and (count, tuple(rows)) not in tried:
                    tried.add((count, tuple(rows)))
                    yield Option(count, tuple(r for r in rows if r is not None), source)

    def _factors(self, rows: int) -> Iterator[tuple[int, Any]]:
        """Numbers of examples that some place says a dimension of so many rows is made of, such as sentences and their words."""
        for index, entered in enumerate(self.entered):
            for dim in list(entered.dims)[:2]:
                size = entered.shape[dim]
                others = [entered.shape[other] for other in entered.dims if other != dim]
                if 1 < size < rows and rows % size == 0 and rows // size in others:
                    yield size, ("place", index, dim)


_BRANCHES = "the model takes other calls where its numbers are not finite"


def _apart(reading: Reading) -> int:
    return sum(place.apart for place in reading.places)


def _leave(index: int, entered: Entered, tensor: Tensor) -> Tensor:
    return tensor


def _everywhere(index: int, entered: Entered, tensor: Tensor) -> Tensor:
    return torch.full_like(tensor, math.nan) if entered.dims else tensor


def _first_line(error: Exception) -> str:
    return [*str(error).strip().splitlines(), "no reason given"][0][:200]
