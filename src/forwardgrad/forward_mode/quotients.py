"""Central differences of one operator that torch has no forward mode for, where the caller asked for them (`differences`).

With x the operator's arguments and t their tangent, f(x)˙ ≈ (f(x + h t) − f(x − h t)) / 2h: two evaluations a tangent beside the one that
gives the value. Both are made in float64 where the operator takes it. The step h moves the arguments by the cube root of the precision
that the results turn out to have, relative to their root mean square: then the error of the curvature, h², and that of rounding, 1/h,
are about as large.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Generator, Tensor
from torch.autograd import Function
from torch.autograd.function import FunctionCtx
from torch.overrides import TorchFunctionMode

from forwardgrad.forward_mode.levels import level, unwrapped
from forwardgrad.forward_mode.notes import asked as noted
from forwardgrad.forward_mode.notes import name_of, outside
from forwardgrad.forward_mode.refusals import NO_RULE, Said, custom_function_of
from forwardgrad.forward_mode.structure import exchanged, leaves, rebuilt

LEAST_SCALE = 1e-3  # what arguments near zero count as: a smaller step would be lost in the rounding of the result


@dataclass
class _Request:
    """That differences are asked for, and what was found to need them so far."""

    operators: set[Any] = field(default_factory=set)
    functions: set[type[Function]] = field(default_factory=set)  # custom ones in the old style, which torch's forward mode refuses


_request: ContextVar[_Request | None] = ContextVar("differences", default=None)


@contextmanager
def differences() -> Iterator[None]:
    """Inside, an operator that torch has no forward mode for is derived by central differences of this one operator.

    f(x)˙ ≈ (f(x + h t) − f(x − h t)) / 2h, with x the operator's arguments and t their tangent; all other operators keep their exact
    rules. It serves custom `autograd.Function`s without a `jvp`, `ctc_loss`, and whatever else an error says has no rule.

    Error: about 1e-9 relative to the operator's result where it computes in float64, whatever the model's precision; 1e-4 where it
    insists on float32. At a kink that lies within a step of the arguments, the mean of both sides' slopes.
    Cost: 2 evaluations of the operator a tangent, one after the other, beside the one that gives the value, and two copies of its
    arguments. A custom function also takes the whole model to torch's own forward mode, which is slower.
    Random operators draw the same numbers in every evaluation. Arguments of whole numbers stay as they are.
    One warning names each operator.

    Raises NotImplementedError for an operator that writes into its arguments.

    >>> import forwardgrad as fg
    >>> class Cube(torch.autograd.Function):
    ...     @staticmethod
    ...     def forward(ctx, x):
    ...         return x**3
    >>> x = torch.tensor([1.0, 2.0], requires_grad=True)
    >>> with warnings.catch_warnings(action="ignore"), differences():
    ...     record = fg.estimate_grad_(lambda x: Cube.apply(x).sum(), x, fg.ForwardGradient(2, law=fg.Orthogonal()),
    ...                                generator=torch.Generator().manual_seed(0))
    >>> x.grad.round(decimals=3)
    tensor([ 3., 12.])
    """
    token = _request.set(_Request())
    try:
        yield
    finally:
        _request.reset(token)


def are_asked() -> bool:
    """Whether the caller is inside `differences`."""
    return _request.get() is not None


def asked_of(error: Exception) -> bool:
    """Whether an error is about a custom function in the old style for which differences are asked, and were not lent yet."""
    request, function = _request.get(), custom_function_of(error)
    if request is None or function is None or "setup_context" not in str(error) or function in request.functions:
        return False
    if function.__name__ == "CheckpointFunction":  # whose parameters are not among its arguments
        return False
    request.functions.add(function)
    return True


@contextmanager
def lent() -> Iterator[None]:
    """Inside, custom functions in the old style that were found to need differences have the form that torch's forward mode takes."""
    request = _request.get()
    with ExitStack() as stack:
        for function in request.functions if request is not None else ():
            form = _Lent(function.forward)
            for name in ("forward", "setup_context"):
                own = function.__dict__.get(name)
                stack.callback(delattr, function, name) if own is None else stack.callback(setattr, function, name, own)
                setattr(function, name, staticmethod(getattr(form, name)))
        yield


