"""The lines of arms, and what every plot of them shares: looks, limits, legend, and the numbers that travel with a page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from forwardgrad.lab.report.figures.drawing import Trace
from forwardgrad.lab.report.figures.style import FURTHER, LOOKS, with_rest
from forwardgrad.lab.statistics import Curve


@dataclass(frozen=True)
class Line:
    """One arm's curve in a panel; `end` says in words which runs ended early, `stopped` that all of them did.

    `label` is the arm's name where it is not that of its kind; a `computed` line is drawn in dots, without a place in the legend.
    """

    kind: str
    curve: Curve
    end: str | None = None
    stopped: bool = False
    label: str = ""
    computed: bool = False

    @property
    def name(self) -> str:
        return self.label or (LOOKS[self.kind]["name"] if self.kind in LOOKS else self.kind)


def trace_of(line: Line, look: Mapping[str, Any]) -> Trace:
    """The numbers of a drawn line."""
    name, curve = f"{line.name}, computed" if line.computed else line.name, line.curve
    return Trace(name, look["color"], curve.at, curve.mean, curve.low, curve.high)


def looks_of(lines: Sequence[Line]) -> dict[str, dict[str, Any]]:
    """The look of every arm by its name: that of its kind for the first of the kind, one of the rest for the others."""
    first: dict[str, str] = {}
    for line in lines:
        first.setdefault(line.kind, line.name)
    looks = {first[kind]: look for kind, look in (LOOKS | FURTHER).items() if kind in first}
    return with_rest(looks, [line.name for line in lines])


def limit_losses(axes: Axes, lines: Sequence[Line], log: bool | None) -> None:
    """The limits of a loss axis, from the means and not the bands: one bad mini-batch must not flatten every curve."""
    means = [value for line in lines for value in line.curve.mean if value > 0]
    if not means:
        axes.set_ylim(0, 1)
        return
    least, most = max(min(means), 1e-5), max(means)
    if log or (log is None and most / least > 15):
        axes.set_yscale("log", nonpositive="clip")
        axes.set_ylim(least / 1.4, most * 1.6)
        label_plainly(axes, most / least)
    else:
        axes.set_ylim(0, most * 1.12)


def label_plainly(axes: Axes, span: float) -> None:
    """Ticks of a logarithmic axis without powers of ten where a reader can do without."""
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if span < 100 else (1.0,)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}" if 1e-3 <= value < 1e5 else f"{value:.0e}"))
    axes.yaxis.set_minor_locator(NullLocator())  # labelled lines say as much, and hundreds of ticks take seconds to draw


def add_legend(figure: Figure, looks: Mapping[str, dict[str, Any]], marks: bool) -> None:
    """The arms above a figure, each with its look; `marks` where the lines have them."""
    handles = [
        Line2D([], [], color=look["color"], linestyle=look["linestyle"], linewidth=2, label=name,
               marker=look["marker"] if marks else None, markersize=5)
        for name, look in looks.items()
    ]  # fmt: skip
    if handles:
        figure.legend(handles=handles, loc="outside upper left", ncols=2 if len(handles) <= 2 else 3, handlelength=3.2)
