"""Studies that the command line carries out, or whose cost it tells."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from forwardgrad.lab.errors import UserError
from forwardgrad.lab.execution import Place
from forwardgrad.lab.store import Store
from forwardgrad.lab.studies import Pace, Run, Study
from forwardgrad.lab.tuning import Campaign


def carry_out(studies: Sequence[Study], out: Path, place: Place) -> tuple[Store, list[Campaign]]:
    """Run the unfinished runs of some studies, one study after the other, under the live display; returns the store they are in.

    All studies are planned, and what they need is checked, before the first of them writes anything.
    """
    from forwardgrad.lab.environment import command
    from forwardgrad.lab.execution import execute, ready
    from forwardgrad.lab.store import Progress

    check_place(place)
    store, progress = Store(out), Progress()
    store.check()
    campaigns = [
        Campaign(study, store, lambda runs: execute(runs, store, place, progress), command(), _pace(place), _examine(place))
        for study in studies
    ]
    for campaign in campaigns:
        campaign.names = progress.names
        campaign.plan()
    if words := place.crowded:
        progress.say(words)
    with ready(place):
        for campaign in campaigns:
            progress.say(campaign.study.title)
            campaign.run()
            if campaign.record_name != campaign.study.name:
                progress.say(
                    f"{campaign.study.name} is there with runs of another description: this one is stored as {campaign.record_name}"
                )
    return store, campaigns


def pretrained(run: Run, out: Path, place: Place) -> str:
    """The digest of the weights that a run comes to, for others to start from. It is trained unless its weights are there.

    Raises UserError where the run does not finish.
    """
    from forwardgrad.lab.execution import execute
    from forwardgrad.lab.layers import train_again
    from forwardgrad.lab.store import Progress
    from forwardgrad.lab.training import keep_weights_of

    check_place(place)
    store, progress = Store(out), Progress({run.identity: f"{run.model} on {run.data}, to start from"})
    store.check()
    keeping = dataclasses.replace(place, keep_weights=True)
    result = execute([run], store, keeping, progress)[run.identity]
    if result["status"] != "finished":
        raise UserError(f"the run {run.identity}, which others start from, {result['status']}: {result['reason']}")
    train_again(store, [run], keeping, progress.say)  # where another command trained it, and kept no weights
    return keep_weights_of(store.folder(run.identity), place.data_dir)


def show_cost(study: Study, out: Path, place: Place) -> None:
    """Print what a study would cost, from a timed warm-up of every arm; nothing is stored."""
    from forwardgrad.lab.tuning import Planner, cost_table, costs

    check_place(place)
    with tempfile.TemporaryDirectory() as away:
        store = Store(out if Store.there(out) else Path(away))
        print(cost_table(costs(Planner(study, store, _pace(place)), place.data_dir), place))
    if words := place.crowded:
        print(words)


def check_place(place: Place) -> None:
    """Raise UserError for a device or a package that is not there, before anything runs."""
    if place.executor == "process":  # nodes of a cluster look for themselves
        from forwardgrad.lab.environment import device

        device(place.device)
    if place.tensorboard:
        from forwardgrad.lab.training import installed

        installed()


def _examine(place: Place) -> Callable[[Sequence[Run]], None]:
    """A function that checks runs before a record names them. It does not look for data that only the nodes of a cluster see."""

    def look(runs: Sequence[Run]) -> None:
        from forwardgrad.lab.tuning import check_buildable

        if place.address is None:
            check_buildable(runs, place.data_dir, place.directions)

    return look


def _pace(place: Place) -> Callable[[Run], Pace]:
    """A function that measures what a step of a run costs here."""

    def pace(run: Run) -> Pace:
        from forwardgrad.lab.tuning import measure_pace

        try:
            return measure_pace(run, place.device, place.data_dir, place.share)
        except (UserError, OSError):
            raise
        except Exception as error:  # a user's own model, loss or optimizer can raise anything
            why = " ".join(str(error).split()) or "no message"
            raise UserError(f"the warm-up of {run.model} with {run.estimator['name']} stops with {type(error).__name__}: {why}") from error

    return pace