_DROPPING = {torch.scatter_reduce, Tensor.scatter_reduce, Tensor.scatter_reduce_}  # of products: torch's forward mode drops the tangent


class _Context(FunctionCtx):
    """What a custom function writes to beside its result; of it only that is kept what it says does not move."""

    def __init__(self, args: tuple[Any, ...]) -> None:
        self.needs_input_grad = tuple(isinstance(value, Tensor) and value.is_floating_point() for value in args)
        self.non_differentiable: tuple[Tensor, ...] = ()

    def save_for_backward(self, *tensors: Any) -> None:
        pass

    save_for_forward = save_for_backward

    def mark_dirty(self, *tensors: Any) -> None:
        raise Said(*_WRITES)


class _Lent:
    """A forward in the old style, which takes a context, in the two parts of the new style."""

    def __init__(self, forward: Callable[..., Any]) -> None:
        self._forward = forward
        self._context = _Context(())

    def forward(self, *args: Any) -> Any:
        self._context = _Context(args)
        return self._forward(self._context, *args)

    def setup_context(self, ctx: Any, inputs: Any, output: Any) -> None:
        ctx.mark_non_differentiable(*self._context.non_differentiable)


_WRITES = (
    "an operator without a rule for forward mode writes into its arguments, so it has no differences",
    "give it a form that leaves them alone",
)


def attempt(
    function: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    make: Callable[[], Any],
    by_differences: Callable[[Call], Any],
    moves: Callable[[], bool] = lambda: True,
) -> Any:
    """A call as torch's forward mode makes it, or by differences where it has no rule and they are asked for; `moves`: if anything does."""
    request = _request.get()
    drops = function in _DROPPING and any(isinstance(value, str) and value == "prod" for value in (*args, *kwargs.values()))
    if drops and request is None and moves():
        raise NotImplementedError(f"Trying to use forward AD with {name_of(function)} that does not support it")
    if request is None:
        return make()
    if not drops and function not in request.operators and not (_is_custom(function, args) and args[0].jvp is Function.jvp):
        began = _random_state(leaves((args, kwargs)), args, kwargs)
        try:
            return make()
        except NotImplementedError as error:
            if isinstance(error, Said) or not NO_RULE.search(str(error)):
                raise
            name = name_of(function)
            if (name.endswith("_") and not name.endswith("__")) or kwargs.get("out") is not None or kwargs.get("inplace"):
                raise Said(*_WRITES) from error
        _restore(began)
        request.operators.add(function)
    return by_differences(Call(function, args, kwargs))


def _is_custom(function: Any, args: Sequence[Any]) -> bool:
    return getattr(function, "__name__", "") == "custom_function_call" and bool(args) and isinstance(args[0], type)


