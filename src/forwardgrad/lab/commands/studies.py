"""Commands that run studies: a user's own, and the paper's."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Collection
from pathlib import Path
from typing import Annotated, Literal

import typer

from forwardgrad.lab import recipes
from forwardgrad.lab.commands.carrying import carry_out, pretrained, show_cost
from forwardgrad.lab.commands.ending import end_of_studies
from forwardgrad.lab.commands.execution_options import ExecutionOptions, takes_execution_options
from forwardgrad.lab.commands.options import Precise, write_report
from forwardgrad.lab.errors import UserError
from forwardgrad.lab.execution import Place
from forwardgrad.lab.recipes import beyond, everything, faster, finetune, noise, passes
from forwardgrad.lab.store import Store
from forwardgrad.lab.studies import Engine, Study

RETUNED = {
    "baydin": "always shows both: one learning rate for both arms, and each arm tuned",
    "beyond": "always tunes every arm",
    "noise": "has the paper's hyperparameters, times a factor",
    "faster": "always tunes both arms",
    "finetune": "always tunes every arm",
    "passes": "always tunes every arm",
}  # recipes that decide themselves what is tuned
TIMED = ("faster", "finetune", "passes")  # recipes whose runs are timed, each by itself
ALLOWED = {"finetune": "seconds", "passes": "forward passes"}  # what these give every arm alike


@takes_execution_options
def study(
    file: Annotated[str, typer.Argument(metavar="FILE.py", help="A file with a function that returns a Study, or FILE.py:FUNCTION.")],
    settings: Annotated[list[str] | None, typer.Option("--set", metavar="NAME=VALUE", help="An argument of that function.")] = None,
    budget: Annotated[bool, typer.Option("--budget", help="Only print what it would cost, from a timed warm-up of every arm.")] = False,
    *,
    execution: ExecutionOptions,
) -> None:
    """Run a study of your own: arms with equal budgets, tuned on validation data, winners on fresh seeds, the test set read once.

    Exit status: 0 where it has all its results, 1 where a run failed, 3 where nothing failed but all trials of an arm diverged.
    """
    from forwardgrad.lab.studies import load

    found, folder = load(file, dict(_setting(text) for text in settings or []))
    place, out = execution.place(path=folder), execution.out
    if budget:
        show_cost(found, out, place)
        return
    store, campaigns = carry_out([found], out, place)
    write_report(store)
    end_of_studies(store, campaigns)


def _setting(text: str) -> tuple[str, str]:
    name, sign, value = text.partition("=")
    if not sign or not name.isidentifier():
        raise UserError(f"--set takes NAME=VALUE, not {text!r}")
    return name, value


@takes_execution_options
def reproduce(
    recipe: Annotated[
        Literal["all", "table1", "figure1", "figure2", "baydin", "beyond", "noise", "faster", "passes", "finetune"],
        typer.Argument(help="What to reproduce."),
    ],
    rows: Annotated[
        str | None, typer.Option(help="Only these rows, separated by commas: numbers, or starts of names: nn, cnn-adam.")
    ] = None,
    epochs: Annotated[int | None, typer.Option(min=1, help="Epochs of every run; fewer than published marks it as shortened.")] = None,
    seeds: Annotated[
        int | None,
        typer.Option(min=1, help="Final runs of each arm, seeds 0, 1, ... [default: 1; beyond, finetune: 3; faster: 6 or 4; passes: 8]"),
    ] = None,
    retune: Annotated[bool, typer.Option("--retune", help="Search the paper's grids instead of taking Table I's hyperparameters.")] = False,
    tuning_epochs: Annotated[int | None, typer.Option(min=1, help="Epochs of each trial of a search. [default: the paper's]")] = None,
    budget: Annotated[
        Literal["small", "medium", "paper", "full"] | None,
        typer.Option(
            help="`all`: small (a quarter of an hour on two cores) or paper; `faster`, `passes`, `finetune`: small (minutes) or full; "
            "`finetune` alone: medium (an hour)."
        ),
    ] = None,
    precision: Precise = "float32",
    engine: Annotated[
        Engine | None,
        typer.Option(help="How steps are taken; falls back to eager ones, with a warning. [default: eager; faster: compile]"),
    ] = None,
    *,
    execution: ExecutionOptions,
) -> None:
    """Run the paper, or a part of it: Table I, its figures, the comparison of Baydin et al., a study beyond it; and write the report.

    `all` runs everything that the paper's claims need, tuned anew with equal budgets on fresh seeds, and ends in the page on those claims.

    Figure 1 shows the CIFAR-10 rows of Table I and figure 2 the MNIST rows: they share their runs with table1. `beyond` tunes every
    estimator on the paper's networks; `noise` shows the explosion on CIFAR-10 as a random walk, and what holds it back.
    `faster` clocks local losses with learned feedback against backpropagation, to the same accuracy: each arm chooses its learning rate,
    batch size and length from the same grid by the time to it. `passes` puts claims of newer papers on random directions to the test, every
    arm with as many forward passes. `finetune` tunes a pretrained transformer on reviews of films, every arm for as many seconds; with
    `--rows words` a small GPT goes on from film critics to reviews of drugs. Runs of these three have one thread each unless told
    otherwise.
    """
    place, out = execution.place(), execution.out
    if recipe == "all":
        unused = {"--rows": rows, "--epochs": epochs, "--tuning-epochs": tuning_epochs, "--retune": retune or None}
        if given := [option for option, value in unused.items() if value is not None]:
            raise UserError(f"`reproduce all` decides about {given[0]} itself: leave it out, or choose with --budget small or paper")
        if budget in ("medium", "full"):
            raise UserError("the budgets of `reproduce all` are small and paper")
        whole = everything("small" if budget == "small" else "paper", seeds)
        return _reproduce_all([study.computed(precision, engine or "eager") for study in whole], out, place)
    if budget is not None and (recipe not in TIMED or budget == "paper" or (budget == "medium" and recipe != "finetune")):
        raise UserError(
            "--budget belongs to `reproduce all` (small, paper), to `reproduce faster` and `passes` (small, full), and to "
            "`reproduce finetune` (small, medium, full): shorten others with --epochs"
        )
    chosen = [row.strip() for row in rows.split(",")] if rows is not None else None
    if retune and recipe in RETUNED:
        raise UserError(f"{recipe} {RETUNED[recipe]}; leave --retune out")
    if recipe == "faster":
        if tuning_epochs is not None:
            raise UserError("trials of `reproduce faster` train as long as final runs: give --epochs, or leave --tuning-epochs out")
        races = faster.faster(chosen, epochs, seeds, small=budget == "small")
        return _race([study.computed(precision, engine or faster.ENGINE) for study in races], recipe, out, place)
    if recipe in ALLOWED:
        if epochs is not None or tuning_epochs is not None:
            option = "--epochs" if epochs is not None else "--tuning-epochs"
            raise UserError(f"{recipe} gives every arm as many {ALLOWED[recipe]}: leave {option} out, and shorten it with --budget small")
        if recipe == "finetune":
            size: finetune.Size = budget or "full"
            alone = _timed(recipe, place)
            starts = {run.identity: pretrained(run, out, alone) for run in finetune.pretraining(chosen, size)}
            made = finetune.finetune(chosen, seeds, size, starts)
        else:
            made = passes.passes(chosen, seeds, small=budget == "small")
        return _race([made.computed(precision, engine or "eager")], recipe, out, place)
    if recipe == "beyond":
        study = beyond.beyond(chosen, epochs, seeds, tuning_epochs)
    elif recipe == "noise":
        study = noise.noise(chosen, epochs, seeds or 1)
    elif recipe == "baydin":
        study = recipes.baydin(epochs, seeds or 1, tuning_epochs, chosen)
    else:
        chosen = chosen or {"table1": None, "figure1": ["cifar-cnn"], "figure2": ["nn", "cnn"]}[recipe]
        study = recipes.table1(chosen, epochs, seeds or 1, retune, tuning_epochs)
    store, campaigns = carry_out([study.computed(precision, engine or "eager")], out, place)
    if recipe == "baydin":
        from forwardgrad.lab.training import functions

        functions.write(store)
    if recipe not in ("beyond", "noise"):  # those have more arms than the two that are timed
        _time_steps(store, {arm.run.model for arm in study.arms}, place.device)
    write_report(store)
    end_of_studies(store, campaigns)


def _reproduce_all(studies: list[Study], out: Path, place: Place) -> None:
    from forwardgrad.lab.training import functions

    store, campaigns = carry_out(studies, out, place)
    functions.write(store)
    _time_steps(store, {arm.run.model for study in studies for arm in study.arms}, place.device)
    write_report(store)
    end_of_studies(store, campaigns)


def _race(studies: list[Study], recipe: str, out: Path, place: Place) -> None:
    """Runs that are timed: each by itself, with as many threads as any other."""
    store, campaigns = carry_out(studies, out, _timed(recipe, place))
    write_report(store)
    end_of_studies(store, campaigns)


def _timed(recipe: str, place: Place) -> Place:
    """Where runs that are timed are trained. UserError where they could not be told apart."""
    if place.batched:
        raise UserError(f"`reproduce {recipe}` times every run by itself: leave --batched out")
    if place.ranks > 1:
        raise UserError(f"`reproduce {recipe}` times every run in one process: leave --ranks out")
    return dataclasses.replace(place, batched=False, threads=place.threads or 1)


def _time_steps(store: Store, networks: Collection[str], device: str) -> None:
    """Time a step of the networks that were not timed before in this store.

    Times of another machine or commit are kept, and nothing is timed beside them.
    """
    from forwardgrad.lab.bench import TABLE_1, BenchCase, BenchOptions, measure_steps, timed_networks, would_replace
    from forwardgrad.lab.report.sections import bench_text

    if untimed := [BenchCase(name, 64) for name in sorted(set(networks) - timed_networks(store, device))]:
        if would_replace(store, device):
            print("bench.json is of another machine or commit and is kept: `forwardgrad bench` times steps here", file=sys.stderr)
            return
        found = measure_steps(store, untimed, TABLE_1, BenchOptions(rounds=15), device=device, say=lambda _: None)
        print("\n\n".join(bench_text(case) for case in found), file=sys.stderr)
