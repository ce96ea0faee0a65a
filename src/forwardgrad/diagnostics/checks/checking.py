"""`check`: test an estimator on the model in hand before a run is trusted."""

from __future__ import annotations

import dataclasses
import time
import warnings
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Generator, Tensor

from forwardgrad.diagnostics import LEAST, Moments, Part, exact_gradient
from forwardgrad.diagnostics.checks.bias import bias
from forwardgrad.diagnostics.checks.directions import DirectionTests
from forwardgrad.diagnostics.checks.findings import Check, Finding
from forwardgrad.diagnostics.checks.promises import promises
from forwardgrad.diagnostics.checks.refusals import refused
from forwardgrad.diagnostics.checks.subject import Gradients, Subject, held
from forwardgrad.diagnostics.checks.ways import compiles, explained
from forwardgrad.estimators import Estimator, check_count, check_number
from forwardgrad.forward_mode import asking
from forwardgrad.objective import Point

MOST_ESTIMATES = 5000  # estimates: what more of them would show is less than what matters in training
WARM_UP = 20


def check(
    loss: Callable[..., Tensor],
    at: Point,
    estimator: Estimator,
    *,
    generator: Generator | None = None,
    state: Mapping[str, Tensor] | None = None,
    seconds: float = 30.0,
    repeats: int | None = None,
    warm_up: int = WARM_UP,
    compile: bool = False,
) -> Check:
    """Look for whatever would make a run with this estimator, on this model and loss, be about something else than it says.

    What is looked at, each a row of the result with its remedy: whether an ordinary forward pass works; whether the estimate can be made
    (else the operator without a forward rule, and what works instead); that nothing is saved for a backward pass; that buffers, `.grad`
    and the global random state are as after one forward pass; that the same generator state gives the same bits; that directions are
    independent between parameters, steps and tangents; that the mean of the estimates is the exact gradient, with the length
    E[ĝ·g]/‖g‖² of every parameter; which layers are scored per example; and, on request, whether the step compiles.

    Works for any estimator, since nothing but its estimates is looked at: `diagnostics.checks.directions` says how directions are told
    from them, `diagnostics.checks.bias` how bias is. The exact gradient is backpropagation's. An estimator that says it is biased
    (`unbiased` is False) is measured, and not faulted for it.
    False alarms: a correct estimator on a correct model gets a fault in less than 1 of 1,000 checks, over all findings together.
    Power: a factor on the estimate of one parameter is seen when it is further from 1 than some 4 times the 95 % interval of its length in
    the table reaches; more tangents or seconds make that narrower. Shared directions are seen from about 10 estimates on in tensors, from
    some 100 on in single numbers, and partly shared ones where the cosine of the noise is well above 1/3.

    The model is afterwards what it was: parameters, buffers, `.grad`, modes, `state`, the global random state and `generator`, of which
    a copy is used. All estimates see the same dropout masks.
    Cost: the seconds given, or somewhat more: some 20 estimates and one of backpropagation are made in any case;
    about 40 bytes a weight.

    Args:
        loss, at, estimator, generator: as `estimate_grad_` takes them. Without a generator one with seed 0 is used.
        state: what a stateful estimator has learned; left out, it first learns for `warm_up` steps on this batch.
        seconds: above 0, the time for repeated estimates: as many are made as fit, at most 5,000.
        repeats: how many to make instead, an even number of at least 10: then the findings do not depend on the machine's speed.
        warm_up: steps that a stateful estimator without a state learns, the weights held still.
        compile: also compile the step, on a copy of the model; that takes up to minutes.

    Raises TypeError or ValueError for arguments outside their limits, and where there is nothing to train. An error that the loss or the
    estimator raises is a finding.

    >>> model, x = torch.nn.Linear(3, 1), torch.ones(4, 3)
    >>> from forwardgrad import Backprop
    >>> found = check(lambda m: m(x).square().mean(), model, Backprop(), repeats=10)
    >>> found.passed, [finding.name for finding in found.findings if finding.status == "note"][0]
    (True, 'backward pass')
    """
    if not isinstance(estimator, Estimator):
        raise TypeError(f"the estimator must be an object such as ForwardGradient(), not {estimator!r}")
    check_number("seconds", seconds, 0)
    check_count("warm_up", warm_up)
    if repeats is not None:
        check_count("repeats", repeats)
        if repeats < LEAST or repeats % 2:
            raise ValueError(f"repeats must be an even number of at least {LEAST}, not {repeats}")
    began = time.perf_counter()
    subject = Subject(loss, at, estimator, generator, {} if state is None else state)
    learns = warm_up if estimator.stateful and state is None else 0
    work = _Work(subject)
    with held(subject.objective), asking(), warnings.catch_warnings():  # what a step would warn of is a finding here
        warnings.filterwarnings("ignore", message="derivatives of .* are made by torch's own forward mode")
        findings = tuple(work.findings(learns, seconds, repeats, compile))
    return Check(_named(estimator), findings, tuple(work.parts), work.repeats, time.perf_counter() - began)


