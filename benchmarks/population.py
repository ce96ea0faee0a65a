"""What a population costs: a zeroth-order step of K directions of rank one as one batch, beside plain inference on as many examples.

python benchmarks/population.py                                       # an MLP and a transformer encoder, K = 8, 64, 512
python benchmarks/population.py --models mlp --directions 64 --sides two --rounds 21
python benchmarks/population.py --device cuda --directions 64,512,4096

A step is all of it: random numbers, evaluations, the loss, and the move of plain SGD. Plain inference is the same model and loss, as it
stands, on the examples of all points, in whichever of one batch and batches of --batches takes less time. `share` is its time over that of
the step; above 1 the step is faster, since the product of the first layer is made once for all directions. The loop is the same step with
chunk_size=1. All take turns. Shown are medians over the rounds, and that of the share within a round with its 95 % bootstrap interval.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import forwardgrad as fg
from forwardgrad.lab import environment

GOAL, GOAL_AT = 0.8, 64
LAWS = {law.name: law for law in (fg.Gaussian(), fg.Rademacher())}
LOOPED = 64  # directions up to which the loop is timed


class Block(nn.Module):
    """A transformer block, normalised first."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(-3, -2) for part in self.qkv(self.first(x)).chunk(3, -1))
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(-3, -2).flatten(-2))
        return x + self.down(F.gelu(self.up(self.second(x))))


class Encoder(nn.Module):
    """A small transformer that classifies sentences."""

    def __init__(self, width: int, blocks: int) -> None:
        super().__init__()
        self.words = nn.Embedding(1000, width)
        self.blocks = nn.Sequential(*(Block(width, 4) for _ in range(blocks)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, words: Tensor) -> Tensor:
        found: Tensor = self.head(self.norm(self.blocks(self.words(words))).mean(-2))
        return found


def built(name: str, width: int, batch: int, device: torch.device) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    y = torch.arange(batch) % 10
    if name == "mlp":
        layers = [
            nn.Linear(784, width),
            nn.ReLU(),
            nn.Linear(width, width),
            nn.ReLU(),
            nn.Linear(width, width),
            nn.ReLU(),
            nn.Linear(width, 10),
        ]
        return nn.Sequential(*layers).to(device), torch.randn(batch, 784).to(device), y.to(device)
    return Encoder(width, 2).to(device), torch.randint(1000, (batch, 32)).to(device), y.to(device)


def loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(model(x), y)


def timed(work: Callable[[], object], device: torch.device, *, processor: bool) -> float:
    clock = time.thread_time if processor else time.perf_counter
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    began = clock()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return clock() - began


def interval(values: Sequence[float], draws: int = 2000) -> tuple[float, float]:
    """The 95 % bootstrap interval of their median."""
    generator = random.Random(0)
    medians = sorted(statistics.median(generator.choices(values, k=len(values))) for _ in range(draws))
    return medians[draws // 40], medians[-draws // 40]


def measure(name: str, directions: int, options: argparse.Namespace) -> None:
    device = torch.device(options.device)
    width, batch = (options.width, options.batch_size) if name == "mlp" else (options.width // 4, max(1, options.batch_size // 4))
    model, x, y = built(name, width, batch, device)
    points = directions * (2 if options.sides == "two" else 1)
    wide, labels = x.repeat(points, *[1] * (x.dim() - 1)), y.repeat(points)
    law, perturb = LAWS[options.law], fg.LowRank(options.rank)

    def step(chunk_size: int | None) -> Callable[[], object]:
        method = fg.ZerothOrder(1e-3, directions, law, perturb, options.sides, chunk_size)
        optimizer, generator = torch.optim.SGD(model.parameters(), 1e-6), torch.Generator(device).manual_seed(0)
        take = fg.TrainingStep(loss, model, optimizer, method, generator=generator, engine=options.engine)
        return lambda: take(x, y)

    @torch.no_grad()
    def plain(size: int) -> None:
        for some, of in zip(wide.split(size), labels.split(size), strict=True):
            loss(model, some, of)

    arms: dict[str, Callable[[], object]] = {
        "one batch": lambda: plain(len(wide)),
        "batches": lambda: plain(options.batches),
        "step": step(options.chunk),
    }
    if directions <= LOOPED:
        arms["loop"] = step(1)
    for work in arms.values():
        work(), work()
    rounds: list[dict[str, float]] = []
    for _ in range(options.rounds):
        order = list(arms)
        random.shuffle(order)
        rounds.append({arm: timed(arms[arm], device, processor=options.processor_time) for arm in order})
    tell(f"{name} of width {width}, {batch} examples, {options.sides}-sided", directions, rounds)


def tell(what: str, directions: int, rounds: Sequence[dict[str, float]]) -> None:
    middle = {arm: statistics.median(each[arm] for each in rounds) for arm in rounds[0]}
    best = min(("one batch", "batches"), key=middle.__getitem__)
    shares = [each[best] / each["step"] for each in rounds]
    low, high = interval(shares)
    share = statistics.median(shares)
    goal = f"  (goal: {GOAL})" if directions == GOAL_AT else ""
    loop = f", loop {1e3 * middle['loop']:.1f} ms" if "loop" in middle else ""
    times = f"inference {1e3 * middle[best]:.1f} ms ({best}), step {1e3 * middle['step']:.1f} ms{loop}"
    print(f"{what}, K = {directions}: share {share:.2f} ({low:.2f} to {high:.2f}){goal}; {times}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--models", default="mlp,encoder")
    parser.add_argument("--directions", default="8,64,512")
    parser.add_argument("--width", default=1024, type=int, help="of the MLP; the encoder's is a quarter of it")
    parser.add_argument("--batch-size", default=16, type=int, help="of the MLP; the encoder's, of 32 words each, is a quarter of it")
    parser.add_argument("--rank", default=1, type=int)
    parser.add_argument("--sides", default="one", choices=["one", "two"])
    parser.add_argument("--law", default="rademacher", choices=list(LAWS))
    parser.add_argument("--chunk", type=int, help="directions side by side; those of chunk_size=None if left out")
    parser.add_argument("--batches", default=1024, type=int, help="examples of a batch of plain inference, unless one of all is faster")
    parser.add_argument("--engine", default="eager", choices=["eager", "compile"])
    parser.add_argument("--rounds", default=11, type=int)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--processor-time", action="store_true", help="count this thread's time on its processor; with one thread only")
    options = parser.parse_args()
    if options.processor_time:
        torch.set_num_threads(1)
    random.seed(0)
    where = environment.describe(torch.device(options.device))
    print(
        f"{where['device']}, {where['threads']} threads, torch {where['torch']}, commit {where['commit']}, {options.engine}, {options.law}"
    )
    clock = "those of one thread on its processor" if options.processor_time else "by the clock on the wall"
    print(f"times are {clock}; {options.rounds} rounds")
    for name in options.models.split(","):
        for directions in options.directions.split(","):
            measure(name, int(directions), options)


if __name__ == "__main__":
    main()
