"""What every estimator promises of an estimate, each promise a function that raises AssertionError with one sentence.

The sentence says what is wrong and what to do. `close` is how far a number may be from that of one ordinary forward pass: an estimator
that evaluates the loss beside the parameters, as finite differences do, has the loss and the buffers of its own evaluations.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import SkipTest

import torch
from torch import Tensor

from forwardgrad.estimators import Estimate, Estimator
from forwardgrad.objective import Objective
from forwardgrad.testing.cases import Case, gpus
from forwardgrad.testing.evidence import SEED, FreshEstimate, PromiseEvidence, random_state, take

LOSS, BUFFERS = 0.05, 1e-3  # relative: a second update of a running mean is 0.9 of the first, and finite differences are far closer


def ensure(holds: bool, broken: str, remedy: str) -> None:
    if not holds:
        raise AssertionError(f"{broken}; {remedy}")


def returns_what_grad_needs(estimator: Estimator, case: Case, device: str = "cpu") -> None:
    """One estimate, asked for as `estimate_grad_` asks: an `Estimate`, and a finite tensor or None for every trained parameter."""
    model, loss = case.build(device)
    with torch.random.fork_rng(devices=gpus(device)), torch.no_grad():
        torch.manual_seed(SEED)
        objective = Objective(loss, model)
        found: Any = estimator.estimate(objective, torch.Generator().manual_seed(0), {})
    remedy = "return two things: the record, an Estimate, and a dictionary from the name of a parameter to its estimate"
    ensure(isinstance(found, tuple) and len(found) == 2, f"estimate returns {type(found).__name__}", remedy)
    record, gradients = found
    kinds = f"estimate returns {type(record).__name__} and {type(gradients).__name__}"
    ensure(isinstance(record, Estimate) and isinstance(gradients, dict), kinds, remedy)
    for name, p in objective.parameters.items():
        ensure(name in gradients, f"the estimate leaves out {name}", "give every name in objective.parameters a tensor, or None")
        g = gradients[name]
        ensure(g is None or isinstance(g, Tensor), f"the estimate of {name} is {type(g).__name__}", "give it a tensor, or None")
        if g is not None:
            ensure(g.shape == p.shape, f"the estimate of {name} has shape {tuple(g.shape)}", f"give it the parameter's, {tuple(p.shape)}")
            ensure(bool(g.isfinite().all()), f"the estimate of {name} is not finite", "look for a division by zero, or an overflow")
    ensure(all(p.grad is None for p in model.parameters()), "estimate writes to .grad", "return the estimate: `estimate_grad_` adds it")


def fills_grad_and_adds_to_it(evidence: PromiseEvidence, learns: Callable[[Tensor], bool] | None = None) -> None:
    """What is trained, and nothing else, has an estimate in its `.grad`, of its own kind, added to what was there.

    `learns`: whether a parameter gets an estimate; left out, every trained parameter where the estimator calls itself unbiased.
    """
    first, model = evidence.first, evidence.same.model
    objects = "parameters or buffers are other objects than before"
    ensure(first.kept and evidence.added.kept, objects, "write to none of them: `Objective.commit` takes the buffers of an evaluation over")
    for name, p in model.named_parameters():
        if not p.requires_grad or (learns is not None and not learns(p)):
            what = "is frozen" if not p.requires_grad else "is none that this estimator trains"
            ensure(p.grad is None, f"{name} {what}, and has a .grad", "return estimates of objective.parameters alone")
            continue
        if p.grad is None:
            ensure(
                learns is None and not evidence.estimator.unbiased,
                f"{name} is trained and has no .grad",
                "return an estimate for every parameter, or let `unbiased` be False where some are not trained",
            )
            continue
        _of_its_kind(name, p, p.grad)
    ensure(any(bool(g.any()) for g in first.gradients.values()), "the estimate is zero everywhere", "return something to step along")
    expected = {name: -2 * g for name, g in first.gradients.items()}
    remedy = "return a tensor of your own: a view of .grad, or of something kept, changes under the addition"
    _close(evidence.added.gradients, expected, None, "the estimate is not added to what .grad held", remedy)


def _of_its_kind(name: str, p: Tensor, g: Tensor) -> None:
    kinds = (g.dtype, g.device, g.shape), (p.dtype, p.device, p.shape)
    ensure(kinds[0] == kinds[1], f"{name} has a .grad of {kinds[0]}, and is {kinds[1]}", "keep dtype, device and shape")
    ensure(bool(g.isfinite().all()), f"{name} has a .grad that is not finite", "look for a division by zero, or an overflow")
    ensure(type(g) is Tensor, f"{name} has a {type(g).__name__} in its .grad", "return a plain tensor, not a parameter")
    ensure(not g.requires_grad, f"{name} has a .grad that hangs on a graph", "work on detached tensors, or detach what is returned")
    ensure(not g.is_inference(), f"{name} has a .grad made in inference mode", "leave inference mode alone")


def repeats_bit_for_bit(evidence: PromiseEvidence) -> None:
    """The same seed gives the same bits."""
    first, same = numbers(evidence.first), numbers(evidence.same)
    ensure(
        len(first) == len(same) and all(torch.equal(a, b) for a, b in zip(first, same, strict=True)),
        "the same seed gives other numbers",
        "draw from the generator that `estimate` is handed, and from nothing else",
    )


def numbers(taken: FreshEstimate) -> list[Tensor]:
    """All that an estimate says."""
    return [taken.record.loss, taken.record.derivatives, *taken.gradients.values()]


def passes_as_an_ordinary_forward_pass(evidence: PromiseEvidence, close: float | None = LOSS) -> None:
    """The loss is that of the batch, and the global generators are as after one ordinary forward pass.

    `close` None: as close as the type of number allows.
    """
    record, (model, loss) = evidence.first.record, evidence.build()
    with torch.random.fork_rng(devices=gpus(evidence.device)):
        torch.manual_seed(SEED)
        start = random_state(model)
        expected = loss(model).detach().mean()
        after = random_state(model)
    drawn = not all(torch.equal(a, b) for a, b in zip(start, after, strict=True))
    ensure(drawn == evidence.case.random, f"the case draws {'' if drawn else 'no '}random numbers", f"give it random={drawn}")
    ensure(
        all(torch.equal(a, b) for a, b in zip(evidence.first.random, after, strict=True)),
        "the global random state is not as after one ordinary forward pass",
        "draw from the generator that `estimate` is handed; where the loss is evaluated more than once, let one evaluation commit",
    )
    says = f"the record says that the loss is {float(record.loss):.6g}, and a forward pass gives {float(expected):.6g}"
    _close(record.loss, expected, close, says, "report the loss of the batch")
    ensure(record.derivatives.dim() == 1, "the record's derivatives are no vector", "report one number for every tangent, or none at all")
    counted = type(record.forward_passes) is int and record.forward_passes >= 1
    ensure(counted, f"forward_passes is {record.forward_passes!r}", "count the primal pass and every tangent pass as one, a whole number")
    held = record.loss.requires_grad or record.derivatives.requires_grad
    ensure(not held, "the record hangs on a graph for a backward pass", "detach the loss and the derivatives")


def updates_buffers_once(evidence: PromiseEvidence, close: float = BUFFERS) -> None:
    """Buffers move as by one ordinary forward pass, in the first step and in the next."""
    (model, loss), taken = evidence.build(), evidence.first
    remedy = "let one evaluation of a step commit its buffers (`Objective.commit`), and the others leave none"
    with torch.random.fork_rng(devices=gpus(evidence.device)):
        for _ in range(2 if taken.buffers else 0):
            torch.manual_seed(SEED)
            loss(model)
            expected = dict(model.named_buffers())
            _close(taken.buffers, expected, close, "the buffers are not as after one forward pass", remedy, absolute=close / 10)
            taken = take(evidence.estimator, taken.model, loss)
            ensure(taken.kept, "parameters or buffers are other objects than before", remedy)


def saves_nothing_for_a_backward_pass(evidence: PromiseEvidence) -> None:
    """No bytes are saved for a backward pass, unless the estimator says that it makes one (`reverse`)."""
    if evidence.estimator.reverse:
        raise SkipTest(f"{type(evidence.estimator).__name__} says that it makes a backward pass")
    seen = [taken.saved for taken in (evidence.first, evidence.added)]
    if None in seen:
        raise SkipTest("the loss uses torch.func, under which torch does not show what is saved for a backward pass")
    ensure(
        all(saved == (0, 0) for saved in seen),
        f"{seen[0][1]:,} bytes are saved for a backward pass" if seen[0] else "",
        "compute under torch.no_grad(), take derivatives along detached parameters, or say `reverse = True`",
    )


def _close(found: object, expected: object, close: float | None, broken: str, remedy: str, absolute: float | None = None) -> None:
    try:
        torch.testing.assert_close(found, expected, rtol=close, atol=close if absolute is None else absolute)
    except AssertionError as error:
        raise AssertionError(f"{broken}; {remedy} ({' '.join(str(error).split())})") from None
