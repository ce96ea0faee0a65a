"""Commands that measure: the cost of a step, the quality of an estimate; and the list of what can be measured."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from forwardgrad.lab.commands.options import OUT, Data, DataDir, Device, Model, Out, Seed, counts, estimator_of, numbers, write_report
from forwardgrad.lab.errors import UserError
from forwardgrad.lab.execution import Place
from forwardgrad.lab.store import Store
from forwardgrad.lab.studies import parse_estimators


def bench(
    models: Annotated[
        str | None, typer.Option(help="Networks, or mlp-, vgg-, gpt-, bert-LAYERSxWIDTH, by commas. [default: nn,cnn,cifar-cnn]")
    ] = None,
    batch_size: Annotated[str, typer.Option(help="Examples a step, one number or several separated by commas.")] = "64",
    sequence: Annotated[int | None, typer.Option(min=1, help="Tokens an example, of gpt- and bert- networks. [default: 128]")] = None,
    optimizer: Annotated[str, typer.Option(help="What takes every step: sgd, momentum, adam, adamw; one or several by commas.")] = "sgd",
    sweep: Annotated[
        Literal["depth", "convolutions", "width", "batch"] | None,
        typer.Option(help="Vary the MLP's depth or width, the VGG's depth (`convolutions`), or the batch."),
    ] = None,
    arms: Annotated[str | None, typer.Option(metavar="ARMS", help="Names or estimators, separated by commas. [default: most]")] = None,
    law: Annotated[Literal["gaussian", "rademacher"] | None, typer.Option(help="Draws of the arms that move less than all.")] = None,
    layout: Annotated[
        Literal["fastest", "contiguous", "channels-last"], typer.Option(help="Order in memory; `fastest` is backpropagation's choice.")
    ] = "fastest",
    rounds: Annotated[int, typer.Option(min=5, help="Times every arm is measured, in turn with the others.")] = 30,
    seconds: Annotated[float, typer.Option(min=0, help="No round of a case begins later than this; five are always measured.")] = 120,
    repeats: Annotated[int | None, typer.Option(help="Estimates for the noise of an arm; 0: none. [default: 20; in a sweep 0]")] = None,
    cosine: Annotated[str, typer.Option(help="Cosines with the gradient to be priced, separated by commas.")] = "0.1,0.5",
    verify_memory: Annotated[bool, typer.Option("--verify-memory", help="Check every peak against a process of its own.")] = False,
    loss: Annotated[
        Literal["whole", "parts"], typer.Option(help="Of gpt- networks: scores of all places at once, or of a few (parts).")
    ] = "whole",
    memory_only: Annotated[
        bool, typer.Option("--memory-only", help="Measure the peak memory of one step alone, each arm in a process of its own.")
    ] = False,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads of torch. [default: torch's own choice]")] = None,
    seed: Seed = 0,
    device: Device = "cpu",
    out: Out = OUT,
) -> None:
    """Measure one whole step of every arm, all in turn in one run: time, memory, random numbers, the roofline, and what it is worth."""
    from forwardgrad.lab.bench import FOR_MEMORY, BenchOptions, chosen_arms, chosen_cases, measure_memory, measure_steps, torch_threads
    from forwardgrad.lab.report.sections import bench_text, memory_text

    cases = chosen_cases(models, batch_size, sweep, layout, optimizer, sequence, loss)
    if memory_only:
        if device != "cpu" or not sys.platform.startswith("linux"):
            raise UserError("--memory-only reads the memory of processes, which Linux tells of the processor alone: leave it out")
        store = Store(out)
        store.check()
        with torch_threads(threads):
            peaks = measure_memory(store, cases, chosen_arms(arms or FOR_MEMORY, law), say=_say)
        print("\n\n".join(memory_text(case) for case in peaks))
        write_report(store)
        return
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


def layers(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="An output folder.")],
    runs: Annotated[
        list[str] | None,
        typer.Argument(metavar="[RUN]...", help="Runs by name, or the beginning of it. [default: all that kept their weights]"),
    ] = None,
    estimator: Annotated[str, typer.Option(metavar="SPEC", help="Whose angle with the gradient is measured.")] = "local(feedback=true)",
    examples: Annotated[int, typer.Option(min=10, help="Training examples that a probe learns from.")] = 5000,
    features: Annotated[int, typer.Option(min=1, max=10_000, help="The most numbers that a probe sees of an example.")] = 2048,
    l2: Annotated[float, typer.Option(help="Weight of a probe's penalty l2/2·‖W‖².")] = 1e-3,
    batches: Annotated[int, typer.Option(min=2, help="Training batches whose angle is measured.")] = 10,
    batch_size: Annotated[int, typer.Option(min=1, help="Examples in each of them.")] = 64,
    learn: Annotated[int, typer.Option(min=1, help="Steps that an estimator with a memory learns first, the weights held still.")] = 200,
    untrained: Annotated[bool, typer.Option("--untrained", help="Also measure the networks before their first step.")] = False,
    train: Annotated[bool, typer.Option("--train", help="Train runs that kept no weights again, from their descriptions.")] = False,
    seed: Seed = 0,
    device: Device = "cpu",
    data_dir: DataDir = None,
) -> None:
    """Measure what each layer of trained networks holds (linear probes), and the angle of an estimate with its gradient."""
    from forwardgrad.lab.layers import LayersSetting, chosen_runs, measure_layers, train_again
    from forwardgrad.lab.report.sections import layers_text

    store = Store(directory, create=False)
    store.check()
    how = {
        "examples": examples,
        "most": features,
        "l2": l2,
        "batches": batches,
        "batch": batch_size,
        "learn": learn,
        "untrained": untrained,
    }
    setting = LayersSetting(estimator_of(estimator), seed=seed, **how)  # type: ignore[arg-type]
    chosen = chosen_runs(store, runs or [], any_run=train)
    if train:
        train_again(store, chosen, Place(device=device, data_dir=data_dir, keep_weights=True), _say)
    print(layers_text(measure_layers(store, chosen, setting, device=device, data_dir=data_dir, say=_say)))
    write_report(store)


def _say(words: str) -> None:
    """Print how far a measurement is, apart from its result."""
    print(words, file=sys.stderr)
