"""The one training loop: every arm goes through it, and runs alone as well as runs together.

It looks for divergence at fixed steps. An evaluation covers the whole split, and its time does not count. Everything random follows from a
run's seed, so a killed run goes on from its checkpoint to the same bits.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, Protocol

import torch

from forwardgrad.lab import environment, interrupts, store
from forwardgrad.lab.errors import UserError
from forwardgrad.lab.studies import Run, import_path, to_json
from forwardgrad.lab.training import builders
from forwardgrad.lab.training.divergence import find_divergence
from forwardgrad.lab.training.evaluation import evaluate
from forwardgrad.lab.training.run_folder import finish, write_environment, write_status
from forwardgrad.lab.training.schedule import CHECK_EVERY, Schedule
from forwardgrad.lab.training.tensorboard import Board
from forwardgrad.lab.training.training import Training


class UnderWay(Protocol):
    """What the loop drives: one run, or several as one program."""

    schedule: Schedule

    @property
    def step(self) -> int:
        """How many steps have been taken."""

    def advance_timed(self, stop: int) -> float:
        """Take the steps up to `stop`; returns how many that is in a second."""

    def look(self) -> bool:
        """Take one step, and do all that the schedule has for it; returns whether a run is left that has not diverged."""

    def tell(self) -> None:
        """Say how far it is, for a display and for TensorBoard."""

    def save(self) -> None:
        """Write a checkpoint."""


def train_to_end(under_way: UnderWay, checkpoint_seconds: float) -> None:
    """Take all steps, or those until every run has diverged."""
    schedule, saved, chunk = under_way.schedule, time.monotonic(), 1
    while under_way.step < schedule.total:
        interrupts.check()
        look = schedule.next_look(under_way.step)
        if look > under_way.step + 1:  # up to the step before the one that is looked at
            per_second = under_way.advance_timed(min(under_way.step + chunk, look - 1))
            chunk = max(1, min(CHECK_EVERY, round(per_second)))  # about a second's worth
            if under_way.step == look - 1:
                continue
        elif not under_way.look():
            return
        under_way.tell()
        if time.monotonic() - saved >= checkpoint_seconds:
            under_way.save()
            saved = time.monotonic()


class SingleRun:
    """One run by itself, as the loop drives it."""

    def __init__(self, training: Training, folder: Path, board: Board) -> None:
        self.training, self.folder, self.board = training, folder, board
        self.schedule = training.schedule
        self.diverged: str | None = None  # why it did

    @property
    def step(self) -> int:
        return self.training.state.step

    def advance_timed(self, stop: int) -> float:
        return self.training.advance_timed(stop)

    def look(self) -> bool:
        step, evaluated = self.step + 1, self.step + 1 in self.schedule.evaluations
        if self.schedule.is_measured(step):
            self.training.step_measured(with_memory=evaluated)
        else:
            self.training.advance_timed(step)
        if self.schedule.is_checked(step):
            self.diverged = find_divergence(self.training)
        if evaluated and self.diverged is None:
            evaluate(self.training)
        return self.diverged is None

    def tell(self) -> None:
        write_status(self.training, self.folder)
        self.board.note()

    def save(self) -> None:
        self.board.flush()
        store.write_checkpoint(self.folder / "checkpoint.pt", self.training.state.dump())


def train(
    run: Run,
    folder: Path,
    *,
    device: str = "cpu",
    data_dir: Path | None = None,
    checkpoint_seconds: float = 60.0,
    tensorboard: Path | None = None,
) -> dict[str, Any]:
    """Train one run in its folder, or go on with it, and return its result. A finished run is only read.

    TensorBoard's files, if asked for, go to a folder of the run's own in `tensorboard`.

    Raises UserError for data that is missing or damaged, an unknown estimator option, or a device that is not there.
    """
    if (done := store.read_result(folder)) is not None:
        return done
    on = environment.device(device)
    _check_code(run)
    dataset = builders.dataset(run, on, data_dir)
    with torch.random.fork_rng([on.index or 0] if on.type == "cuda" else []):
        training = Training.begin(run, dataset, on)
        with store.alone(folder):
            if (done := store.read_result(folder)) is not None:  # another process was quicker
                return done
            store.write_json(folder / "run.json", to_json(run))
            write_environment(folder, environment.describe(on))
            if (checkpoint := folder / "checkpoint.pt").exists():
                training.state.load(checkpoint)
            with Board(tensorboard and tensorboard / run.identity, training) as board:
                under_way = SingleRun(training, folder, board)
                train_to_end(under_way, checkpoint_seconds)
                result = finish(training, folder, under_way.diverged)
                board.end(result)
            return result


def _check_code(run: Run) -> None:
    """Refuse to train with code that changed since the run was described: the result would be stored under the name of another run."""
    named = import_path.paths(run)
    if named and (found := import_path.digest(named)) != run.code:
        raise UserError(f"the code of {', '.join(named.values())} changed while the study ran ({run.code}, now {found}): start it again")
