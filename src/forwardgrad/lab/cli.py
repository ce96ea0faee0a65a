"""The `forwardgrad` command. Nothing heavy is imported before a command needs it, so that --help is quick."""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Collection
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from forwardgrad import __version__
from forwardgrad.lab import beyond, noise, recipes
from forwardgrad.lab.errors import UserError
from forwardgrad.lab.run import DataName, Engine, ModelName, Optimizer, OptimizerName, Precision, Run
from forwardgrad.lab.spec import format_estimator, parse_estimator, parse_estimators
from forwardgrad.lab.store import Store
from forwardgrad.lab.study import Arm, Study, run_study

INTERRUPTED = 130
RETUNED = {
    "baydin": "always shows both: one learning rate for both arms, and each arm tuned",
    "beyond": "always tunes every arm",
    "noise": "has the paper's hyperparameters, times a factor",
}  # recipes that decide themselves what is tuned

app = typer.Typer(add_completion=False, no_args_is_help=True, rich_markup_mode=None, pretty_exceptions_enable=False)
data_app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Download the data sets, or check the files that are there.")
app.add_typer(data_app, name="data")

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
Seeds = Annotated[int, typer.Option(min=1, help="Final runs of each arm, with seeds 0, 1, ...")]
Data = Annotated[DataName, typer.Option(help="Data set.")]
Model = Annotated[ModelName, typer.Option(help="Network; `cifar-cnn` is the CNN of the paper's CIFAR-10 rows.")]
Estimator = Annotated[
    str,
    typer.Option(
        metavar="SPEC", help="How the gradient is found: backprop, 'forward(tangents=8, clip=1.0)'; `forwardgrad estimators` lists all."
    ),
]
OptimizerOption = Annotated[OptimizerName, typer.Option(help="Optimizer; `nesterov` takes the gradient at the look-ahead point.")]
Epochs = Annotated[int, typer.Option(min=1, help="Passes over the training split.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Examples a step.")]
Beta1 = Annotated[float, typer.Option(help="Adam's decay rate of the first moment.")]
Beta2 = Annotated[float, typer.Option(help="Adam's decay rate of the second moment.")]
Anneal = Annotated[bool, typer.Option("--anneal", help="Also anneal the learning rate to zero over the run, along a cosine.")]
Cap = Annotated[float | None, typer.Option(help="Largest step relative to the parameters' norm; longer ones are cut. [default: none]")]
EngineOption = Annotated[Engine, typer.Option(help="How steps are taken; falls back to eager ones, with a warning, where it has to.")]
Precise = Annotated[Precision, typer.Option(help="What layers compute in; parameters and updates are float32 in any case.")]
Seed = Annotated[int, typer.Option(min=0, help="Governs everything random: split, initialisation, order, directions.")]


def main() -> None:
    """Run the command line: every mistake of the user's is one sentence and status 2, Ctrl-C is status 130."""
    try:
        status = app(prog_name="forwardgrad", standalone_mode=False)
    except typer.TyperException as error:
        helps = type(error).__name__ == "NoArgsIsHelpError"  # not a mistake: a user who asks what there is
        status = print(error.format_message()) if helps else _fail(" ".join(error.format_message().split()))
    except UserError as error:
        status = _fail(str(error))
    except OSError as error:
        where = f" {error.filename}" if error.filename else ""
        status = _fail(f"cannot read or write{where} ({error.strerror or error}): mend that and run the same command again to go on")
    except (KeyboardInterrupt, typer.Abort):
        status = INTERRUPTED
    if status == INTERRUPTED:
        print("\nforwardgrad: interrupted; finished runs are kept, and the same command goes on from the last checkpoint", file=sys.stderr)
    sys.exit(status or 0)


def _fail(message: str) -> int:
    print(f"forwardgrad: {message}", file=sys.stderr)
    return 2


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"forwardgrad {__version__}")
        raise typer.Exit


