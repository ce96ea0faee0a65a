"""Ranks that train one run in lockstep: how they begin alike, which part of a batch is whose, and what each draws by itself."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

from forwardgrad.lab.errors import UserError
from forwardgrad.lab.studies import Run, stream
from forwardgrad.ranks import Distributed, RankGone, hold

NOTHING = -1  # in place of a checkpoint's size


class RankLost(UserError):
    """Ranks of a run have ended, or do not answer: `how` they ended, and how many are `lost`."""

    def __init__(self, how: str, lost: int = 1) -> None:
        super().__init__(f"{how}. The last checkpoint is kept: the same command goes on from there, with any number of --ranks")
        self.how, self.lost = how, lost


class Team:
    """The processes of the default group of torch.distributed that train one run: rank 0 keeps its folder, the others follow.

    Before the first step rank 0 tells the others where to begin: at the start, at a checkpoint, which it sends, or not at all.
    `directions` of them divide the directions of each part of a batch.
    """

    def __init__(self, directions: int = 1) -> None:
        self.group = Distributed(directions=directions)
        self.begun = False

    @property
    def rank(self) -> int:
        """The number of this process among them."""
        return self.group.rank

    @property
    def size(self) -> int:
        """How many they are."""
        return self.group.size

    def told_of(self) -> dict[str, int]:
        """What environment.json says of them."""
        return {"ranks": self.size, **({"directions": self.group.directions} if self.group.directions > 1 else {})}

    def begin(self, checkpoint: bytes) -> None:
        """On rank 0: have all go on from a checkpoint; b"" is the start."""
        self.begun = True
        with self.told():
            _from_first(torch.tensor(len(checkpoint)))
            if checkpoint:
                _from_first(torch.frombuffer(bytearray(checkpoint), dtype=torch.uint8))

    def dismiss(self) -> None:
        """On rank 0: let the others go where there was nothing to do."""
        if not self.rank and not self.begun:
            self.begun = True
            with self.told():
                _from_first(torch.tensor(NOTHING))

    def beginning(self) -> bytes | None:
        """On the others: the checkpoint to go on from, b"" for the start; None where there is nothing to do."""
        size = torch.tensor(0)
        with self.told():
            _from_first(size)
            if int(size) == NOTHING:
                return None
            checkpoint = torch.empty(int(size), dtype=torch.uint8)
            if len(checkpoint):
                _from_first(checkpoint)
        return checkpoint.numpy().tobytes()

    @contextmanager
    def told(self) -> Iterator[None]:
        """Inside, an exchange that fails is a RankLost."""
        try:
            yield
        except (dist.DistError, RankGone) as error:
            raise self._lost(error) from error
        except RuntimeError as error:
            if "gloo" in str(error):  # which does not always say what kind of error it is
                raise self._lost(error) from error
            raise

    def _lost(self, error: BaseException) -> RankLost:
        why = " ".join((str(error.__cause__ or error).splitlines() or [""])[0].split())
        return RankLost(f"rank {self.rank} of {self.size} waited in vain for another rank, which has ended or does not answer ({why})")


def _from_first(message: torch.Tensor) -> None:
    dist.broadcast(message, 0)
    hold(message)


def check_batches(run: Run, examples: int, parts: int) -> None:
    """UserError where a batch of a run has fewer examples than parts."""
    least = min(sizes(run, examples))
    if least < parts:
        which = "a batch has" if least == min(run.batch_size, examples) else f"the last batch of an epoch of {examples:,} examples has"
        raise UserError(
            f"ranks divide every batch into {parts} parts, and {which} {least}: take fewer --ranks, or another --batch-size than "
            f"{run.batch_size}"
        )


def sizes(run: Run, examples: int) -> set[int]:
    """The sizes of a run's batches: that of most, and that of the last one of an epoch."""
    whole = min(run.batch_size, examples)
    return {whole, examples % whole or whole}


def part(count: int, group: Distributed) -> slice:
    """Which of the examples of a batch are this rank's."""
    return slice(count * group.shard // group.shards, count * (group.shard + 1) // group.shards)


def weight(count: int, group: Distributed) -> float:
    """What the mean loss of this rank's part is multiplied by, so that the mean over ranks is that over the whole batch."""
    mine = part(count, group)
    return float((mine.stop - mine.start) * group.shards / count)


def draw_apart(run: Run, step: int, group: Distributed) -> None:
    """Let what a model draws in a step, such as dropout, follow from the step and the part of the batch.

    The first part goes on with the run's own global generator, which its checkpoint holds.
    """
    if group.shard:
        torch.manual_seed(stream(run.seed, f"part {group.shard} of step {step}"))
