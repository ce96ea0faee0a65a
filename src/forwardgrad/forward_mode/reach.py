"""Whether an estimator sees every use of a trained parameter: tried once for a model and loss, in one evaluation of values alone.

Estimators know a parameter when a torch function is handed it. What runs below torch's functions hands nothing over: a scripted function,
a C++ extension, a kernel that is given an address. And a view that was made earlier is another tensor. What stands there would count as a
constant, in silence. So this evaluation gives torch's functions copies of the parameters, and looks below them for the memory of the
parameters themselves.
"""

from __future__ import annotations

import warnings
from bisect import bisect_right
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import AbstractContextManager
from io import IOBase
from itertools import repeat
from types import CellType, CodeType
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import get_proxy_mode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from forwardgrad.forward_mode import levels
from forwardgrad.forward_mode.explicit import READS
from forwardgrad.forward_mode.notes import outside
from forwardgrad.forward_mode.refusals import Said
from forwardgrad.forward_mode.structure import exchanged
from forwardgrad.forward_mode.workarounds import RandomState, one_by_one
from forwardgrad.forward_mode.writes import frozen_kept
from forwardgrad.objective import Objective, code_of

_NAMED = 3  # parameters that a sentence names
_INSTEAD = (
    "write that part in torch's own functions, freeze these parameters with requires_grad_(False), or estimate with "
    "ForwardGradient(perturb=Dense()), which follows scripted code"
)
_ADDRESSES: frozenset[Any] = frozenset((Tensor.data_ptr, Tensor.untyped_storage, Tensor.storage, Tensor.__dlpack__))
_looked: Any = WeakIdKeyDictionary()
_below: Any = WeakIdKeyDictionary()  # losses, by model, in which something runs below torch's functions


def check_reach(objective: Objective, around: Callable[[], AbstractContextManager[Any]], *, live: bool = False, below: bool = True) -> None:
    """Raise `Said` where the loss uses a trained parameter in a way that stays hidden; a model is looked at once under each loss.

    `around` is what keeps the evaluation from leaving a trace.
    `live`: whether the estimator evaluates the loss with the live parameters in place, and not with others.
    `below`: whether what runs below torch's functions is out of reach as well; torch's own forward mode follows it.
    """
    if torch.compiler.is_compiling() or get_proxy_mode() is not None or levels.level():
        return
    at = _subject(objective)
    key: Hashable = code_of(objective.loss), live, below, len(objective.parameters)
    if key in (seen := _looked.setdefault(at, set())):
        return
    if below and (scripted := trained_script(objective)) is not None:
        raise Said(f"the parameters of the scripted module {scripted!r} cannot be exchanged from outside", _INSTEAD)
    if drawn := _iterators(objective.loss):
        warnings.warn(
            f"the loss calls next() and {' and '.join(drawn)} is an iterator: a step evaluates the loss several times, each time on "
            "another batch, so its differences are not those of one loss. Take the batch ahead of the step, and let the loss use that",
            stacklevel=outside(),
        )
    parameters = objective.parameters if live else {name: p.detach() for name, p in objective.parameters.items()}
    copies, random = _Copies(parameters), RandomState(objective)
    beneath = _Beneath(copies, objective.parameters, parameters)
    seen.add(key)
    try:
        with warnings.catch_warnings(), around(), torch.no_grad(), one_by_one(), frozen_kept(objective), copies, beneath:
            warnings.simplefilter("ignore")  # the estimator's own evaluation gives them
            beneath.begin()
            objective.raw(parameters)
    except Exception:
        return  # whatever is wrong with the loss, the estimator's own evaluation meets it
    finally:
        random.restore()
    if beneath.aliased and not _counts(objective, around):
        beneath.aliased.clear()
    if beneath.passed:
        _below.setdefault(at, set()).add(code_of(objective.loss))
    try:
        _judge(copies, beneath, below)
    except Said:
        seen.discard(key)
        raise


def runs_below(objective: Objective, code: Hashable) -> bool:
    """Whether a look at this loss found operations that no torch function was called for: what they use is not seen by a watch."""
    return code in _below.get(_subject(objective), ())


def _iterators(loss: Any) -> list[str]:
    """The names of iterators that a loss function can take its batch from."""
    loss = getattr(loss, "of_code", loss)
    code, closed = getattr(loss, "__code__", None), getattr(loss, "__closure__", None) or ()
    if not isinstance(code, CodeType) or "next" not in code.co_names:
        return []
    held = {name: cell.cell_contents for name, cell in zip(code.co_freevars, closed, strict=False) if cell != CellType()}
    held |= {name: loss.__globals__[name] for name in code.co_names if name in getattr(loss, "__globals__", {})}
    return [name for name, value in held.items() if isinstance(value, Iterator) and not isinstance(value, (IOBase, repeat))]


def _subject(objective: Objective) -> nn.Module | Tensor:
    return objective.at if isinstance(objective.at, nn.Module) else next(iter(objective.parameters.values()))


class _Copies(TorchFunctionMode):
    """Hands copies of parameters to torch's functions, and notes which parameters were handed over, and which gave their address away."""

    def __init__(self, parameters: Mapping[str, Tensor]) -> None:
        super().__init__()
        self._names = {id(p): name for name, p in parameters.items()}
        self._parameters = parameters
        self.used, self.addressed = set[str](), set[str]()
        self.inside = False  # whether the last call came from inside a transform of torch.func, which makes views of its own

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs, self.inside = kwargs or {}, levels.level() > 0
        found = {self._names[id(leaf)] for leaf in tree_leaves((args, kwargs)) if id(leaf) in self._names}
        if func in _ADDRESSES:
            self.addressed |= found
        if not found or func in READS or func in _ADDRESSES:
            return func(*args, **kwargs)
        self.used |= found
        copies = {id(self._parameters[name]): self._copy(self._parameters[name]) for name in found}
        return func(*exchanged(args, copies), **exchanged(kwargs, copies))

    @staticmethod
    def _copy(parameter: Tensor) -> Tensor:
        return parameter.detach().clone().requires_grad_(parameter.requires_grad)


