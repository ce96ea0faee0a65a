"""Values of a loss at points beside the parameters, and what follows from them: derivatives without forward mode.

The watch is that of forward mode (`ModelWatch`). What it would let move along a direction is here displaced by a step along it, so a layer
with a rule needs no moved copy of its weights: its output is what it is at θ, and the step times the rule's move.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.func import vmap

from forwardgrad.calls.folding import Folding, attention_in_one, attention_together, beside, linear_in_one, side_by_side
from forwardgrad.calls.kept import check_uses
from forwardgrad.calls.passes import Pass, numbered
from forwardgrad.calls.retakes import OtherPath, Transformed, UsedAgain
from forwardgrad.calls.surveyed import ATTEMPTS, Surveyed, unsteady
from forwardgrad.calls.watch import ModelWatch
from forwardgrad.directions import Directions, HeldDirections, Law, PartOfSeeds, Still, unplanned
from forwardgrad.forward_mode import EMBEDDINGS, Alike, Unwritten, levels, one_by_one, renormed
from forwardgrad.forward_mode.rules import dropout
from forwardgrad.objective import Objective, loss_by_example
from forwardgrad.perturbations import WHOLE, Entered, Layer, Norm, Perturbation, Pick, Reading, Sown, Step, WholeUse

_HELD = 2**24
"""Bytes of the widest of what a batch makes. Larger blocks are new memory at every call, which a system has to clear first."""


@dataclass(frozen=True)
class Stencil:
    """Points at ±ε on both sides of θ, or at ε on one side, which are compared with one value at θ."""

    epsilon: float
    two_sided: bool

    @property
    def steps(self) -> tuple[float, ...]:
        return (self.epsilon, -self.epsilon) if self.two_sided else (self.epsilon,)

    def slopes(self, values: Float[Tensor, "s k ..."], base: Tensor | None) -> Float[Tensor, "k ..."]:
        """Rates of change along k lines, from what was found at the steps and, on one side, at θ."""
        return (values[0] - values[1]) / (2 * self.epsilon) if base is None else (values[0] - base) / self.epsilon

    def middle(self, values: Float[Tensor, "s k ..."], base: Tensor | None) -> Float[Tensor, "k ..."]:
        """What is taken for the value at θ, for each of the lines."""
        return values[0] / 2 + values[1] / 2 if base is None else base.expand_as(values[0])


class Unmoved(NamedTuple):
    """Parameters whose move leaves this share of the numbers at a place where they are."""

    names: tuple[str, ...]
    dtype: torch.dtype
    share: float


class Displacing:
    """An evaluation of values alone, at `step` along the direction that `pick` takes from a stack; see `ModelWatch`.

    `unmoved`, where it is given, takes the share of the numbers at each place that rounding put back where they were.
    """

    def __init__(self, step: Step, pick: Pick, unmoved: list[Unmoved] | None = None) -> None:
        self.step, self.pick, self._unmoved = step, pick, unmoved

    def inject(self, tensor: Tensor, source: Entered) -> Tensor:
        if self._unmoved is None or tensor.itemsize >= 4:
            return source.displaced(tensor, self.step, self.pick)
        before = tensor.clone()
        moved = source.displaced(tensor, self.step, self.pick)
        self._unmoved.append(Unmoved(tuple(source.names), tensor.dtype, float((moved == before).float().mean())))
        return moved

    def carries(self, tensor: Tensor) -> bool:
        return False

    def primal(self, tensor: Tensor) -> Tensor:
        return tensor

    def call(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        in_one = func is F.scaled_dot_product_attention and isinstance(self.step, Tensor)
        return (attention_in_one if in_one else func)(*args, **kwargs)


class SideBySide(Displacing):
    """An evaluation of the members of a batch under `vmap`, which go through the directions once for each of the sizes of `steps` [n].

    It is made inside of vmap. `step` is that of one member, or any number that hangs on the member.
    """

    def __init__(self, steps: Tensor, step: Tensor) -> None:
        super().__init__(step, self._picked)
        self.steps, self._level = steps, levels.level()

    def _picked(self, stack: Tensor) -> Tensor:
        times = len(self.steps) // len(stack)
        return levels.member(stack if times == 1 else stack.repeat(times, *[1] * (stack.dim() - 1)))

    def inject(self, tensor: Tensor, source: Entered) -> Tensor:
        found = source.displaced_together(tensor, self.steps)
        return super().inject(tensor, source) if found is None else found

    def call(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if levels.level() == self._level and (in_one := _TOGETHER.get(func)) is not None:
            return in_one(*args, **kwargs)
        return super().call(func, args, kwargs)


_TOGETHER: dict[Callable[..., Any], Callable[..., Any]] = {F.linear: linear_in_one, F.scaled_dot_product_attention: attention_together}
"""What stands in for calls of all members: as one call it takes less time than as vmap makes it."""


class DisplacedWatch(ModelWatch):
    """The watch over values: a parameter that moves as a whole is displaced anew wherever it is used, and no copy of it is kept."""

    def open(self, evaluation: Any, parameters: Mapping[str, Tensor]) -> AbstractContextManager[Any]:
        self._uses: dict[str, WholeUse] = {}
        self._latest: tuple[Tensor, Tensor] | None = None
        self._unwritten = Unwritten(parameters)
        return super().open(evaluation, parameters)

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        if func is F.multi_head_attention_forward and not self.perturbation.apart:  # its matrices are layers inside it
            with self:
                return dropout.opened(func)(*args, **(kwargs or {}))
        return super().__torch_function__(func, types, args, kwargs)

    def _made(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if func in EMBEDDINGS and kwargs.get("max_norm") is not None and id(args[1]) in self._names:
            kwargs = renormed(func, args, kwargs, args[1])
        self._unwritten.check(func, args, kwargs)
        return super()._made(func, args, kwargs)

    def _dense(self, parameter: Tensor) -> Tensor:
        name = self._names[id(parameter)]
        if (use := self._uses.get(name)) is None:
            use = self._uses[name] = WholeUse(name, parameter, self.directions)
            self._enter(use, parameter)
        moved = self._evaluation.inject(parameter, use) if len(self.directions) else parameter
        self._latest = moved, parameter
        if moved is not parameter:
            self._unwritten.add(name, moved)
        return moved

    def _whole(self, layer: Layer, given: Tensor, x: Tensor) -> Tensor:
        if not isinstance(layer, Norm) or not isinstance(self._evaluation, SideBySide):
            return super()._whole(layer, given, x)
        return layer.scaled_together(x, self._standing(layer.call.get("weight")), self._standing(layer.call.get("bias")))

    def _moved(self, entered: Sown, out: Tensor) -> Tensor:
        moved = super()._moved(entered, out)
        for held in ("x", "out") if not len(self.directions) else ():  # nobody will ask how it moves
            entered.__dict__.pop(held, None)
        return moved

    def _call(self, func: Any, *args: Any, **kwargs: Any) -> Any:
        """With the padding row of an embedding where it was, as in backpropagation, which gives it no gradient here."""
        row, latest, self._latest = kwargs.get("padding_idx"), self._latest, None
        if func in (F.embedding, F.embedding_bag) and row is not None and latest is not None and latest[0] is not latest[1]:
            latest[0][row] = latest[1][row]
        return super()._call(func, *args, **kwargs)


class _Found(NamedTuple):
    """What one evaluation gave, or several side by side: values by name, what the watch keeps, and the buffers."""

    values: dict[str, Tensor]
    kept: dict[str, Tensor]
    buffers: dict[str, Tensor]


class _Seen(NamedTuple):
    """Evaluations of k directions at s steps: values by name and what watches keep [s, k, *shape], the watch over the first, how what it
    saw is told apart by example, and the buffers of the last direction at each step."""

    values: dict[str, Tensor]
    kept: dict[str, Tensor]
    watch: ModelWatch
    reading: Reading
    buffers: list[dict[str, Tensor]]


@dataclass(frozen=True)
class Differences:
    """What a step found out: the loss at θ as the stencil tells it, a pass for every group of directions that were evaluated together,
    and the buffers that evaluations left: those at θ, or those of the last pair."""

    loss: Tensor
    passes: list[Pass]
    buffers: list[dict[str, Tensor]]


class Lines:
    """Lines through θ, one for every seed, and a loss on them.

    `begun` is the context of one evaluation, in which random numbers begin where they began in the first. `kept` are the seeds of the
    factors that the directions keep.
    """

    def __init__(
        self,
        objective: Objective,
        perturbation: Perturbation,
        law: Law,
        seeds: Sequence[int],
        device: torch.device,
        begun: Callable[[], AbstractContextManager[None]],
        kept: Sequence[int] | None = None,
    ) -> None:
        perturbation.check(law)
        check_uses(objective)
        self._objective, self._perturbation, self._law, self._device = objective, perturbation, law, device
        self._seeds, self._kept, self._begun = seeds, kept, begun
        self._surveyed = Surveyed.of(objective, perturbation, exact_output=False, who=f"perturb={perturbation!r}")
        self._primals = {name: p.detach() for name, p in objective.parameters.items()}

    def differences(self, stencil: Stencil, size: int | None, mine: range | None = None) -> Differences:
        """Evaluate the loss at the steps of a stencil along all lines, or those that are mine, at most `size` lines side by side.

        None: all of them, or as many as are fast where that is known.
        """
        mine = range(len(self._seeds)) if mine is None else mine
        passes, losses, buffers = list[Pass](), list[Tensor](), list[dict[str, Tensor]]()
        with torch.no_grad():
            base = None if stencil.two_sided else self._at_theta()
            for seen in self._groups(stencil.steps, size or self._abreast(len(mine), base), mine):
                found, loss = _pass(seen, stencil, base)
                passes.append(found)
                losses.append(loss)
                buffers = seen.buffers
        if not any(found.entered for found in passes):
            raise RuntimeError("the loss does not depend on any trainable parameter: there is nothing to estimate")
        return Differences(torch.cat(losses).mean() if base is None else losses[0][0], passes, buffers if base is None else base.buffers)

    def unmoved(self, step: float) -> list[Unmoved]:
        """The places in half precision, and what share of their numbers one step along the first line leaves where they are."""
        found: list[Unmoved] = []
        with torch.no_grad(), unplanned():
            self._settled(partial(self._evaluated, self._directions(range(1)).again, Displacing(step, _first, found), Tensor.clone))
        return found

    def everywhere(self, one: Pass, derivatives: Tensor, size: int) -> list[Pass]:
        """Passes along all lines, groups of `size`, as this pass was, with these derivatives."""
        groups = [range(start, min(start + size, len(derivatives))) for start in range(0, len(derivatives), size)]
        return [
            replace(one, derivatives=derivatives[part.start : part.stop], entered=self._along(one.entered, part), told=None)
            for part in groups
        ]

    def _along(self, entered: Sequence[Entered], part: range) -> list[Entered]:
        directions = self._directions(part)
        return [use.along(directions) for use in entered]

    def _groups(self, steps: tuple[float, ...], size: int, mine: range) -> Iterator[_Seen]:
        folding = Folding(self._objective, ("lines", repr(self._perturbation)))
        for start in range(mine.start, mine.stop, size):
            part = range(start, min(start + size, mine.stop))
            together = folding.tried(partial(self._together, part, steps)) if len(part) > 1 else None
            if together is not None:
                yield together
            else:
                yield from (self._alone(index, steps) for index in part)
        folding.finish()

    def _abreast(self, count: int, base: _Seen | None) -> int:
        """How many of so many lines are one batch, by what places hold at θ: a processor's caches hold no more of what they make."""
        first = next(iter(self._primals.values()))
        if base is None or first.device.type != "cpu" or torch.compiler.is_compiling():
            return count
        widest = max((entered.shape.numel() for entered in base.watch.entered), default=0) * first.itemsize
        batches = -(-count * widest // _HELD)
        return -(-count // max(1, batches))

    def _directions(self, part: range) -> HeldDirections:
        kept = None if self._kept is None else PartOfSeeds(self._kept, part)
        return HeldDirections(self._law, PartOfSeeds(self._seeds, part), self._device, kept)

    def _at_theta(self) -> _Seen:
        found, watch = self._settled(partial(self._evaluated, Still, Displacing(0.0, _first), Tensor.clone))
        watch.keep(found.kept)
        return _Seen(found.values, found.kept, watch, watch.reading, [found.buffers])

    def _alone(self, index: int, steps: tuple[float, ...]) -> _Seen:
        """One line, its points one after the other: no more is held than by an ordinary pass."""
        directions = self._directions(range(index, index + 1))
        each = [self._settled(partial(self._evaluated, directions.again, Displacing(step, _first), Tensor.clone)) for step in steps]
        readings, watch = [watch.reading for _, watch in each], each[0][1]
        same = all(reading == readings[0] for reading in readings)
        names = each[0][0].values if same else ["loss"]  # where a pair took two paths nothing but their losses can be compared
        values = {name: torch.stack([found.values[name] for found, _ in each]).unsqueeze(1) for name in names}
        kept = {name: torch.stack([found.kept[name] for found, _ in each]).unsqueeze(1) for name in each[0][0].kept} if same else {}
        watch.keep(each[0][0].kept)
        return _Seen(values, kept, watch, readings[0] if same else WHOLE, [found.buffers for found, _ in each])

    def _together(self, part: range, steps: tuple[float, ...]) -> _Seen:
        """Some lines, all of their points as one batch: what is the same for all is computed once, as long as it is the same."""
        directions, count, first = self._directions(part), len(part), next(iter(self._primals.values()))
        index = torch.arange(count, device=first.device).repeat(len(steps))
        sizes = side_by_side(steps, count, first)

        def evaluate(reading: Reading) -> tuple[_Found, DisplacedWatch]:
            watches: list[DisplacedWatch] = []

            def one(index: Tensor, step: Tensor) -> _Found:
                def pick(stack: Tensor) -> Tensor:
                    return stack.index_select(0, index.reshape(1)).squeeze(0)

                with Alike():
                    evaluation = Displacing(step, pick) if torch.compiler.is_compiling() else SideBySide(sizes, step)
                    found, watch = self._evaluated(directions.again, evaluation, partial(beside, member=step), reading)
                if any(isinstance(p.factor, Tensor) and levels.unwrapped(p.factor) is not p.factor for p in watch.loss.parts):
                    raise RuntimeError("a factor of the loss depends on what moves")
                watches.append(watch)
                return found

            return vmap(one, randomness="same")(index, sizes), watches[0]

        found, watch = self._settled(evaluate)
        watch.keep({name: t[0] for name, t in found.kept.items()})
        values, kept = ({name: t.unflatten(0, (len(steps), count)) for name, t in some.items()} for some in (found.values, found.kept))
        last = [{name: t[count * (s + 1) - 1] for name, t in found.buffers.items()} for s in range(len(steps))]
        return _Seen(values, kept, watch, watch.reading, last)

    def _evaluated(
        self, directions: Callable[[], Directions], evaluation: Displacing, cloned: Callable[[Tensor], Tensor], reading: Reading
    ) -> tuple[_Found, DisplacedWatch]:
        watch = DisplacedWatch(self._perturbation, directions(), reading=reading, whole=self._surveyed.memory.whole)
        with watch.open(evaluation, self._primals):
            loss, buffers = self._objective.raw({**self._primals, **watch.instead}, cloned)
        outputs, kept = watch.close(loss)
        watch.unmark()
        return _Found({"loss": loss_by_example(self._objective.precise(loss)), **outputs}, kept, buffers), watch

    def _settled(self, evaluate: Callable[[Reading], tuple[_Found, DisplacedWatch]]) -> tuple[_Found, DisplacedWatch]:
        """An evaluation, made again until what is known of the model holds in it."""
        for _ in range(ATTEMPTS):
            reading = self._surveyed.reading()
            try:
                with self._begun(), one_by_one():
                    found, watch = evaluate(reading)
            except UsedAgain as again:
                self._surveyed.used_again(again.index)
            except OtherPath as other:
                self._surveyed.went(other.path)
            except Transformed as inside:
                self._surveyed.went_through(inside.names)
            else:
                self._surveyed.took(watch.path_taken)
                return found, watch
        raise unsteady(self._objective)


def _pass(seen: _Seen, stencil: Stencil, base: _Seen | None) -> tuple[Pass, Tensor]:
    """What forward mode would have found along these lines, by differences; and the loss [k] of each."""
    at_theta = {} if base is None else base.values
    slopes = {name: stencil.slopes(t, at_theta.get(name)) for name, t in seen.values.items() if base is None or name in at_theta}
    total, terms = slopes["loss"], None
    loss = stencil.middle(seen.values["loss"], at_theta.get("loss"))
    if total.dim() > 1:
        terms, total, loss = total / total.shape[1], total.mean(1), loss.mean(1)
    reading, watch = seen.reading, seen.watch if base is None else base.watch
    if base is not None and base.reading != reading:
        reading = WHOLE
    if reading.way not in ("outputs", "replay"):
        return Pass(loss.mean(), total, seen.watch.entered, reading, terms), loss
    replay, lines = None, list[Pass]()
    for k in range(len(total)):  # what is at θ is told by each line's own pair on two sides, so that no line depends on another
        at, kept = (at_theta, base.kept) if base is not None else (_middles(seen.values, k), _middles(seen.kept, k))
        if watch.loss.loss_of is not None:
            replay = watch.loss.loss_of, {slot: kept[f"constant/{slot[0]}/{slot[1]}"] for slot in watch.loss.constants}
        moved = tuple(t[k : k + 1] for t in numbered(slopes, "output"))
        entered = seen.watch.entered  # whose shapes may be what tells how many examples there are
        lines.append(Pass(loss[k], total[k : k + 1], entered, reading, None, numbered(at, "output"), moved, watch.loss.parts, replay))
    told = [line.rows for line in lines if line.rows is not None]
    whole = Pass(loss.mean(), total, seen.watch.entered, reading, terms, lines[0].read, (), watch.loss.parts, replay)
    return replace(whole, told=torch.cat(told) if told else None), loss


def _middles(stacks: Mapping[str, Tensor], k: int) -> dict[str, Tensor]:
    """Of stacks [s, k, *shape] what is in the middle of line k: it is that at θ up to O(ε²)."""
    return {name: t[:, k].mean(0) if t.is_floating_point() else t[0, k] for name, t in stacks.items()}


def _first(stack: Tensor) -> Tensor:
    return stack[0]
