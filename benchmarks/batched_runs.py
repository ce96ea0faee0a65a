"""What many runs cost as one program: the time of a step of R replicas beside that of one run alone, measured in turn.

python benchmarks/batched_runs.py --device cuda                      # one, 8 and 32 runs of the NN; the goal is 32 for at most 4
python benchmarks/batched_runs.py --runs 1,4 --estimator "forward(perturb=low-rank)" --optimizer adam --same-rate
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import forwardgrad as fg
from forwardgrad.estimators import from_config
from forwardgrad.lab import environment, models
from forwardgrad.lab.bench.cases import INPUTS
from forwardgrad.lab.errors import UserError
from forwardgrad.lab.studies.estimator_text import parse_estimator

WARM_UP = 3
OPTIMIZERS = {
    "sgd": lambda groups: torch.optim.SGD(groups, 1e-7, momentum=0.9),  # a rate so small that no arm diverges
    "nesterov": lambda groups: fg.Nesterov(groups, 1e-7, 0.9),
    "adam": lambda groups: torch.optim.Adam(groups, 1e-7),
}


def loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(model(x), y)


def alone(options: argparse.Namespace, on: torch.device) -> Callable[[], object]:
    """A step of one run by itself."""
    shape = INPUTS[options.model][1]
    model = models.build(options.model, shape, 10).to(on)
    batch = torch.rand(options.batch_size, *shape, device=on), torch.randint(10, (options.batch_size,), device=on)
    optimizer = OPTIMIZERS[options.optimizer](model.parameters())
    generator = torch.Generator(on).manual_seed(0)
    step = fg.TrainingStep(loss, model, optimizer, options.estimator, generator=generator)
    return lambda: step(*batch)


def together(options: argparse.Namespace, on: torch.device, count: int) -> Callable[[], object]:
    """A step of `count` runs as one program, each with its own batch, directions and, as in a grid, learning rate."""
    shape = INPUTS[options.model][1]
    replicas = [models.build(options.model, shape, 10).to(on) for _ in range(count)]
    ensemble = fg.Ensemble(replicas)
    batch = torch.rand(count, options.batch_size, *shape, device=on), torch.randint(10, (count, options.batch_size), device=on)
    groups = [{"params": model.parameters(), "lr": 1e-7 * (index + 1)} for index, model in enumerate(replicas)]
    shared = [p for model in replicas for p in model.parameters()]
    optimizer = OPTIMIZERS[options.optimizer](shared if options.same_rate else groups)
    generators = [torch.Generator(on).manual_seed(seed) for seed in range(count)]

    def closure() -> Tensor:
        optimizer.zero_grad()
        return fg.estimate_grads_(loss, ensemble, batch, options.estimator, generators=generators).loss

    return lambda: optimizer.step(closure)


def timed(step: Callable[[], object], on: torch.device) -> float:
    if on.type == "cuda":
        torch.cuda.synchronize(on)
    began = time.perf_counter()
    step()
    if on.type == "cuda":
        torch.cuda.synchronize(on)
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N")
    parser.add_argument("--model", default="nn", choices=INPUTS)
    parser.add_argument("--batch-size", default=64, type=int)
    parser.add_argument("--runs", default="1,8,32", help="numbers of runs, separated by commas")
    parser.add_argument("--estimator", default="forward", help="as for `forwardgrad train --estimator`")
    parser.add_argument("--optimizer", default="sgd", choices=OPTIMIZERS)
    parser.add_argument(
        "--same-rate", action="store_true", help="several seeds of one rate, one parameter group, instead of a grid of rates"
    )
    parser.add_argument("--rounds", default=30, type=int)
    options = parser.parse_args()
    try:
        on, options.estimator = environment.device(options.device), from_config(parse_estimator(options.estimator))
        counts = [int(part) for part in options.runs.split(",")]
        if min(*counts, options.batch_size) < 1 or options.rounds < 2:
            raise ValueError("--runs and --batch-size are at least 1, --rounds at least 2")
    except (UserError, ValueError) as error:
        parser.error(str(error))
    steps = [alone(options, on), *(together(options, on, count) for count in counts)]
    seconds = [[timed(step, on) for step in steps] for _ in range(WARM_UP + options.rounds)][WARM_UP:]
    base = statistics.median(row[0] for row in seconds)
    where = environment.describe(on)
    print(f"{options.model}, batch {options.batch_size}, {options.estimator}, {options.optimizer}: {options.rounds} steps in turn")
    print(f"{where['device']}, {where['threads']} threads, torch {where['torch']}, commit {where['commit']}")
    for name, times in zip(["one alone", *(f"{count} batched" for count in counts)], zip(*seconds, strict=True), strict=True):
        low, middle, high = statistics.quantiles(times, n=4)
        runs = 1 if name == "one alone" else int(name.split()[0])
        spread = f"(quartiles {1e3 * low:.2f} to {1e3 * high:.2f})"
        print(f"{name:12} {1e3 * middle:9.2f} ms {spread:32} {middle / base:6.2f} of one alone, {middle / base / runs:.2f} a run")


if __name__ == "__main__":
    main()
