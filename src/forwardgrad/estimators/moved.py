"""The mode under which a loss is evaluated with its parameters moved, while the live ones are never written to.

And whether a move is as large as the spacing of the numbers: one that is too small moves nothing, and says nothing of it.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakIdKeyDictionary

from forwardgrad.calls import Lines
from forwardgrad.forward_mode import EMBEDDINGS, Redo, Unwritten, levels, renormed
from forwardgrad.objective import Objective

_VALUES = {"data", "T", "mT", "H", "mH", "real", "imag"}  # properties of a tensor that hold its values; the others only describe it
_DESCRIBING = {
    *(torch.numel, torch.is_floating_point, torch.is_complex, torch.is_same_size, torch.get_device),
    *(torch.empty_like, torch.zeros_like, torch.ones_like, torch.full_like, torch.rand_like, torch.randn_like),
    *(
        getattr(Tensor, name)
        for name in (
            *("size", "dim", "ndimension", "numel", "nelement", "stride", "storage_offset", "is_contiguous", "element_size", "__len__"),
            *("get_device", "is_floating_point", "is_complex", "is_signed", "is_same_size", "is_shared", "is_pinned", "data_ptr"),
            *("new_empty", "new_zeros", "new_ones", "new_full", "requires_grad_", "register_hook"),
        )
    ),
}


class UsedInside(Redo):
    """A parameter went into a transform of torch.func: it has to be exchanged before that begins."""


class Moved(TorchFunctionMode):
    """While it is active, torch functions that are handed a live parameter get another tensor in its place, made for that call alone.

    `moved` makes that tensor, p + step·v, and `direction` makes v alone. A graph computes x(W + step·V)ᵀ as xWᵀ + step·xVᵀ where no
    parameter was used before: x is the same in all evaluations then, so both products are made once for all of them, and no moved copies
    of W are written.
    """

    def __init__(self, objective: Objective, moved: Callable[[str], Tensor], direction: Callable[[str], Tensor], step: float) -> None:
        super().__init__()
        self.direction, self.step = direction, step
        self.names = {id(p): name for name, p in objective.parameters.items()}
        self.live = {name: p.detach() for name, p in objective.parameters.items()}
        self.moved, self.used, self._unwritten = moved, set[str](), Unwritten(objective.parameters)
        self.level, self.storages = levels.level(), {levels.storage(p) for p in self.live.values()}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        describes = func in _DESCRIBING or (getattr(func, "__name__", "") == "__get__" and func.__self__.__name__ not in _VALUES)
        if not describes and levels.level() != self.level:
            if self.storages & levels.storages((args, kwargs)):
                raise UsedInside
        elif func is F.linear and (name := self._shared(*args, **kwargs)) is not None:
            return self._linear(name, *args, **kwargs)
        elif not describes:
            if func in EMBEDDINGS and kwargs.get("max_norm") is not None and (name := self.names.get(id(args[1]))) is not None:
                kwargs = renormed(func, args, kwargs, self.live[name])
            self._unwritten.check(func, args, kwargs)
            made: dict[str, Tensor] = {}  # a parameter handed over twice is still one tensor
            args, kwargs = self._exchange(args, made), self._exchange(kwargs, made)
            self.used |= made.keys()
            for name, tensor in made.items():
                self._unwritten.add(name, tensor)
            if func in (F.embedding, F.embedding_bag) and kwargs.get("padding_idx") is not None:
                self._hold_padding(kwargs["padding_idx"], made)
        return func(*args, **kwargs)

    def _shared(self, x: Any, weight: Any, bias: Any = None) -> str | None:
        """The name of the weight of a linear layer, where other evaluations of a graph multiply the same x with it."""
        name = self.names.get(id(weight))
        if name is None or self.used or not torch.compiler.is_compiling() or not isinstance(x, Tensor) or id(x) in self.names:
            return None
        exact = weight.dtype in (torch.float32, torch.float64) and not torch.is_autocast_enabled(weight.device.type)
        small = weight.dim() == 2 and x.numel() <= weight.numel()  # else sums of outputs take longer than copies of weights
        return name if exact and small else None

    def _linear(self, name: str, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        self.used.add(name)
        y = F.linear(x, self.live[name]) + F.linear(x, self.direction(name)) * self.step
        if bias is None:
            return y
        made: dict[str, Tensor] = {}
        bias = self._exchange(bias, made)
        self.used |= made.keys()
        return y + bias

    def _hold_padding(self, row: int, made: dict[str, Tensor]) -> None:
        """The padding row of an embedding stays where it is, as in backpropagation, which gives it no gradient here."""
        for name, moved in made.items():
            moved[row] = self.live[name][row]

    def _exchange(self, value: Any, made: dict[str, Tensor]) -> Any:
        if isinstance(value, Tensor):
            name = self.names.get(id(value))
            if name is None:
                return value
            if name not in made:
                made[name] = self.moved(name)
            return made[name]
        if isinstance(value, (tuple, list)):
            items = [self._exchange(item, made) for item in value]
            if all(item is before for item, before in zip(items, value, strict=True)):  # such as a torch.Size
                return value
            return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
        if isinstance(value, dict):
            return {key: self._exchange(item, made) for key, item in value.items()}
        return value


_seen: Any = WeakIdKeyDictionary()
_SAMPLED = 4096  # numbers of a parameter that are looked at
_NAMED = 3  # parameters that a warning names


def check_spacing(objective: Objective, epsilon: float) -> None:
    """Warn, once for a model and step, of parameters most of whose numbers lie further apart than 2ε: rounding puts them back."""
    if _first_look(objective, epsilon) and (found := list(_still(objective, epsilon))):
        widest = max(spacing for _, _, spacing in found)
        warnings.warn(
            f"a step of epsilon={epsilon:g} leaves most numbers of {_named([name for name, _, _ in found])} where they are, as "
            f"{_words(found[0][1])} has no other number that close: their part of the estimate is near zero whatever the gradient. Take "
            f"epsilon={widest:.2g} or more, hold these parameters in a higher precision, or freeze them",
            stacklevel=2,
        )


def check_outputs(objective: Objective, epsilon: float, lines: Lines) -> None:
    """Warn, once for a model and step, of layers in half precision whose move rounding takes back for most of their numbers."""
    precise = all(p.dtype.itemsize >= 4 for p in objective.parameters.values())
    device = next(iter(objective.parameters.values())).device.type
    if (precise and not torch.is_autocast_enabled(device)) or not _first_look(objective, (epsilon, "outputs")):
        return
    if found := [place for place in lines.unmoved(epsilon) if place.share > 0.5]:
        names = list(dict.fromkeys(name for place in found for name in place.names))
        warnings.warn(
            f"a step of epsilon={epsilon:g} along {_named(names)} leaves most numbers that they make where they are, as "
            f"{_words(found[0].dtype)} has no other number that close: their part of the estimate is rounding. Take a larger epsilon, "
            "or compute these layers in a higher precision",
            stacklevel=2,
        )


def _first_look(objective: Objective, what: Hashable) -> bool:
    """Whether a model was not looked at before in this respect; a graph is not, since the eager step ahead of it was."""
    if torch.compiler.is_compiling():
        return False
    at = objective.at if isinstance(objective.at, torch.nn.Module) else next(iter(objective.parameters.values()))
    seen = _seen.setdefault(at, set())
    if what in seen:
        return False
    seen.add(what)
    return True


def _named(names: Sequence[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(name.removeprefix("model.") for name in names[:_NAMED]) + more


def _words(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _still(objective: Objective, epsilon: float) -> Iterator[tuple[str, torch.dtype, float]]:
    """The parameters most of whose numbers stay, with the spacing that half of their numbers do not exceed."""
    for name, p in objective.parameters.items():
        if p.numel():
            middle = float(spacings(p.detach().reshape(-1)[:: -(-p.numel() // _SAMPLED)]).median())
            if middle > 2 * epsilon:
                yield name, p.dtype, middle


def spacings(numbers: Tensor) -> Tensor:
    """How far the next number of the same precision is from each, away from zero; 0 for zeros."""
    exponent = torch.frexp(numbers.double()).exponent - 1  # |number| lies in [2^exponent, 2^(exponent + 1))
    steps = torch.ldexp(torch.ones_like(numbers, dtype=torch.float64), exponent) * torch.finfo(numbers.dtype).eps
    return torch.where(numbers == 0, 0.0, steps)
