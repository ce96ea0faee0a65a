"""What an estimate must leave alone: nothing is saved for a backward pass, nothing is touched, one seed gives one result."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from forwardgrad.diagnostics.checks.findings import Finding, listed
from forwardgrad.diagnostics.checks.subject import Gradients, Left, Subject, Taken, held

_ONCE = 0.05  # of a buffer's change: less is rounding or a zeroth-order pair; a second update of a running mean is 0.9 of the first


def promises(subject: Subject, ordinary: Left) -> Iterator[Finding]:
    """Compare one estimate with an ordinary forward pass, and with the same estimate made again."""
    start = subject.generator.get_state()
    with held(subject.objective) as state:
        first = subject.estimate(start=start)
        changed = state.changed()
    form = _returned(subject, first)
    yield form
    if form.status == "fault":
        return
    yield _saved(subject, first)
    yield _buffers(subject.before, ordinary, first)
    yield _touched(changed)
    if changed:  # the same estimate cannot be made again
        return
    with held(subject.objective):
        yield _random(subject, ordinary, first, start)
        yield _replayed(subject, first, start)
        yield _added_up(subject, first, start)
    yield _loss(subject, ordinary, first)


def _returned(subject: Subject, taken: Taken) -> Finding:
    """Whether the estimate has the form that `.grad` needs."""
    wrong = []
    for name, p in subject.objective.parameters.items():
        if name not in taken.gradients:
            wrong.append(f"{subject.name(name)} is left out")
        elif (g := taken.gradients[name]) is not None and g.shape != p.shape:
            wrong.append(f"{subject.name(name)} has shape {tuple(g.shape)}, not {tuple(p.shape)}")
        elif g is not None and not bool(g.isfinite().all()):
            wrong.append(f"{subject.name(name)} is not finite")
    if wrong:
        return Finding("estimate", "fault", f"in the estimate {listed(wrong)}", "return a finite tensor or None for every parameter")
    none = [subject.name(name) for name, g in taken.gradients.items() if g is None]
    said = f"every parameter has an estimate, in {taken.record.forward_passes} forward passes"
    if none:
        said = f"{listed(none)} get{'s' * (len(none) == 1)} none: the loss does not depend on it, or the estimator does not train it"
    return Finding("estimate", "note" if none else "ok", said)


def _saved(subject: Subject, taken: Taken) -> Finding:
    name = "backward pass"
    attached = [subject.name(key) for key, g in taken.gradients.items() if g is not None and (g.requires_grad or g.grad_fn is not None)]
    attached += [what for what, t in (("the loss", taken.record.loss), ("the derivatives", taken.record.derivatives)) if t.requires_grad]
    if taken.saved and subject.estimator.reverse:
        return Finding(name, "note", f"{taken.saved:,} bytes are saved for a backward pass, as backpropagation does")
    if taken.saved:
        remedy = "compute under torch.no_grad(), and forward derivatives on detached parameters"
        return Finding(name, "fault", f"{taken.saved:,} bytes were saved for a backward pass", remedy)
    if attached:
        return Finding(name, "fault", f"{listed(attached)} still hang on a graph for a backward pass", "detach what is returned")
    if taken.saved is None:
        return Finding(name, "note", "the loss uses torch.func, under which torch does not show what is saved for a backward pass")
    return Finding(name, "ok", "nothing is saved for a backward pass")


def _buffers(before: Left, ordinary: Left, taken: Taken) -> Finding:
    """Whether buffers moved as by one ordinary pass: the difference is measured in units of that pass's own change."""
    wrong = []
    for name, expected in ordinary.buffers.items():
        got, was = taken.left.buffers.get(name), before.buffers.get(name)
        if got is None or got.shape != expected.shape:
            wrong.append(name)
            continue
        wide = torch.float64 if not expected.is_complex() else torch.complex128
        expected, got = expected.to(wide), got.to(wide)
        change = expected - was.to(wide) if was is not None and was.shape == expected.shape else expected
        rounding = torch.finfo(ordinary.buffers[name].dtype).eps if ordinary.buffers[name].is_floating_point() else 0.0
        allowed = _ONCE * float(change.norm()) + 16 * rounding * float(expected.norm())
        if not float((got - expected).norm()) <= allowed:
            wrong.append(name)
    if wrong:
        found = f"{listed(wrong)} {'are' if len(wrong) > 1 else 'is'} not as after one forward pass"
        return Finding("buffers", "fault", found, "let one evaluation of a step commit its buffers, and the others leave none")
    return Finding("buffers", "ok", "as after one forward pass" if ordinary.buffers else "there are none")