class Call:
    """A call of an operator as a function of the tensors among its arguments."""

    def __init__(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.name = args[0].__name__ if _is_custom(function, args) else name_of(function)
        self.function, self.args, self.kwargs = function, args, kwargs
        self.tensors = _distinct(leaves((args, kwargs)))
        self.result: Any = None
        self.moves: list[bool] = []  # which tensors of the result
        self._began: list[Any] = []
        self._as_it_is = False  # whether the operator does not take float64

    def say(self) -> None:
        """Warn that differences are taken: once for each place that this is called from, as Python does it."""
        if noted.get() is None:  # whoever asks is told
            warnings.warn(
                f"{self.name} has no rule for forward mode: its derivative is a central difference of this one operator "
                "(forwardgrad.differences: 2 evaluations a tangent, an error of about 1e-9 of its result in float64)",
                stacklevel=outside(),
            )

    def rebuilt(self, tensors: Sequence[Tensor]) -> Any:
        """A result like that of the call, of these tensors."""
        return rebuilt(self.result, (leaf for leaf in tensors if _real(leaf)), (leaf for leaf in tensors if not _real(leaf)))

    def value(self, values: Sequence[Tensor]) -> list[Tensor]:
        """The tensors of the result, as an ordinary call gives them."""
        self._began = _random_state(values, self.args, self.kwargs)
        self.result, still = self._at(values)
        found = leaves(self.result)
        self.moves = [_real(leaf) and not any(leaf is other for other in still) for leaf in found]
        return found

    def moved(self, values: Sequence[Tensor], tangents: Sequence[Tensor | None]) -> list[Tensor]:
        """Tangents [K, ...] of what moves of the result, from those [K, ...] of the arguments; None: one that stands still."""
        ended = _random_state(values, self.args, self.kwargs)
        count = next(len(t) for t in tangents if t is not None)
        each = [self._along(values, [None if t is None else t[k] for t in tangents]) for k in range(count)]
        _restore(ended)
        dtypes = [leaf.dtype for leaf, moves in zip(leaves(self.result), self.moves, strict=True) if moves]
        return [torch.stack([one[place] for one in each]).to(dtype) for place, dtype in enumerate(dtypes)]

    def _along(self, values: Sequence[Tensor], tangent: Sequence[Tensor | None]) -> list[Tensor]:
        doubled = [_double(value) for value in values]
        if not self._as_it_is and any(one is not other for one, other in zip(doubled, values, strict=True)):
            try:
                return self._quotient(doubled, [None if t is None else _double(t) for t in tangent])
            except Said:
                raise
            except (RuntimeError, TypeError, ValueError):  # it does not take float64, or the device has none
                self._as_it_is = True
        return self._quotient(values, tangent)

    def _quotient(self, values: Sequence[Tensor], tangent: Sequence[Tensor | None]) -> list[Tensor]:
        unit = _unit(values, tangent)
        finest = max((torch.finfo(value.dtype).eps for value in values if _real(value)), default=2.0**-52)
        ahead = self._moved_by(values, tangent, unit * finest ** (1 / 3))
        if (eps := max(finest, *(_precision(leaf) for leaf in ahead))) > finest:  # it computes in less than what it was given
            finest = eps
            ahead = self._moved_by(values, tangent, unit * finest ** (1 / 3))
        step = unit * finest ** (1 / 3)
        behind = self._moved_by(values, tangent, -step)
        return [torch.where(one == other, 0, (one - other) / (2 * step)) for one, other in zip(ahead, behind, strict=True)]

    def _moved_by(self, values: Sequence[Tensor], tangent: Sequence[Tensor | None], step: Tensor) -> list[Tensor]:
        _restore(self._began)
        moved = [value if t is None else value + (step * t).to(value.dtype) for value, t in zip(values, tangent, strict=True)]
        return [leaf for leaf, moves in zip(leaves(self._at(moved)[0]), self.moves, strict=True) if moves]

    def _at(self, values: Sequence[Tensor]) -> tuple[Any, Sequence[Tensor]]:
        """The result, and what of it does not move by its own word."""
        instead = {id(tensor): value for tensor, value in zip(self.tensors, values, strict=True)}
        versions = _versions(values)
        args, kwargs = exchanged(self.args, instead), exchanged(self.kwargs, instead)
        still: Sequence[Tensor] = ()
        if _is_custom(self.function, args):
            function, given, context = args[0], args[1:], _Context(args[1:])
            with _Given(self.name):
                result = function.forward(*given)
                function.setup_context(context, given, result)
            still = context.non_differentiable
        else:
            result = self.function(*args, **kwargs)
        if versions != _versions(values):
            raise Said(*_WRITES)
        return result, still


class _Given(TorchFunctionMode):
    """Below all levels of torch.func, where only what moves and was not handed over is still wrapped: it would stand still unnoticed."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self._name = name

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        if level() == 0 and any(unwrapped(leaf) is not leaf for leaf in leaves((args, kwargs or {}))):
            raise Said(f"{self._name} reads something that moves and that it was not given", "hand it over as an argument")
        return func(*args, **(kwargs or {}))


class Differenced(Function):
    """A call under torch's own forward mode, whose tangents are differences."""

    @staticmethod
    def forward(call: Call, *values: Tensor) -> tuple[Tensor, ...]:
        return tuple(call.value(values))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.call = inputs[0]
        ctx.mark_non_differentiable(*(leaf for leaf, moves in zip(output, ctx.call.moves, strict=True) if not moves))
        ctx.save_for_forward(*inputs[1:])

    @staticmethod
    def jvp(ctx: Any, _: None, *tangents: Tensor | None) -> tuple[Tensor | None, ...]:
        moving = tuple(t is not None for t in tangents)
        given = [t for t in tangents if t is not None]
        found = iter(_Quotient.apply(ctx.call, moving, *ctx.saved_tensors, *given))  # type: ignore[no-untyped-call]
        return tuple(next(found) if moves else None for moves in ctx.call.moves)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], call: Call, *values: Tensor) -> Any:
        each = [call.value(one) for one in _apart(info.batch_size, in_dims[1:], values)]
        return tuple(torch.stack(leaf) for leaf in zip(*each, strict=True)), tuple(0 for _ in each[0])


