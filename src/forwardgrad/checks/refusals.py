"""An error on the way to an estimate as a finding: which operator, where in the model, and what works instead."""

from __future__ import annotations

import re
from types import TracebackType

from torch import nn

from forwardgrad.checks.findings import Finding
from forwardgrad.checks.subject import Subject, held
from forwardgrad.estimators.zeroth_order import ZerothOrder

_OPERATOR = re.compile(r"forward AD with (\w+) that does not support it")
_CUSTOM = re.compile(r"custom autograd\.Function|an autograd\.Function with functorch|tried to vmap over")
_STORAGE = re.compile(r"Cannot access data pointer|doesn't have storage")
_OWN = "write the function with setup_context, a jvp and generate_vmap_rule=True"


def refused(subject: Subject, error: Exception) -> Finding:
    """What stopped an estimate. ZerothOrder is tried before it is named."""
    text = " ".join(str(error).split()) or "no message"
    where = _where(subject, error.__traceback__)
    if operator := _OPERATOR.search(text):
        found, own = f"torch has no forward rule for {operator[1]}{where}", ""
    elif _CUSTOM.search(text):
        found, own = f"a custom autograd.Function{where} has no forward rule", _OWN
    elif _STORAGE.search(text):
        found, own = f"an operator{where} reads its input's memory, which forward mode does not let it (packed sequences do)", ""
    elif isinstance(error, (ValueError, TypeError)) and not where:
        return Finding(
            "estimate", "fault", f"{type(error).__name__}: {_short(text)}", "use another estimator, or change the loss as it says"
        )
    else:
        found, own = f"{type(error).__name__}{where}: {_short(text)}", ""
    works = None if isinstance(subject.estimator, ZerothOrder) else _works_without(subject)
    rest = {True: "use fg.ZerothOrder(), which needs no derivative and works here", False: "ZerothOrder() fails here too", None: ""}[works]
    return Finding("forward rule", "fault", found, ", or ".join(part for part in (own, rest) if part))


def _works_without(subject: Subject) -> bool:
    with held(subject.objective):
        try:
            subject.estimate(ZerothOrder())
        except Exception:  # whatever it is, the advice would be wrong
            return False
    return True


def _where(subject: Subject, trace: TracebackType | None) -> str:
    """The innermost module of the model that was at work, and its kind."""
    model = subject.objective.at
    if not isinstance(model, nn.Module):
        return ""
    names, found = {id(module): name for name, module in model.named_modules()}, None
    while trace is not None:
        owner = trace.tb_frame.f_locals.get("self")
        found = owner if isinstance(owner, nn.Module) and id(owner) in names else found
        trace = trace.tb_next
    if found is None:
        return ""
    name = names[id(found)]
    return f" in {name} ({type(found).__name__})" if name else f" in {type(found).__name__}"


def _short(text: str, most: int = 200) -> str:
    return text if len(text) <= most else f"{text[:most]} ..."