def _named(estimator: Estimator) -> str:
    """The estimator with the fields that are not what they are by default."""
    fields = [(field.name, getattr(estimator, field.name), field.default) for field in dataclasses.fields(estimator)]
    return f"{type(estimator).__name__}({', '.join(f'{name}={value!r}' for name, value, default in fields if value != default)})"


class _Work:
    """The check as it goes on: a fault that leaves nothing to look at ends it."""

    def __init__(self, subject: Subject) -> None:
        self._subject, self.parts, self.repeats = subject, list[Part](), 0

    def findings(self, learns: int, seconds: float, repeats: int | None, compile: bool) -> Iterator[Finding]:
        subject = self._subject
        try:
            ordinary = subject.ordinary()
        except Exception as error:  # the loss is the user's, and may raise anything
            found = f"the loss stops with {type(error).__name__}: {' '.join(str(error).split()) or 'no message'}"
            yield Finding("forward pass", "fault", found, "mend the loss: nothing else was looked at")
            return
        yield Finding("forward pass", "ok", f"an ordinary forward pass gives {float(ordinary.loss):.6g}")
        try:
            with held(subject.objective):
                subject.learn(learns)
                subject.estimate()  # the first is made in more than one way, to be compared
            kept = list(promises(subject, ordinary))
        except Exception as error:  # whatever torch raises is to be a row
            yield refused(subject, error)
            return
        yield from kept
        if not any(row.name in ("estimate", "parameters") and row.status == "fault" for row in kept):
            yield from self._repeated(seconds, repeats)
            yield from explained(subject)
            if compile:
                yield compiles(subject)

    def _repeated(self, seconds: float, repeats: int | None) -> Iterator[Finding]:
        """What many estimates show together."""
        subject = self._subject
        exact: Gradients | None = None
        try:
            with torch.inference_mode(False), torch.no_grad():
                exact = exact_gradient(subject.objective, None)
        except Exception as error:  # a model that has no backward pass can still be trained without one
            reason = " ".join(str(error).split())[:200]
            yield Finding("exact gradient", "note", f"there is none to compare with ({reason}): bias cannot be told")
        directions = DirectionTests(subject, exact)
        moments = None if exact is None else Moments([subject.name(name) for name in exact], [g for g in exact.values() if g is not None])
        until = time.perf_counter() + seconds
        try:
            while self.repeats < (repeats or LEAST) or (repeats is None and self.repeats < MOST_ESTIMATES and time.perf_counter() < until):
                pair = [subject.again() for _ in range(2)]
                for record, estimate in pair:
                    directions.add(record.derivatives, estimate)
                if moments is not None:
                    moments.add(*([estimate[name] for name in subject.objective.parameters] for _, estimate in pair))
                self.repeats += 2
            if moments is not None:
                self.parts = moments.parts()
        except Exception as error:
            yield Finding(
                "estimates", "fault", f"after {self.repeats} estimates {type(error).__name__}: {' '.join(str(error).split())[:200]}"
            )
            return
        yield from directions.findings()
        if moments is not None:
            yield from bias(subject, moments, self.parts)
