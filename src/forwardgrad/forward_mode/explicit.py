"""`Explicit`: forward mode with plain tensors. K tangents travel beside each value, without torch's dual numbers.

An evaluation under `Explicit` sees every torch call of a model. For the calls that networks are made of it has a rule for the derivative
(`rules`). It keeps values and tangents in one tensor where it can (a `stack`), so that one matrix product reads the weight once for all of
them, and the K tangents share one forward pass without `vmap`. Any other call is handed to torch's dual numbers by itself.

It refuses what it cannot follow (`Unfollowed`), such as a write in place to a tensor that has a view. Some operations run below torch's
functions, and it does not see them: those of a scripted module or a custom autograd function. A guarded evaluation finds them (`guard`).
Whenever a model takes a path of calls for the first time, it is guarded, and its result is compared with torch's own (`arbitration`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any
from weakref import ref

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import jvp, vmap
from torch.overrides import TorchFunctionMode

from forwardgrad.forward_mode import regions
from forwardgrad.forward_mode.guard import Guard, Unfollowed, address
from forwardgrad.forward_mode.levels import level, unwrapped
from forwardgrad.forward_mode.notes import Kind, Way, counter, name_of
from forwardgrad.forward_mode.quotients import Call, attempt
from forwardgrad.forward_mode.rules import ALL_RULES, Track, attention, composed, dropout
from forwardgrad.forward_mode.structure import Marks, exchanged, leaves, named, rebuilt
from forwardgrad.forward_mode.writes import Live, writes, written


def _reads(name: str) -> Callable[..., Any]:
    reader: Callable[..., Any] = getattr(Tensor, name).__get__
    return reader


READS: frozenset[Callable[..., Any]] = frozenset(  # what looks at a tensor without using its values
    [_reads(name) for name in ("shape", "dtype", "device", "ndim", "layout", "is_cuda", "requires_grad", "is_leaf", "grad")]
    + [_reads(name) for name in ("is_sparse", "is_nested", "is_quantized", "is_mkldnn", "is_cpu", "is_meta", "itemsize", "nbytes")]
    + [Tensor.size, Tensor.dim, Tensor.numel, Tensor.stride, Tensor.is_contiguous, Tensor.is_floating_point, Tensor.__len__]
    + [Tensor.is_complex, Tensor.nelement, Tensor.ndimension, Tensor.element_size, Tensor.get_device, torch.is_floating_point]
    + [torch.is_complex, torch.numel, Tensor.__repr__]
)
DROPS: frozenset[Any] = frozenset(
    (
        torch.detach,
        Tensor.detach,
        Tensor.item,
        Tensor.tolist,
        Tensor.numpy,
        Tensor.__bool__,
        Tensor.__float__,
        Tensor.__int__,
        _reads("data"),
    )
)
"""What gives values without tangents, in every kind of forward mode."""
_NEW: frozenset[Any] = (
    frozenset(
        getattr(home, name)
        for name in ("gt", "ge", "lt", "le", "eq", "ne", "argmax", "argmin", "isnan", "isinf", "isfinite", "logical_not")
        for home in (torch, Tensor)
    )
    | {getattr(Tensor, f"__{name}__") for name in ("gt", "ge", "lt", "le", "eq", "ne")}
    | {
        *(getattr(torch, f"{name}_like") for name in ("empty", "zeros", "ones", "full", "rand", "randn")),
        *(getattr(Tensor, f"new_{name}") for name in ("empty", "zeros", "ones", "full", "tensor")),
    }
)
"""What gives truths, whole numbers or numbers of its own, in new memory."""


def _is_low(tensor: Tensor) -> bool:
    """Whether a call on a tensor is computed in low precision."""
    return torch.is_autocast_enabled(tensor.device.type) or (tensor.dtype.itemsize < 4 and tensor.dtype.is_floating_point)


class Explicit(TorchFunctionMode):
    """One evaluation with `count` tangents; `moving` gives those of parameters, [K, *shape], by the id of the tensor that stands for it.

    `guarding`: what stands for the parameters, in a guarded evaluation; None in one that is trusted.
    `live`: what is trained; a write to it is one of values.
    """

    def __init__(
        self,
        count: int,
        moving: Mapping[int, Tensor] | None = None,
        *,
        guarding: Iterable[Tensor] | None = None,
        live: Live | None = None,
    ) -> None:
        super().__init__()
        self._live = live
        self._guard = None if guarding is None else Guard(guarding)
        self.count = count
        self.moving = dict(moving or {})
        self._calls: list[Any] = []
        self._tracks = Marks("_forwardgrad_track")
        self.low = False  # whether a call was made in low precision
        self.ways = counter()
        self._level: ExitStack | None = None
        self._outside = level()

    def __enter__(self) -> Explicit:
        super().__enter__()  # type: ignore[no-untyped-call]
        if self._guard is not None:
            self._guard.begin()
        return self

    def __exit__(self, *exception: Any) -> None:
        if self._guard is not None:
            self._guard.end()
        super().__exit__(*exception)  # type: ignore[no-untyped-call]
        self._end()

    @contextmanager
    def guarding(self) -> Iterator[None]:
        """For a watch that stands at every call itself: what is done here, outside of its calls, passes by."""
        if self._guard is None:
            yield
            return
        self._guard.begin()
        try:
            yield
        finally:
            self._guard.end()

    @contextmanager
    def begun(self) -> Iterator[Explicit]:
        """For a watch that stands at every call itself, and passes them on to `call`."""
        try:
            yield self
        finally:
            self._end()

    def _end(self) -> None:
        """Leave torch's forward mode, if a call needed it, and let go of directions: what outlives the evaluation may know it still."""
        self.moving = {}
        self._tracks.clear()
        if self._guard is not None:
            self._guard.stills.clear()
        if self._level is not None:
            self._level.close()
            self._level = None

    @property
    def path(self) -> int:
        """The calls with something that moved, in order, as one number."""
        return hash(tuple(self._calls))

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        if func in READS:
            return func(*args, **(kwargs or {}))
        return self.call(func, args, kwargs or {})

    def track(self, tensor: Tensor) -> Track | None:
        """How a tensor moves in this evaluation, None where it does not."""
        found: Track | None = self._tracks.of(tensor)
        if found is not None and found.owner is self:
            return found
        if self.moving and (tangents := self.moving.get(id(tensor))) is not None:
            return Track(self, tangents)
        return None

    def tangents(self, tensor: Tensor) -> Tensor | None:
        """[K, *shape], or None where the tensor does not move."""
        found = self.track(tensor)
        return None if found is None else found.of(tensor)

    def derivative(self, tensor: Tensor) -> Tensor:
        """[K, *shape], zero where the tensor does not move."""
        found = self.tangents(tensor)
        return tensor.new_zeros((self.count, *tensor.shape)) if found is None else found

    def attach(self, tensor: Tensor, tangents: Tensor, stack: Tensor | None = None, *, fresh: bool = False) -> Tensor:
        """Let a tensor move. `stack` [1 + K, *shape] holds its values and tangents behind them; `fresh`: nothing else sees either."""
        self._tracks.put(tensor, Track(self, tangents, stack, fresh))
        if self._guard is not None:
            self._guard.add(tensor)
        return tensor

    def follow(self, tensor: Tensor, behind: Tensor) -> Tensor:
        """Let a ReLU move as the tensor behind it does, where it is not zero; worked out when it is asked for."""
        source = self.track(behind)
        assert source is not None
        track = Track(self, None, fresh=True)
        track.behind = source, ref(behind)
        source.lent += 1
        self._tracks.put(tensor, track)
        if self._guard is not None:
            self._guard.add(tensor)
        return tensor

    # What stands in for torch's own forward mode: see `dual_numbers.Plain`.

    def carries(self, tensor: Tensor) -> bool:
        return self.track(tensor) is not None

    def primal(self, tensor: Tensor) -> Tensor:
        return tensor if self.track(tensor) is None else self._still(tensor.detach())

    def _still(self, value: Any) -> Any:
        """The same; what does not move in it is known to share memory with something that does."""
        if self._guard is not None:
            self._guard.leave_still([tensor for tensor in leaves(value) if self.track(tensor) is None])
        return value

    def inject(self, tensor: Tensor, source: Any) -> Tensor:
        """The tensor with what `source` moves it by added to how it moves already."""
        track = self.track(tensor)
        if track is None:
            return self.attach(tensor.detach(), source.tangents(self.count).to(tensor.dtype), fresh=True)
        if track.fresh and not track.lent:  # else somebody's tangents would change who only shares the memory
            source.add_to_(track.of(tensor))
            return tensor
        return self.attach(tensor.detach(), track.of(tensor) + source.tangents(self.count).to(tensor.dtype), fresh=True)

    def call(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The result of a call, moving as its arguments make it."""
        if func is regions.SWITCH:
            return regions.switched(args, kwargs)
        if self._guard is not None:
            self._guard.look(self, (*args, *kwargs.values()))
        if self._live is not None and (result := self._live.write(func, args, kwargs)) is not NotImplemented:
            return result
        # a transform of the loss's own wraps what it is given: a rule would move the wrapper, and the transform not know of it
        if level() != self._outside and any(self.track(unwrapped(leaf)) is not None for leaf in leaves((args, kwargs))):
            raise Unfollowed("a transform of torch.func was handed something that moves")
        if not any(self._moves(value) for value in args) and not (kwargs and any(self._moves(value) for value in kwargs.values())):
            self._note(func, "did not move")
            result = NotImplemented if func is not attention.FUNCTION else attention.values(args, kwargs, derived=False)
            result = func(*args, **kwargs) if result is NotImplemented else result
            if self._guard is not None and any(self._guard.knows_still(tensor) for tensor in leaves((args, kwargs))):
                self._still(result)  # it may be a view of what is known to stand still
            return result
        if regions.still():
            if any(self.track(tensor) is not None for tensor in written(func, args, kwargs)):
                raise Unfollowed(f"{name_of(func)} writes under torch.no_grad() into what moves")
            self._note(func, "did not move", "it is made under torch.no_grad()")
            return self._still(regions.constant(func(*args, **kwargs), (args, kwargs)))
        if not torch._C._is_fwd_grad_enabled():  # inside a custom autograd function, which has a derivative of its own
            raise Unfollowed("an autograd function is being evaluated")
        self._calls.append(getattr(func, "__code__", func))  # a method or a lambda may be a new one at every step
        self.low = self.low or any(isinstance(value, Tensor) and _is_low(value) for value in args[:1])
        try:
            return self._moving(func, args, kwargs)
        except Exception as error:
            if not hasattr(error, "forwardgrad_call"):
                error.forwardgrad_call = name_of(func)  # type: ignore[attr-defined]
            raise

    def _moving(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if func in DROPS:
            self._note(func, "did not move", "it drops tangents, in every kind of forward mode")
            return self._still(func(*args, **kwargs))
        if func is Tensor.requires_grad_:  # for checkpoints, which keep nothing here
            return args[0]
        if func in _NEW and kwargs.get("out") is None:
            self._note(func, "did not move", "what it gives does not depend on how its arguments move")
            return func(*args, **kwargs)
        if func in dropout.OPENED:
            with _Within(self):
                return dropout.opened(func)(*args, **kwargs)
        if (composition := composed.composition_of(func)) is not None:
            with _Within(self):
                result = composition(*args, **kwargs)
            if result is not NotImplemented:
                return result
        if (rule := ALL_RULES.get(func)) is not None:
            result = rule(self, func, args, kwargs)
            if result is not NotImplemented:
                self._note(func, "rule")
                return result
        lacks = "there is no rule for it" if rule is None else "its rule does not hold for these arguments"

        def by_duals() -> Any:
            result = self._by_duals(func, args, kwargs)
            self._note(func, "dual numbers", lacks)
            return result

        return attempt(func, args, kwargs, by_duals, self._by_differences)

    def _by_differences(self, call: Call) -> Any:
        """One call by central differences."""
        call.say()
        self._note(call.function, "differences", "torch has no forward mode for it")
        tracks = [self.track(tensor) for tensor in call.tensors]
        given = [None if track is None else track.of(tensor) for track, tensor in zip(tracks, call.tensors, strict=True)]
        values = [tensor.detach() for tensor in call.tensors]
        found = call.value(values)
        moved = iter(call.moved(values, given))
        outs = [self.attach(leaf, next(moved), fresh=True) if moves else leaf for leaf, moves in zip(found, call.moves, strict=True)]
        return call.rebuilt(outs)

    def _note(self, func: Any, kind: Kind, reason: str = "") -> None:
        if self.ways is not None:
            self.ways[Way(name_of(func), kind, reason)] += 1

    def _moves(self, value: Any) -> bool:
        if isinstance(value, Tensor):
            return self.track(value) is not None
        if isinstance(value, (tuple, list)):
            return any(self._moves(item) for item in value)
        return isinstance(value, dict) and any(self._moves(item) for item in value.values())

    def _by_duals(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """One call by torch's forward mode."""
        name = getattr(func, "__name__", "")
        if name in ("numpy", "tolist"):
            raise Unfollowed(f"{name} hands numbers to other code")
        if writes(func, args, kwargs):
            raise Unfollowed(f"{name} writes in place into a tensor that a view or another name may look at")
        if any(kwargs.get(scale, 1) != 1 for scale in ("alpha", "beta", "value")):  # under a guard torch crashes on it (2.13)
            raise Unfollowed(f"{name} scales its arguments")
        found: dict[int, tuple[Tensor, Tensor]] = {}
        self._gather((args, kwargs), found)
        if self.count == 1:
            if self._level is None:
                self._level = ExitStack()
                self._level.enter_context(forward_ad.dual_level())
            duals = {key: forward_ad.make_dual(value, tangents[0]) for key, (value, tangents) in found.items()}
            return self._taken(func(*exchanged(args, duals), **exchanged(kwargs, duals)), self._seen(found))
        keys = list(found)

        shape: list[Any] = []

        def along(*tangents: Tensor) -> Any:
            def flat(*values: Tensor) -> Any:
                given = dict(zip(keys, values, strict=True))
                result = func(*exchanged(args, given), **exchanged(kwargs, given))
                shape[:] = [result]
                real = [leaf for leaf in leaves(result) if leaf.is_floating_point() or leaf.is_complex()]
                real = real or [values[0].new_zeros(())]  # jvp wants one, and whole numbers alone have none: it is left over
                return tuple(real), [leaf for leaf in leaves(result) if not (leaf.is_floating_point() or leaf.is_complex())]

            return jvp(flat, tuple(value for value, _ in found.values()), tangents, has_aux=True)

        each: Any = vmap(along, out_dims=(None, 0, None), randomness="same")  # type: ignore[arg-type]
        outs, moved, rest = each(*(tangents for _, tangents in found.values()))
        return rebuilt(shape[0], self._attached(outs, moved, found), iter(rest))

    def _attached(self, outs: Any, moved: Any, found: dict[int, tuple[Tensor, Tensor]]) -> Any:
        seen = self._seen(found)
        return iter([self._apart(out, tangents, seen) for out, tangents in zip(outs, moved, strict=True)])

    def _seen(self, found: dict[int, tuple[Tensor, Tensor]]) -> dict[int, Tensor]:
        """The memory of what went into a call, and whose it is."""
        return {address(part): value for value, tangents in found.values() for part in (value, tangents)}

    def _apart(self, out: Tensor, tangents: Tensor, seen: dict[int, Tensor]) -> Tensor:
        """A result, which nothing else sees unless it is a view of what went in."""
        fresh = True
        for place in (address(out), address(tangents)):
            if place in seen:  # from now on an in-place call on either would change the other, so neither may be written to
                fresh = False
                if (track := self.track(seen[place])) is not None:
                    track.fresh = False
        return self.attach(out, tangents, fresh=fresh)

    def _gather(self, value: Any, found: dict[int, tuple[Tensor, Tensor]]) -> None:
        if isinstance(value, Tensor):
            if (track := self.track(value)) is not None:
                found[id(value)] = value, track.of(value)
        elif isinstance(value, (tuple, list)):
            for item in value:
                self._gather(item, found)
        elif isinstance(value, dict):
            for item in value.values():
                self._gather(item, found)

    def _taken(self, value: Any, seen: dict[int, Tensor]) -> Any:
        """Dual numbers as values and tangents apart."""
        if isinstance(value, Tensor):
            primal, tangent = forward_ad.unpack_dual(value)
            return primal if tangent is None else self._apart(primal, _written_out(tangent).unsqueeze(0), seen)
        if isinstance(value, (tuple, list)):
            items = [self._taken(item, seen) for item in value]
            return type(value)(items) if type(value) in (tuple, list) else named(value, items)
        if isinstance(value, dict):
            return {key: self._taken(item, seen) for key, item in value.items()}
        return value


class _Within(TorchFunctionMode):
    """Hands the calls inside a function that was opened to an evaluation."""

    def __init__(self, evaluation: Explicit) -> None:
        super().__init__()
        self._evaluation = evaluation

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        return func(*args, **(kwargs or {})) if func in READS else self._evaluation.call(func, args, kwargs or {})


def _written_out(tangent: Tensor) -> Tensor:
    return tangent if not tangent._is_zerotensor() else torch.zeros_like(tangent)
