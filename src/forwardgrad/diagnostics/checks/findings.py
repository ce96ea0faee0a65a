"""`Finding` and `Check`: what a check found, as rows and as text."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

from forwardgrad.diagnostics import Part

Status = Literal["ok", "note", "fault"]


@dataclass(frozen=True)
class Finding:
    """One row: what was looked at, how it stands, what was found in one sentence, and what to do about it ('' for nothing)."""

    name: str
    status: Status
    found: str
    remedy: str = ""


@dataclass(frozen=True)
class Check:
    """What `check` found: `findings` in the order in which they were made, and the estimate compared with the exact gradient.

    `passed`: whether nothing is a fault; a note is for the reader to judge. `parts`: all parameters together and then one by one, as in
    `Quality.total` and `Quality.tensors`; empty where there was no exact gradient or no estimate. `repeats`: the estimates that were made.
    """

    estimator: str
    findings: tuple[Finding, ...]
    parts: tuple[Part, ...]
    repeats: int
    seconds: float

    @property
    def passed(self) -> bool:
        return not self.faults

    @property
    def faults(self) -> tuple[Finding, ...]:
        return tuple(finding for finding in self.findings if finding.status == "fault")

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {"passed": self.passed, **dataclasses.asdict(self)}

    def table(self) -> str:
        """The findings as text, a line for each and a line for its remedy; then the length of the estimate, parameter by parameter."""
        count = len(self.faults)
        verdict = "passed" if self.passed else f"{count} fault{'s' * (count > 1)}"
        lines = [f"{self.estimator}: {verdict} ({self.repeats} estimates, {self.seconds:.3g} s)"]
        wide = max((len(finding.name) for finding in self.findings), default=0)
        for finding in self.findings:
            lines.append(f"{finding.status:<5}  {finding.name.ljust(wide)}  {finding.found}")
            if finding.remedy:
                lines.append(f"{'':<5}  {'':<{wide}}  -> {finding.remedy}")
        return "\n".join([*lines, *_lengths(self.parts)])

    def __str__(self) -> str:
        return self.table()


def _lengths(parts: tuple[Part, ...]) -> list[str]:
    if not parts:
        return []
    head = ("parameter", "weights", "‖g‖", "length E[ĝ·g]/‖g‖²", "95 % interval", "cosine of mean")
    rows = [head, *(_line(part) for part in parts)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    text = ("  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))) for row in rows)
    return ["", *(line.rstrip() for line in text)]


def _line(part: Part) -> tuple[str, ...]:
    if part.length is None or part.cosine_of_mean is None:
        return (part.name, f"{part.weights:,}", "0", "–", "–", "–")
    length = part.length
    between = f"{length.low:.3g} to {length.high:.3g}"
    return (part.name, f"{part.weights:,}", f"{part.norm:.3g}", f"{length.value:.3g}", between, f"{part.cosine_of_mean:.3g}")


def listed(names: list[str], most: int = 3) -> str:
    """Names as part of a sentence; of many the first few and how many more."""
    shown, more = names[:most], len(names) - most
    return f"{', '.join(shown)} and {more} more" if more > 0 else " and ".join([", ".join(shown[:-1]), shown[-1]] if shown[1:] else shown)
