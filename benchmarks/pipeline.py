"""What a pipeline without backward messages gains: examples a second of two processes of one thread, and of one process of two.

python benchmarks/pipeline.py                         # the NN of 784-1024-1024-10 and a perceptron of 8 × 1024, batch 64, on two cores
python benchmarks/pipeline.py --model deep --rounds 3

Both train the same model on the same batches by `LocalLosses(feedback=True)` and SGD, and end with the same loss. They take turns, each
round in a random order. Shown are medians over the rounds, and that of the ratio within a round with its 95 % bootstrap interval. A run is
timed from the first step after the warm-up of any process to the last step of the last one. `busy` is the time that each process works in
its own thread a step, without waiting: the slowest stage is the least that a pipeline can take.
"""

from __future__ import annotations

import argparse
import itertools
import os
import random
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.multiprocessing
import torch.nn.functional as F
from torch import Tensor, nn

import forwardgrad as fg

MODELS = {"nn": (784, 1024, 1024, 10), "deep": (784, *[1024] * 8, 10)}
CLASSES, WARM_UP = 10, 20
METHOD = fg.LocalLosses(feedback=True)


def network(name: str) -> nn.Sequential:
    torch.manual_seed(0)
    widths = MODELS[name]
    layers = [layer for sizes in itertools.pairwise(widths) for layer in (nn.Linear(*sizes), nn.ReLU())]
    return nn.Sequential(*layers[:-1])


def batches(options: argparse.Namespace) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    made = []
    for _ in range(16):
        y = torch.randint(0, CLASSES, (options.batch_size,), generator=generator)
        made.append((torch.randn(options.batch_size, 784, generator=generator) + y.unsqueeze(1) / CLASSES, y))
    return made


def sgd(module: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(module.parameters(), lr=0.01)


def one_process(_: int, options: argparse.Namespace, name: str, threads: int, folder: Path) -> None:
    torch.set_num_threads(threads)
    model, given = network(name), batches(options)
    generator = torch.Generator().manual_seed(0)
    step = fg.TrainingStep(lambda m, x, y: F.cross_entropy(m(x), y), model, sgd(model), METHOD, generator=generator)
    for index in range(WARM_UP):
        record = step(*given[index % len(given)])
    began, busy = time.perf_counter(), time.thread_time()
    for index in range(WARM_UP, WARM_UP + options.steps):
        record = step(*given[index % len(given)])
    told = [began, time.perf_counter(), (time.thread_time() - busy) / options.steps, float(record.loss)]
    torch.save(told, folder / "0.pt")


def rank_of_many(rank: int, options: argparse.Namespace, name: str, ranks: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=ranks)
    stage, given = fg.split_stages(network(name), ranks)[rank], batches(options)
    generator = torch.Generator().manual_seed(0)
    step = fg.PipelineStep(F.cross_entropy, stage, sgd(stage), METHOD, classes=CLASSES, generator=generator)
    record, began, busy = None, 0.0, 0.0
    for index in range(WARM_UP + options.steps):
        if index == WARM_UP:
            began, busy = time.perf_counter(), time.thread_time()
        record = step(*given[index % len(given)]) if rank == 0 else step()
    told = [began, time.perf_counter(), (time.thread_time() - busy) / options.steps, float(record.loss) if record else 0.0]
    step.wait()
    torch.save(told, folder / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


class Run(NamedTuple):
    """One run: examples a second, the milliseconds that each process works a step, and the last loss."""

    rate: float
    busy: list[float]
    loss: float


def measured(work: Any, options: argparse.Namespace, name: str, count: int, processes: int) -> Run:
    """A run in new processes. The clock of `perf_counter` is one for all processes of a machine."""
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.start_processes(work, (options, name, count, Path(folder)), processes, start_method="spawn")
        found = [torch.load(Path(folder) / f"{rank}.pt") for rank in range(processes)]
    seconds = max(f[1] for f in found) - min(f[0] for f in found)
    return Run(options.steps * options.batch_size / seconds, [1000 * f[2] for f in found], found[-1][3])


def interval(values: Sequence[float], draws: int = 2000) -> tuple[float, float]:
    """The 95 % bootstrap interval of their median."""
    generator = random.Random(0)
    medians = sorted(statistics.median(generator.choices(values, k=len(values))) for _ in range(draws))
    return medians[draws // 40], medians[-draws // 40]


def compare(options: argparse.Namespace, name: str) -> None:
    many, order = options.processes, random.Random(0)
    arms = {
        f"{many} processes, 1 thread": (rank_of_many, many, many),
        f"1 process, {many} threads": (one_process, many, 1),
        "1 process, 1 thread": (one_process, 1, 1),
    }
    found: dict[str, list[Run]] = {arm: [] for arm in arms}
    for _ in range(options.rounds):
        for arm in order.sample(list(arms), len(arms)):
            work, count, processes = arms[arm]
            found[arm].append(measured(work, options, name, count, processes))
    first = next(iter(found.values()))
    print(f"{name}: {'-'.join(map(str, MODELS[name]))}, batch {options.batch_size}, {options.rounds} rounds of {options.steps} steps")
    for arm, runs in found.items():
        rate, busy = statistics.median(run.rate for run in runs), [statistics.median(b) for b in zip(*(r.busy for r in runs), strict=True)]
        ratios = [one.rate / other.rate for one, other in zip(first, runs, strict=True)]
        low, high = interval(ratios)
        told = "" if runs is first else f"   the pipeline is {statistics.median(ratios):.2f} [{low:.2f}, {high:.2f}] times as fast"
        print(f"  {arm:24} {rate:8,.0f} examples/s   busy {', '.join(f'{b:.2f}' for b in busy)} ms a step   loss {runs[-1].loss:.4f}{told}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=[*MODELS, "all"], default="all")
    parser.add_argument("--processes", type=int, default=2, help="stages of the pipeline, and threads of the one process")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--steps", type=int, default=400, help="timed steps of each run")
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    print(f"torch {torch.__version__}, {os.cpu_count()} cores")
    for name in MODELS if options.model == "all" else [options.model]:
        compare(options, name)


if __name__ == "__main__":
    main()
