"""Commands that train: one run, a search, the paper's studies, the demonstration."""

from __future__ import annotations

import dataclasses
import sys
import tempfile
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from forwardgrad.lab import beyond, noise, recipes
from forwardgrad.lab.commands.options import (
    Anneal,
    Batched,
    BatchSize,
    Beta1,
    Beta2,
    Cap,
    Data,
    DataDir,
    Device,
    EngineOption,
    Epochs,
    Estimator,
    Jobs,
    Model,
    OptimizerOption,
    Out,
    Precise,
    Seed,
    Seeds,
    TensorBoard,
    estimator_of,
    numbers,
    write_report,
)
from forwardgrad.lab.errors import UserError
from forwardgrad.lab.everything import Budget, everything
from forwardgrad.lab.length import Length, Pace
from forwardgrad.lab.run import Optimizer, Precision, Run
from forwardgrad.lab.spec import format_estimator, parse_estimator
from forwardgrad.lab.store import Store
from forwardgrad.lab.study import Arm, Study
from forwardgrad.lab.tuning import Campaign, run_study

RETUNED = {
    "baydin": "always shows both: one learning rate for both arms, and each arm tuned",
    "beyond": "always tunes every arm",
    "noise": "has the paper's hyperparameters, times a factor",
}  # recipes that decide themselves what is tuned


def train(
    data: Data = "mnist",
    model: Model = "nn",
    estimator: Estimator = "forward",
    optimizer: OptimizerOption = "sgd",
    lr: Annotated[float, typer.Option(help="Learning rate of the first step.")] = 0.000464,
    decay: Annotated[float, typer.Option(help="Decay k: the learning rate at step t is lr*exp(-k*t).")] = 0.0,
    momentum: Annotated[float, typer.Option(help="Momentum of SGD and Nesterov, in [0, 1).")] = 0.0,
    beta1: Beta1 = 0.9,
    beta2: Beta2 = 0.999,
    weight_decay: Annotated[float, typer.Option(help="Decoupled weight decay: parameters shrink by lr times this at every step.")] = 0.0,
    anneal: Anneal = False,
    cap: Cap = None,
    epochs: Epochs = 10,
    batch_size: BatchSize = 64,
    seed: Seed = 0,
    precision: Precise = "float32",
    engine: EngineOption = "eager",
    device: Device = "cpu",
    data_dir: DataDir = None,
    out: Out = Path("results"),
    tensorboard: TensorBoard = False,
) -> None:
    """Train one network once and print its validation and test results."""
    options = Optimizer(optimizer, lr, decay, momentum, beta1, beta2, weight_decay, anneal, cap)
    run = Run(data, model, estimator_of(estimator), options, epochs, batch_size, seed, precision=precision, engine=engine)
    from forwardgrad.lab.execute import Place, execute
    from forwardgrad.lab.progress import Progress, describe

    _check_tensorboard(tensorboard)
    store, progress = Store(out), Progress({run.identity: f"{model} {estimator}"})
    result = execute([run], store, Place(device, data_dir, tensorboard=tensorboard), progress)[run.identity]
    print(f"{describe(result)}\n{store.folder(run.identity)}")


def tune(
    lr: Annotated[str, typer.Option(help="Learning rates to try, separated by commas.")],
    decay: Annotated[str, typer.Option(help="Decays to try, separated by commas.")] = "0",
    momentum: Annotated[str, typer.Option(help="Momenta to try, separated by commas.")] = "0",
    weight_decay: Annotated[str, typer.Option(help="Decoupled weight decays to try, separated by commas.")] = "0",
    data: Data = "mnist",
    model: Model = "nn",
    estimator: Estimator = "forward",
    optimizer: OptimizerOption = "sgd",
    beta1: Beta1 = 0.9,
    beta2: Beta2 = 0.999,
    anneal: Anneal = False,
    cap: Cap = None,
    epochs: Epochs = 10,
    tuning_epochs: Annotated[int, typer.Option(min=1, help="Epochs of each trial of the grid.")] = 3,
    widen: Annotated[int, typer.Option(min=0, help="Times that the grid may be widened where its best point lies on an edge.")] = 0,
    batch_size: BatchSize = 64,
    seeds: Seeds = 1,
    device: Device = "cpu",
    data_dir: DataDir = None,
    out: Out = Path("results"),
    jobs: Jobs = 1,
    batched: Batched = None,
    tensorboard: TensorBoard = False,
) -> None:
    """Search a grid on the validation split, then train the best point on fresh seeds."""
    given = {"lr": lr, "decay": decay, "momentum": momentum, "weight_decay": weight_decay}
    space = {name: numbers(text, f"--{name.replace('_', '-')}") for name, text in given.items()}
    first: dict[str, Any] = {name: values[0] for name, values in space.items()}
    options = Optimizer(optimizer, **first, beta1=beta1, beta2=beta2, anneal=anneal, cap=cap)
    run = Run(data, model, estimator_of(estimator), options, epochs, batch_size)
    for name, values in space.items():  # a bad value anywhere in the grid is told before anything runs
        for value in values:
            dataclasses.replace(options, **{name: value})  # type: ignore[arg-type]
    spec = format_estimator(parse_estimator(estimator))
    kind, group = run.estimator["name"], f"{model} · {data} · {optimizer}"
    label = recipes.LABELS.get(spec, spec)
    arm = Arm(f"{data}-{model}-{optimizer}-{spec}", group, kind, label, run, space)
    study = Study("tune", "Tuning", (arm,), seeds, Length(epochs=tuning_epochs), widen=widen)
    write_report(carry_out(study, out, device, data_dir, jobs, batched, tensorboard))


