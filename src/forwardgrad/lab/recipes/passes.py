"""What a forward pass is worth: claims of newer papers on random directions, each arm tuned alike and given as many forward passes.

One small network is trained from random weights, with plain SGD at a constant rate. The papers fine-tune large pretrained ones, or reward a
policy: what holds here need not hold there. A constant rate lets a run be stopped anywhere, so that the passes to a loss mean something.

A step along K directions is 2K passes with differences on two sides, K + 1 on one side. Forward-mode AD carries K tangents beside the
values of one pass. Each tangent costs about one pass more, so that a step is K + 1 passes too.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from forwardgrad.lab.errors import UserError
from forwardgrad.lab.studies import Arm, DataName, Length, Optimizer, Run, Study, space

POINTS = 40  # evaluations of a run, evenly spaced in passes
SEVERAL = 8  # directions a step


@dataclass(frozen=True)
class Walker:
    """What supplies the gradient of an arm, the passes that its step takes, and the learning rates that it is tuned over."""

    label: str
    kind: str
    estimator: dict[str, Any]
    passes: int
    rates: tuple[float, ...]


MEZO: dict[str, Any] = {"name": "zeroth-order"}
FORWARD: dict[str, Any] = {"name": "forward"}
# Normalised, an estimate of FZOO is as long as 1/ε whatever the gradient, so its rates are small.
FZOO: dict[str, Any] = {"name": "zeroth-order", "law": "rademacher", "sides": "one", "normalize": True}
K: dict[str, Any] = {"tangents": SEVERAL}
EGGROLL: dict[str, Any] = {"perturb": "low-rank", "chunk_size": None}  # all directions in one batch, as its authors have it

# The best rate grows with K, as the noise of an estimate falls, and lies just below those that diverge. So rates are a factor of √2 apart.
ONE_RATES = (8.5e-4, 1.2e-3, 1.7e-3, 2.4e-3, 3.4e-3)
K_RATES = (7e-3, 1e-2, 1.4e-2, 2e-2, 2.8e-2)

WALKERS: dict[str, Walker] = {
    "mezo": Walker("MeZO", "zeroth-order", MEZO, 2, ONE_RATES),
    "forward": Walker("forward mode", "forward", FORWARD, 2, ONE_RATES),
    "mezo-8": Walker("MeZO, K = 8", "zeroth-order-8", MEZO | K, 2 * SEVERAL, K_RATES),
    "rank-one": Walker("MeZO at rank one (EGGROLL), K = 8", "eggroll", MEZO | K | EGGROLL, 2 * SEVERAL, K_RATES),
    "forward-8": Walker("forward mode, K = 8", "forward-8", FORWARD | K, SEVERAL + 1, K_RATES),
    "fzoo": Walker("FZOO, K = 8", "fzoo", FZOO | K, SEVERAL + 1, (5e-6, 7e-6, 1e-5, 1.4e-5, 2e-5)),
}
QUESTIONS: dict[str, tuple[str, ...]] = {
    "fzoo": ("mezo", "fzoo"),
    "rank": ("mezo-8", "rank-one"),
    "forward": ("mezo", "forward", "mezo-8", "forward-8"),
    "directions": ("mezo", "mezo-8"),
}  # the arms that each claim needs


@dataclass(frozen=True)
class Allowance:
    """The task, the forward passes of every trial and every final run, the seeds, and what learning rates are multiplied by."""

    title: str
    data: DataName
    passes: int
    seeds: int
    times: float = 1.0


FULL = Allowance("MLP · MNIST", "mnist", 8_000, seeds=8)
SMALL = Allowance("MLP · digits", "digits", 3_000, seeds=3, times=8)  # a tenth of the weights, so a tenth of the noise


def passes(rows: list[str] | None = None, seeds: int | None = None, *, small: bool = False) -> Study:
    """The arms of all claims, or of those named. `small` takes the digits that come with the laboratory, and some minutes."""
    if unknown := [row for row in rows or () if row not in QUESTIONS]:
        raise UserError(f"no row {unknown[0]!r} at equal passes: choose from {', '.join(QUESTIONS)}")
    given = SMALL if small else FULL
    given = replace(given, seeds=seeds or given.seeds)
    wanted = {name for row in rows or QUESTIONS for name in QUESTIONS[row]}
    length = Length(forward_passes=given.passes)
    title = "What a forward pass is worth: claims of newer papers"
    return Study("passes", title, tuple(_arm(name, given) for name in WALKERS if name in wanted), given.seeds, length, length)


def _arm(name: str, given: Allowance) -> Arm:
    walker = WALKERS[name]
    rates = tuple(space.short(given.times * rate) for rate in walker.rates)
    run = Run(
        data=given.data,
        model="mlp",
        estimator=walker.estimator,
        optimizer=Optimizer("sgd", rates[0]),
        evaluate_every=max(1, given.passes // POINTS // walker.passes),
    )
    return Arm(f"mlp-{name}", given.title, walker.kind, walker.label, run, {"lr": rates})
