"""The options that commands share, and how their texts are read."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any, get_args

import typer

from forwardgrad.lab.commands.factory import estimator, read
from forwardgrad.lab.errors import UserError
from forwardgrad.lab.execution import ExecutorName, LostRank
from forwardgrad.lab.store import Store
from forwardgrad.lab.studies import (
    FAMILIES,
    TRANSFORMERS,
    Augment,
    DataName,
    Engine,
    ModelName,
    OptimizerName,
    Precision,
    format_estimator,
)

OUT = Path("runs")  # not "results": the folder of that name in a checkout holds what was published
Out = Annotated[Path, typer.Option(help="Output folder: runs, studies and the report go there; finished runs in it are not repeated.")]
DataDir = Annotated[
    Path | None, typer.Option(help="Folder with the data sets in torchvision's layout. [default: $FORWARDGRAD_DATA, else the cache folder]")
]
Device = Annotated[str, typer.Option(help="Where to train: cpu, cuda or cuda:N.")]
Jobs = Annotated[int, typer.Option(min=1, help="Runs trained at the same time, dividing the processor's cores.")]
Batched = Annotated[
    bool | None,
    typer.Option("--batched/--no-batched", help="Train runs that differ in seed and rates alone as one program. [default: on a GPU only]"),
]
TensorBoard = Annotated[bool, typer.Option("--tensorboard", help="Also write events for TensorBoard, to the output folder's tensorboard/.")]
KeepWeights = Annotated[
    bool, typer.Option("--keep-weights", help="Keep the weights of final runs in their folders, as `forwardgrad layers` reads them.")
]
StartFrom = Annotated[
    Path | None,
    typer.Option("--start-from", metavar="FOLDER", help="A run's folder, OUT/runs/NAME, whose kept weights this run starts from."),
]
Log = Annotated[
    bool, typer.Option("--log", help="Also write the numbers of each step, from which `forwardgrad replay` builds the model of any step.")
]
ExecutorOption = Annotated[
    ExecutorName, typer.Option(help="Where --jobs runs go: processes on this machine, or a Ray cluster (pip install 'forwardgrad[ray]').")
]
Address = Annotated[str | None, typer.Option(help="Ray cluster to join, HOST:PORT or auto. [default: one is started on this machine]")]
Gpus = Annotated[float | None, typer.Option(help="Part of a GPU that each run takes on Ray, such as 0.25. [default: a whole one]")]
Threads = Annotated[int | None, typer.Option(min=1, help="Threads of each run. [default: the processor's cores over --jobs]")]
Ranks = Annotated[
    int, typer.Option(min=1, help="Processes that train one run together, each a part of every batch. Under torchrun: those it started.")
]
Directions = Annotated[
    int, typer.Option(min=1, help="How many of the --ranks divide the directions of one part of the batch; a divisor of their number.")
]
LostRankOption = Annotated[
    LostRank,
    typer.Option(help="Where one of the --ranks is lost: end, or go on from the last checkpoint with those that are left."),
]
RetryFailed = Annotated[bool, typer.Option("--retry-failed", help="Run again what failed before, from its last checkpoint.")]
Seeds = Annotated[int, typer.Option(min=1, help="Final runs of each arm, with seeds 0, 1, ...")]
Data = Annotated[DataName, typer.Option(help="Data set.")]
Model = Annotated[
    str,
    typer.Option(
        metavar="NAME",
        help=f"Network: {', '.join(get_args(ModelName))} (cifar-cnn is that of the paper's CIFAR-10 rows; minilm reads texts), "
        f"{', '.join(TRANSFORMERS)} or another bert-LAYERSxWIDTH, {', '.join(FAMILIES)} or a resnet of another depth 6n+2; these four "
        "also with a width, as vgg8b-w4 (a quarter) or resnet20-x2 (twice).",
    ),
]
Estimator = Annotated[
    str,
    typer.Option(
        metavar="SPEC",
        help="How the gradient is found: backprop, 'forward(tangents=8, clip=1.0)', or your own, 'module:Class(option=value)'; "
        "`forwardgrad estimators` lists all that come with the project.",
    ),
]
OptimizerOption = Annotated[OptimizerName, typer.Option(help="Optimizer; `nesterov` takes the gradient at the look-ahead point.")]
Epochs = Annotated[int, typer.Option(min=1, help="Passes over the training split.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Examples a step.")]
Beta1 = Annotated[float, typer.Option(help="Adam's decay rate of the first moment.")]
Beta2 = Annotated[float, typer.Option(help="Adam's decay rate of the second moment.")]
Anneal = Annotated[bool, typer.Option("--anneal", help="Also anneal the learning rate to zero over the run, along a cosine.")]
Cap = Annotated[float | None, typer.Option(help="Largest step relative to the parameters' norm; longer ones are cut. [default: none]")]
Augmented = Annotated[
    Augment | None,
    typer.Option(help="What is done to training images: crop-flip moves them by up to 4 pixels and mirrors half. [default: nothing]"),
]
Smoothing = Annotated[float, typer.Option(help="Label smoothing in [0, 1): so much of every target is shared by all classes.")]
WarmUp = Annotated[int, typer.Option(min=0, help="Steps over which the learning rate first rises, in a line.")]
EngineOption = Annotated[Engine, typer.Option(help="How steps are taken; falls back to eager ones, with a warning, where it has to.")]
Precise = Annotated[Precision, typer.Option(help="What layers compute in; parameters and updates are float32 in any case.")]
Seed = Annotated[int, typer.Option(min=0, help="Governs everything random: split, initialisation, order, directions.")]


def estimator_of(text: str) -> dict[str, Any]:
    """The complete description of an estimator, its limits checked before anything runs."""
    from forwardgrad.estimators import to_config

    return to_config(estimator(text))


def spec_of(text: str) -> str:
    """The text of an estimator as tables and labels show it."""
    return format_estimator(read(text))


def numbers(text: str, option: str) -> tuple[float, ...]:
    try:
        values = tuple(float(part) for part in text.split(","))
    except ValueError as error:
        raise UserError(f"{option} takes numbers separated by commas, not {text!r}") from error
    if not all(math.isfinite(value) for value in values):
        raise UserError(f"{option} takes finite numbers, not {text!r}")
    return values


def counts(text: str, option: str) -> list[int]:
    words = [word.strip() for word in text.split(",")]
    if not all(word.isdecimal() and int(word) > 0 for word in words):
        raise UserError(f"{option} takes whole numbers of at least 1 separated by commas, not {text!r}")
    return sorted({int(word) for word in words})


def write_report(store: Store, *, pdf: bool = False) -> None:
    from forwardgrad.lab.report import write

    try:
        page = write(store, pdf=pdf)
    except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as error:  # fields that only another program writes so
        raise UserError(f"no report can be made of {store.root} ({error!r}): one of its files is not as this version writes it") from error
    print(f"report: {page}")
