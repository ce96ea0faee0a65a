"""`Objective`: a loss and what it is trained by. It evaluates the loss with other tensors in place of the parameters and buffers."""

from __future__ import annotations

import copy
import functools
import sys
import threading
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from numbers import Real
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from forwardgrad.ranks import ALONE, Ranks

Point = nn.Module | Tensor | Sequence[Tensor]
"""Where a loss is evaluated: a module, one tensor, or several tensors."""


class _LossModule(nn.Module):
    """The loss of a model as a module, so that `functional_call` can exchange the model's parameters under any loss function."""

    def __init__(self, loss: Callable[..., Tensor], model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.loss_of = loss

    def forward(self) -> tuple[Any, dict[str, Tensor]]:
        loss = self.loss_of(self.model)
        return loss, {place.name: place.tensor for place in _places(self, "_buffers")}  # read again: a model may put a new one there


class _Place(NamedTuple):
    """Where a module keeps a tensor; a module or tensor that is reached under several names has one place for each module alone."""

    name: str
    module: nn.Module
    key: str
    tensor: Tensor


def _places(root: nn.Module, kind: Literal["_parameters", "_buffers"]) -> Iterator[_Place]:
    for prefix, module in root.named_modules():
        for key, tensor in getattr(module, kind).items():
            if tensor is not None:
                yield _Place(f"{prefix}.{key}" if prefix else key, module, key, tensor)


class Objective:
    """A loss as a function of the tensors it is trained by.

    `loss` takes what `at` is: the module, the tensor, or the tensors as separate arguments; it returns a tensor of one element, or of
    one element an example, whose mean is then the loss.
    `given` are the tensors of a batch that the loss closes over, in their order at every step, where the caller knows them.
    `ranks` are the processes whose losses it is the mean of.
    `parameters` are the live tensors with `requires_grad=True`, by name; tied weights appear once.

    Raises TypeError or ValueError where there is nothing to train, or something that cannot be trained.
    """

    def __init__(self, loss: Callable[..., Tensor], at: Point, given: Sequence[Tensor] = (), ranks: Ranks = ALONE) -> None:
        if not callable(loss):
            raise TypeError(
                f"the loss must be a function of the model, such as `lambda model: loss_fn(model(x), y)`, not a {type(loss).__name__}"
            )
        self.loss, self.at, self.given, self.ranks, self._of_values = loss, at, tuple(given), ranks, False
        self._module = _LossModule(loss, at) if isinstance(at, nn.Module) else None
        self._tensors = {} if self._module else _named(at)
        named = dict(at.named_parameters(prefix="model")) if isinstance(at, nn.Module) else self._tensors
        self.parameters = {name: p for name, p in named.items() if p.requires_grad}
        if not self.parameters:
            raise ValueError("nothing to train: no parameter has requires_grad=True")
        for name, p in self.parameters.items():
            if is_lazy(p):
                raise ValueError(f"{name} has no shape yet, as its module is a lazy one: call the model once on a batch, and then train it")
            if not p.is_leaf:
                raise ValueError(f"{name} is the result of a computation, not a leaf: its .grad would never be used")
            if not p.is_floating_point():
                raise TypeError(f"{name} is {p.dtype}: forward gradients need real floating-point parameters")

    @property
    def frozen(self) -> dict[str, Tensor]:
        """The parameters that stay as they are, by name."""
        named = dict(self.at.named_parameters(prefix="model")) if isinstance(self.at, nn.Module) else self._tensors
        return {name: p for name, p in named.items() if not p.requires_grad}

    @cached_property
    def buffered(self) -> bool:
        """Whether an evaluation may leave something in buffers."""
        return self._module is not None and next(_places(self._module, "_buffers"), None) is not None

    def live(self) -> Tensor:
        """The loss of the live tensors: an ordinary forward pass, recorded for reverse mode if the caller's context says so."""
        return scalar(self.precise(self._evaluated()))

    def as_it_is(self) -> Any:
        """As `live`, with whatever the loss function returned, and nothing of it compiled."""
        with as_written():
            return self._evaluated()

    def _evaluated(self) -> Any:
        with _recomputed():
            return self._told(self.loss(self.at) if self._module else self.loss(*self._tensors.values()))

    def of_values(self) -> Objective:
        """The same for whoever takes values of the loss alone: it may be a Python number, too, or a tensor of truths or whole numbers."""
        other = copy.copy(self)
        other._of_values = True
        return other

    def _told(self, loss: Any) -> Any:
        """What the loss function returned, as a tensor of real numbers if any kind of number will do."""
        if not self._of_values or (isinstance(loss, Tensor) and (loss.is_floating_point() or loss.is_complex())):
            return loss
        if not isinstance(loss, (Tensor, Real)):
            raise TypeError(f"the loss must return a tensor or a number, not {type(loss).__name__}")
        return torch.as_tensor(loss, dtype=torch.float64, device=next(iter(self.parameters.values())).device)

    def with_(
        self, parameters: Mapping[str, Tensor], cloned: Callable[[Tensor], Tensor] = Tensor.clone
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss with these tensors in place of the live ones, and the buffers that the evaluation leaves; the model's own stay.

        `cloned` makes the copies of buffers that the evaluation may write to.
        """
        loss, buffers = self.raw(parameters, cloned)
        return scalar(self.precise(loss)), buffers

    def raw(self, parameters: Mapping[str, Tensor], cloned: Callable[[Tensor], Tensor] = Tensor.clone) -> tuple[Any, dict[str, Tensor]]:
        """As `with_`, with whatever the loss function returned."""
        if self._module is None:
            with as_written():
                return self._told(self.loss(*(parameters.get(name, t) for name, t in self._tensors.items()))), {}
        instead = {id(p): parameters[name] for name, p in self.parameters.items()}  # tied weights: one tensor in several places
        for place in _places(self._module, "_buffers"):
            instead.setdefault(id(place.tensor), cloned(place.tensor))
        places = [*_places(self._module, "_parameters"), *_places(self._module, "_buffers")]
        state = {place.name: instead[id(place.tensor)] for place in places if id(place.tensor) in instead}
        with _recomputed(), as_written():
            loss, buffers = functional_call(self._module, state, (), tie_weights=False)
        return self._told(loss), buffers

    def precise(self, loss: Any) -> Any:
        """What the loss function returned in no less than the parameters' precision: autocast may have left it, and d, in 8 or 11 bits."""
        most = max((p.dtype for p in self.parameters.values()), key=lambda dtype: dtype.itemsize)
        lacks = isinstance(loss, Tensor) and loss.is_floating_point() and loss.dtype.itemsize < min(most.itemsize, 4)
        return loss.to(most) if lacks else loss

    def commit(self, buffers: Mapping[str, Tensor]) -> None:
        """Make these buffers the model's own."""
        for place in _places(self._module, "_buffers") if self._module else ():
            if 0 in place.tensor.stride():  # an expanded constant cannot be written to, but may have been replaced
                place.module._buffers[place.key] = buffers[place.name]
            else:
                place.tensor.copy_(buffers[place.name])


@contextmanager
def _recomputed() -> Iterator[None]:
    """Inside, `torch.nn.utils.parametrize.cached()` around a step keeps what this evaluation computes, and nothing of others: of these the
    weights have moved elsewhere."""
    cache = getattr(parametrize, "_cache", None) if getattr(parametrize, "_cache_enabled", 0) else None
    if cache is None:
        yield
        return
    before = dict(cache)
    cache.clear()
    try:
        yield
    finally:
        cache.clear()
        cache.update(before)


_running, _count, _stance = threading.Lock(), 0, None


@contextmanager
def as_written() -> Iterator[None]:
    """Inside, what `torch.compile` made of parts of a model or a loss runs as it was written.

    An estimator sees and moves tensors by function modes, of which a compiler would make a graph for every step, or none. The compiler's
    stance belongs to the process: the first thread that comes here changes it, and the last one puts it back.
    """
    global _count, _stance
    if "torch._dynamo" not in sys.modules or _inside_a_compiled_frame():  # nothing is compiled, or whoever calls is
        yield
        return
    frames: Any = sys.modules["torch._dynamo.eval_frame"]
    with _running:
        if not _count:
            _stance = frames._set_stance(frames.DynamoStance("force_eager"))
        _count += 1
    try:
        yield
    finally:
        with _running:
            _count -= 1
            if not _count:
                frames._set_stance(_stance)


def _inside_a_compiled_frame() -> bool:
    return torch._C._dynamo.eval_frame.get_eval_frame_callback() not in (None, False)


def code_of(loss: Callable[..., Any]) -> Hashable:
    """What stands for a loss function in all that is remembered of a model: its code, since a lambda is another object at every step.

    That of a partial function is the code of the function inside it; a loss bound to its batch names its own (`of_code`).
    """
    inner: Any = loss
    while (found := _inside(inner)) is not None:
        inner = found
    kind: Any = type(inner)
    code: Hashable = getattr(inner, "__code__", kind)
    return code


def _inside(loss: Any) -> Any:
    if isinstance(loss, functools.partial):
        return loss.func
    return getattr(loss, "of_code", None)


def _named(at: object) -> dict[str, Tensor]:
    tensors = [at] if isinstance(at, Tensor) else at
    if not isinstance(tensors, Sequence) or not all(isinstance(t, Tensor) for t in tensors):
        raise TypeError(f"expected a module, a tensor, or a list or tuple of tensors to train, not {type(at).__name__}")
    if len({id(t) for t in tensors}) < len(tensors):
        raise ValueError("the same tensor was given twice: its two derivatives could not be told apart")
    return {f"tensor {index}": t for index, t in enumerate(tensors)}


def scalar(loss: Any) -> Tensor:
    each = loss_by_example(loss)
    return each.mean() if each.dim() else each  # a loss of whole numbers has no mean, and its own error


def loss_by_example(loss: Any) -> Tensor:
    """The loss as one number, or one number an example."""
    if not isinstance(loss, Tensor):
        raise TypeError(f"the loss must return a tensor, not {type(loss).__name__}")
    if loss.numel() == 0:
        raise ValueError(
            f"the loss has no element, but shape {tuple(loss.shape)}: leave batches without examples out, or reduce it with sum()"
        )
    if loss.numel() > 1 and loss.dim() > 1:
        raise ValueError(
            f"the loss must have one element, or one an example, not shape {tuple(loss.shape)}: reduce it with mean() or sum()"
        )
    if loss.is_complex():
        raise TypeError("the loss is complex: take its real part or its absolute value")
    return loss.reshape(()) if loss.numel() == 1 else loss
