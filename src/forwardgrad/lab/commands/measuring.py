"""Commands that measure: the cost of a step, the quality of an estimate; and the list of what can be measured."""

from __future__ import annotations

import sys
from typing import Annotated, Literal

import typer

from forwardgrad.lab.commands.options import OUT, Data, DataDir, Device, Model, Out, Seed, counts, numbers, write_report
from forwardgrad.lab.store import Store
from forwardgrad.lab.studies import parse_estimators


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
    out: Out = OUT,
) -> None:
    """Measure one whole step of every arm, all in turn in one run: time, memory, random numbers, the roofline, and what it is worth."""
    from forwardgrad.lab.bench import BenchOptions, chosen_arms, chosen_cases, measure_steps, torch_threads
    from forwardgrad.lab.report.sections import bench_text

    cases = chosen_cases(models, batch_size, sweep, layout)
    chosen = chosen_arms(arms, law, on_gpu=device.startswith("cuda"))
    repeats = (0 if sweep else 20) if repeats is None else repeats
    cosines = numbers(cosine, "--cosine")
    options = BenchOptions(rounds=rounds, seconds=seconds, seed=seed, repeats=repeats, cosines=cosines, verify_memory=verify_memory)
    store = Store(out)
    store.check()
    with torch_threads(threads):
        found = measure_steps(store, cases, chosen, options, device=device, say=_say)
    print("\n\n".join(bench_text(case) for case in found))
    write_report(store)


def estimators() -> None:
    """List every estimator that --estimator can name, with its options and their defaults."""
    from forwardgrad.lab.commands.listing import listing

    print(listing())


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
    out: Out = OUT,
) -> None:
    """Measure bias, variance, angle and cost of estimators against the exact gradient of one batch, and add that to the report."""
    from forwardgrad.lab.bench import QualitySetting, estimators_at, measure_estimates
    from forwardgrad.lab.report.sections import quality_text

    chosen = estimators_at(parse_estimators(estimators), counts(tangents, "--tangents"))
    setting = QualitySetting(model=model, data=data, batch=batch_size, repeats=repeats, warm_up=warm_up, learn=learn, seed=seed)
    store = Store(out)
    store.check()
    print(quality_text(measure_estimates(store, setting, chosen, device=device, data_dir=data_dir, say=_say)))
    write_report(store)


def _say(words: str) -> None:
    """Print how far a measurement is, apart from its result."""
    print(words, file=sys.stderr)