class _Quotient(Function):
    """The tangents of a call's results, from the values and tangents of its arguments; several tangents come as a batch."""

    @staticmethod
    def forward(call: Call, moving: tuple[bool, ...], *both: Tensor) -> tuple[Tensor, ...]:
        return tuple(t[0] for t in _tangents(call, moving, both[: len(moving)], [t.unsqueeze(0) for t in both[len(moving) :]]))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        pass

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], call: Call, moving: tuple[bool, ...], *both: Tensor) -> Any:
        dims, many = in_dims[2:], len(moving)
        if all(dim is None for dim in dims[:many]):
            given = [t.movedim(dim, 0) if dim is not None else t.expand(info.batch_size, *t.shape) for t, dim in _pairs(both, dims, many)]
            found = _tangents(call, moving, both[:many], given)
        else:
            each = [_Quotient.forward(call, moving, *one) for one in _apart(info.batch_size, dims, both)]
            found = [torch.stack(t) for t in zip(*each, strict=True)]
        return tuple(found), tuple(0 for _ in found)


def _pairs(both: Sequence[Tensor], dims: Sequence[Any], many: int) -> Iterator[tuple[Tensor, Any]]:
    return zip(both[many:], dims[many:], strict=True)


def _tangents(call: Call, moving: Sequence[bool], values: Sequence[Tensor], given: Sequence[Tensor]) -> list[Tensor]:
    left = iter(given)
    return call.moved(values, [next(left) if moves else None for moves in moving])


def _apart(size: int, dims: Sequence[Any], values: Sequence[Tensor]) -> list[list[Tensor]]:
    """The members of a batch, each as a call's own arguments."""
    return [[v if dim is None else v.select(dim, index) for v, dim in zip(values, dims, strict=True)] for index in range(size)]


def _versions(tensors: Sequence[Tensor]) -> list[int]:
    return [0 if tensor.is_inference() else tensor._version for tensor in tensors]


def _distinct(tensors: list[Tensor]) -> list[Tensor]:
    return list({id(tensor): tensor for tensor in tensors}.values())


def _real(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


def _double(tensor: Tensor) -> Tensor:
    if tensor.is_floating_point():
        return tensor.double()
    return tensor.to(torch.complex128) if tensor.is_complex() else tensor


def _unit(values: Sequence[Tensor], tangent: Sequence[Tensor | None]) -> Tensor:
    """The factor with which the tangent is as long as the arguments, number by number; that of the argument with the shortest step."""
    units = []
    for value, t in zip(values, tangent, strict=True):
        if t is not None and t.numel():
            size = torch.where(value.isfinite(), value, 0).abs().square().mean().sqrt().clamp(min=LEAST_SCALE)
            length = t.abs().square().mean().sqrt()
            units.append(torch.where(length > 0, size / length, torch.inf))
    unit = torch.stack(units).min() if units else torch.ones(())
    return torch.where(unit.isfinite(), unit, 1.0)


def _precision(result: Tensor) -> float:
    """That of the numbers in a result, whose type may promise more than they were computed in."""
    own = torch.finfo(result.dtype).eps
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        eps = torch.finfo(dtype).eps
        if eps > own and result.is_floating_point() and result.numel() and torch.equal(result.to(dtype).to(result.dtype), result):
            return eps
    return own


def _random_state(values: Sequence[Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    """The state of everything that a call may draw from."""
    devices = sorted({value.get_device() for value in values if value.is_cuda})
    own = [value for value in (*args, *kwargs.values()) if isinstance(value, Generator)]
    states: list[Any] = [(torch.set_rng_state, torch.get_rng_state())]
    states += [
        (lambda state, device=device: torch.cuda.set_rng_state(state, device), torch.cuda.get_rng_state(device)) for device in devices
    ]
    return states + [(generator.set_state, generator.get_state()) for generator in own]


def _restore(states: list[Any]) -> None:
    for put_back, state in states:
        put_back(state)