@app.callback()
def forwardgrad(
    version: Annotated[bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")] = False,
) -> None:
    """Train neural networks without a backward pass, and compare that fairly with backpropagation."""


@app.command()
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
    run = Run(data, model, _estimator(estimator), options, epochs, batch_size, seed, precision=precision, engine=engine)
    from forwardgrad.lab.execute import Place, execute
    from forwardgrad.lab.progress import Progress, describe

    store, progress = Store(out), Progress({run.identity: f"{model} {estimator}"})
    result = execute([run], store, Place(device, data_dir), progress)[run.identity]
    print(f"{describe(result)}\n{store.folder(run.identity)}")


@app.command()
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
) -> None:
    """Search a grid on the validation split, then train the best point on fresh seeds."""
    given = {"lr": lr, "decay": decay, "momentum": momentum, "weight_decay": weight_decay}
    space = {name: _numbers(text, f"--{name.replace('_', '-')}") for name, text in given.items()}
    first = {name: values[0] for name, values in space.items()}
    options = Optimizer(optimizer, **first, beta1=beta1, beta2=beta2, anneal=anneal, cap=cap)
    run = Run(data, model, _estimator(estimator), options, epochs, batch_size)
    for name, values in space.items():  # a bad value anywhere in the grid is told before anything runs
        for value in values:
            dataclasses.replace(options, **{name: value})  # type: ignore[arg-type]
    spec = format_estimator(parse_estimator(estimator))
    kind, group = run.estimator["name"], f"{model} · {data} · {optimizer}"
    label = recipes.LABELS.get(spec, spec)
    arm = Arm(f"{data}-{model}-{optimizer}-{spec}", group, kind, label, run, space)
    _report(_run_study(Study("tune", "Tuning", (arm,), seeds, tuning_epochs), out, device, data_dir, jobs, batched))


@app.command()
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
) -> None:
    """Run the paper's Table I, its figures, the comparison of Baydin et al., or a study beyond the paper, and write the report.

    Figure 1 shows the CIFAR-10 rows of Table I and figure 2 the MNIST rows: they share their runs with table1. `beyond` tunes every
    estimator on the paper's networks; `noise` shows the explosion on CIFAR-10 as a random walk, and what holds it back.
    """
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
    store = _run_study(study.computed_in(precision), out, device, data_dir, jobs, batched)
    if recipe == "baydin":
        from forwardgrad.lab import functions

        functions.write(store)
    if recipe not in ("beyond", "noise"):  # those have more arms than the two that are timed
        _time_steps(store, {arm.run.model for arm in study.arms}, device)
    _report(store)


@app.command()
def demo(
    epochs: Annotated[int, typer.Option(min=1, help="Epochs of the final runs.")] = 30,
    seeds: Seeds = 3,
    out: Out = Path("demo"),
    jobs: Jobs = 2,
) -> None:
    """Compare both arms on scikit-learn's handwritten digits, without any download, in less than a minute."""
    _report(_run_study(recipes.demo(epochs, seeds), out, "cpu", None, jobs))


