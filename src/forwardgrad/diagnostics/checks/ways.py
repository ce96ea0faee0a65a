"""How a step is taken: which layers are scored per example, what goes the slow way, and whether it compiles."""

from __future__ import annotations

import copy
import time
import warnings
from collections.abc import Iterator

import torch
from torch import Generator, nn

from forwardgrad.diagnostics import Explanation, copied, unchanged
from forwardgrad.diagnostics.checks.findings import Finding, listed
from forwardgrad.diagnostics.checks.subject import Subject
from forwardgrad.training_step import TrainingStep

_STEPS = 4  # the state of an estimator is filled in the first, and a graph may be compared in three


def explained(subject: Subject) -> Iterator[Finding]:
    """Which layers are scored example by example, and which calls go by differences or through torch's dual numbers."""
    found = subject.explained()
    yield _layers(found)
    if quotients := [row.function for row in found.calls if row.way == "differences"]:
        told = f"{listed(quotients)}: derived by central differences, as forwardgrad.differences asks: near the derivative, not exact"
        yield Finding("differences", "note", told, "give it a jvp, or write it with operations that have a rule")
    slow = [f"{row.function} ({row.reason})" if row.reason else row.function for row in found.calls if row.way == "dual numbers"]
    if found.way == "dual numbers":
        why = found.reason or "it was asked for"
        yield Finding("slow paths", "note", f"the whole model goes through torch's own forward mode: {why}; right, and slower")
    elif slow:
        yield Finding("slow paths", "note", f"torch's dual numbers carry {listed(slow)}: right, and slower than a rule")
    else:
        yield Finding("slow paths", "ok", "no call goes through torch's dual numbers")


def _layers(found: Explanation) -> Finding:
    name, whole = "examples", [row for row in found.layers if row.scored == "by the whole loss"]
    apart = [row for row in found.layers if row.scored == "by example"]
    if whole:
        told = f"{whole[0].reason}: {listed([row.layer for row in whole])} are scored by the whole loss, unbiased and noisier"
        return Finding(name, "note", told, "a shared direction (perturb=LowRank()) has no part of the loss to be told apart")
    if apart:
        return Finding(name, "ok", f"all {len(apart)} places where examples move on their own are scored example by example")
    return Finding(name, "ok", "all examples share what moves")


def compiles(subject: Subject) -> Finding:
    """Take a few steps of a copy of the model with engine="compile"; a fall-back is a note with its reason."""
    model, name, began = subject.objective.at, "compile", time.perf_counter()
    if not isinstance(model, nn.Module):
        return Finding(name, "note", "only the step of a module is compiled")
    try:
        twin = copy.deepcopy(model)
    except Exception as error:  # modules may hold anything
        return Finding(name, "note", f"not tried: the model cannot be copied ({type(error).__name__})")
    generator = Generator(subject.generator.device)
    generator.set_state(subject.generator.get_state())
    optimizer = torch.optim.SGD([p for p in twin.parameters() if p.requires_grad], lr=1e-3)
    step = TrainingStep(
        subject.objective.loss, twin, optimizer, subject.estimator, generator=generator, state=copied(subject.state), engine="compile"
    )
    with warnings.catch_warnings(record=True) as told, unchanged(subject.objective):
        warnings.simplefilter("always")
        try:
            for _ in range(_STEPS):
                step()
        except Exception as error:  # a compiler's errors are of many kinds
            return Finding(name, "note", f"a compiled step stops with {type(error).__name__}: {' '.join(str(error).split())[:200]}")
    reasons = [str(w.message).partition("eager steps: ")[2] for w in told if "falls back to eager steps" in str(w.message)]
    if reasons:
        return Finding(name, "note", f"steps stay eager: {reasons[0]}", "leave engine='eager', or change what the reason names")
    return Finding(name, "ok", f"one compiled function, equal to the eager step ({time.perf_counter() - began:.0f} s)")
