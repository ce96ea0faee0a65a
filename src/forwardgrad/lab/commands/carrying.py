"""Studies carried out from the command line, or only their cost told."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

from forwardgrad.lab.errors import UserError
from forwardgrad.lab.length import Pace
from forwardgrad.lab.place import Place
from forwardgrad.lab.run import Run
from forwardgrad.lab.store import Store
from forwardgrad.lab.study import Study
from forwardgrad.lab.tuning import Campaign, run_study


def carry_out(study: Study, out: Path, place: Place) -> Store:
    """Run what is not finished of a study, under the live display; returns the store it is in."""
    from forwardgrad.lab.environment import command
    from forwardgrad.lab.execute import execute, ready
    from forwardgrad.lab.progress import Progress

    check(place)
    store, progress = Store(out), Progress()
    progress.say(study.title)
    with ready(place):
        run_study(study, store, lambda runs: execute(runs, store, place, progress), command(), progress.names, _pace(place))
    return store


def show_cost(study: Study, out: Path, place: Place) -> None:
    """Print what a study would cost, from a timed warm-up of every arm; nothing is stored."""
    from forwardgrad.lab.environment import command
    from forwardgrad.lab.paces import costs, table

    check(place)
    with tempfile.TemporaryDirectory() as away:
        store = Store(out if (out / "runs").is_dir() else Path(away))
        campaign = Campaign(study, store, lambda runs: {}, command(), _pace(place))
        print(table(costs(campaign, place.data_dir), place.jobs))


def check(place: Place) -> None:
    """Tell before anything runs, not in the first run, what is not there."""
    if place.executor == "process":  # nodes of a cluster look for themselves
        from forwardgrad.lab.environment import device

        device(place.device)
    if place.tensorboard:
        from forwardgrad.lab.tensorboard import installed

        installed()


def _pace(place: Place) -> Callable[[Run], Pace]:
    """What a step costs here, measured when it is asked for."""

    def pace(run: Run) -> Pace:
        from forwardgrad.lab.paces import measure

        try:
            return measure(run, place.device, place.data_dir, place.share)
        except (UserError, OSError):
            raise
        except Exception as error:  # a user's own model, loss or optimizer can raise anything
            why = " ".join(str(error).split()) or "no message"
            raise UserError(f"the warm-up of {run.model} with {run.estimator['name']} stops with {type(error).__name__}: {why}") from error

    return pace