@app.command()
def bench(
    models: Annotated[str | None, typer.Option(help="Networks, or mlp-LAYERSxWIDTH, by commas. [default: nn,cnn,cifar-cnn]")] = None,
    batch_size: Annotated[str, typer.Option(help="Examples a step, one number or several separated by commas.")] = "64",
    sweep: Annotated[Literal["depth", "width", "batch"] | None, typer.Option(help="Vary the MLP's depth or width, or the batch.")] = None,
    arms: Annotated[str | None, typer.Option(metavar="ARMS", help="Names or estimators, separated by commas. [default: all]")] = None,
    law: Annotated[Literal["gaussian", "rademacher"] | None, typer.Option(help="Draws of the arms that move less than all.")] = None,
    layout: Annotated[
        Literal["fastest", "contiguous", "channels-last"], typer.Option(help="Order in memory; `fastest` is backpropagation's choice.")
    ] = "fastest",
    rounds: Annotated[int, typer.Option(min=5, help="Times every arm is measured, in turn with the others.")] = 30,
    seconds: Annotated[float, typer.Option(min=0, help="No round of a case begins later than this; five are always measured.")] = 120,
    repeats: Annotated[int | None, typer.Option(help="Estimates for the noise of an arm; 0: none. [default: 20; in a sweep 0]")] = None,
    cosine: Annotated[str, typer.Option(help="Cosines with the gradient to be priced, separated by commas.")] = "0.1,0.5",
    verify_memory: Annotated[bool, typer.Option("--verify-memory", help="Check every peak against a process of its own.")] = False,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads of torch. [default: torch's own choice]")] = None,
    seed: Seed = 0,
    device: Device = "cpu",
    out: Out = Path("results"),
) -> None:
    """Measure one whole step of every arm, all in turn in one run: time, memory, random numbers, the roofline, and what it is worth."""
    from forwardgrad.lab import bench as benchmark
    from forwardgrad.lab import bench_arms, bench_cases

    cases = bench_cases.cases(models, batch_size, sweep, layout)
    chosen = bench_arms.arms(arms, law)
    repeats = (0 if sweep else 20) if repeats is None else repeats
    method = benchmark.Method(rounds, seconds, seed, repeats, _numbers(cosine, "--cosine"), verify_memory)
    store = Store(out)
    with benchmark.threads(threads):
        print(benchmark.measure(store, cases, chosen, method, device=device, say=lambda words: print(words, file=sys.stderr)))
    _report(store)


@app.command()
def estimators() -> None:
    """List every estimator that --estimator can name, with its options and their defaults."""
    from forwardgrad.lab.listing import listing

    print(listing())


@app.command()
def quality(
    estimators: Annotated[str, typer.Option(metavar="SPECS", help="Estimators, separated by semicolons.")] = "backprop; forward",
    tangents: Annotated[str, typer.Option(help="Numbers of tangents, for every estimator that has them.")] = "1,4,16,64",
    data: Data = "mnist",
    model: Model = "nn",
    batch_size: Annotated[int, typer.Option(min=1, help="Examples in the one batch whose gradient is estimated.")] = 64,
    repeats: Annotated[int, typer.Option(help="Independent estimates of each: an even number, at least 10.")] = 100,
    warm_up: Annotated[int, typer.Option(min=0, help="Steps of Adam with backpropagation before; 0 measures at initialisation.")] = 0,
    learn: Annotated[int, typer.Option(min=0, help="Steps that an estimator with a memory learns first, the weights held still.")] = 200,
    seed: Seed = 0,
    device: Device = "cpu",
    data_dir: DataDir = None,
    out: Out = Path("results"),
) -> None:
    """Measure bias, variance, angle and cost of estimators against the exact gradient of one batch, and add that to the report."""
    from forwardgrad.lab.quality import Setting, arms, measure

    chosen = arms(parse_estimators(estimators), _counts(tangents, "--tangents"))
    setting = Setting(model, data, batch_size, repeats, warm_up, learn, seed)
    store = Store(out)
    print(measure(store, setting, chosen, device=device, data_dir=data_dir, say=lambda words: print(words, file=sys.stderr)))
    _report(store)


@app.command()
def report(directory: Annotated[Path, typer.Argument(metavar="DIR", help="An output folder.")]) -> None:
    """Write the report of an output folder again, from its stored runs."""
    _report(Store(directory, create=False))


@data_app.command()
def fetch(
    names: Annotated[list[str] | None, typer.Argument(help="mnist, cifar10; both if left out.")] = None, data_dir: DataDir = None
) -> None:
    """Download the official files, check them, and lay them out; what is there and good is not downloaded again."""
    from forwardgrad.lab.fetch import fetch as download

    for name in names or ["mnist", "cifar10"]:
        for path in download(name, data_dir):
            print(path)


@data_app.command()
def verify(
    names: Annotated[list[str] | None, typer.Argument(help="mnist, cifar10; both if left out.")] = None, data_dir: DataDir = None
) -> None:
    """Check the data files against their checksums; status 2 where one is missing or damaged."""
    from forwardgrad.lab.data import folder
    from forwardgrad.lab.data import verify as check

    states = check(data_dir, names)
    for name, state in states:
        print(f"{state:8} {name}")
    if wrong := [name for name, state in states if state != "ok"]:
        count = f"{len(wrong)} of {len(states)} files are"
        raise UserError(f"{count} missing or damaged in {folder(data_dir)}: `forwardgrad data fetch` brings them")


def _estimator(text: str) -> dict[str, Any]:
    """The complete description of an estimator, its limits checked before anything runs."""
    from forwardgrad.estimators import from_config, to_config

    try:
        return to_config(from_config(parse_estimator(text)))
    except ValueError as error:
        raise UserError(f"the estimator {text!r} cannot be used: {error}") from error


def _numbers(text: str, option: str) -> tuple[float, ...]:
    try:
        values = tuple(float(part) for part in text.split(","))
    except ValueError as error:
        raise UserError(f"{option} takes numbers separated by commas, not {text!r}") from error
    if not all(math.isfinite(value) for value in values):
        raise UserError(f"{option} takes finite numbers, not {text!r}")
    return values


def _counts(text: str, option: str) -> list[int]:
    words = [word.strip() for word in text.split(",")]
    if not all(word.isdecimal() and int(word) > 0 for word in words):
        raise UserError(f"{option} takes whole numbers of at least 1 separated by commas, not {text!r}")
    return sorted({int(word) for word in words})


def _run_study(study: Study, out: Path, device: str, data_dir: Path | None, jobs: int, batched: bool | None = None) -> Store:
    """Run what is not finished of a study, under the live display; returns the store it is in."""
    from forwardgrad.lab.environment import command
    from forwardgrad.lab.environment import device as check_device
    from forwardgrad.lab.execute import Place, execute
    from forwardgrad.lab.progress import Progress

    check_device(device)
    store, progress, place = Store(out), Progress(), Place(device, data_dir, jobs, batched)
    progress.say(study.title)
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


def _report(store: Store) -> None:
    from forwardgrad.lab.report import write

    print(f"report: {write(store)}")


if __name__ == "__main__":
    main()
