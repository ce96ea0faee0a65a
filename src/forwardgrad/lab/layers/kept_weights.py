"""Runs whose final weights are looked at: which are meant, and how those come by them that kept none."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from forwardgrad.lab.errors import UserError
from forwardgrad.lab.execution import Place, execute
from forwardgrad.lab.store import Progress, Store, read_checkpoint, results, write_checkpoint
from forwardgrad.lab.studies import Run, find_here, paths


def chosen_runs(store: Store, names: Sequence[str], *, any_run: bool) -> list[Run]:
    """The finished runs of these names, or beginnings of names; without names all runs that kept their weights.

    Raises UserError for a name that no run or several have, a run that has not finished, a run without weights unless `any_run`,
    and a user's own part that is not here.
    """
    from forwardgrad.lab.training import WEIGHTS

    there = store.runs()
    with_weights = [one for one in there if (store.folder(one) / WEIGHTS).exists()]
    wanted = [_named(name, there, store) for name in names] if names else with_weights
    if not wanted:
        raise UserError(f"no run of {store.root} kept its weights: train with --keep-weights, or name runs and add --train")
    found = []
    for identity in dict.fromkeys(wanted):
        stored = store.stored(identity)
        if stored is None or stored.result is None or stored.result["status"] != "finished":
            raise UserError(f"the run {identity} has not finished: only the weights of a finished run are looked at")
        if identity not in with_weights and not any_run:
            raise UserError(f"the run {identity} kept no weights: add --train to train it again, or train with --keep-weights")
        found.append(run := results.described(store.folder(identity), stored))
        for part, path in paths(run).items():
            find_here(path, part)  # a user's own parts are looked for in the current folder
    return found if names else sorted(found, key=lambda run: (run.data, run.model, run.estimator["name"], run.seed))


def _named(name: str, there: Sequence[str], store: Store) -> str:
    found = [identity for identity in there if identity.startswith(name)] if name else []
    if len(found) != 1:
        many = f"{len(found)} runs of {store.root} begin with {name!r}: write more of the name"
        raise UserError(many if found else f"no run of {store.root} is called {name!r}: `forwardgrad list` shows their names")
    return found[0]


def train_again(store: Store, runs: Sequence[Run], place: Place, say: Callable[[str], None]) -> None:
    """Train the runs that kept no weights anew, away from the store, and put their weights beside their results.

    On the same hardware with the same threads they come to the same bits. `say` gets a line about every run that came to another loss.

    Raises UserError for a run that does not finish, and for a trial, which keeps no weights.
    """
    from forwardgrad.lab.training import WEIGHTS

    lacking = [run for run in runs if not (store.folder(run.identity) / WEIGHTS).exists()]
    if trials := [run.identity for run in lacking if not run.test]:
        raise UserError(f"{', '.join(trials)}: trials keep no weights; name final runs")
    if not lacking:
        return
    with tempfile.TemporaryDirectory() as name:
        away = Store(Path(name))
        found = execute(lacking, away, place, Progress({run.identity: f"{run.model} {run.estimator['name']}" for run in lacking}))
        for run in lacking:
            result, before = found[run.identity], store.result(run.identity)
            if result["status"] != "finished" or before is None:
                raise UserError(f"the run {run.identity} was trained again and {result['status']}: {result['reason']}")
            if result["validation_loss"] != before["validation_loss"]:
                losses = f"{result['validation_loss']} in place of {before['validation_loss']}"
                say(f"{run.identity} came to another validation loss ({losses}): other hardware, threads or versions")
            folder = store.folder(run.identity)
            folder.mkdir(exist_ok=True)  # a packed run has none
            write_checkpoint(folder / WEIGHTS, read_checkpoint(away.folder(run.identity) / WEIGHTS))
