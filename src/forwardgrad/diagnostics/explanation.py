"""`explain`: which way the derivatives of a model go, call by call, and why."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor

from forwardgrad.diagnostics.measured import unchanged
from forwardgrad.estimators import Estimator, ForwardGradient
from forwardgrad.forward_mode import Kind, Notes, asking
from forwardgrad.objective import Objective, Point


@dataclass(frozen=True)
class CallRow:
    """Calls of one function that went one way: "rule" (the explicit way knows it), "dual numbers" (torch's own), "did not move", or
    "differences" (of this operator, where `forwardgrad.differences` asks for them)."""

    function: str
    times: int
    way: Kind
    reason: str


@dataclass(frozen=True)
class LayerRow:
    """What moves at one layer, named by its parameters, and which part of the loss scores it.

    `scored` is "by example" (each example by its own part of the loss), "by the whole loss" (examples influence one another there), "by the
    loss" (all examples share what moves), or "exactly" (the gradient there is exact).
    """

    layer: str
    moves: str
    scored: str
    reason: str


@dataclass(frozen=True)
class ExplanationSection:
    """A part of an explanation: rows of one dataclass, whose fields are the columns."""

    title: str
    rows: tuple[Any, ...]


@dataclass(frozen=True)
class Explanation:
    """What `explain` found.

    `way` of a pass as a whole: "explicit", "dual numbers" (torch's own forward mode for everything), or "none" where the estimator needs
    no forward mode; `reason` says why it is not the first. `sections` tell more: `calls`, and `layers` with what scores each of them
    (none where whole weights move, which all examples share).
    """

    estimator: str
    way: str
    reason: str
    sections: tuple[ExplanationSection, ...]

    @property
    def calls(self) -> tuple[CallRow, ...]:
        return self.sections[0].rows

    @property
    def layers(self) -> tuple[LayerRow, ...]:
        return self.sections[1].rows

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return dataclasses.asdict(self)

    def table(self) -> str:
        """The findings as text, a line for every row."""
        why = f", because {self.reason}" if self.reason else ""
        parts = [f"{self.estimator}: {self.way}{why}"]
        return "\n\n".join([*parts, *(_table(section) for section in self.sections if section.rows)])


def _table(section: ExplanationSection) -> str:
    names = [field.name for field in dataclasses.fields(section.rows[0])]
    rows = [names, *([str(getattr(row, name)) for name in names] for row in section.rows)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(names))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([section.title, *lines])


def explain(
    loss: Callable[..., Tensor],
    at: Point,
    estimator: Estimator | None = None,
    *,
    generator: Generator | None = None,
    state: Mapping[str, Tensor] | None = None,
) -> Explanation:
    """Make one estimate, throw it away, and tell which way each torch call of the loss was differentiated.

    Parameters, buffers, `.grad`, the global random state, `generator` and `state` are afterwards what they were. What is learned of the
    model stays known: if it is given up for torch's own forward mode here, later steps take that at once.

    Args:
        loss, at, estimator, generator, state: as `estimate_grad_` takes them; without a generator directions follow from seed 0.

    Raises what `estimate_grad_` raises.

    >>> model, x = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Tanh()), torch.ones(4, 2)
    >>> found = explain(lambda m: m(x).cumsum(0).sum(), model)
    >>> found.way, [(row.function, row.way) for row in found.calls][:2]
    ('explicit', [('cumsum', 'dual numbers'), ('linear', 'rule')])
    """
    chosen = ForwardGradient() if estimator is None else estimator
    if not isinstance(chosen, Estimator):
        raise TypeError(f"the estimator must be an object such as ForwardGradient(), not {chosen!r}")
    own = torch.Generator().manual_seed(0) if generator is None else generator
    before = own.get_state()
    try:
        with torch.inference_mode(False), torch.no_grad(), asking() as notes:
            objective = Objective(loss, at)
            with unchanged(objective):
                chosen.estimate(objective, own, {name: value.detach().clone() for name, value in (state or {}).items()})
    finally:
        own.set_state(before)
    way, reason = _whole(notes)
    layers = tuple(LayerRow(*scored) for scored in notes.layers)
    return Explanation(repr(chosen), way, reason, (ExplanationSection("calls", _rows(notes)), ExplanationSection("layers", layers)))


def _whole(notes: Notes) -> tuple[str, str]:
    """The way of all passes: where they differ, that of the one that was given up."""
    if not notes.passes:
        return "none", "this estimator makes no pass in forward mode"
    return max(notes.passes, key=lambda found: (found[0] == "dual numbers", bool(found[1])))


def _rows(notes: Notes) -> tuple[CallRow, ...]:
    order = ("differences", "dual numbers", "rule", "did not move")
    counted = sorted(notes.calls.items(), key=lambda item: (order.index(item[0].kind), -item[1], item[0]))
    return tuple(CallRow(way.function, times, way.kind, way.reason) for way, times in counted if times)
