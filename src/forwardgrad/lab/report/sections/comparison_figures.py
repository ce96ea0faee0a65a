"""The plots of a comparison: what a budget buys, how much the learning rate matters, and how fast arms are over many tasks."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from forwardgrad.lab.report import figures
from forwardgrad.lab.report.blocks import exact
from forwardgrad.lab.report.figures import INK, Drawing, Sketch, render
from forwardgrad.lab.statistics import WITHIN, BestOf, Curve, Profile, Sensitivity

FEW, MARKED = 12, 30  # trials, and learning rates, up to which each is marked
BAND_TOP = 100.0  # times the highest value: where the end of a band is drawn that is infinite, out of sight
BANDS = 2  # arms up to which their bands can be told apart
FINE = 1e3  # a range of learning rates up to which thirds of a decade are labelled
ROW = 0.04  # of the height, between the lost trials of one arm and the next


@dataclass(frozen=True)
class Searched:
    """The trials of an arm: what the best of so many is worth, and the learning rates of those that were lost."""

    kind: str
    label: str
    best: BestOf
    rates: Sensitivity | None = None
    lost: tuple[float, ...] = ()


def budget(name: str, title: str, arms: Sequence[Searched]) -> Drawing:
    """The best validation loss against the number of trials, with its band where arms are few; infinite values are a gap ahead of it."""
    lines = [figures.Line(arm.kind, _budget_curve(arm.best, len(arms) <= BANDS), label=arm.label) for arm in arms]
    most = max(arm.best.trials[-1] for arm in arms)
    ylabel = "best validation loss (nats)"
    return figures.curves(name, [[figures.Panel(title, tuple(lines))]], xlabel="trials", ylabel=ylabel, marks=most <= FEW)


def _budget_curve(best: BestOf, band: bool) -> Curve:
    top = BAND_TOP * max((value for value in (*best.value, *best.low) if math.isfinite(value)), default=1.0)
    rows = [row for row in zip(best.trials, best.value, best.low, best.high, strict=True) if math.isfinite(row[1])]
    at, values = tuple(float(trials) for trials, *_ in rows), tuple(value for _, value, *_ in rows)
    if not band:
        return Curve(at, values, values, values)
    return Curve(at, values, tuple(low for *_, low, _ in rows), tuple(min(high, top) for *_, high in rows))


def sensitivity(name: str, title: str, arms: Sequence[Searched]) -> Drawing:
    """Validation loss against learning rate. Crosses at the upper edge are lost trials. The wide line marks rates nearly as good."""
    lines = [figures.Line(arm.kind, _rate_curve(arm.rates), label=arm.label) for arm in arms]

    def draw() -> tuple[Figure, list[Sketch]]:
        figure = Figure(figsize=(9.6, 4.4), layout="constrained")
        axes = figure.subplots()
        axes.set_title(title, pad=14)
        axes.set_xscale("log")
        rates = [rate for arm, line in zip(arms, lines, strict=True) for rate in (*line.curve.at, *arm.lost)]
        axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 3.0) if max(rates) / min(rates) < FINE else (1.0,), numticks=12))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda rate, _: exact(rate)))
        axes.xaxis.set_minor_locator(NullLocator())
        figures.limit_losses(axes, lines, None)
        looks = figures.looks_of(lines)
        crossed = 0
        for arm, line in zip(arms, lines, strict=True):
            _rates(axes, arm, line.curve, looks[line.name], 1 - ROW * crossed)
            crossed += bool(arm.lost)
        figure.supxlabel("learning rate", fontsize=9.5, color=INK)
        figure.supylabel("validation loss (nats)", fontsize=9.5, color=INK)
        figures.add_legend(figure, looks, True)
        traces = [figures.trace_of(line, looks[line.name]) for line in lines if line.curve.at]
        return figure, [Sketch(axes, title, traces)]

    return render(name, draw, "learning rate", "validation loss (nats)")


def _rate_curve(rates: Sensitivity | None) -> Curve:
    points = [(x, y) for x, y in zip(rates.rates, rates.losses, strict=True) if math.isfinite(y)] if rates else []
    losses = tuple(y for _, y in points)
    return Curve(tuple(x for x, _ in points), losses, losses, losses)


def _rates(axes: Axes, arm: Searched, curve: Curve, look: Mapping[str, Any], height: float) -> None:
    marker = look["marker"] if len(curve.at) <= MARKED else None
    axes.plot(curve.at, curve.mean, color=look["color"], linestyle=look["linestyle"], linewidth=1.7, marker=marker, markersize=5)
    if arm.rates is not None:
        good = [(x, y) for x, y in zip(curve.at, curve.mean, strict=True) if arm.rates.low <= x <= arm.rates.high]
        wide = {"color": look["color"], "alpha": 0.2, "linewidth": 9, "solid_capstyle": "round"}
        axes.plot([x for x, _ in good], [y for _, y in good], **wide)
    if lost := sorted(set(arm.lost)):
        (crosses,) = axes.plot(lost, [height] * len(lost), transform=axes.get_xaxis_transform(), linestyle="none", marker="X", markersize=8,
                               color=look["color"], markeredgecolor="white", clip_on=False, zorder=5)  # fmt: skip
        crosses.set_in_layout(False)


def profile(name: str, panels: Sequence[tuple[str, Sequence[tuple[str, str, Profile]]]]) -> Drawing:
    """The share of tasks that an arm has solved, against how many times the fastest arm's time it took.

    Panels stand side by side; each arm is its kind, its label and its profile.
    """
    drawn = [(title, [figures.Line(kind, _stairs(found), label=label) for kind, label, found in arms]) for title, arms in panels]
    row = [figures.Panel(title, tuple(lines)) for title, lines in drawn]
    return figures.curves(name, [row], xlabel="times the fastest arm's", ylabel="share of tasks there", log=False)


def _stairs(found: Profile) -> Curve:
    at, share = [found.within[0]], [found.share[0]]
    for place, height in zip(found.within[1:], found.share[1:], strict=True):
        at += [place, place]
        share += [share[-1], height]
    heights = (*share, share[-1])
    return Curve((*at, WITHIN), heights, heights, heights)
