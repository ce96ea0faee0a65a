"""The factor of a direction that is kept for some steps: its seeds, and how many steps there were, in the state of an estimator."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Generator, Tensor

from forwardgrad.directions import StreamSeeds, drawn, fork
from forwardgrad.perturbations import Perturbation

_STEP, _SEEDS = "subspace.step", "subspace.seeds"


def period_of(perturb: Perturbation) -> int:
    """For how many steps a perturbation keeps a factor; 1 where it keeps none."""
    return int(getattr(perturb, "period", 1))


def kept_seeds(perturb: Perturbation, count: int, generator: Generator, state: dict[str, Tensor]) -> StreamSeeds | None:
    """The seeds of the factors that `count` directions keep, None where they keep none.

    They are drawn anew when a period is over. What is remembered lies in host memory, and is read and written by the draw alone: a graph
    of the step has nothing to do with it.
    """
    if (period := period_of(perturb)) == 1:
        return None

    def make() -> StreamSeeds:
        step = state.setdefault(_STEP, torch.zeros((), dtype=torch.int64))
        seeds = state.setdefault(_SEEDS, torch.zeros(count, dtype=torch.int64))
        if len(seeds) != count:
            raise ValueError(f"the state keeps factors of {len(seeds)} directions, and there are {count}: begin with another state")
        if int(step) % period == 0:
            seeds.copy_(torch.tensor(fork(generator, count)))
        step.add_(1)
        return StreamSeeds(seeds.tolist())

    return drawn(make, on=[generator])


@contextmanager
def counted(state: dict[str, Tensor]) -> Iterator[None]:
    """A step that counts where it comes to its end: one that fails leaves the count where it was."""
    before = {name: t.clone() for name, t in state.items() if name in (_STEP, _SEEDS)}
    try:
        yield
    except BaseException:
        for name in (_STEP, _SEEDS):
            if name in before:
                state[name].copy_(before[name])
            else:
                state.pop(name, None)
        raise
