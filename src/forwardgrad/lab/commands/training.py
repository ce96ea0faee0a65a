"""Commands that train: one run, the search of one arm, the demonstration."""

from __future__ import annotations

import dataclasses
import shlex
from pathlib import Path
from typing import Annotated, Any

import typer

from forwardgrad.lab import recipes
from forwardgrad.lab.commands.carrying import carry_out, check_place
from forwardgrad.lab.commands.ending import end_of_run, end_of_studies
from forwardgrad.lab.commands.execution_options import ExecutionOptions, takes_execution_options
from forwardgrad.lab.commands.options import (
    OUT,
    Anneal,
    Augmented,
    BatchSize,
    Beta1,
    Beta2,
    Cap,
    Data,
    DataDir,
    Device,
    Directions,
    EngineOption,
    Epochs,
    Estimator,
    Jobs,
    KeepWeights,
    Log,
    LostRankOption,
    Model,
    OptimizerOption,
    Out,
    Precise,
    Ranks,
    RetryFailed,
    Seed,
    Seeds,
    Smoothing,
    StartFrom,
    TensorBoard,
    WarmUp,
    estimator_of,
    numbers,
    spec_of,
    write_report,
)
from forwardgrad.lab.execution import Place, launched
from forwardgrad.lab.store import Progress, Store
from forwardgrad.lab.studies import Arm, Length, Optimizer, Run, Study, folder_of, signed


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
    warm_up: WarmUp = 0,
    augment: Augmented = None,
    label_smoothing: Smoothing = 0.0,
    epochs: Epochs = 10,
    batch_size: BatchSize = 64,
    seed: Seed = 0,
    precision: Precise = "float32",
    engine: EngineOption = "eager",
    device: Device = "cpu",
    data_dir: DataDir = None,
    out: Out = OUT,
    retry_failed: RetryFailed = False,
    tensorboard: TensorBoard = False,
    keep_weights: KeepWeights = False,
    ranks: Ranks = 1,
    directions: Directions = 1,
    lost_rank: LostRankOption = "end",
    log: Log = False,
    start_from: StartFrom = None,
) -> None:
    """Train one network once and print its validation and test results.

    Exit status: 0 where it finished, 1 where it failed, 3 where it diverged.
    """
    options = Optimizer(
        optimizer,
        lr,
        decay=decay,
        momentum=momentum,
        beta1=beta1,
        beta2=beta2,
        weight_decay=weight_decay,
        anneal=anneal,
        cap=cap,
        warm_up=warm_up,
    )
    how: dict[str, Any] = {"precision": precision, "engine": engine, "augment": augment, "label_smoothing": label_smoothing}
    how["start"] = _start(start_from, data_dir)
    run = signed(Run(data, model, estimator_of(estimator), options, epochs, batch_size, seed, **how))
    where: dict[str, Any] = {"retry_failed": retry_failed, "tensorboard": tensorboard, "keep_weights": keep_weights, "log": log}
    where |= {"ranks": ranks, "directions": directions, "lost_rank": lost_rank}
    place = Place(device=device, data_dir=data_dir, path=folder_of(run), **where)
    check_place(place)
    from forwardgrad.lab.store import describe
    from forwardgrad.lab.training import STEPS_LOG, WEIGHTS, builders

    run = signed(run)
    builders.check_divided(run, directions)
    progress = Progress({run.identity: f"{model} {estimator}"})
    if (result := _result(run, out, place, progress)) is None:
        return
    store = Store(out)
    print(f"{describe(result)}\n{store.folder(run.identity)}")
    if keep_weights and result["status"] == "finished" and not (store.folder(run.identity) / WEIGHTS).exists():
        again = f"forwardgrad layers {shlex.quote(str(out))} {run.identity} --train"
        progress.say(f"this run was finished before, and kept no weights: `{again}` trains it again for them")
    if log and result["status"] != "failed" and not (store.folder(run.identity) / STEPS_LOG).exists():
        progress.say("this run was finished before, and wrote no log: choose another --out to train it again for one")
    end_of_run(result, store.folder(run.identity))


