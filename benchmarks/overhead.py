"""What the laboratory adds to a step of training: its own loop beside the same steps without it, in turn, and piece by piece.

python benchmarks/overhead.py              # the NN on MNIST, batch 64, forward gradient, SGD; the goal is below 1 % of a step
python benchmarks/overhead.py --empty      # the laboratory's own Python alone: a step that does nothing

Both loops take the same `TrainingStep`s on the same batches, gathered from the same tensors, under the same schedule. The laboratory's
also notes losses and derivatives, looks for divergence, measures relative step and norm every 100 steps, and writes its status: that is
what the loops differ in. Pieces that come seldom are timed by themselves and counted as often as they come: the memory's watch in a step
before an evaluation, a checkpoint a minute, a look of the display every half second. Evaluations and the reading of data are work, not
overhead, and left out. `--empty` and `--processor-time` count the time of this thread on its processor, which other programs do not
disturb much; without them the clock on the wall is read, on a machine that should be quiet.
"""

from __future__ import annotations

import argparse
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from forwardgrad.estimators.base import Estimate
from forwardgrad.lab import environment, store
from forwardgrad.lab.data.datasets import load
from forwardgrad.lab.data.splits import Dataset, Split
from forwardgrad.lab.errors import UserError
from forwardgrad.lab.store.progress import POLL_SECONDS
from forwardgrad.lab.store.standing import StoreWatch
from forwardgrad.lab.studies.estimator_text import parse_estimator
from forwardgrad.lab.studies.run import Optimizer, Run, to_json
from forwardgrad.lab.training import builders, loop
from forwardgrad.lab.training.precision import arranged
from forwardgrad.lab.training.schedule import CHECK_EVERY, FIRST_EVALUATIONS
from forwardgrad.lab.training.state import State
from forwardgrad.lab.training.tensorboard import Board
from forwardgrad.lab.training.training import Training
from forwardgrad.training_step import TrainingStep

GOAL = 0.01
CHECKPOINT_SECONDS = 60.0
BLOCK = CHECK_EVERY  # steps that each loop takes before the other has its turn
PROCESSOR = False  # which clock is read
WARM_UP = max(FIRST_EVALUATIONS)  # steps


def clock() -> float:
    return time.thread_time() if PROCESSOR else time.perf_counter()


class Nothing(nn.Module):
    """Ten numbers, whatever the images."""

    def __init__(self) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(10))

    def forward(self, images: Tensor) -> Tensor:
        return self.logits.expand(len(images), -1)


class NoStep:
    """In place of a step: what a forward gradient would have said."""

    preparing = 0.0

    def __init__(self, at: State) -> None:
        at.optimizer._opt_called = True  # type: ignore[attr-defined]  # the schedule asks
        self._said = Estimate(torch.tensor(2.3), torch.tensor([0.1]), 2)

    def __call__(self, *batch: object) -> Estimate:
        return self._said


class Over(Exception):
    """Enough has been measured."""


def step_of(run: Run, at: State) -> Callable[..., Estimate]:
    pieces = builders.batch_loss(run), at.model, at.optimizer, at.estimator
    return TrainingStep(*pieces, generator=at.generator, state=at.memory, engine=run.engine)


def bare(training: Training, take: Callable[..., Estimate]) -> Callable[[int], float]:
    """A function that takes the steps up to one, and nothing else, and returns the seconds that takes."""
    run, dataset, at, per_epoch = training.run, training.dataset, training.state, training.schedule.per_epoch

    def advance(until: int) -> float:
        began = clock()
        while at.step < until:
            order = training.order()
            start = at.step % per_epoch * run.batch_size
            batch = order[start : start + run.batch_size]
            take(arranged(dataset.for_model(dataset.train.inputs[batch]), run.precision), dataset.train.labels[batch])
            at.lr_schedule.step()
            at.step += 1
        return clock() - began

    return advance


def in_turn(training: Training, other: Callable[[int], float], folder: Path, blocks: int) -> list[tuple[float, float]]:
    """Seconds of every block of the laboratory's loop and of the other, blocks with an evaluation left out."""
    epoch, found = training.schedule.epoch, list[tuple[float, float]]()
    tell, began = loop.write_status, 0.0

    def turn(training: Training, *rest: Any) -> None:
        nonlocal began
        tell(training, *rest)
        if (step := training.state.step) % BLOCK:
            return
        took = clock() - began
        alone = other(step)
        if step > WARM_UP and epoch(step) == epoch(step - BLOCK):
            found.append((took, alone))
        if len(found) == blocks:
            raise Over
        began = clock()

    loop.write_status = turn
    try:
        began = clock()
        loop.train_to_end(loop.SingleRun(training, folder, Board(None, training)), float("inf"))
    except Over:
        pass
    finally:
        loop.write_status = tell
    return found


