"""`Distributed`: processes of torch.distributed that train one model, and send one another a few numbers a step."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Generator, Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from forwardgrad.directions import fork, streams
from forwardgrad.factored import Gradient
from forwardgrad.ranks.averaging import averaged
from forwardgrad.ranks.digest import digest, of_state, of_text
from forwardgrad.ranks.together import Ranks, share_of
from forwardgrad.ranks.wire import Wire


class Distributed(Ranks):
    """The processes (ranks) of a torch.distributed group as one trainer: pass it as `group` to `estimate_grad_` or `TrainingStep`.

    Every rank has the model with the same parameters, and a generator with the same seed, so all of them draw the same directions. What a
    rank has to tell the others is the derivative along each direction.

    - **Data-parallel** (directions=1): each rank has a part of the batch. Formula: dₖ = (1/R) Σᵣ ∇fᵣ·vₖ, with fᵣ the loss of rank r's part.
      With parts of equal size and mean losses that is what one process finds on the whole batch; other parts count alike all the same, as
      in DistributedDataParallel.
    - **Direction-parallel** (directions=R): all ranks have the same batch, and each evaluates K/R of the K directions. Every rank draws all
      K for the move.
    - **Both** (directions=J, J a divisor of R): ranks 0 to J − 1 share the first part of the batch, the next J the second, and so on.

    Bias and variance: those of the estimator with all K directions on the whole batch. Cost: K/J + 1 forward passes a rank, and where
    directions are divided the numbers of all K for the move.
    On the wire: K/J + 1 numbers a rank and step for `ForwardGradient` and `ZerothOrder` with Dense, LowRank or Sparse, and at J = 1 for
    SplitWeights and `Guess`; a loop over chunks of `ForwardGradient` has one more a chunk. Other estimators send the mean of their
    gradients, as thin factors where that is less, and of what they learn. Their ranks draw numbers of their own, at J = 1 alone.

    Parameters are never sent. They stay equal to the bit, as every rank makes the same move by the same code. A digest of them is compared
    every `check_every` steps, and by `compare(model)` for the steps since: ranks that came to differ end with a RuntimeError that names
    the step. Buffers (running statistics of batch normalisation) follow from a rank's own examples, and stay its own.
    A step that ends in an error on one rank leaves the others waiting for it: that rank cannot go on, and they end after the timeout.
    Ranks that torchrun has started again come together by `join_ranks`, and go on by `replay(..., group=)` from the log that is furthest.

    Args:
        group: the group; the default group of `torch.distributed.init_process_group` if left out.
        directions: J ≥ 1, how many ranks divide the directions of a batch; a divisor of the number of ranks, and of K.
        check_every: steps between two comparisons, or None for none but at the start. They take 8 bytes a step.
        timeout: seconds after which a rank that waits for another gives up; those of the group if left out.

    `sent` are the bytes that this rank has sent so far, as payload.

    Raises RuntimeError without an initialised group, and in a step where another rank is elsewhere or gone (`RankGone`); ValueError for
    a number of directions that does not divide the ranks or the tangents.

    Source: the shared seed is that of Salimans et al., "Evolution Strategies as a Scalable Alternative to Reinforcement Learning" (2017),
    section 2.1.
    """

    def __init__(
        self,
        group: dist.ProcessGroup | None = None,
        *,
        directions: int = 1,
        check_every: int | None = 100,
        timeout: float | None = None,
    ) -> None:
        for what, value in (("directions", directions), ("check_every", 1 if check_every is None else check_every)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{what} must be a whole number of at least 1, not {value!r}")
        if timeout is not None and not timeout > 0:
            raise ValueError(f"timeout must be a number of seconds above 0, or None, not {timeout!r}")
        self._wire = Wire(group, timeout)
        if self.size % directions:
            raise ValueError(f"directions={directions} must divide the number of ranks, which is {self.size}")
        self.directions, self.check_every = directions, check_every
        self._watched: Any = WeakIdKeyDictionary()
        self._under_way = False

    @property
    def rank(self) -> int:
        """The number of this process in the group."""
        return self._wire.rank

    @property
    def size(self) -> int:
        """How many processes there are."""
        return self._wire.size

    @property
    def shard(self) -> int:
        """Which part of the batch this rank has: from 0 on, below `shards`. For a `DistributedSampler`, its rank."""
        return self.rank // self.directions

    @property
    def shards(self) -> int:
        """How many parts the batch has. For a `DistributedSampler`, its number of replicas."""
        return self.size // self.directions

    @property
    def sent(self) -> int:
        """Bytes of payload that this rank has sent so far."""
        return self._wire.sent

    @property
    def many(self) -> bool:  # type: ignore[override]
        return self.size > 1

    def broadcast(self, model: nn.Module) -> None:
        """Give every rank the parameters and buffers of rank 0, for models that were not built from the same seed.

        Where all ranks have the same ones already, a digest tells them so, and nothing else is sent.
        """
        tensors = [*model.parameters(), *model.buffers()]
        if _others(self._wire.gathered(digest(tensors).reshape(1))[:, 0]):
            with torch.no_grad():
                self._wire.from_rank(0, tensors)

    def __deepcopy__(self, memo: dict[int, Any]) -> Distributed:
        """A group is no part of what is copied: a twin of a model, or of what trains it, talks to the same processes."""
        return self

    def furthest(self, count: int, content: bytes) -> bytes:
        """What that rank has that counts most, on every rank; of several the first."""
        counts = self._wire.gathered(torch.tensor([count, len(content)], device=self._wire.home))
        rank = int(counts[:, 0].argmax())
        given = bytearray(content) if rank == self.rank else bytearray(int(counts[rank, 1]))
        if not given:
            return b""
        carried = torch.frombuffer(given, dtype=torch.uint8).to(self._wire.home)
        self._wire.from_rank(rank, [carried])
        return carried.cpu().numpy().tobytes()

    def share(self, tangents: int) -> int:
        return share_of(tangents, self.directions)

    def part(self, count: int) -> range:
        each, mine = count // self.directions, self.rank % self.directions
        return range(mine * each, (mine + 1) * each)

    def together(self, loss: Tensor, derivatives: Tensor) -> tuple[Tensor, Tensor]:
        mean, rows = self._told(loss, derivatives)
        return mean, rows.mean(0).flatten()

    def joined(self, loss: Tensor, derivatives: Tensor) -> tuple[Tensor, Tensor]:
        """As `together`, from the derivatives along all directions, with zeros for those that other ranks evaluate (`Apart`)."""
        mean, rows = self._told(loss, derivatives)
        return mean, rows.sum(1).mean(0)

    def _told(self, loss: Tensor, derivatives: Tensor) -> tuple[Tensor, Tensor]:
        """The mean loss, and the derivatives of every rank [shards, directions, k]."""
        dtype = torch.promote_types(loss.dtype, derivatives.dtype)
        rows = self._wire.gathered(torch.cat([loss.reshape(1).to(dtype), derivatives.to(dtype)]))
        each = rows[:, 1:].unflatten(0, (self.shards, self.directions))
        return rows[:, 0].mean().to(loss.dtype), each.to(derivatives.dtype)

    def mean(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        if not tensors:
            return []
        total = self._wire.summed(torch.cat([t.reshape(-1) for t in tensors])) / self.size
        return [part.view(t.shape) for part, t in zip(total.split([t.numel() for t in tensors]), tensors, strict=True)]

    def gradients(self, parameters: Mapping[str, Tensor], parts: Iterable[tuple[str, Gradient]]) -> Iterator[tuple[str, Gradient]]:
        return averaged(self._wire, parameters, parts)

    def own(self, generator: Generator | None) -> Generator | None:
        if generator is None:
            return None
        (seed,) = fork(generator, 1)
        return Generator(generator.device).manual_seed(streams.sown(seed, self.rank) >> 1)

    def check(self, parameters: Mapping[str, Tensor], generator: Generator | None, method: str) -> None:
        """Called ahead of every step: see to it that all ranks began alike, and every `check_every` steps that they still are alike.

        What differs would stay unnoticed otherwise: each rank would go down along the others' derivatives from somewhere else.
        """
        if self._under_way:
            raise RuntimeError(
                f"a step that rank {self.rank} began was never finished, so the other ranks are at another one: end all of them, and start "
                "again from the last checkpoint"
            )
        first = next(iter(parameters.values()))
        if (watched := self._watched.get(first)) is None:
            self._check_start(parameters, generator, method)
            self._watched[first] = _Watched()
        elif self.check_every is None:
            watched.steps += not watched.compared
        elif not watched.compared:
            watched.digests.append(digest(parameters.values()))
            if len(watched.digests) == self.check_every:
                self._compare(watched)
        self._watched[first].compared = False
        self._under_way = True

    def finished(self) -> None:
        self._under_way = False

    def compare(self, model: nn.Module) -> None:
        """See to it that the parameters of a model are equal on all ranks now: at the end of training, or ahead of a checkpoint.

        Raises RuntimeError where they are not, with the first step after which they were not.
        """
        trained = [p for p in model.parameters() if p.requires_grad]
        watched = self._watched.setdefault(trained[0], _Watched())
        if not watched.compared:
            watched.digests.append(digest(trained))
            self._compare(watched)
            watched.compared = True

    def _check_start(self, parameters: Mapping[str, Tensor], generator: Generator | None, method: str) -> None:
        told = digest(parameters.values())
        rows = self._wire.gathered(
            torch.stack([told, *(torch.tensor(n, device=told.device) for n in (of_text(method), of_state(generator)))])
        )
        for what, column, how in (
            ("parameters", 0, "build the model from the same seed on every rank, or call `broadcast(model)` first"),
            ("estimators", 1, "give every rank the same"),
            ("generators", 2, "seed them alike on every rank, and draw from them in steps alone"),
        ):
            if others := _others(rows[:, column]):
                raise RuntimeError(f"the {what} of {_ranks(others)} are not those of rank 0 at the start: {how}")

    def _compare(self, watched: _Watched) -> None:
        rows = self._wire.gathered(torch.stack(watched.digests))
        for index, column in enumerate(rows.T, 1):
            if others := _others(column):
                raise RuntimeError(
                    f"the parameters of {_ranks(others)} are not those of rank 0 after step {watched.steps + index} of these processes: "
                    "let all ranks take the same steps with the same optimizer, learning rate and engine, on processors of one kind, and "
                    "go on from an earlier checkpoint"
                )
        watched.steps += len(watched.digests)
        watched.digests.clear()


@dataclass
class _Watched:
    """The steps of a model that have been compared, and the digests after those that have not."""

    steps: int = 0
    digests: list[Tensor] = field(default_factory=list)
    compared: bool = False  # whether the parameters are still those that were compared last


def _others(told: Tensor) -> list[int]:
    """The ranks that tell another thing than the first."""
    each = told.tolist()
    return [rank for rank, one in enumerate(each) if one != each[0]]


def _ranks(numbers: list[int]) -> str:
    return f"rank{'s' if len(numbers) > 1 else ''} {', '.join(map(str, numbers))}"
