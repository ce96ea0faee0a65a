"""What several evaluations of a loss draw from the global generators: the same numbers, such as the masks of dropout, in each of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from forwardgrad.forward_mode import RandomState
from forwardgrad.objective import Objective

aten = torch.ops.aten


class SameDraws:
    """Lets every evaluation draw what the first one draws; the global generators end as after one.

    An eager evaluation begins with the generators where the first one found them. A graph cannot set them back: there the numbers
    themselves are handed from the first evaluation to the others.
    """

    def __init__(self, objective: Objective) -> None:
        self._noted = _Noted() if torch.compiler.is_compiling() else None
        self._start = RandomState(objective)

    @contextmanager
    def begun(self) -> Iterator[None]:
        """One evaluation."""
        if self._noted is not None:
            self._noted.next = 0
            with self._noted:
                yield
            return
        self._start.restore()
        try:
            yield
        except Exception:
            self._start.restore()
            raise


class _Noted(TorchDispatchMode):
    """Notes what is drawn, and hands it out again once `next` is set back.

    Raises NotImplementedError where what is drawn depends on a tensor, which may have another value by then, or is drawn in another way.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.next = 0
        self._draws: list[tuple[Any, Tensor]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if torch.Tag.nondeterministic_seeded not in func.tags or isinstance(kwargs.get("generator"), torch.Generator):
            return func(*args, **kwargs)
        if _drops_nothing(func, args, kwargs):
            return func(*args, **kwargs)
        if func is aten.native_dropout.default:
            return self._dropped(*args)
        if not _drawn_alone(func, args):
            raise NotImplementedError(f"{func} draws by what a tensor holds, so the evaluations of a graph cannot share its random numbers")
        made = self._again(func, lambda: func(*args, **kwargs))
        if not func._schema.is_mutable:
            return made.clone()
        written = args[0]
        return written if written is made else written.copy_(made)

    def _dropped(self, x: Tensor, p: float, train: bool | None = True) -> tuple[Tensor, Tensor]:
        """Dropout as GPUs have it, a mask and a product in one."""
        if not train or p in (0, 1):
            result: tuple[Tensor, Tensor] = aten.native_dropout.default(x, p, train)
            return result
        mask = self._again(aten.native_dropout.default, lambda: aten.native_dropout.default(x, p, train)[1])
        return x * mask * (1 / (1 - p)), mask

    def _again(self, func: Any, make: Callable[[], Tensor]) -> Tensor:
        """What the draw at this place made, which now makes it if it is the first to come here."""
        place, self.next = self.next, self.next + 1
        if place == len(self._draws):
            made = make()
            self._draws.append((func, made.clone()))  # in place, what was drawn may be written to later
            return made
        known, noted = self._draws[place]
        if known is not func:
            raise NotImplementedError("two evaluations of the loss draw different random numbers")
        return noted


def _drops_nothing(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether it is attention, which can drop out what it attends to, and here does not."""
    names = [argument.name for argument in func._schema.arguments]
    return "dropout_p" in names and not {**dict(zip(names, args, strict=False)), **kwargs}.get("dropout_p", 0.0)


def _drawn_alone(func: Any, args: tuple[Any, ...]) -> bool:
    """Whether numbers follow from the generator alone: what the tensors hold that an operator is handed is overwritten or not looked at."""
    tensors = sum(isinstance(arg, Tensor) for arg in args)
    name = func.__name__.split(".")[0]
    return tensors == 0 or (tensors == 1 and (func._schema.is_mutable or func is aten.bernoulli.p or name.endswith("_like")))
