"""`quality`: bias, variance, angle and cost of an estimator, measured against the exact gradient of one batch."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor, nn

from forwardgrad.diagnostics.memory import peak_bytes
from forwardgrad.diagnostics.moments import Interval, Moments, Part
from forwardgrad.estimators import Backprop, Estimate, Estimator, check_count
from forwardgrad.objective import Objective, Point

LEAST = 10  # repeats: below, no interval is worth its name


@dataclass(frozen=True)
class Quality:
    """What `quality` found: `total` over all parameters and `tensors` one by one; theory and cost of one estimate.

    `theory`: the relative variance that the estimator's formula promises, None where it has none. `forward_passes` of one estimate
    (a backward pass is not among them), its median `seconds`, and the `peak_bytes` it held beyond what was there before.
    """

    estimator: str
    repeats: int
    total: Part
    tensors: tuple[Part, ...]
    theory: float | None
    forward_passes: int
    seconds: float
    peak_bytes: int

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return dataclasses.asdict(self)

    def table(self) -> str:
        """The findings as text, a line for every tensor."""
        head = ("", "weights", "‖g‖", "bias²", "95 % interval", "z", "length", "variance", "cosine", "of mean")
        rows = [head, *(_line(part) for part in (self.total, *self.tensors))]
        widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
        lines = ["  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))) for row in rows]
        theory = "no theory" if self.theory is None else f"theory {_short(self.theory)}"
        cost = f"{self.forward_passes} forward passes, {self.seconds:.3g} s, {self.peak_bytes:,} bytes an estimate"
        test = f"unbiased: p = {self.total.p:.2g}"
        variance = f"variance: {_short(_value(self.total.variance))} ({theory})"
        return "\n".join([f"{self.estimator}, {self.repeats} estimates; {test}; {variance}", *lines, cost])


def _line(part: Part) -> tuple[str, ...]:
    between = "–" if part.bias is None else f"{_short(part.bias.low)} to {_short(part.bias.high)}"
    middle = (_short(_value(part.bias)), between, f"{part.z:.1f}")
    rest = (_value(part.length), _value(part.variance), _value(part.cosine), part.cosine_of_mean)
    return (part.name, f"{part.weights:,}", _short(part.norm), *middle, *map(_short, rest))


def _value(interval: Interval | None) -> float | None:
    return None if interval is None else interval.value


def _short(value: float | None) -> str:
    return "–" if value is None else f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def quality(
    loss: Callable[..., Tensor],
    at: Point,
    estimator: Estimator,
    *,
    generator: Generator | None = None,
    state: Mapping[str, Tensor] | None = None,
    repeats: int = 200,
    warm_up: int = 0,
    exact: Mapping[str, Tensor | None] | None = None,
) -> Quality:
    """Compare many independent estimates ĝ of one batch's gradient with the exact gradient g.

    All at one point: parameters, buffers, `.grad`, the global random state and `state` are afterwards what they were, and every estimate
    sees the same dropout masks. Only `generator` moves on: that is what makes the estimates independent. An estimate that is None for a
    parameter counts as zero there.

    Formula: with V = E‖ĝ − Eĝ‖² from R estimates, ‖Eĝ − g‖² is (‖mean − g‖² − V/R), both relative to ‖g‖².
    Bias and variance: the estimate of the squared bias has no bias of its own and so can be negative. The test of 'unbiased' has a p-value
    below 0.05 in at most about 5 % of cases where that is true; `tensors` are tested one by one, so expect up to one in twenty there.
    Intervals are at 95 %: how they are made, and where they are too narrow, stands at the top of `forwardgrad.diagnostics.moments`.
    Cost: `repeats` + 1 estimates and one of backpropagation; about 40 bytes a weight, however many repeats.

    Args:
        loss, at, estimator, generator: as `estimate_grad_` takes them.
        state: what a stateful estimator has learned; every estimate works on a copy of it, so that estimates are independent.
        repeats: R ≥ 10 estimates, an even number: they are taken in pairs.
        warm_up: steps that a stateful estimator first learns on a copy of `state`, with this batch and these weights. It knows the batch
            then as it would not in training: pass the `state` of a training run where there is one.
        exact: the exact gradient by parameter name, where it is known already; found by backpropagation if left out.

    Raises ValueError where an argument is outside its limits, a stateful estimator has neither state nor warm_up, or the gradient is
    zero or not finite; RuntimeError where an estimate is not finite; and what `estimate_grad_` raises.

    Source: the bias-variance decomposition. The cosine is shown both of one estimate and of their mean, because neither alone tells how
    an estimator trains: that of one estimate is about 1/√n for an unbiased one over n weights.

    >>> xy = torch.tensor([3.0, 4.0], dtype=torch.float64, requires_grad=True)
    >>> found = quality(lambda t: (t**2).sum() / 2, xy, Backprop(), repeats=10)
    >>> found.total.norm, found.total.bias.value, found.total.variance.value, found.total.cosine.value
    (5.0, 0.0, 0.0, 1.0)
    """
    if not isinstance(estimator, Estimator):
        raise TypeError(f"the estimator must be an object such as ForwardGradient(), not {estimator!r}")
    check_count("repeats", repeats)
    if repeats < LEAST or repeats % 2:
        raise ValueError(f"repeats must be an even number of at least {LEAST}, not {repeats}")
    if warm_up:
        check_count("warm_up", warm_up)
    if estimator.stateful and state is None and not warm_up:
        raise ValueError(f"{type(estimator).__name__} learns from step to step: pass the state it has, or let it learn with warm_up=100")
    with torch.inference_mode(False), torch.no_grad():
        objective = Objective(loss, at)
        step = _Step(objective, estimator, generator, {} if state is None else state)
        g = exact_gradient(objective, exact)
        step.learn(warm_up)
        moments = Moments([shown(name, objective) for name in g], list(g.values()))
        seconds = []
        for _ in range(repeats // 2):
            pair = []
            for _ in range(2):
                began = step.now()
                record, estimate = step()
                seconds.append(step.now() - began)
                pair.append([estimate[name] for name in g])
            moments.add(*pair)
        total, *tensors = moments.parts()
        theory = estimator.variance(g)
        del pair, estimate, moments
        peak = step.peak_bytes()
    return Quality(repr(estimator), repeats, total, tuple(tensors), theory, record.forward_passes, statistics.median(seconds), peak)


class _Step:
    """One estimate that can be made again and again from the same point: each works on a copy of the estimator's memory."""

    def __init__(self, objective: Objective, estimator: Estimator, generator: Generator | None, state: Mapping[str, Tensor]) -> None:
        self._objective, self._estimator, self._generator = objective, estimator, generator
        self._state = copied(state)
        self._cuda = sorted({p.get_device() for p in objective.parameters.values() if p.is_cuda})

    def __call__(self) -> tuple[Estimate, dict[str, Tensor | None]]:
        return self._estimate(copied(self._state))

    def learn(self, steps: int) -> None:
        for _ in range(steps):
            self._estimate(self._state)

    def _estimate(self, state: dict[str, Tensor]) -> tuple[Estimate, dict[str, Tensor | None]]:
        with unchanged(self._objective):
            return self._estimator.estimate(self._objective, self._generator, state)

    def peak_bytes(self) -> int:
        """The most bytes that one estimate holds, the copies made here not counted."""
        state, devices = copied(self._state), [p.device for p in self._objective.parameters.values()]
        with unchanged(self._objective):
            return peak_bytes(lambda: self._estimator.estimate(self._objective, self._generator, state), devices)

    def now(self) -> float:
        """The time when all that was asked of the device is done."""
        for device in self._cuda:
            torch.cuda.synchronize(device)
        return time.perf_counter()


