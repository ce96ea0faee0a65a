"""The plots: plain numbers in, drawings out, the same bytes for the same numbers; matplotlib's global settings stay as they are."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator

from forwardgrad.lab.report.figures.drawing import Drawing, Sketch, Trace, render
from forwardgrad.lab.report.figures.lines import Line, add_legend, label_plainly, limit_losses, looks_of, trace_of
from forwardgrad.lab.report.figures.style import FURTHER, INK, LEVEL, LOOKS, QUIET, with_rest


@dataclass(frozen=True)
class Panel:
    """One set of axes: a title, a note below it, and the lines; without lines the note stands in the middle."""

    title: str
    lines: tuple[Line, ...] = ()
    note: str = ""


@dataclass(frozen=True)
class DescentPath:
    """A path over a function of two variables."""

    kind: str
    label: str
    path: Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Surface:
    """A function of two variables on a grid, its minimum and where descents start."""

    x: Sequence[float]
    y: Sequence[float]
    z: Sequence[Sequence[float]]
    minimum: tuple[float, float]
    start: tuple[float, float]


@dataclass(frozen=True)
class Bar:
    """A value with its interval."""

    kind: str
    label: str
    value: float
    low: float | None
    high: float | None


def curves(
    name: str, rows: Sequence[Sequence[Panel]], *, xlabel: str, ylabel: str, marks: bool = False, log: bool | None = None
) -> Drawing:
    """Panels on shared axes (steps shared along a row), the mean as a line and the range from least to greatest as a light band.

    The loss axis is logarithmic where asked for or, with `log` None, where the means span more than a factor of fifteen.
    """
    tall, wide = len(rows), max(len(row) for row in rows)

    def draw() -> tuple[Figure, list[Sketch]]:
        size = (9.6, 4.4) if wide == tall == 1 else (9.6, 3.4 * tall + (0.9 if tall == 1 else 0.5))
        figure = Figure(figsize=size, layout="constrained")
        grid = figure.subplots(tall, wide, squeeze=False, sharex="row", sharey=True)  # a network trained for less keeps a readable row
        lines = [line for row in rows for panel in row for line in panel.lines]
        limit_losses(grid[0][0], lines, log)
        looks = looks_of(lines)
        sketches = []
        for axes, panel in zip(grid.flat, (panel for row in rows for panel in row), strict=True):
            _panel(axes, panel, marks, looks)
            sketches.append(Sketch(axes, panel.title, [trace_of(line, looks[line.name]) for line in panel.lines]))
        figure.supxlabel(xlabel, fontsize=9.5, color=INK)
        figure.supylabel(ylabel, fontsize=9.5, color=INK)
        add_legend(figure, looks, marks)
        return figure, sketches

    return render(name, draw, xlabel, ylabel)


def _panel(axes: Axes, panel: Panel, marks: bool, looks: Mapping[str, dict[str, Any]]) -> None:
    axes.set_title(panel.title + (f"\n{panel.note}" if panel.note and panel.lines else ""))
    if not panel.lines:
        axes.text(0.5, 0.5, panel.note or "not run", transform=axes.transAxes, ha="center", va="center", color=QUIET, fontsize=10)
        return
    axes.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value / 1000:g}k" if abs(value) >= 10_000 else f"{value:g}"))
    for line in sorted(panel.lines, key=_dashes_last):
        look, curve = looks[line.name], line.curve
        if line.computed:
            axes.plot(curve.at, curve.mean, color=look["color"], linestyle=(0, (1, 1.6)), linewidth=1.5)
            continue
        axes.fill_between(curve.at, curve.low, curve.high, color=look["color"], alpha=0.16, linewidth=0)
        marker = look["marker"] if marks or len(curve.at) == 1 else None
        axes.plot(curve.at, curve.mean, color=look["color"], linestyle=look["linestyle"], linewidth=1.7, marker=marker, markersize=4)
        if line.stopped and curve.at:
            axes.plot(curve.at[-1], curve.mean[-1], marker="X", markersize=9, color=look["color"], markeredgecolor="white", clip_on=False)
    for place, line in enumerate(line for line in panel.lines if line.end):
        words = f"× {line.name}: {line.end}"  # the name, not the colour: words need more contrast than lines
        axes.text(0.97, 0.96 - 0.08 * place, words, transform=axes.transAxes, ha="right", va="top", fontsize=8.5, color=INK)


def contours(name: str, surface: Surface, panels: Sequence[tuple[str, Sequence[DescentPath]]]) -> Drawing:
    """Level lines, evenly spaced in the logarithm of the height above the minimum, with the paths taken in each panel."""

    def draw() -> tuple[Figure, list[Sketch]]:
        figure = Figure(figsize=(9.6, 4.9), layout="constrained")
        grid = figure.subplots(1, len(panels), squeeze=False, sharex=True, sharey=True)[0]
        for axes, (title, descents) in zip(grid, panels, strict=True):
            _levels(axes, surface)
            for descent in descents:  # halos, so that the paths stand out from the levels
                axes.plot(*_columns(descent), color="white", linewidth=3.6, alpha=0.8)
            for descent in sorted(descents, key=_dashes_last):
                _descend(axes, descent)
            axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.12), handlelength=3, ncols=1)
            axes.plot(*surface.start, marker="o", markersize=7, color="white", markeredgecolor=INK, linestyle="none", zorder=5)
            axes.plot(*surface.minimum, marker="*", markersize=13, color="white", markeredgecolor=INK, linestyle="none", zorder=5)
            axes.set(title=title, xlim=(surface.x[0], surface.x[-1]), ylim=(surface.y[0], surface.y[-1]), xlabel="x")
        grid[0].set_ylabel("y")
        points = [("o", "start"), ("*", "minimum")]
        handles = [Line2D([], [], marker=m, color="white", markeredgecolor=INK, linestyle="none", markersize=9, label=t) for m, t in points]
        figure.legend(handles=handles, loc="outside upper left", ncols=2)
        return figure, []

    return render(name, draw)


def _levels(axes: Axes, surface: Surface) -> None:
    heights = [value for row in surface.z for value in row if math.isfinite(value) and value > 0]
    axes.grid(False)
    if not heights or min(heights) == max(heights):
        return
    low, high = math.log10(max(min(heights), max(heights) * 1e-7)), math.log10(max(heights))
    levels = [10 ** (low + (high - low) * i / 13) for i in range(14)]
    shades = [(*to_rgb(INK), 0.24 * i / len(levels)) for i in range(len(levels) + 1)]  # ink of more and more strength, on any ground
    axes.contourf(surface.x, surface.y, surface.z, levels=[0, *levels], colors=shades, extend="max")
    axes.contour(surface.x, surface.y, surface.z, levels=levels, colors=LEVEL, linewidths=0.6)


def _descend(axes: Axes, descent: DescentPath) -> None:
    look, (across, along) = LOOKS[descent.kind], _columns(descent)
    axes.plot(across, along, color=look["color"], linestyle=look["linestyle"], linewidth=1.9, label=descent.label)
    axes.plot(across[-1:], along[-1:], color=look["color"], marker=look["marker"], markersize=6, markeredgecolor="white")


def _columns(descent: DescentPath) -> tuple[list[float], list[float]]:
    return [x for x, _ in descent.path], [y for _, y in descent.path]


def _dashes_last(drawn: Line | DescentPath) -> bool:
    """Where two lines run together, the dashed one on top lets the other show through."""
    return drawn.kind == "forward"


def bars(name: str, groups: Sequence[tuple[str, Sequence[Bar]]], *, xlabel: str) -> Drawing:
    """Horizontal bars with intervals and their values in figures, one group under another."""

    def draw() -> tuple[Figure, list[Sketch]]:
        count = sum(len(group) for _, group in groups)
        figure = Figure(figsize=(9.6, 0.9 + 0.36 * count + 0.42 * len(groups)), layout="constrained")
        axes = figure.subplots()
        axes.grid(axis="y", visible=False)
        place, ticks, reach = 0.0, [], max((bar.high or bar.value for _, group in groups for bar in group), default=1.0)
        for title, group in groups:
            axes.text(0, place, title, fontsize=9.5, fontweight="bold", color=INK, va="center", backgroundcolor="white")
            for bar in group:
                place += 1
                ticks.append((place, bar.label))
                _bar(axes, bar, place, reach)
            place += 1.15
        axes.set_yticks([at for at, _ in ticks], [label for _, label in ticks])
        axes.tick_params(axis="y", length=0, labelcolor=INK)
        axes.set(ylim=(place - 0.4, -0.7), xlim=(0, reach * 1.22), xlabel=xlabel)
        axes.axvline(1, color=QUIET, linewidth=0.9, linestyle=":", zorder=0.9)
        return figure, []

    return render(name, draw)


def _bar(axes: Axes, bar: Bar, place: float, reach: float) -> None:
    color = (LOOKS | FURTHER).get(bar.kind, {"color": "#9aa5b1"})["color"]
    hatch = "///" if bar.kind == "forward" else None
    axes.barh(place, bar.value, height=0.7, color=color, alpha=0.85, hatch=hatch, edgecolor="white", linewidth=0)
    edge = bar.value
    if bar.low is not None and bar.high is not None:
        edge = max(edge, bar.high)
        ends = [[max(0.0, bar.value - bar.low)], [max(0.0, bar.high - bar.value)]]
        axes.errorbar(bar.value, place, xerr=ends, color=INK, capsize=3, linewidth=1.2)
    axes.text(edge + reach * 0.015, place, f"{bar.value:.2f}", va="center", fontsize=9, color=INK)


@dataclass(frozen=True)
class Trend:
    """A quantity with its intervals at several x, and what theory says there; at no x in particular where `at` is empty.

    `kind` is that of an arm whose look it has, where no other line of the figure has it already.
    """

    label: str
    at: tuple[float, ...]
    value: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]
    theory: tuple[float | None, ...] = ()
    kind: str = ""


def trends(name: str, panels: Sequence[tuple[str, Sequence[Trend]]], *, xlabel: str) -> Drawing:
    """Panels side by side on one logarithmic x; y is logarithmic where positive values span more than a factor of fifteen."""
    labels = [trend.label for _, group in panels for trend in group]
    first: dict[str, str] = {}
    for trend in (trend for _, group in panels for trend in group):
        first.setdefault(trend.kind or trend.label, trend.label)
    looks = with_rest({first[kind]: look for kind, look in (LOOKS | FURTHER).items() if kind in first}, labels)
    ticks = sorted({x for _, group in panels for trend in group for x in trend.at})

    def draw() -> tuple[Figure, list[Sketch]]:
        figure = Figure(figsize=(9.6, 4.4), layout="constrained")
        sketches = []
        for axes, (title, group) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
            axes.set_title(title)
            drawn = [Trace(trend.label, looks[trend.label]["color"], trend.at, trend.value, trend.low, trend.high) for trend in group]
            sketches.append(Sketch(axes, title, drawn))
            axes.set_xscale("log", base=2)
            axes.set_xticks(ticks or [1], [f"{x:g}" for x in ticks or [1]])
            axes.xaxis.set_minor_locator(NullLocator())
            positive = [value for trend in group for value in trend.value if value > 0]
            if positive and max(positive) / min(positive) > 15:
                axes.set_yscale("log", nonpositive="mask")
                axes.set_ylim(min(positive) / 2, max(positive) * 2)
                label_plainly(axes, max(positive) / min(positive))
            for trend in group:
                _trend(axes, trend, looks[trend.label])
        figure.supxlabel(xlabel, fontsize=9.5, color=INK)
        handles = [
            Line2D([], [], color=look["color"], linestyle=look["linestyle"], marker=look["marker"], markersize=5, label=label)
            for label, look in looks.items()
        ]
        theory = any(y is not None for _, group in panels for trend in group for y in trend.theory)
        handles += [Line2D([], [], color=INK, linestyle=":", linewidth=1.2, label="theory")] if theory else []
        figure.legend(handles=handles, loc="outside upper left", ncols=2, handlelength=3.2)
        return figure, sketches

    return render(name, draw, xlabel)


def _trend(axes: Axes, trend: Trend, look: dict[str, Any]) -> None:
    color, linestyle = look["color"], look["linestyle"]
    if not trend.at:  # a band over the whole width
        axes.axhline(trend.value[0], color=color, linestyle=linestyle, linewidth=1.7)
        axes.axhspan(trend.low[0], trend.high[0], color=color, alpha=0.16, linewidth=0)
        return
    axes.fill_between(trend.at, trend.low, trend.high, color=color, alpha=0.16, linewidth=0)
    axes.plot(trend.at, trend.value, color=color, linestyle=linestyle, linewidth=1.7, marker=look["marker"], markersize=5)
    told = [(x, y) for x, y in zip(trend.at, trend.theory, strict=False) if y is not None and y > 0]
    if told:
        axes.plot([x for x, _ in told], [y for _, y in told], color=INK, linestyle=":", linewidth=1.2, zorder=3)
