"""`peak_bytes`: the most memory that a piece of work holds at once."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def peak_bytes(work: Callable[[], object], devices: Iterable[torch.device]) -> int:
    """The most bytes held at once during the work, above what was held before it.

    On CUDA it is what torch's allocator says, summed over the devices; that sets back its peak statistics (`max_memory_allocated`).
    Elsewhere it is the bytes of all tensors alive that operators returned during the work, those held for a backward pass included;
    scratch inside a single operator's kernel is not seen. The work is slowed down by that: time it in another run.

    >>> def work():
    ...     one = torch.ones(100)  # 400 bytes
    ...     two = one + 1  # 800
    ...     del one
    ...     return two.double().view(-1)  # 400 + 800
    >>> peak_bytes(work, [torch.device("cpu")])
    1200
    """
    cuda = [device for device in dict.fromkeys(devices) if device.type == "cuda"]
    if not cuda:
        gc.collect(1)  # what is made from here on is collected at the same points of the work every time
        tally = _Tally()
        with tally:
            work()
        return tally.peak
    gc.collect()  # what waits in a cycle belongs to whoever left it there
    before: list[int] = []
    for device in cuda:
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before.append(torch.cuda.memory_allocated(device))
    work()
    peaks = [int(torch.cuda.max_memory_allocated(device)) for device in cuda]
    return sum(peaks) - sum(before)


class _Tally(TorchDispatchMode):
    """Counts the bytes of new storages below every transformation (vmap, jvp, autograd), and takes them off when they are freed."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self._alive: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {id(leaf.untyped_storage()) for leaf in tree_leaves((args, kwargs)) if _stored(leaf)}
        for leaf in tree_leaves(result):
            if not _stored(leaf):
                continue
            storage = leaf.untyped_storage()  # the same Python object as long as the storage lives, whoever holds it
            if id(storage) in self._alive or id(storage) in given:  # a view, or the result of an operation in place
                continue
            self._alive[id(storage)] = storage.nbytes()
            weakref.finalize(storage, self._freed, id(storage)).atexit = False
            self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        return result

    def _freed(self, storage: int) -> None:
        self.now -= self._alive.pop(storage)


def _stored(leaf: object) -> bool:
    """Whether it is a tensor with memory: forward mode's zeros and the shapes it works out on the meta device have none."""
    return isinstance(leaf, Tensor) and leaf.layout == torch.strided and not leaf._is_zerotensor() and not leaf.is_meta
