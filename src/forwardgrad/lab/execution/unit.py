"""One unit of work: a run, or several that are trained as one program, in whatever process it is given to.

What goes wrong in it comes back as a value.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from forwardgrad.lab.errors import UserError
from forwardgrad.lab.execution.place import Place, launched
from forwardgrad.lab.lockstep import RankLost
from forwardgrad.lab.store import Busy, Store, failure
from forwardgrad.lab.studies import Run
from forwardgrad.lab.training import allocation

Results = dict[str, dict[str, Any]]
Unit = tuple[Run, ...]


class FailedTogether:
    """What comes back of several runs that failed as one program. Which of them it was is found by taking the unit apart."""


class WorkerDied:
    """What comes back of a unit whose worker ended without a word. `how` it ended; whether it `counts`, as perhaps the unit's own doing."""

    def __init__(self, how: str, *, counts: bool = True) -> None:
        self.how, self.counts = how, counts


class FewerRanks:
    """What comes back of a run that lost ranks, and is to go on with those that are left: how they ended, and how many `left`."""

    def __init__(self, how: str, left: int) -> None:
        self.how, self.left = how, left


class GpuLost(UserError):
    """After a run that failed, this process cannot use its GPU any more; another one can."""


# What comes back of a unit: results, or what happened instead.
Reply = Results | FailedTogether | FewerRanks | WorkerDied | UserError | OSError


def train_unit(unit: Unit, store: Store, place: Place) -> Reply:
    """Train a unit.

    A run that throws or exhausts the memory has a result that says so. Mistakes of the user's and of the disk come back as they are, and so
    does Busy where another process holds one of the runs.
    """
    try:
        with _at_home(place):
            return _train(unit, store, place)
    except RankLost as error:
        if place.lost_rank == "go-on":
            return FewerRanks(error.how, max(1, place.ranks - error.lost))
        return error if place.alone else WorkerDied(f"lost a rank ({error.how})")
    except (UserError, OSError) as error:
        return error
    except (Exception, SystemExit) as error:
        details = traceback.format_exc()
        reply = give_up(unit[0], store, reason_of(error), details) if len(unit) == 1 else take_apart(unit, store)
        if isinstance(reply, Exception) or not _gpu_is_lost(place.device):
            return reply
        return GpuLost(f"the GPU cannot be used any more after a run that failed ({reason_of(error)}): run the same command again to go on")


def give_up(run: Run, store: Store, reason: str, details: str) -> Reply:
    """The result of a run that failed, or what keeps it from being written."""
    try:
        return {run.identity: failure.record(run, store, reason, details)}
    except (UserError, OSError) as error:
        return error


def take_apart(unit: Unit, store: Store) -> Reply:
    """Forget how far several runs had come together; each of them is begun again, in smaller company."""
    from forwardgrad.lab.training import batched

    try:
        batched.forget(unit, store)
    except Busy as error:
        return error
    return FailedTogether()


def reason_of(error: BaseException) -> str:
    """What an exception says, in one line."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return f"the memory was exhausted ({type(error).__name__})"
    said = " ".join(str(error).split())
    return f"{type(error).__name__}: {said}" if said else type(error).__name__


def _gpu_is_lost(device: str) -> bool:
    """Whether an error has left a process without its GPU, as a failed assertion in a kernel does: every later call fails there."""
    import torch

    if not device.startswith("cuda") or not torch.cuda.is_initialized():
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


def _train(unit: Unit, store: Store, place: Place) -> Results:
    options: Any = {"device": place.device, "data_dir": place.data_dir, "checkpoint_seconds": place.checkpoint_seconds}
    options["tensorboard"] = store.root / "tensorboard" if place.tensorboard else None
    options |= {"keep_weights": place.keep_weights, "alone": place.alone}
    if len(unit) > 1:
        from forwardgrad.lab.training import batched

        return batched.train(unit, store, **options)
    from forwardgrad.lab.training import train

    (run,) = unit
    folder = store.folder(run.identity)
    if place.ranks == 1:
        return {run.identity: train(run, folder, log=place.log, **options)}
    from forwardgrad.lab.execution.team import team_of

    with team_of(run, place) as team:
        return {run.identity: train(run, folder, log=place.log, team=team, **options)}


@contextmanager
def _at_home(place: Place) -> Iterator[None]:
    """The threads and the modules that a run is given, and what was there before again after it."""
    import torch

    allocation.keep()
    threads, path = torch.get_num_threads(), list(sys.path)
    if place.threads is not None or (place.ranks > 1 and launched() == 1):
        torch.set_num_threads(place.share)
    if place.path is not None:
        sys.path.insert(0, str(place.path.resolve()))
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        sys.path[:] = path
