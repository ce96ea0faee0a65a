"""How long steps take with and without a log, and how long the same steps take again: `python benchmarks/replay.py --steps 1000`.

The paper's NN on a batch of random images, plain SGD, one thread. Seconds are those of the processor, so other programs count little.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import forwardgrad as fg
from forwardgrad.lab import models

METHODS: dict[str, fg.Estimator] = {
    "dense": fg.ForwardGradient(),
    "low-rank": fg.ForwardGradient(perturb=fg.LowRank()),
    "zeroth-order": fg.ZerothOrder(),
}


def network() -> nn.Module:
    torch.manual_seed(0)
    return models.build("nn", (1, 28, 28), 10)


def timed(act: Callable[[], object]) -> float:
    began = time.process_time()
    act()
    return time.process_time() - began


def trained(method: fg.Estimator, steps: int, log: fg.StepLog | None) -> tuple[nn.Module, float]:
    """The network after so many steps, and the seconds of each."""
    made = torch.Generator().manual_seed(1)
    x, y = torch.randn(64, 1, 28, 28, generator=made), torch.randint(0, 10, (64,), generator=made)
    model = network()

    def loss(m: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(m(x), y)

    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    step = fg.TrainingStep(loss, model, optimizer, method, generator=torch.Generator().manual_seed(2), log=log)
    seconds = timed(lambda: [step(x, y) for _ in range(steps)])
    if log is not None:
        log.close()
    return model, seconds / steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--method", choices=METHODS, nargs="*", default=list(METHODS))
    asked = parser.parse_args()
    torch.set_num_threads(1)
    for name in asked.method:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "steps.log"
            model, logged = trained(METHODS[name], asked.steps, fg.StepLog(path))
            _, plain = trained(METHODS[name], asked.steps, None)
            again = network()
            optimizer = torch.optim.SGD(again.parameters(), lr=1.0)
            replayed = timed(lambda: fg.replay(path, again, optimizer)) / asked.steps  # noqa: B023
            same = all(torch.equal(p, q) for p, q in zip(model.parameters(), again.parameters(), strict=True))
            told = f"a step {1e3 * plain:.1f} ms, with a log {1e3 * logged:.1f} ms, replayed {1e3 * replayed:.1f} ms"
            print(
                f"{name}: {asked.steps:,} steps, {told}; {path.stat().st_size:,} bytes; {'the same bits' if same else 'OTHER BITS'}",
                flush=True,
            )


if __name__ == "__main__":
    main()
