"""Whether an estimate is unbiased: one half of the estimates picks the directions to test, the other half tests them.

Student's t (or Hall's, see `diagnostics.moments`) is computed for every parameter, and for all together, of the error ĝ − g along g and
along 16 fixed random directions. Far out in its tails t is not to be trusted where noise is skewed, and with many parameters one would
have to go far out. So the first half of the estimates only names what to look at, at level SUSPICION over everything; the second half,
which knows nothing of the first, tests those directions again, on the same side and with Bonferroni's correction, at level CONVICTION.
An estimator without bias fails both with probability SUSPICION·CONVICTION = 1e-5 where t is Student's. Simulated for 50 parameters with
ENOUGH estimates (the fewest that convict) and the noise of one Gaussian tangent, (x² − 1) and (x² + √3 xy)/2 − 1/2, it is 1e-5 and 1e-4;
from 200 estimates on both are below 2e-5.
Where few estimates carry all of the mean (a layer that moves in one step of twenty) nothing is convicted before as many do as EVENTS
equal ones would: (Σ|ĝ·u|)²/Σ(ĝ·u)² in the second half, u the direction tested.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from forwardgrad.diagnostics import DIRECTIONS, Moments, Part, standard, students
from forwardgrad.diagnostics.checks.findings import Finding, listed
from forwardgrad.diagnostics.checks.subject import Subject

SUSPICION, CONVICTION, ENOUGH, EVENTS = 1e-2, 1e-3, 100, 12
_MEND = "mend the estimator, or let its `unbiased` be False"
_ROUNDING = 16  # units in the last place, as in `forwardgrad.diagnostics.moments`


def bias(subject: Subject, moments: Moments, parts: Sequence[Part]) -> Iterator[Finding]:
    """The length of the estimate, and whether it is right. `parts`: all together, then every parameter, as `Moments.parts` gives them."""
    total, repeats = parts[0], len(moments.errors())
    if total.length is None or total.cosine_of_mean is None or total.cosine is None:
        return
    length = f"length {total.length.value:.3g} ({total.length.low:.3g} to {total.length.high:.3g})"
    if not subject.estimator.unbiased:
        said = f"{type(subject.estimator).__name__} does not claim to be unbiased"
        angle = f"cosine with the gradient {total.cosine.value:.2g}, of the mean of all {total.cosine_of_mean:.2g}"
        yield Finding("bias", "note", f"{said}: {length}, {angle}")
        return
    wrong = convicted(moments, parts, subject.tolerance) if repeats >= ENOUGH else []
    if wrong:
        named = [_lengths(part) for part in wrong if part is not total] or [_lengths(total)]
        ours = type(subject.estimator).__module__.startswith("forwardgrad.")
        remedy = "use fg.ForwardGradient(), which moves whole weights, and report the model" if ours else _MEND
        yield Finding("bias", "fault", f"the mean of the estimates is not the gradient: {listed(named)}", remedy)
    elif repeats < ENOUGH:
        yield Finding(
            "bias", "note", f"{length}, but {repeats} estimates decide nothing", f"give it time for {ENOUGH}, or repeats={ENOUGH}"
        )
    else:
        yield Finding("bias", "ok", f"none seen in {repeats} estimates: {length}, p = {total.p:.2g}")


def _lengths(part: Part) -> str:
    if part.length is None:
        return f"{part.name} (gradient 0)"
    return f"{part.name} (length {part.length.value:.3g}, {part.length.low:.3g} to {part.length.high:.3g})"


def convicted(moments: Moments, parts: Sequence[Part], tolerance: float) -> list[Part]:
    """The parts whose mean error both halves of the estimates see, and which is more than rounding."""
    scales = torch.tensor([part.norm or parts[0].norm for part in parts], dtype=torch.float64)
    scales = torch.stack([scales.square(), *[scales] * DIRECTIONS], dim=1)
    errors, exact = (torch.cat([t.sum(dim=-2, keepdim=True), t], dim=-2) / scales for t in (moments.errors(), moments.exact()))
    first, second = errors.tensor_split(2)
    suspected = _normals(first, tolerance)
    picked = suspected.abs() > _normal(SUSPICION / suspected.numel())
    again = _normals(second, tolerance) * suspected.sign()
    products = (second + exact).abs()
    told = products.sum(dim=0).square() > EVENTS * products.square().sum(dim=0)
    found = picked & told & (again > _normal(2 * CONVICTION / max(1, int(picked.sum())))) & (errors.mean(dim=0).abs() > tolerance)
    return [part for part, wrong in zip(parts, found.any(dim=1).tolist(), strict=True) if wrong]


def _normals(errors: Tensor, tolerance: float) -> Tensor:
    """The mean of each column of errors relative to ‖g‖ as a standard normal value; rounding is some thousandth of the tolerance."""
    t = students(errors, _ROUNDING * tolerance / 1e3)
    return torch.tensor([math.copysign(standard(abs(x), len(errors) - 1), x) for x in t.flatten().tolist()]).view_as(t)


def _normal(level: float) -> float:
    """What the absolute value of a standard normal is above with this probability.

    >>> round(_normal(0.05), 2)
    1.96
    """
    return float(-math.sqrt(2) * torch.erfinv(torch.tensor(level - 1, dtype=torch.float64)))
