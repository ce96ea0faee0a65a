"""Messages between neighbours of a pipeline: tensors, with a header that says what they are. They go forward alone."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

KINDS = ("step", "forward")
_DTYPES = (
    *(torch.float32, torch.float64, torch.float16, torch.bfloat16),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
)
_TENSORS, _DIMS = 2, 8  # at most, in a message and in a tensor
_HEADER = 4 + _TENSORS * (2 + _DIMS)
_FORMATS = 8  # that have tags of their own: full and last batches of training and evaluation are four
_TAGS = 1 + _TENSORS * (1 + _FORMATS)  # of a pipeline: one for headers, and those of each format and of all further ones
_FIRST_TAG = 7001
IN_FLIGHT = 2  # messages that a rank may be ahead of what the next one took

_made: dict[str, int] = {}


def next_tag(group: dist.ProcessGroup) -> int:
    """Where the tags of a new pipeline begin: one that went before may have asked for what never came."""
    number = _made[group.group_name] = _made.get(group.group_name, -1) + 1
    return _FIRST_TAG + number * _TAGS


def _format(tensors: Sequence[Tensor]) -> list[int]:
    """The types and shapes of some tensors as whole numbers."""
    told = []
    for tensor in tensors:
        if tensor.dtype not in _DTYPES or tensor.dim() > _DIMS:
            raise ValueError(f"a stage cannot send a tensor of {tensor.dtype} with {tensor.dim()} dimensions")
        told += [_DTYPES.index(tensor.dtype), tensor.dim(), *tensor.shape, *[0] * (_DIMS - tensor.dim())]
    return told


def _room(told: list[int], device: torch.device) -> list[Tensor]:
    """Tensors of a format, with nothing in them yet."""
    places = [told[index : index + 2 + _DIMS] for index in range(0, len(told), 2 + _DIMS)]
    return [torch.empty(place[2 : 2 + place[1]], dtype=_DTYPES[place[0]], device=device) for place in places]


class Outbox:
    """Messages to the next rank. They are sent while this one goes on, up to `IN_FLIGHT` of them.

    A message is a header, of a fixed size, and its tensors. Each format has tags of its own, by which the next rank can ask for a message
    like the one before while it works on that, and for one of another format when a header says so.
    """

    def __init__(self, rank: int, group: dist.ProcessGroup, tag: int) -> None:
        self._group, self._to, self._ranks, self._tag = group, dist.get_global_rank(group, rank + 1), (rank, rank + 1), tag
        self._formats: dict[tuple[int, ...], int] = {}
        self._flying: deque[tuple[list[Any], list[Tensor]]] = deque()

    def send(self, kind: str, number: int, tensors: Sequence[Tensor]) -> None:
        self.wait(IN_FLIGHT - 1)
        told = _format(tensors)
        if len(self._formats) < _FORMATS:
            self._formats.setdefault(tuple(told), len(self._formats))
        index = self._formats.get(tuple(told), _FORMATS)
        header = [KINDS.index(kind), number, index, len(tensors), *told]
        parts = [torch.tensor(header + [0] * (_HEADER - len(header))), *(t.detach().contiguous() for t in tensors)]
        tags = [self._tag, *_tags(self._tag, index, len(tensors))]
        with _told(*self._ranks):
            works = [dist.isend(part, self._to, self._group, tag) for part, tag in zip(parts, tags, strict=True)]
        self._flying.append((works, parts))

    def wait(self, most: int = 0) -> None:
        """Wait until at most so many messages are under way."""
        with _told(*self._ranks):
            while len(self._flying) > most:
                for work in self._flying[0][0]:
                    work.wait()
                self._flying.popleft()


class Inbox:
    """Messages from the rank before. The next one is asked for before the message in hand is worked on: it comes in meanwhile."""

    def __init__(self, rank: int, group: dist.ProcessGroup, tag: int, device: torch.device) -> None:
        self._group, self._from, self._ranks = group, dist.get_global_rank(group, rank - 1), (rank, rank - 1)
        self._tag, self._device = tag, device
        self._header: _Asked | None = None
        self._asked: dict[int, _Asked] = {}  # for each format, the message of it that comes next

    def receive(self, kind: str, number: int) -> list[Tensor]:
        """The tensors of the next message; RuntimeError where it is another one than is expected here."""
        with _told(*self._ranks):
            (told,) = (self._header or self._ask([torch.zeros(_HEADER, dtype=torch.int64)], [self._tag])).taken()
            sent, at, index, count, *rest = told.tolist()
            described = rest[: count * (2 + _DIMS)]
            tensors = (self._asked.pop(index, None) or self._ask_for(index, described)).taken()
        with suppress(RuntimeError):  # the rank before may have ended, which is an error only where more is wanted of it
            self._header = None
            self._header = self._ask([torch.zeros(_HEADER, dtype=torch.int64)], [self._tag])
            if index < _FORMATS and self._device.type == "cpu":  # without tags, as in NCCL, only what surely comes can be asked for
                self._asked[index] = self._ask_for(index, described)
        if (KINDS[sent], at) != (kind, number):
            me, before = self._ranks
            raise RuntimeError(
                f"rank {me} of the pipeline is at {kind} after {number} steps, and rank {before} at {KINDS[sent]} after {at}: let all "
                "ranks make the same calls in the same order, and load checkpoints of one step"
            )
        return tensors

    def _ask_for(self, index: int, described: list[int]) -> _Asked:
        tensors = _room(described, self._device)
        return self._ask(tensors, _tags(self._tag, index, len(tensors)))

    def _ask(self, tensors: list[Tensor], tags: Sequence[int]) -> _Asked:
        return _Asked([dist.irecv(t, self._from, self._group, tag) for t, tag in zip(tensors, tags, strict=True)], tensors)


class _Asked(NamedTuple):
    """Tensors that come in."""

    works: list[Any]
    tensors: list[Tensor]

    def taken(self) -> list[Tensor]:
        for work in self.works:
            work.wait()
        return self.tensors


def _tags(tag: int, index: int, count: int) -> range:
    first = tag + 1 + index * _TENSORS
    return range(first, first + count)


@contextmanager
def _told(me: int, other: int) -> Iterator[None]:
    """Say in a sentence whom a rank waited for in vain."""
    try:
        yield
    except RuntimeError as error:
        verb = "send to" if other > me else "hear from"
        raise RuntimeError(
            f"rank {me} of the pipeline could not {verb} rank {other}: that process has ended, or was busy for longer than the timeout of "
            f"the process group, which init_process_group(timeout=...) sets ({(str(error).splitlines() or [''])[0]})"
        ) from error
