"""The one training loop: every arm goes through it, and runs alone as well as runs together.

It looks for divergence at fixed steps. An evaluation covers the whole split, and its time does not count. Everything random follows from a
run's seed, so a killed run goes on from its checkpoint to the same bits.
"""

from __future__ import annotations

import math
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Protocol

import torch

from forwardgrad.lab import environment, interrupts, store
from forwardgrad.lab.energy import EnergyMeter, energy_meter
from forwardgrad.lab.errors import UserError
from forwardgrad.lab.lockstep import Team, check_batches
from forwardgrad.lab.studies import Run, import_path, to_json
from forwardgrad.lab.training import builders
from forwardgrad.lab.training.divergence import find_divergence
from forwardgrad.lab.training.evaluation import evaluate
from forwardgrad.lab.training.run_folder import finish, write_environment, write_status
from forwardgrad.lab.training.schedule import CHECK_EVERY, Schedule
from forwardgrad.lab.training.step_logs import check_log
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


class Following:
    """One run as a rank that keeps no folder takes part in it: its steps alone."""

    def __init__(self, training: Training) -> None:
        self.training, self.schedule = training, training.schedule
        self.diverged: str | None = None  # why it did

    @property
    def step(self) -> int:
        return self.training.state.step

    def advance_timed(self, stop: int) -> float:
        return self.training.advance_timed(stop)

    def look(self) -> bool:
        self.training.advance_timed(self.step + 1)
        if self.schedule.is_checked(self.step):
            self.diverged = find_divergence(self.training)  # the losses are those of all ranks, and so is what is found
        return self.diverged is None

    def tell(self) -> None:
        """The first rank does."""

    def save(self) -> None:
        """The first rank does."""


class SingleRun(Following):
    """One run by itself, or the first of its ranks, as the loop drives it."""

    def __init__(self, training: Training, folder: Path, board: Board) -> None:
        super().__init__(training)
        self.folder, self.board = folder, board

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
        self.training.sync_log()
        store.write_checkpoint(self.folder / "checkpoint.pt", self.training.state.dump())


def train(
    run: Run,
    folder: Path,
    *,
    device: str = "cpu",
    data_dir: Path | None = None,
    checkpoint_seconds: float = 60.0,
    tensorboard: Path | None = None,
    keep_weights: bool = False,
    log: bool = False,
    alone: bool = False,
    team: Team | None = None,
) -> dict[str, Any]:
    """Train one run in its folder, or go on with it, and return its result. A finished run is only read.

    This process is the first rank of a `team`, whose others `follow`.

    TensorBoard's files, if asked for, go to a folder of the run's own in `tensorboard`. `keep_weights` leaves the
    final weights in the run's folder, and `log` the numbers of its steps. `alone` says that no other run shares the machine: then its
    joules are counted, where they are told.

    Raises UserError for data that is missing or damaged, an unknown estimator option, a device that is not there, a batch that has fewer
    examples than ranks divide it into, or directions that they cannot divide; RankLost where a rank has ended.
    """
    if (done := store.read_result(folder)) is not None:
        return done
    on = environment.device(device)
    check_code(run)
    dataset = builders.dataset(run, on, data_dir)
    if team:
        check_batches(run, len(dataset.train), team.group.shards)
        builders.check_divided(run, team.group.directions)
    with torch.random.fork_rng([on.index or 0] if on.type == "cuda" else []):
        training = Training.begin(run, dataset, on, team.group if team else None, data_dir=data_dir)
        if log:
            check_log(training)
        training.meter = energy_meter(on) if alone else EnergyMeter()
        with store.alone(folder):
            if (done := store.read_result(folder)) is not None:  # another process was quicker
                return done
            store.write_json(folder / "run.json", to_json(run))
            write_environment(folder, environment.describe(on) | (team.told_of() if team else {}))
            if (checkpoint := folder / "checkpoint.pt").exists():
                training.state.load(checkpoint)
            if log:
                training.log_to(folder)
            if team:
                team.begin(store.read_checkpoint(checkpoint) if checkpoint.exists() else b"")
            with Board(tensorboard and tensorboard / run.identity, training) as board, team.told() if team else nullcontext():
                under_way = SingleRun(training, folder, board)
                train_to_end(under_way, checkpoint_seconds)
                training.end_log()
                training.compare()
                result = finish(training, folder, under_way.diverged, keep_weights=keep_weights)
                board.end(result)
            return result


def follow(run: Run, team: Team, *, device: str = "cpu", data_dir: Path | None = None) -> None:
    """Take all steps of a run that the first rank of a team trains; nothing is written.

    Raises UserError as training does, and RankLost where another rank has ended.
    """
    on = environment.device(device)
    check_code(run)
    dataset = builders.dataset(run, on, data_dir)
    builders.check_divided(run, team.group.directions)
    with torch.random.fork_rng([on.index or 0] if on.type == "cuda" else []), team.told():
        training = Training.begin(run, dataset, on, team.group, data_dir=data_dir)
        checkpoint = team.beginning()
        if checkpoint:
            training.state.load(Path("checkpoint.pt"), checkpoint)
        if checkpoint is not None:
            train_to_end(Following(training), math.inf)
            training.compare()


def check_code(run: Run) -> None:
    """Refuse to train with code that changed since the run was described: the result would be stored under the name of another run."""
    named = import_path.paths(run)
    if named and (found := import_path.digest(named)) != run.code:
        raise UserError(f"the code of {', '.join(named.values())} changed while the study ran ({run.code}, now {found}): start it again")