def _touched(changed: list[str]) -> Finding:
    if changed:
        return Finding("parameters", "fault", f"the estimate changes {listed(changed)}", "return the estimate, and write to nothing")
    return Finding("parameters", "ok", "parameters and their .grad are as before")


def _random(subject: Subject, ordinary: Left, first: Taken, start: Tensor) -> Finding:
    """Whether the global generators are as after one pass; where that draws nothing, whether the estimate depends on them all the same."""
    name, remedy = "global random state", "draw directions from the generator that is given, and from nothing else"
    if not all(torch.equal(one, other) for one, other in zip(ordinary.random, first.left.random, strict=True)):
        return Finding(name, "fault", "it is not as after one forward pass: the estimate draws from it", remedy)
    if not subject.draws:
        one, other = (subject.estimate(start=start, seed=seed) for seed in (1, 2))
        if not _equal(one, other) and _distance(subject, one.gradients, other.gradients) > subject.tolerance:
            return Finding(name, "fault", "the estimate depends on it, though the model draws nothing from it", remedy)
    said = "as after one forward pass, with the same draws (dropout) in every evaluation" if subject.draws else "never used"
    return Finding(name, "ok", said)


def _replayed(subject: Subject, first: Taken, start: Tensor) -> Finding:
    """Whether the same generator state gives the same bits and ends in the same state."""
    name, same = "replay", subject.estimate(start=start)
    if not torch.equal(first.generator, same.generator):
        return Finding(name, "fault", "the generator ends in another state when a step is made again from the same one",
                       "draw the same numbers at every step, whatever was drawn before")  # fmt: skip
    if _equal(first, same):
        return Finding(name, "ok", "the same generator state gives the same bits, and the generator ends in the same state")
    distance = _distance(subject, first.gradients, same.gradients)
    if distance <= subject.tolerance:
        return Finding(name, "note", f"the same generator state gives the same estimate up to rounding ({distance:.1e})",
                       "torch.use_deterministic_algorithms(True) gives the same bits where torch has such kernels")  # fmt: skip
    return Finding(name, "fault", f"the same generator state gives another estimate (by {distance:.2g} of its norm)",
                   "draw directions from the generator that is given; a loss that draws has to do so from the global one")  # fmt: skip


def _added_up(subject: Subject, first: Taken, start: Tensor) -> Finding:
    """Whether the parts in which a whole step is taken add up to the estimate."""
    distance = _distance(subject, first.gradients, subject.parts(start))
    if distance <= subject.tolerance:
        return Finding("parts", "ok", "the parts in which TrainingStep takes an estimate add up to it")
    found = f"the parts in which TrainingStep takes an estimate differ from it (by {distance:.2g} of its norm)"
    return Finding("parts", "fault", found, "override `parts` together with `estimate`, or let both come from one function")


def _loss(subject: Subject, ordinary: Left, taken: Taken) -> Finding:
    expected, got = float(ordinary.loss), float(taken.record.loss)
    if abs(got - expected) <= 0.05 * abs(expected) + subject.tolerance:
        return Finding("loss", "ok", f"{got:.6g}, that of an ordinary forward pass")
    return Finding("loss", "fault", f"the record says {got:.6g}, an ordinary forward pass {expected:.6g}", "report the batch's own loss")


def _equal(one: Taken, other: Taken) -> bool:
    if not torch.equal(one.record.loss, other.record.loss) or not torch.equal(one.record.derivatives, other.record.derivatives):
        return False
    pairs = [(g, other.gradients.get(name)) for name, g in one.gradients.items()]
    return all(g is h if g is None or h is None else torch.equal(g, h) for g, h in pairs)


def _distance(subject: Subject, one: Gradients, other: Gradients) -> float:
    """How far two estimates are apart, relative to the norm of the first; None counts as zero."""
    square = size = 0.0
    for name, p in subject.objective.parameters.items():
        g, h = (torch.zeros_like(p) if (t := gradients.get(name)) is None else t.double() for gradients in (one, other))
        square, size = square + float((g - h).square().sum()), size + float(g.square().sum())
    return float((square / size) ** 0.5) if size else float(square > 0)
