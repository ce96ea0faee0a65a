"""The log of a run's steps: begun with the run, gone on with from its checkpoint, and replayed."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from forwardgrad.estimators import UNLOGGABLE
from forwardgrad.journal import JournalError, StepLog, read_journal
from forwardgrad.lab.errors import UserError
from forwardgrad.lab.studies import Optimizer, Run
from forwardgrad.lab.training.norms import trained
from forwardgrad.lab.training.state import WEIGHTS, read_weights
from forwardgrad.optim import cap_step
from forwardgrad.replaying import replay

if TYPE_CHECKING:
    from forwardgrad.lab.training.training import Training

STEPS_LOG = "steps.log"  # what a run that writes one leaves in its folder


def check_log(training: Training) -> None:
    """UserError where a run cannot be logged."""
    run, state = training.run, training.state
    if not state.estimator.loggable:
        raise UserError(f"--log: {UNLOGGABLE.format(state.estimator)}")
    if run.engine != "eager" or state.generator.device.type != "cpu":
        raise UserError("--log goes with --engine eager on --device cpu: only there are the directions of a step drawn again to the bit")


def opened(folder: Path, step: int) -> StepLog:
    """The log of a run that has come so far; one without a checkpoint is begun anew. UserError where there is none to go on with."""
    path = folder / STEPS_LOG
    if not step:
        path.unlink(missing_ok=True)
        return StepLog(path)
    if not path.exists():
        raise UserError(f"the run in {folder} was begun without --log: go on without it, or choose another --out to begin it again")
    return StepLog(path, since=step)


@contextmanager
def held(optimizer: torch.optim.Optimizer, model: nn.Module, options: Optimizer) -> Iterator[None]:
    """A step of a run: the parameters shrink before it, and its length is capped."""
    if options.weight_decay:
        for group in optimizer.param_groups:
            shrink(group, options.weight_decay)
    if not options.cap:
        yield
        return
    with cap_step(trained(model), options.cap):
        yield


@torch.no_grad()
def shrink(group: dict[str, Any], weight_decay: float) -> None:
    """Shrink the parameters of one group of an optimizer by its learning rate times the weight decay."""
    for p in group["params"]:
        p.mul_(1 - group["lr"] * weight_decay)


@dataclass(frozen=True)
class Rebuilt:
    """What a replay of a run came to: the steps taken, the seconds that took, whether their end was compared with a digest, and whether
    the parameters are those that the run kept (None: it kept none, or they are those of another step)."""

    steps: int
    seconds: float
    compared: bool
    kept: bool | None


def replay_run(training: Training, path: Path, step: int | None) -> Rebuilt:
    """Take the steps of a log again from a run before its first step. UserError where the log does not fit, or comes out different."""
    run, state = training.run, training.state
    try:
        journal = read_journal(path)
        last = len(journal.steps) if step is None else step
        began = time.perf_counter()
        steps = replay(
            path,
            state.model,
            state.optimizer,
            until=last,
            generator=state.generator,
            estimator=state.estimator,
            around=lambda: held(state.optimizer, state.model, run.optimizer),
        )
        seconds = time.perf_counter() - began
    except JournalError as error:
        raise UserError(str(error)) from error
    state.step = steps
    one = journal.steps[last - 1] if last else None
    compared = one is None or one.digest is not None or one.between is not None
    return Rebuilt(steps, seconds, compared, _as_kept(training, path.parent) if last == training.schedule.total else None)


def _as_kept(training: Training, folder: Path) -> bool | None:
    """Whether the parameters are those that the run kept."""
    if not (folder / WEIGHTS).exists():
        return None
    kept = copy.deepcopy(training.state.model)
    read_weights(folder, kept)
    return all(torch.equal(p, q) for p, q in zip(kept.parameters(), training.state.model.parameters(), strict=True))


def buffers_of(run: Run, model: nn.Module) -> str:
    """What to say of buffers that a replay could not know, empty where there are none."""
    found = [name for name, _ in model.named_buffers()]
    return f"; buffers of {run.model} ({', '.join(found[:3])}) follow from the data and are as they were at the start" if found else ""