def _start(folder: Path | None, data_dir: Path | None) -> str | None:
    """The digest of the weights of a run, which are kept where others find them."""
    if folder is None:
        return None
    from forwardgrad.lab.training import keep_weights_of

    return keep_weights_of(folder, data_dir)


def _result(run: Run, out: Path, place: Place, progress: Progress) -> dict[str, Any] | None:
    """Train a run, with the ranks that torchrun started if it did; None on those of them that only follow."""
    from forwardgrad.lab.execution import execute, follow_first, joined

    if launched() == 1:
        if words := place.crowded:
            progress.say(words)
        return execute([run], Store(out), place, progress)[run.identity]
    with joined(place) as (place, team):
        if not team.rank:
            return execute([run], Store(out), place, progress)[run.identity]
        follow_first(run, place, team)
    return None


@takes_execution_options
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
    warm_up: WarmUp = 0,
    augment: Augmented = None,
    label_smoothing: Smoothing = 0.0,
    epochs: Epochs = 10,
    tuning_epochs: Annotated[int, typer.Option(min=1, help="Epochs of each trial of the grid.")] = 3,
    widen: Annotated[int, typer.Option(min=0, help="Times that the grid may be widened where its best point lies on an edge.")] = 0,
    batch_size: BatchSize = 64,
    seeds: Seeds = 1,
    engine: EngineOption = "eager",
    *,
    execution: ExecutionOptions,
) -> None:
    """Search a grid on the validation split, then train the best point on fresh seeds."""
    given = {"lr": lr, "decay": decay, "momentum": momentum, "weight_decay": weight_decay}
    space = {name: numbers(text, f"--{name.replace('_', '-')}") for name, text in given.items()}
    first: dict[str, Any] = {name: values[0] for name, values in space.items()}
    options = Optimizer(optimizer, **first, beta1=beta1, beta2=beta2, anneal=anneal, cap=cap, warm_up=warm_up)
    how: dict[str, Any] = {"engine": engine, "augment": augment, "label_smoothing": label_smoothing}
    run = Run(data, model, estimator_of(estimator), options, epochs, batch_size, **how)
    place = execution.place(folder_of(run))  # where workers find what a user wrote
    for name, values in space.items():  # a bad value anywhere in the grid is told before anything runs
        for value in values:
            dataclasses.replace(options, **{name: value})  # type: ignore[arg-type]
    spec = spec_of(estimator)
    kind, group = run.estimator["name"], f"{model} · {data} · {optimizer}"
    label = recipes.LABELS.get(spec, spec)
    arm = Arm(f"{data}-{model}-{optimizer}-{spec}", group, kind, label, run, space)
    study = Study("tune", "Tuning", (arm,), seeds, Length(epochs=tuning_epochs), widen=widen)
    _carry_out_and_report(study, execution.out, place)


def demo(
    epochs: Annotated[int, typer.Option(min=1, help="Epochs of the final runs.")] = 30,
    seeds: Seeds = 3,
    out: Out = Path("demo"),
    jobs: Jobs = 2,
) -> None:
    """Compare both arms on scikit-learn's handwritten digits, without any download, in less than a minute."""
    _carry_out_and_report(recipes.demo(epochs, seeds), out, Place(jobs=jobs))
    for purpose, command in next_commands(out):
        print(f"{purpose}: {command}")


def next_commands(out: Path) -> tuple[tuple[str, str], ...]:
    """What to try after the demonstration that lies in `out`: a purpose, and a command line that works as it stands."""
    return (
        (
            "Try next, to see how close each estimate comes to the gradient",
            f"forwardgrad quality --data digits --model mlp --out {shlex.quote(str(out))}",
        ),
        ("Or, to see every estimator and its options", "forwardgrad estimators"),
        (
            "Or, to download MNIST (12 MB) and run the paper in a quarter of an hour",
            "forwardgrad data fetch mnist && forwardgrad reproduce all --budget small --jobs 2",
        ),
    )


def _carry_out_and_report(study: Study, out: Path, place: Place) -> None:
    store, campaigns = carry_out([study], out, place)
    write_report(store)
    end_of_studies(store, campaigns)