def study(
    file: Annotated[
        str, typer.Argument(metavar="FILE.py", help="A Python file with a function that returns a Study; FILE.py:NAME names one.")
    ],
    settings: Annotated[list[str] | None, typer.Option("--set", metavar="NAME=VALUE", help="An argument of that function.")] = None,
    budget: Annotated[bool, typer.Option("--budget", help="Only print what it would cost, from a timed warm-up of every arm.")] = False,
    device: Device = "cpu",
    data_dir: DataDir = None,
    out: Out = Path("results"),
    jobs: Jobs = 1,
    batched: Batched = None,
    tensorboard: TensorBoard = False,
) -> None:
    """Run a study of your own: arms with equal budgets, tuned on validation data, winners on fresh seeds, the test set read once."""
    from forwardgrad.lab.studyfile import load

    given = dict(_setting(text) for text in settings or [])
    found, _ = load(file, given)
    if budget:
        show_cost(found, out, device, data_dir, jobs)
    else:
        write_report(carry_out(found, out, device, data_dir, jobs, batched, tensorboard))


def _setting(text: str) -> tuple[str, str]:
    name, sign, value = text.partition("=")
    if not sign or not name.isidentifier():
        raise UserError(f"--set takes NAME=VALUE, not {text!r}")
    return name, value


def reproduce(
    recipe: Annotated[
        Literal["all", "table1", "figure1", "figure2", "baydin", "beyond", "noise"], typer.Argument(help="What to reproduce.")
    ],
    rows: Annotated[
        str | None, typer.Option(help="Only these rows, separated by commas: numbers, or starts of names: nn, cnn-adam.")
    ] = None,
    epochs: Annotated[int | None, typer.Option(min=1, help="Epochs of every run; fewer than published marks it as shortened.")] = None,
    seeds: Annotated[int | None, typer.Option(min=1, help="Final runs of each arm, with seeds 0, 1, ... [default: 1; beyond: 3]")] = None,
    retune: Annotated[bool, typer.Option("--retune", help="Search the paper's grids instead of taking Table I's hyperparameters.")] = False,
    tuning_epochs: Annotated[int | None, typer.Option(min=1, help="Epochs of each trial of a search. [default: the paper's]")] = None,
    budget: Annotated[Budget | None, typer.Option(help="Of `all`: the paper's own, or a quarter of an hour on two cores.")] = None,
    precision: Precise = "float32",
    device: Device = "cpu",
    data_dir: DataDir = None,
    out: Out = Path("results"),
    jobs: Jobs = 1,
    batched: Batched = None,
    tensorboard: TensorBoard = False,
) -> None:
    """Run the paper, or a part of it: Table I, its figures, the comparison of Baydin et al., a study beyond it; and write the report.

    `all` runs everything that the paper's claims need, tuned anew with equal budgets on fresh seeds, and ends in the page on those claims.

    Figure 1 shows the CIFAR-10 rows of Table I and figure 2 the MNIST rows: they share their runs with table1. `beyond` tunes every
    estimator on the paper's networks; `noise` shows the explosion on CIFAR-10 as a random walk, and what holds it back.
    """
    chosen = [row.strip() for row in rows.split(",")] if rows is not None else None
    if retune and recipe in RETUNED:
        raise UserError(f"{recipe} {RETUNED[recipe]}; leave --retune out")
    if recipe == "all":
        unused = {"--rows": rows, "--epochs": epochs, "--tuning-epochs": tuning_epochs, "--retune": retune or None}
        if given := [option for option, value in unused.items() if value is not None]:
            raise UserError(f"`reproduce all` decides about {given[0]} itself: leave it out, or choose with --budget small or paper")
        return _reproduce_all(everything(budget or "paper", seeds), precision, out, device, data_dir, jobs, batched)
    if budget is not None:
        raise UserError("--budget belongs to `reproduce all`: shorten other recipes with --epochs")
    if recipe == "beyond":
        study = beyond.beyond(chosen, epochs, seeds, tuning_epochs)
    elif recipe == "noise":
        study = noise.noise(chosen, epochs, seeds or 1)
    elif recipe == "baydin":
        study = recipes.baydin(epochs, seeds or 1, tuning_epochs, chosen)
    else:
        chosen = chosen or {"table1": None, "figure1": ["cifar-cnn"], "figure2": ["nn", "cnn"]}[recipe]
        study = recipes.table1(chosen, epochs, seeds or 1, retune, tuning_epochs)
    store = carry_out(study.computed_in(precision), out, device, data_dir, jobs, batched, tensorboard)
    if recipe == "baydin":
        from forwardgrad.lab import functions

        functions.write(store)
    if recipe not in ("beyond", "noise"):  # those have more arms than the two that are timed
        _time_steps(store, {arm.run.model for arm in study.arms}, device)
    write_report(store)