def pieces(training: Training, folder: Path, step: float) -> dict[str, float]:
    """Seconds a step of what comes seldom."""
    watched = typical(training.step_with_memory) - step
    checkpoint = typical(lambda: store.write_whole(folder / "checkpoint.pt", training.state.dump()))
    watch = StoreWatch(store.Store(folder.parent.parent), runs=[training.run.identity])
    return {
        "watching the memory, once an epoch": max(0.0, watched) / training.schedule.per_epoch,
        "a checkpoint a minute": checkpoint * step / CHECKPOINT_SECONDS,
        "the display's looks": typical(watch.snapshot) * step / POLL_SECONDS,
    }


def typical(work: Callable[[], object], repeats: int = 15) -> float:
    times = []
    for _ in range(repeats):
        began = clock()
        work()
        times.append(clock() - began)
    return statistics.median(times)


def interval(values: Sequence[float], draws: int = 2000) -> tuple[float, float]:
    """The 95 % bootstrap interval of their median."""
    generator = random.Random(0)
    medians = sorted(statistics.median(generator.choices(values, k=len(values))) for _ in range(draws))
    return medians[draws // 40], medians[-draws // 40]


def prepared(options: argparse.Namespace) -> tuple[Run, Dataset]:
    spec = parse_estimator(options.estimator)
    run = Run("mnist", options.model, spec, Optimizer(options.optimizer, 1e-6, 1e-6), 50, options.batch_size)
    if not options.empty:
        return run, load("mnist", 0, "cpu", options.data_dir)
    builders.initialised_model = lambda run, dataset, on, data_dir=None: Nothing()
    splits = [Split(torch.zeros(n, 1, 1, 1, dtype=torch.uint8), torch.zeros(n, dtype=torch.int64)) for n in (50_000, 64, 64)]
    return run, Dataset("none", 10, *splits)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--empty", action="store_true", help="a model of ten numbers, and no data")
    parser.add_argument("--model", default="nn", choices=["logistic", "nn", "cnn"])
    parser.add_argument("--batch-size", default=64, type=int)
    parser.add_argument("--estimator", default="forward", help="as for `forwardgrad train --estimator`")
    parser.add_argument("--optimizer", default="sgd", choices=["sgd", "nesterov", "adam"])
    parser.add_argument("--blocks", default=60, type=int, help=f"blocks of {BLOCK} steps of each loop")
    parser.add_argument("--processor-time", action="store_true", help="count this thread's time on its processor; with one thread only")
    parser.add_argument("--data-dir", type=Path)
    options = parser.parse_args()
    global PROCESSOR
    PROCESSOR = options.empty or options.processor_time
    if PROCESSOR:
        torch.set_num_threads(1)
    try:
        run, dataset = prepared(options)
        lab, alone = (Training.begin(run, dataset, torch.device("cpu")) for _ in range(2))
    except UserError as error:
        parser.error(str(error))
    if options.blocks < 2:
        parser.error("--blocks is at least 2")
    take = NoStep(alone.state) if options.empty else step_of(run, alone.state)
    if options.empty:
        lab.state.training_step = NoStep(lab.state)  # type: ignore[assignment]
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root) / "runs" / run.identity
        folder.mkdir(parents=True)
        store.write_json(folder / "run.json", to_json(run))
        found = in_turn(lab, bare(alone, take), folder, options.blocks)
        assert all(torch.equal(p, q) for p, q in zip(lab.state.model.parameters(), alone.state.model.parameters(), strict=True))
        step = statistics.median(other for _, other in found) / BLOCK
        seldom = pieces(lab, folder, step)
    tell(options, step, [(mine - other) / BLOCK for mine, other in found], seldom)


def tell(options: argparse.Namespace, step: float, more: Sequence[float], seldom: dict[str, float]) -> None:
    where = environment.describe(torch.device("cpu"))
    print(f"{where['device']}, {where['threads']} threads, torch {where['torch']}, commit {where['commit']}")
    what = "a step that does nothing" if options.empty else f"{options.model}, batch {options.batch_size}, {options.estimator}"
    print(f"{what}, {options.optimizer}: {len(more)} blocks of {BLOCK} steps of each loop in turn, the same parameters to the bit")
    print(f"times are {'those of one thread on its processor' if PROCESSOR else 'by the clock on the wall'}")
    low, high = interval(more)
    typically = statistics.median(more)
    total = typically + sum(seldom.values())
    print(f"{'a step without the laboratory':40} {1e6 * step:10.1f} µs")
    print(f"{'the loop':40} {1e6 * typically:10.1f} µs  (95 % of the median: {1e6 * low:.1f} to {1e6 * high:.1f})")
    for name, seconds in seldom.items():
        print(f"{name:40} {1e6 * seconds:10.1f} µs")
    share = "" if options.empty else f"{total / step:.2%} of a step (goal: below {GOAL:.0%})"
    print(f"{'all':40} {1e6 * total:10.1f} µs  {share}")


if __name__ == "__main__":
    main()
