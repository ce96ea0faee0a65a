"""`ModelWatch` sees every torch call of a model. Where a call is a layer with trained weights, it adds the perturbation there.

It goes by the calls that are made, not by the modules that are declared. So it finds a weight wherever a function is given it: in any
module, tied or shared. A parameter that is given to a function without a rule moves as a whole, so nothing that is trained is left out.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from forwardgrad.calls import paths
from forwardgrad.calls.ahead import Ahead
from forwardgrad.calls.loss_seen import LossSeen
from forwardgrad.calls.retakes import BARE, BELOW, OtherPath, Strayed, Transformed, UsedAgain, WrittenTo
from forwardgrad.directions import Directions
from forwardgrad.forward_mode import DROPS, READS, Evaluation, Explicit, Live, Marks, Unfollowed, levels, regions
from forwardgrad.forward_mode.rules import composed, losses
from forwardgrad.perturbations import INTO_FIRST, LAYERS, WHOLE, ActivityUse, DenseUse, Entered, Layer, Norm, Perturbation, Reading, Sown

Mark = Callable[[int, Entered, Tensor], Tensor]  # changes what stands at a place, whose number it gets, to see what follows: see `survey`


class ModelWatch(TorchFunctionMode):
    """The watch over one evaluation with one perturbation; it satisfies `derivative.Watch`.

    `reading`: what was learned of this path of calls; another path ends in `OtherPath`, unless it is WHOLE.
    `exact_output`: leave a last layer unmoved where the error at its output is known.
    `at_once`: numbers of the layers whose place cannot be put off, see `UsedAgain`. BELOW among them: unseen calls may use any output.
    `whole`: names of parameters that move as a whole from the start, see `Transformed`.
    `ends`: whether a block of the model ends at a place. What follows sees the values of the block and not its tangent, so that each
    block's moves are seen by its own loss alone; `blocks` then tells the block of everything that moved, `ending` the places.
    `still_ends`: leave the places where blocks end unmoved.
    `apart`: give what follows a copy of a block's values, see `WrittenTo`.
    `ahead`, `at_end`: what is known of the loss, and what to call with each block as soon as it ended; nothing of it is held after that.
    `mark`: what to do at every place instead of moving it.
    """

    def __init__(
        self,
        perturbation: Perturbation,
        directions: Directions,
        *,
        reading: Reading = WHOLE,
        exact_output: bool = False,
        at_once: frozenset[int] = frozenset(),
        whole: frozenset[str] = frozenset(),
        ends: Callable[[ActivityUse], bool] = lambda _: False,
        still_ends: bool = False,
        apart: bool = False,
        ahead: Ahead | None = None,
        at_end: Callable[[int, ActivityUse, Tensor], None] | None = None,
        mark: Mark | None = None,
    ) -> None:
        super().__init__()
        self.prefixes, self.read_bare = list[int](), set[str]()  # parameters whose values were read, without being a layer's
        self.perturbation, self.directions, self.reading = perturbation, directions, reading
        self.exact_output, self.at_once, self.ends, self.still_ends = exact_output, at_once, ends, still_ends
        self._below, self.views = bool(len(directions)) and BELOW in at_once, exact_output  # places are put off behind views of values
        self.mark, self.apart, self.whole, self.ahead, self.at_end = mark, apart, whole, ahead, at_end
        self.blocks, self.ending, self._made_ones = list[int](), list[ActivityUse](), list[Hashable]()
        self.unmoved, self.entered = dict[str, Tensor](), list[Entered]()
        self.loss = LossSeen(reading)

    def open(self, evaluation: Evaluation, parameters: Mapping[str, Tensor]) -> AbstractContextManager[Any]:
        self._evaluation = evaluation
        self._names = {id(p): name for name, p in parameters.items()}
        self._mine, self._stands = object(), Marks("_forwardgrad_stand_in")
        self._moving = dict[int, Tensor]()  # what stands in for parameters from now on; see `_stand_in`
        self._waiting: dict[int, tuple[Tensor, ActivityUse]] = {}  # outputs whose place is not fixed yet
        self._passed: dict[int, tuple[weakref.ref[Tensor], ActivityUse]] = {}  # and those that a ReLU, pooling or loss has had
        self._ended, self._passed_on = dict[str, Tensor](), list[tuple[Tensor, int]]()  # values of blocks, and the versions of those
        self._calls = paths.Calls(self._names)
        self.last_layer, self._fed = 0, dict[ActivityUse, Tensor]()  # its call; what layers at rest were given
        self.loss = LossSeen(self.reading)
        self._level, self._parameters, self._live = levels.level(), parameters, Live(parameters)
        self._parted: list[Sown] | None = None  # inside a call that is made in parts: the use of its layer, once it was entered
        self._missed = set[str]()  # names of parameters that should have moved from the start
        self._put_off: list[tuple[weakref.ref[Tensor], int]] = []  # what a layer passed on unmoved, and the number of its place
        if self.whole and isinstance(evaluation, Explicit) and len(self.directions):
            raise Unfollowed("parameters go through a transform of torch.func")
        self.instead = {name: self._dense(p) for name, p in parameters.items() if name in self.whole}
        self._names = {key: name for key, name in self._names.items() if name not in self.whole}
        self._calls.name(self.instead)
        return self

    @property
    def path(self) -> Hashable:
        """The calls of the evaluation, what is trained of them, and which dimensions have size 1."""
        return self._calls.seen(), tuple(self._made_ones)

    @property
    def silent(self) -> bool:
        return bool(self.prefixes) or any(isinstance(entered, ActivityUse) and entered.exact for entered in self.entered)

    def close(self, loss: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        if self._missed:
            raise Transformed(frozenset(self._missed), bool(self.prefixes))
        for tensor, point in list(self._waiting.values()):  # never used: the loss does not depend on it, or unseen
            if self._below and (index := self.entered.index(point)) not in self.at_once:
                raise UsedAgain(self.entered, index)
            point.place_at(self._evaluation.primal(tensor))
            point.draw(self._evaluation.primal(tensor))
        self.path_taken = self.path
        if self.ahead is not None and tuple(self.prefixes) != self.ahead.prefixes:
            raise Strayed
        if not self.apart and any(tensor._version != version for tensor, version in self._passed_on):
            raise WrittenTo
        if self.reading.path is not None and self.path_taken != self.reading.path:
            raise OtherPath(self.path_taken)
        read = self.loss.read(loss, self._evaluation.primal)
        if self.reading.path is not None and not self.reading.fits(
            [tensor.shape for tensor in read] or [loss.shape], [entered.shape for entered in self.entered]
        ):  # rows of a place that cannot be those of the examples, as where a mask leaves another number of them
            raise OtherPath(self.path)
        for index, entered in enumerate(self.entered):
            if isinstance(entered, ActivityUse) and entered.exact:
                entered.read_at = next((place for place, tensor in enumerate(read) if self._had(tensor) is entered), None)
                if entered.read_at is None:
                    raise UsedAgain(self.entered, index)
        kept = {f"{index}/{key}": t for index, entered in enumerate(self.entered) for key, t in entered.kept.items()}
        kept.update({f"constant/{call}/{place}": t for (call, place), t in self.loss.constants.items()})
        moved = {name: h for name, h in self._ended.items() if self._evaluation.carries(h)}
        kept.update({name: h for name, h in self._ended.items() if name not in moved})  # else zeros would be made for their derivatives
        moved.update(("hidden", given) for point, given in self._fed.items() if point.exact and self._evaluation.carries(given))
        return {**moved, **{f"output {index}": self._now(tensor) for index, tensor in enumerate(read)}}, kept

    def _now(self, tensor: Tensor) -> Tensor:
        return tensor if (found := self._stand_in(tensor)) is None else found

    def _stand_in(self, tensor: Tensor) -> Tensor | None:
        """What stands in for a tensor, if anything does. A layer's output knows that itself: held here, none would go before the end."""
        mine, other = self._stands.of(tensor) or (None, None)
        return self._moving.get(id(tensor)) if mine is not self._mine else tensor if other is None else other

    def unmark(self) -> None:
        """Let go of what was known of single tensors, which the model may keep."""
        self._calls.close()
        self._stands.clear()

    def keep(self, tensors: dict[str, Tensor]) -> None:
        self._moving, self._waiting, self._passed, self._passed_on, self._fed = {}, {}, {}, [], {}
        self.loss.forget()
        self.unmark()
        self.unmoved = {name: tensor for name, tensor in tensors.items() if name in self._ended}
        for key, tensor in tensors.items():
            kind, *rest = key.split("/")
            if kind == "constant":
                self.loss.constants[int(rest[0]), int(rest[1])] = tensor
            elif key not in self.unmoved:
                self.entered[int(kind)].kept[rest[0]] = tensor

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if func in READS:
            return func(*args, **kwargs)
        follow = self.perturbation.apart
        if follow:
            self._calls.begin(func, args, kwargs)
        if levels.level() != self._level:
            return self._inside(func, args, kwargs)
        if regions.still():  # values alone: nothing moves, and calls that are made again take them for constants
            result = self._live.write(func, args, kwargs)
            result = self._call(func, *args, **kwargs) if result is NotImplemented else result
            if follow:
                self._calls.end(func, args, kwargs, result)
            return result
        if func is F.linear_cross_entropy and (result := self._in_parts(args, kwargs)) is not NotImplemented:
            return result
        if self.loss.called(self._calls.count, inside=False):
            for _, point in self._waiting.values():
                point.views = False  # calls from here on are made again
        known = self.loss.sums.before(args) if self.loss.sums else []  # before the call, which may write to its arguments
        result = self._made(func, args, kwargs)
        if follow:
            self._calls.end(func, args, kwargs, result)
        self.loss.made(func, args, kwargs, result, known)
        return result

    def _in_parts(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A read-out and its loss as the calls that they are made of. All parts of the batch see the weight move along one direction."""
        if self._parted is not None or not self.perturbation.parted:
            return NotImplemented
        self._parted = []
        with self:
            result = composed.linear_cross_entropy(*args, **kwargs)
        self._parted = None
        return result

    def _made(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if (result := self._live.write(func, args, kwargs)) is not NotImplemented:
            if self.loss.recording is not None:
                self.loss.recording.flaw = "one of them writes to a parameter"
            return result
        # The order counts. A ReLU behind a layer is asked first whether the place moves behind it: in front half of its units cannot count.
        # A loss comes before the layers, since its input may stay unmoved. What is left has no rule: all that it is given moves from here.
        if args and (point := self._waits(args[0])) is not None and point.lets_pass(func, args, kwargs):
            return self._pass(point, func, args, kwargs)
        other = self._waits(args[1]) if len(args) == 2 and func not in INTO_FIRST else None
        if other is not None and other.lets_pass(func, args[::-1], kwargs):  # a sum, either way round
            return self._pass(other, func, args[::-1], kwargs)
        if self._parted is None and (found := losses.bind(func, args, kwargs)) is not None:  # which would keep the scores of every part
            return self._loss(found, func, args, kwargs)
        if (kind := LAYERS.get(func)) is not None and (layer := kind.bind(func, args, kwargs, self._names)) is not None:
            self.last_layer = self._calls.count
            return self._layer(layer)
        if func in DROPS and args and id(args[0]) in self._names and id(args[0]) not in self._moving:
            self.read_bare.add(self._names[id(args[0])])
            return self._call(func, *args, **kwargs)  # values alone: a direction would be noise
        return self._call(func, *(self._standing(a) for a in args), **{key: self._standing(a) for key, a in kwargs.items()})

    def _inside(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A call inside a transform of torch.func, where what goes in must be moving already: such a call is no layer."""
        self.loss.called(self._calls.count, inside=True)
        # The transform wrapped its inputs before any call, so they are other objects than those known here: memory is what tells them.
        reached = levels.storages((args, kwargs))
        for passed, index in self._put_off:
            if (tensor := passed()) is not None and levels.storage(tensor) in reached:
                raise UsedAgain(self.entered, index)
        if len(self.directions) and reached:
            self._missed |= {name for name, p in self._parameters.items() if levels.storage(p) in reached} - self.whole
        return self._call(func, *args, **kwargs)

    def _call(self, func: Any, *args: Any, **kwargs: Any) -> Any:
        return self._evaluation.call(func, args, kwargs)

    def _standing(self, value: Any) -> Any:
        """What a function gets in place of an argument: parameters, and outputs that wait, begin to move."""
        if isinstance(value, Tensor):
            if (instead := self._stand_in(value)) is not None:
                return instead
            if (key := id(value)) in self._names:
                return self._dense(value)
            if key in self._waiting:  # its error will be found where calls are recorded
                settles = self.loss.recording is not None and self.exact_output
                return (self._settle if settles else self._move)(*self._waiting[key])
            # What moves was put behind the layer's ReLU, and somebody reads what stands in front of it (a residual connection), which
            # should have moved, too. It is too late for that: the evaluation is made again, with this place not put off.
            if (passed := self._had(value)) is not None and not (passed.exact and self.loss.recording is not None):
                raise UsedAgain(self.entered, self.entered.index(passed))
            return value
        if isinstance(value, (tuple, list)) and any(isinstance(item, (Tensor, tuple, list)) for item in value):
            items = [self._standing(item) for item in value]
            return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
        return value

    def _had(self, tensor: Tensor) -> ActivityUse | None:
        return found[1] if (found := self._passed.get(id(tensor))) and found[0]() is tensor else None  # ids are given again

    def _waits(self, value: Any) -> ActivityUse | None:
        return self._waiting[id(value)][1] if id(value) in self._waiting else None

    def _dense(self, parameter: Tensor) -> Tensor:
        name = self._names[id(parameter)]

        def made(directions: Directions) -> DenseUse:
            number = directions.next_place
            return DenseUse(name, directions.draw(tuple(parameter.shape), parameter), directions, number)

        use = self.perturbation.whole(name, self.directions, made)
        return self._moving.setdefault(id(parameter), self._sow(use, parameter))

    def _enter(self, entered: Entered, out: Tensor) -> None:
        entered.place, entered.shape = self.reading.place(len(self.entered)), out.shape
        self.entered.append(entered)
        self._made_ones.append((tuple(entered.names), paths.ones(out.shape)))
        self.blocks.append(len(self._ended))

    def _sow(self, entered: Sown, out: Tensor) -> Tensor:
        self._enter(entered, out)
        return self._moved(entered, out)

    def _moved(self, entered: Sown, out: Tensor) -> Tensor:
        if self.mark is not None:
            return self.mark(len(self.entered) - 1, entered, out)
        return self._evaluation.inject(out, entered) if len(self.directions) and entered.moves else out

    def _layer(self, layer: Layer) -> Tensor:
        layer.call = {key: value if key in layer.names else self._standing(value) for key, value in layer.call.items()}
        given = layer.call.pop("input")
        if (rows := self.reading.place(len(self.entered)).rows) is not None:
            layer.along = rows.dim
        if not self.perturbation.rules(layer):
            return self._whole(layer, given, layer.ahead(given, self._call))
        out, x = layer.run(given, self._call)
        if self._parted:
            return self._moved(self._parted[0].once_more(layer, self._evaluation.primal(x), self._evaluation.primal(out)), out)
        entered = self.perturbation.enter(layer, self._evaluation.primal(x), self._evaluation.primal(out), self.directions)
        if entered is None:
            return self._whole(layer, given, x)
        if isinstance(entered, Sown):
            if self._parted is not None:
                self._parted.append(entered)
            return self._sow(entered, out)
        assert isinstance(entered, ActivityUse)
        self._enter(entered, out)
        self._fed[entered], since, number = given, self.reading.since, len(self.entered) - 1
        ahead = since is None or self._calls.count < since  # calls behind are made again
        entered.views = ahead and (self.views or entered.through) and BARE - number not in self.at_once
        may_wait = (self.exact_output or (entered.masked and not self._below)) and number not in self.at_once
        return self._wait(out, entered) if may_wait else self._move(out, entered)

    def _wait(self, out: Tensor, point: ActivityUse) -> Tensor:
        self._waiting[id(out)] = (out, point)
        self._put_off.append((weakref.ref(out), self.entered.index(point)))
        return out

    def _whole(self, layer: Layer, given: Tensor, x: Tensor) -> Tensor:
        """The layer with its trained parameters moving as a whole."""
        call = {key: self._standing(value) if key in layer.names else value for key, value in layer.call.items()}
        if isinstance(layer, Norm):  # not normalised again: that would count the batch twice in running statistics
            return layer.scaled(x, call.get("weight"), call.get("bias"), self._call)
        return layer.made({**call, "input": given}, self._call)

    def _pass(self, point: ActivityUse, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        before = args[0]
        del self._waiting[id(before)]
        rest = tuple([self._standing(value) for value in args[1:]]) if point.through else args[1:]
        out = point.advance(function, (before, *rest), kwargs, self._call, self._evaluation.primal, self._names)
        if out is not before:
            self._passed[id(before)] = (weakref.ref(before), point)
        return self._wait(out, point)

    def _move(self, tensor: Tensor, point: ActivityUse) -> Tensor:
        self._fed.pop(point, None)
        self._waiting.pop(id(tensor), None)
        moved, ends = tensor, self.ends(point)
        learns = ends and self.ahead is not None and self.at_end is not None
        point.place_at(self._evaluation.primal(tensor), at_once=learns)
        if self.mark is not None:
            moved = self.mark(self.entered.index(point), point, tensor)
        elif len(self.directions) and not (ends and self.still_ends):
            point.draw(self._evaluation.primal(tensor))
            moved = self._evaluation.inject(tensor, point)
        if ends:
            self.prefixes.append(self._calls.seen())
            if learns:
                return self._learn(tensor, point)
            self.ending.append(point)
            self.blocks[self.entered.index(point)] = len(self._ended)  # another block may have ended since the layer was called
            self._ended[f"block {len(self._ended)}"] = moved
            moved = self._evaluation.primal(moved).clone() if self.apart else self._evaluation.primal(moved)
            self._passed_on.append((moved, moved._version))
        self._stands.put(tensor, (self._mine, None if moved is tensor else moved))
        return moved

    def _learn(self, tensor: Tensor, point: ActivityUse) -> Tensor:
        """Let a block learn at once. All that holds its values from here on is the model itself."""
        assert self.ahead is not None
        assert self.at_end is not None
        index = len(self.prefixes) - 1
        if self.prefixes != list(self.ahead.prefixes[: index + 1]):
            raise Strayed
        self.at_end(index, point, self._evaluation.primal(tensor))
        point.kept.clear()
        return tensor

    def _settle(self, tensor: Tensor, point: ActivityUse) -> Tensor:
        """Leave the place behind a last layer unmoved: the gradient there is exact."""
        del self._waiting[id(tensor)]
        point.place_at(self._evaluation.primal(tensor))
        point.exact = True
        self._passed[id(tensor)] = (weakref.ref(tensor), point)
        return tensor

    def _loss(self, output: losses.Output, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        given = output.call["input"]
        point = self._waits(given)
        if point is not None and self.exact_output:
            self._settle(given, point)
        elif not ((had := self._had(given)) is not None and had.exact):
            self._standing(given)
        index = self.loss.function(output)
        rest = {key: value for key, value in output.call.items() if key != "input"}
        result = self._call(function, self._now(given), **{key: self._standing(value) for key, value in rest.items()})
        self.loss.sums.begin(result, output, index)
        return result