def _reproduce_all(
    studies: tuple[Study, ...], precision: Precision, out: Path, device: str, data_dir: Path | None, jobs: int, batched: bool | None
) -> None:
    from forwardgrad.lab import functions

    for study in studies:
        store = carry_out(study.computed_in(precision), out, device, data_dir, jobs, batched)
    functions.write(store)
    _time_steps(store, {arm.run.model for study in studies for arm in study.arms}, device)
    write_report(store)


def demo(
    epochs: Annotated[int, typer.Option(min=1, help="Epochs of the final runs.")] = 30,
    seeds: Seeds = 3,
    out: Out = Path("demo"),
    jobs: Jobs = 2,
) -> None:
    """Compare both arms on scikit-learn's handwritten digits, without any download, in less than a minute."""
    write_report(carry_out(recipes.demo(epochs, seeds), out, "cpu", None, jobs))


def carry_out(
    study: Study, out: Path, device: str, data_dir: Path | None, jobs: int, batched: bool | None = None, tensorboard: bool = False
) -> Store:
    """Run what is not finished of a study, under the live display; returns the store it is in."""
    from forwardgrad.lab.environment import command
    from forwardgrad.lab.environment import device as check_device
    from forwardgrad.lab.execute import Place, execute
    from forwardgrad.lab.progress import Progress

    check_device(device)
    _check_tensorboard(tensorboard)
    store, progress, place = Store(out), Progress(), Place(device, data_dir, jobs, batched, tensorboard)
    progress.say(study.title)
    run_study(study, store, lambda runs: execute(runs, store, place, progress), command(), progress.names, pace_on(device, data_dir))
    return store


def show_cost(study: Study, out: Path, device: str, data_dir: Path | None, jobs: int) -> None:
    """Print what a study would cost, from a timed warm-up of every arm; nothing is stored."""
    from forwardgrad.lab.environment import command
    from forwardgrad.lab.environment import device as check_device
    from forwardgrad.lab.paces import costs, table

    check_device(device)
    with tempfile.TemporaryDirectory() as away:
        store = Store(out if (out / "runs").is_dir() else Path(away))
        campaign = Campaign(study, store, lambda runs: {}, command(), pace_on(device, data_dir))
        print(table(costs(campaign, data_dir), jobs))


def pace_on(device: str, data_dir: Path | None) -> Callable[[Run], Pace]:
    """What a step costs here, measured when it is asked for."""

    def pace(run: Run) -> Pace:
        from forwardgrad.lab.paces import measure

        return measure(run, device, data_dir)

    return pace


def _check_tensorboard(wanted: bool) -> None:
    """Told before anything runs, not by the first run."""
    if wanted:
        from forwardgrad.lab.tensorboard import installed

        installed()


def _time_steps(store: Store, networks: Collection[str], device: str) -> None:
    """Time a step of the networks that were not timed before in this store."""
    from forwardgrad.lab import bench as benchmark
    from forwardgrad.lab.bench_arms import TABLE_1
    from forwardgrad.lab.bench_cases import Case

    if untimed := [Case(name, 64) for name in sorted(set(networks) - benchmark.measured(store, device))]:
        method = benchmark.Method(rounds=15)
        print(benchmark.measure(store, untimed, TABLE_1, method, device=device, say=lambda _: None), file=sys.stderr)