def copied(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What an estimator remembers, as tensors of its own."""
    return {name: value.detach().clone() for name, value in state.items()}


@contextmanager
def unchanged(objective: Objective) -> Iterator[None]:
    """Put the model's buffers and the global random state back to what they were."""
    roots = [root for root in (objective.at, objective.loss) if isinstance(root, nn.Module)]
    places = [(module, key, b) for root in roots for module in root.modules() for key, b in module._buffers.items() if b is not None]
    before = {id(b): b.clone() for _, _, b in places}
    cuda = sorted({p.get_device() for p in objective.parameters.values() if p.is_cuda})
    with torch.random.fork_rng(cuda):
        try:
            yield
        finally:
            for module, key, b in places:
                module._buffers[key] = b  # the model may have put another there
                if 0 not in b.stride():  # an expanded constant cannot be written to
                    b.copy_(before[id(b)])


def shown(name: str, objective: Objective) -> str:
    """A parameter's name as the model has it: an objective puts a prefix before it."""
    return name.removeprefix("model.") if isinstance(objective.at, nn.Module) else name


def exact_gradient(objective: Objective, given: Mapping[str, Tensor | None] | None) -> dict[str, Tensor]:
    """The exact gradient of every parameter, by the names of the objective; zeros where the loss does not depend on it."""
    if given is None:
        with unchanged(objective):
            found = Backprop().estimate(objective, None, {})[1]
    else:
        found = {name: given.get(shown(name, objective)) for name in objective.parameters}
    g = {}
    for name, p in objective.parameters.items():
        gradient = found[name]
        if gradient is not None and gradient.shape != p.shape:
            shapes = f"{tuple(gradient.shape)}, not that of the parameter, {tuple(p.shape)}"
            raise ValueError(f"the exact gradient of {shown(name, objective)} has shape {shapes}")
        g[name] = torch.zeros_like(p) if gradient is None else gradient.detach()
    if not all(gradient.isfinite().all() for gradient in g.values()):
        raise ValueError("the exact gradient is not finite: nothing can be compared with it")
    if not any(gradient.any() for gradient in g.values()):
        raise ValueError("the exact gradient is zero: nothing can be compared with it")
    return g