class _Beneath(TorchDispatchMode):
    """Sees the operations below torch's functions, and which of them reach the memory of a parameter after all.

    `hidden` are parameters that an operation used which no function was called for, `aliased` those that a function was handed in part, or
    as another tensor, of which reverse mode would know what it is a part of. `passed` is whether any operation was made that way.
    """

    def __init__(self, copies: _Copies, live: Mapping[str, Tensor], parameters: Mapping[str, Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.hidden, self.aliased, self.passed = set[str](), set[str](), False
        self.copies = copies
        self._own = {id(p) for p in parameters.values()}
        self._live = {id(p): name for name, p in live.items()}
        self._spans = sorted((span, name) for name, p in live.items() if (span := _span(p)) is not None)
        self._starts = [start for (start, _), _ in self._spans]
        self._places = {(span, p.shape) for p in live.values() if (span := _span(p)) is not None}
        self._full = 0

    def begin(self) -> None:
        """From here on, with all modes in place, an operation at full height is below torch's functions: they take a mode off."""
        self._full = torch._C._len_torch_function_stack()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        unseen = torch._C._len_torch_function_stack() >= self._full
        self.passed = self.passed or (unseen and not self.copies.inside)
        with torch._C.DisableTorchFunction():
            for tensor in tree_leaves((args, kwargs)):
                if isinstance(tensor, Tensor) and not self.copies.inside:
                    self._look(tensor, unseen)
        return func(*args, **(kwargs or {}))

    def _look(self, tensor: Tensor, unseen: bool) -> None:
        if not unseen and tensor.grad_fn is not None:
            self._trace(tensor)
        span = _span(tensor)
        if span is None or (name := self._name(span)) is None:
            return
        own = id(tensor) in self._own
        if unseen and (own or tensor.requires_grad or (span, tensor.shape) in self._places):
            self.hidden.add(name)
        elif not unseen and not own and tensor.requires_grad:
            self.aliased.add(name)

    def _trace(self, tensor: Tensor) -> None:
        """Note the parameters that an earlier computation made a tensor of, as reverse mode knows it."""
        nodes, seen = [tensor.grad_fn], set[Any]()
        while nodes:
            node = nodes.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            if (name := self._live.get(id(getattr(node, "variable", None)))) is not None:
                self.aliased.add(name)
            nodes += [following for following, _ in node.next_functions]

    def _name(self, span: tuple[int, int]) -> str | None:
        """The parameter whose memory a tensor reaches into."""
        index = bisect_right(self._starts, span[0]) - 1
        for (start, end), name in self._spans[max(index, 0) : index + 2]:
            if start < span[1] and span[0] < end:
                return name
        return None


def _span(tensor: Tensor) -> tuple[int, int] | None:
    """Where the numbers of a tensor begin and end in memory, None where it has none of its own."""
    if not tensor.numel() or tensor.layout is not torch.strided:
        return None
    try:
        start = tensor.data_ptr()
    except (RuntimeError, NotImplementedError):
        return None
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (start, start + (last + 1) * tensor.element_size()) if start else None


def trained_script(objective: Objective) -> str | None:
    """The name of a scripted module that holds trained parameters."""
    trained = {id(p) for p in objective.parameters.values()}
    for name, module in objective.at.named_modules() if isinstance(objective.at, nn.Module) else ():
        if isinstance(module, torch.jit.ScriptModule) and any(id(p) in trained for p in module.parameters()):
            return name or type(module).__name__
    return None


def _counts(objective: Objective, around: Callable[[], AbstractContextManager[Any]]) -> bool:
    """Whether the loss follows from tensors that were made of trained parameters earlier, and not a number that is looked at alone.

    Reverse mode tells: in this evaluation it records what follows from such tensors, as the parameters themselves are constants.
    """
    random, still = RandomState(objective), {name: p.detach() for name, p in objective.parameters.items()}
    try:
        with warnings.catch_warnings(), around(), torch.enable_grad():
            warnings.simplefilter("ignore")
            loss, _ = objective.raw(still)
        return not isinstance(loss, Tensor) or loss.requires_grad
    except Exception:
        return True
    finally:
        random.restore()


def _judge(copies: _Copies, beneath: _Beneath, below: bool) -> None:
    if beneath.aliased:
        raise Said(
            f"the loss uses the trained {_listed(beneath.aliased)} as another tensor that shares its memory or was computed of it, such as "
            "a view that was made earlier or a parameter that is held outside the model, and would take it for a constant",
            "make such a tensor where it is used, in forward, and reach parameters through the model",
        )
    hidden = beneath.hidden | (copies.addressed - copies.used)
    if below and hidden:
        raise Said(
            f"the loss uses the trained {_listed(hidden)} below torch's functions (in a function under @torch.jit.script, an extension, an "
            "autograd function that gives back what it got, or a kernel that is given an address), where it cannot be moved",
            _INSTEAD,
        )


def _listed(names: set[str]) -> str:
    ordered = sorted(name.removeprefix("model.") for name in names)
    more = f" and {len(ordered) - _NAMED} more" if len(ordered) > _NAMED else ""
    return ", ".join(ordered[:_NAMED]) + more
