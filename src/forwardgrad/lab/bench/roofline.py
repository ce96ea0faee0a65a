"""How fast a piece of work could be at best: the operations and bytes it needs, and how many a second the machine gives at most.

Both are counted at torch's dispatcher, below every transformation (vmap, jvp, autograd), so that forward-mode tangents are seen as what
they are. The time bound is max(operations / most operations a second, bytes / most bytes a second): the roofline of Williams et al. (2009).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

_UNTOUCHED = {torch.ops.aten.empty, torch.ops.aten.empty_like, torch.ops.aten.empty_strided, torch.ops.aten.new_empty,
              torch.ops.aten._efficientzerotensor}  # fmt: skip  # memory that is given out, but neither read nor written
_PRODUCTS: dict[Any, tuple[int, int]] = {torch.ops.aten.mv: (0, 1), torch.ops.aten.addmv: (1, 2), torch.ops.aten.dot: (0, 1)}
"""Products with a vector, which torch's own registry leaves out: where the two factors stand among the arguments."""


class Count(NamedTuple):
    """Floating-point operations of products (matrices, convolutions), and bytes read and written."""

    flops: int
    bytes: int


class Ceilings(NamedTuple):
    """The most that the machine gave in the same run: operations a second of a matrix product, bytes a second of a large triad."""

    flops_per_second: float
    bytes_per_second: float

    def bound(self, count: Count) -> tuple[float, str]:
        """The least seconds that this count can take, and which of the two says so."""
        products, traffic = count.flops / self.flops_per_second, count.bytes / self.bytes_per_second
        return max(products, traffic), "products" if products >= traffic else "bytes"


def count(work: Callable[[], object]) -> Count:
    """What a piece of work needs, run once under the count.

    Products count two operations a multiplication and addition; element-wise work counts as bytes alone. Bytes are the tensors that each
    operator is given and returns, each once, whether a cache holds them or not; views move none, and an expanded tensor has the bytes
    of what is stored. What a kernel keeps to itself is not seen.

    >>> a, b = torch.ones(3, 4), torch.ones(4, 5)
    >>> count(lambda: a @ b)  # 2·3·4·5 operations; (12 + 20 + 15) numbers of 4 bytes
    Count(flops=120, bytes=188)
    """
    counter = _Counter()
    with counter:
        work()
    return Count(counter.flops, counter.bytes)


class _Counter(TorchDispatchMode):
    """Adds up operations and bytes of every operator that moves any."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.flops = self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        packet = func._overloadpacket
        if packet in flop_registry:
            self.flops += int(flop_registry[packet](*args, **kwargs, out_val=result))
        elif packet in _PRODUCTS:
            first, second = (args[place] for place in _PRODUCTS[packet])
            self.flops += 2 * max(first.numel(), second.numel())
        if packet not in _UNTOUCHED and torch.Tag.inplace_view not in func.tags:
            given = list({id(leaf): leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}.values())
            made = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
            if made and (func._schema.is_mutable or not _shared(given, made)):
                self.bytes += sum(map(_stored, given)) + sum(map(_stored, made))
            elif not made and func._schema.is_mutable:  # an optimizer's kernels over many tensors return nothing
                self.bytes += sum(map(_stored, given)) + sum(map(_stored, _written(func, args, kwargs)))
        return result


def _written(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """The tensors that an operator writes to, by its schema; gradients are said to be written, but are only under a scaler."""
    told = {argument.name: value for argument, value in zip(func._schema.arguments, args, strict=False)} | kwargs
    kinds = {argument.name: argument.alias_info for argument in func._schema.arguments}
    found = [value for name, value in told.items() if kinds[name] is not None and kinds[name].is_write and name != "grads"]
    return [leaf for leaf in tree_leaves(found) if isinstance(leaf, Tensor)]


def _shared(given: list[Tensor], made: list[Tensor]) -> bool:
    """Whether what was made is what was given, seen in another way."""
    storages = {leaf.untyped_storage()._cdata for leaf in given if leaf.layout == torch.strided}
    return all(leaf.layout == torch.strided and leaf.untyped_storage()._cdata in storages for leaf in made)


def _stored(tensor: Tensor) -> int:
    if tensor.is_meta or tensor._is_zerotensor():  # forward mode's shapes and zeros: no memory
        return 0
    if tensor.layout != torch.strided:
        return tensor.numel() * tensor.element_size()
    read = math.prod(size for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride)
    return read * tensor.element_size()


def ceilings(on: torch.device, *, product: int = 2048, numbers: int = 1 << 24, repeats: int = 5) -> Ceilings:
    """The machine's own limits in float32, at the current number of threads: the best of `repeats` of each.

    A product of two square matrices of `product` rows, and a + s·b into c over vectors of `numbers`, far larger than any cache.
    """
    with torch.no_grad():
        a, b = (torch.rand(product, product, device=on) for _ in range(2))
        x, y, z = (torch.rand(numbers, device=on) for _ in range(3))
        matmul = min(_times(lambda: torch.mm(a, b), on, repeats))
        triad = min(_times(lambda: torch.add(x, y, alpha=0.5, out=z), on, repeats))
    return Ceilings(2 * product**3 / matmul, 3 * 4 * numbers / triad)


def _times(work: Callable[[], object], on: torch.device, repeats: int) -> list[float]:
    work()
    found = []
    for _ in range(repeats):
        began = now(on)
        work()
        found.append(now(on) - began)
    return found


def now(on: torch.device) -> float:
    """The time when all that was asked of the device is done."""
    if on.type == "cuda":
        torch.cuda.synchronize(on)
    return time.perf_counter()
