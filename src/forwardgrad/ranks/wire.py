"""What goes over the wire between ranks, and what is said where it does not arrive."""

from __future__ import annotations

import atexit
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

HELD_BYTES = 1 << 20  # who exchanges more goes on with it for a while, and does not end a process
LETTING_GO_SECONDS = 10.0
_held: list[Tensor] = []


def hold(*exchanged: Tensor) -> None:
    """Keep the tensors of an exchange until the next one, or until nobody else has them as Python ends.

    A thread of gloo keeps them a moment longer than the exchange takes, and needs Python's lock to let them go. While Python ends nobody
    gets that: the thread is ended instead, and the whole process aborted, whose work was done.
    """
    _held[:] = exchanged if sum(tensor.numel() * tensor.itemsize for tensor in exchanged) <= HELD_BYTES else ()


@atexit.register
def _let_go() -> None:
    until = time.monotonic() + LETTING_GO_SECONDS
    while any(tensor._use_count() > 1 for tensor in _held) and time.monotonic() < until:  # type: ignore[attr-defined]
        time.sleep(0.001)


class RankGone(RuntimeError):
    """A rank waited in vain for another one, which has ended or does not answer."""


class Wire:
    """The exchanges of one group. `sent` are the bytes of payload that this rank gave to exchanges so far; how often a byte travels is the
    business of the group's backend."""

    def __init__(self, group: dist.ProcessGroup | None, timeout: float | None) -> None:
        if not (dist.is_available() and dist.is_initialized()):
            raise RuntimeError(
                "there is no group of processes: start the script with torchrun, and call torch.distributed.init_process_group first"
            )
        whole = dist.group.WORLD if group is None else group
        assert whole is not None
        if dist.get_rank(whole) < 0:
            raise RuntimeError("this process is not in the group that was given")
        self._group, self.rank, self.size = whole, dist.get_rank(whole), dist.get_world_size(whole)
        if timeout is not None:
            members, limit, backend = dist.get_process_group_ranks(whole), timedelta(seconds=timeout), dist.get_backend(whole)
            with self._told():
                self._group = dist.new_group(members, limit, backend, use_local_synchronization=True)
        self._on_host = dist.get_backend(whole) == "gloo"
        self.sent = 0

    @property
    def home(self) -> torch.device:
        """Where tensors lie that it sends as they are."""
        on_gpu = not self._on_host and torch.cuda.is_available()
        return torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")

    def gathered(self, numbers: Tensor) -> Tensor:
        """The numbers [n] of every rank, [ranks, n], in the same order on all of them: a sum over them has the same bits everywhere."""
        message = self._carried(numbers)
        rows = [torch.empty_like(message) for _ in range(self.size)]
        with self._told():
            dist.all_gather(rows, message, self._group)
        hold(message, *rows)
        self._count(message)
        return torch.stack(rows).to(numbers.device)

    def summed(self, tensor: Tensor) -> Tensor:
        """The sum of a tensor over all ranks, with the same bits on all of them."""
        total = self._carried(tensor).clone()
        with self._told():
            dist.all_reduce(total, group=self._group)
        hold(total)
        self._count(total)
        return total.to(tensor.device)

    def from_rank(self, rank: int, tensors: Sequence[Tensor]) -> None:
        """Write one rank's tensors into those of the others."""
        for tensor in tensors:
            carried = self._carried(tensor).contiguous()
            with self._told():
                dist.broadcast(carried, dist.get_global_rank(self._group, rank), self._group)
            hold(carried)
            tensor.copy_(carried)
            if self.rank == rank:
                self._count(carried)

    def _carried(self, tensor: Tensor) -> Tensor:
        return tensor.detach().cpu() if self._on_host else tensor.detach()

    def _count(self, message: Tensor) -> None:
        self.sent += message.numel() * message.itemsize

    @contextmanager
    def _told(self) -> Iterator[None]:
        """Say in a sentence that a rank waited in vain."""
        try:
            yield
        except RuntimeError as error:  # a DistError, or gloo's own words; others have other reasons
            if not isinstance(error, dist.DistError) and not any(word in str(error).lower() for word in ("gloo", "timeout", "connection")):
                raise
            why = (str(error).splitlines() or [""])[0]
            raise RankGone(
                f"rank {self.rank} of {self.size} waited in vain for another rank: that process has ended, or was busy for longer than the "
                "timeout. No rank can go on. Start again from the last checkpoint, with as many ranks as there are now "
                f"({why})"
            ) from error
