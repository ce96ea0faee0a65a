"""What a step is worth: how many estimates have to be averaged until their mean points along the gradient.

With ĝ of mean m and relative variance V = E‖ĝ − m‖²/‖g‖², the mean of N estimates has the cosine with g

    c = L / √(M + V/N),   L = m·g/‖g‖²,   M = ‖m‖²/‖g‖² = B + 2L − 1,   B = ‖m − g‖²/‖g‖²,

as noise in many dimensions is at right angles to g. So N = V / (L²/c² − M): V·c²/(1 − c²) without bias (L = M = 1), and never where c is
not below L/√M, the cosine that a biased estimator tends to.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from forwardgrad.diagnostics import quality
from forwardgrad.directions import Orthogonal
from forwardgrad.estimators import Estimator, ForwardGradient
from forwardgrad.lab.bench.records import CosinePrice, Worth

LEARN = 50  # steps that an estimator with a memory learns first, the weights held still
FOUND = 0.05  # below this p-value a bias is found


def worth(
    estimator: Estimator,
    loss: Callable[[nn.Module], Tensor],
    model: nn.Module,
    *,
    repeats: int,
    exact: Mapping[str, Tensor | None],
    state: Mapping[str, Tensor],
) -> Worth:
    """Measure an estimator against the exact gradient of one batch.

    The variance is that of the estimator's formula, where it has one. An estimator counts as unbiased if its formula says so, or if the
    measurement found no bias: a handful of estimates tells that a bias is there long before it tells how large it is.
    """
    generator = torch.Generator(next(model.parameters()).device).manual_seed(0)
    learn, memory = (LEARN, state) if estimator.stateful else (0, None)
    found = quality(loss, model, estimator, generator=generator, state=memory, repeats=repeats, warm_up=learn, exact=exact)
    total = found.total
    assert total.variance is not None  # the gradient is not zero: quality refuses that
    assert total.bias is not None
    assert total.length is not None
    known = found.theory
    spread = (total.variance.value, total.variance.low, total.variance.high) if known is None else (known, known, known)
    biased = not estimator.unbiased and total.p < FOUND
    length = total.length.value if biased else 1.0
    square = max(total.bias.value + 2 * length - 1, length**2) if biased else 1.0  # ‖m‖‖g‖ is at least m·g
    limit = length / math.sqrt(square) if square else 0.0
    return Worth(variance=spread[0], low=max(0.0, spread[1]), high=spread[2], length=length, square=square, limit=limit, biased=biased)


def one_direction(estimator: Estimator) -> tuple[Estimator, int]:
    """The estimator with a single direction, and how many independent directions it averages.

    The single one is measured: the noise of their mean follows from it.
    """
    if not isinstance(estimator, ForwardGradient) or isinstance(estimator.law, Orthogonal):
        return estimator, 1
    if estimator.combine != "mean" or estimator.stateful or not estimator.unbiased:
        return estimator, 1
    return dataclasses.replace(estimator, tangents=1, chunk_size=None), estimator.tangents


def averaged(one: Worth, count: int) -> Worth:
    """What the mean of `count` independent estimates is worth."""
    spread = {key: one[key] / count for key in ("variance", "low", "high")}
    return {**one, **spread}  # type: ignore[typeddict-item]


def estimates_needed(found: Worth, cosine: float, variance: float | None = None) -> int | None:
    """How many estimates have to be averaged for this cosine with the gradient; None where no number is enough.

    >>> estimates_needed(Worth(variance=300.0, low=200.0, high=400.0, length=1.0, square=1.0, limit=1.0, biased=False), 0.5)
    100
    """
    room = found["length"] ** 2 / cosine**2 - found["square"]
    if found["length"] <= 0 or room <= 0:
        return None
    needed = (found["variance"] if variance is None else variance) / room
    return max(1, math.ceil(round(needed, 6)))  # rounded: 100 is not 101 for the sake of its last bit


def cosine_prices(found: Worth, seconds: float, cosines: Sequence[float]) -> list[CosinePrice]:
    """How many estimates, and how many seconds, it takes to each cosine; None where it is never reached."""
    told: list[CosinePrice] = []
    for cosine in cosines:
        needed, low, high = (estimates_needed(found, cosine, variance) for variance in (found["variance"], found["low"], found["high"]))
        told.append(CosinePrice(cosine=cosine, estimates=needed, low=low, high=high, seconds=needed and needed * seconds))
    return told
