"""An estimate that fails, as a finding: which operator stopped it, where in the model, and what works instead."""

from __future__ import annotations

from forwardgrad.diagnostics.checks.findings import Finding
from forwardgrad.diagnostics.checks.subject import Subject, held
from forwardgrad.estimators import ZerothOrder
from forwardgrad.forward_mode import Said, place_of, refusal


def refused(subject: Subject, error: Exception) -> Finding:
    """What stopped an estimate. ZerothOrder is tried before it is named."""
    text, where = " ".join(str(error).split()) or "no message", place_of(error, subject.objective.at)
    said = error if isinstance(error, Said) else refusal(error, subject.objective.at)
    if said is None and isinstance(error, (ValueError, TypeError)) and not where:
        told = f"{type(error).__name__}: {_short(text)}"
        return Finding("estimate", "fault", told, "use another estimator, or change the loss as it says")
    found, own = (said.what, said.do) if said is not None else (f"{type(error).__name__}{where}: {_short(text)}", "")
    if isinstance(subject.estimator, ZerothOrder):
        return Finding("forward rule", "fault", found, own)
    if not _works_without(subject):
        return Finding("forward rule", "fault", found, "ZerothOrder() fails here too")
    own = own.partition("or train this model with")[0].removesuffix("replace it, ").rstrip(", ")
    works = "use fg.ZerothOrder(), which needs no derivative and works here"
    return Finding("forward rule", "fault", found, f"{own}, or {works}" if own else works)


def _works_without(subject: Subject) -> bool:
    with held(subject.objective):
        try:
            subject.estimate(ZerothOrder())
        except Exception:  # whatever it is, the advice would be wrong
            return False
    return True


def _short(text: str, most: int = 200) -> str:
    return text if len(text) <= most else f"{text[:most]} ..."
