"""Commands that train: one run, a search, the paper's studies, the demonstration."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Collection
from pathlib import Path
from typing import Annotated, Literal

import typer

from forwardgrad.lab import beyond, noise, recipes
from forwardgrad.lab.commands.options import (
    Address,
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
    ExecutorOption,
    Gpus,
    Jobs,
    Model,
    OptimizerOption,
    Out,
    Precise,
    RetryFailed,
    Seed,
    Seeds,
    Threads,
    estimator_of,
    numbers,
    write_report,
)
from forwardgrad.lab.errors import UserError
from forwardgrad.lab.place import Place
from forwardgrad.lab.run import Optimizer, Run
from forwardgrad.lab.spec import format_estimator, parse_estimator
from forwardgrad.lab.store import Store
from forwardgrad.lab.study import Arm, Study, run_study

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
) -> None:
    """Train one network once and print its validation and test results."""
    options = Optimizer(optimizer, lr, decay, momentum, beta1, beta2, weight_decay, anneal, cap)
    run = Run(data, model, estimator_of(estimator), options, epochs, batch_size, seed, precision=precision, engine=engine)
    from forwardgrad.lab.execute import execute
    from forwardgrad.lab.progress import Progress, describe

    store, progress = Store(out), Progress({run.identity: f"{model} {estimator}"})
    result = execute([run], store, Place(device, data_dir), progress)[run.identity]
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
    batch_size: BatchSize = 64,
    seeds: Seeds = 1,
    device: Device = "cpu",
    data_dir: DataDir = None,
    out: Out = Path("results"),
    jobs: Jobs = 1,
    batched: Batched = None,
    threads: Threads = None,
    executor: ExecutorOption = "process",
    address: Address = None,
    gpus: Gpus = None,
    retry_failed: RetryFailed = False,
) -> None:
    """Search a grid on the validation split, then train the best point on fresh seeds."""
    place = Place(device, data_dir, jobs, batched, executor, address, gpus, threads, retry_failed=retry_failed)
    given = {"lr": lr, "decay": decay, "momentum": momentum, "weight_decay": weight_decay}
    space = {name: numbers(text, f"--{name.replace('_', '-')}") for name, text in given.items()}
    first = {name: values[0] for name, values in space.items()}
    options = Optimizer(optimizer, **first, beta1=beta1, beta2=beta2, anneal=anneal, cap=cap)
    run = Run(data, model, estimator_of(estimator), options, epochs, batch_size)
    for name, values in space.items():  # a bad value anywhere in the grid is told before anything runs
        for value in values:
            dataclasses.replace(options, **{name: value})  # type: ignore[arg-type]
    spec = format_estimator(parse_estimator(estimator))
    kind, group = run.estimator["name"], f"{model} · {data} · {optimizer}"
    label = recipes.LABELS.get(spec, spec)
    arm = Arm(f"{data}-{model}-{optimizer}-{spec}", group, kind, label, run, space)
    write_report(carry_out(Study("tune", "Tuning", (arm,), seeds, tuning_epochs), out, place))


def reproduce(
    recipe: Annotated[Literal["table1", "figure1", "figure2", "baydin", "beyond", "noise"], typer.Argument(help="What to reproduce.")],
    rows: Annotated[
        str | None, typer.Option(help="Only these rows, separated by commas: numbers, or starts of names: nn, cnn-adam.")
    ] = None,
    epochs: Annotated[int | None, typer.Option(min=1, help="Epochs of every run; fewer than published marks it as shortened.")] = None,
    seeds: Annotated[int | None, typer.Option(min=1, help="Final runs of each arm, with seeds 0, 1, ... [default: 1; beyond: 3]")] = None,
    retune: Annotated[bool, typer.Option("--retune", help="Search the paper's grids instead of taking Table I's hyperparameters.")] = False,
    tuning_epochs: Annotated[int | None, typer.Option(min=1, help="Epochs of each trial of a search. [default: the paper's]")] = None,
    precision: Precise = "float32",
    device: Device = "cpu",
    data_dir: DataDir = None,
    out: Out = Path("results"),
    jobs: Jobs = 1,
    batched: Batched = None,
    threads: Threads = None,
    executor: ExecutorOption = "process",
    address: Address = None,
    gpus: Gpus = None,
    retry_failed: RetryFailed = False,
) -> None:
    """Run the paper's Table I, its figures, the comparison of Baydin et al., or a study beyond the paper, and write the report.

    Figure 1 shows the CIFAR-10 rows of Table I and figure 2 the MNIST rows: they share their runs with table1. `beyond` tunes every
    estimator on the paper's networks; `noise` shows the explosion on CIFAR-10 as a random walk, and what holds it back.
    """
    place = Place(device, data_dir, jobs, batched, executor, address, gpus, threads, retry_failed=retry_failed)
    chosen = [row.strip() for row in rows.split(",")] if rows is not None else None
    if retune and recipe in RETUNED:
        raise UserError(f"{recipe} {RETUNED[recipe]}; leave --retune out")
    if recipe == "beyond":
        study = beyond.beyond(chosen, epochs, seeds, tuning_epochs)
    elif recipe == "noise":
        study = noise.noise(chosen, epochs, seeds or 1)
    elif recipe == "baydin":
        study = recipes.baydin(epochs, seeds or 1, tuning_epochs, chosen)
    else:
        chosen = chosen or {"table1": None, "figure1": ["cifar-cnn"], "figure2": ["nn", "cnn"]}[recipe]
        study = recipes.table1(chosen, epochs, seeds or 1, retune, tuning_epochs)
    store = carry_out(study.computed_in(precision), out, place)
    if recipe == "baydin":
        from forwardgrad.lab import functions

        functions.write(store)
    if recipe not in ("beyond", "noise"):  # those have more arms than the two that are timed
        _time_steps(store, {arm.run.model for arm in study.arms}, device)
    write_report(store)


def demo(
    epochs: Annotated[int, typer.Option(min=1, help="Epochs of the final runs.")] = 30,
    seeds: Seeds = 3,
    out: Out = Path("demo"),
    jobs: Jobs = 2,
) -> None:
    """Compare both arms on scikit-learn's handwritten digits, without any download, in less than a minute."""
    write_report(carry_out(recipes.demo(epochs, seeds), out, Place(jobs=jobs)))


def carry_out(study: Study, out: Path, place: Place) -> Store:
    """Run what is not finished of a study, under the live display; returns the store it is in."""
    from forwardgrad.lab.environment import command
    from forwardgrad.lab.environment import device as check_device
    from forwardgrad.lab.execute import execute, ready
    from forwardgrad.lab.progress import Progress

    if place.executor == "process":  # nodes of a cluster look for themselves
        check_device(place.device)
    store, progress = Store(out), Progress()
    progress.say(study.title)
    with ready(place):
        run_study(study, store, lambda runs: execute(runs, store, place, progress), command(), progress.names)
    return store


def _time_steps(store: Store, networks: Collection[str], device: str) -> None:
    """Time a step of the networks that were not timed before in this store."""
    from forwardgrad.lab import bench as benchmark
    from forwardgrad.lab.bench_arms import TABLE_1
    from forwardgrad.lab.bench_cases import Case

    if untimed := [Case(name, 64) for name in sorted(set(networks) - benchmark.measured(store, device))]:
        method = benchmark.Method(rounds=15)
        print(benchmark.measure(store, untimed, TABLE_1, method, device=device, say=lambda _: None), file=sys.stderr)
