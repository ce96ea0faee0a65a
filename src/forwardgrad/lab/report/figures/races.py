"""Runs of several arms against the clock: every run as a line, and the height that they race to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from forwardgrad.lab.report.figures.drawing import Drawing, Sketch, Trace, render
from forwardgrad.lab.report.figures.lines import Line, add_legend, looks_of
from forwardgrad.lab.report.figures.style import INK, QUIET
from forwardgrad.lab.statistics import Curve

SHOWN_FROM = 0.1  # of the longest run: what lies below the lowest value after that is left out, or the finish could not be seen
Points = tuple[Sequence[float], Sequence[float]]


@dataclass(frozen=True)
class Racer:
    """An arm: the points of every run, where each that arrived did so, and what all runs come to (which the page reads off)."""

    kind: str
    label: str
    runs: tuple[Points, ...]
    arrivals: tuple[tuple[float, float], ...]
    pooled: Curve


@dataclass(frozen=True)
class RacePanel:
    """One set of axes: the arms, and the height that they race to where it is known; without arms the note stands in the middle."""

    title: str
    racers: tuple[Racer, ...] = ()
    finish: float | None = None
    note: str = ""


def race(name: str, tracks: Sequence[RacePanel], *, xlabel: str, ylabel: str) -> Drawing:
    """Tracks side by side, each on its own axes: a line for every run, a mark where it first is at the finish, a dashed line there."""
    lines = [Line(racer.kind, racer.pooled, label=racer.label) for track in tracks for racer in track.racers]
    looks = looks_of(lines)

    def draw() -> tuple[Figure, list[Sketch]]:
        figure = Figure(figsize=(9.6, 4.4), layout="constrained")
        sketches = []
        for axes, track in zip(figure.subplots(1, len(tracks), squeeze=False)[0], tracks, strict=True):
            _draw(axes, track, looks)
            traces = [_trace(racer, looks[racer.label]) for racer in track.racers]
            sketches.append(Sketch(axes, track.title, traces))
        figure.supxlabel(xlabel, fontsize=9.5, color=INK)
        figure.supylabel(ylabel, fontsize=9.5, color=INK)
        add_legend(figure, looks, True)
        return figure, sketches

    return render(name, draw, xlabel, ylabel)


def _trace(racer: Racer, look: Mapping[str, Any]) -> Trace:
    pooled = racer.pooled
    return Trace(racer.label, look["color"], pooled.at, pooled.mean, pooled.low, pooled.high)


def _draw(axes: Axes, track: RacePanel, looks: Mapping[str, dict[str, Any]]) -> None:
    axes.set_title(track.title + (f"\n{track.note}" if track.note and track.racers else ""))
    drawn = [run for racer in track.racers for run in racer.runs if len(run[0])]
    if not drawn:
        axes.text(0.5, 0.5, track.note or "not run", transform=axes.transAxes, ha="center", va="center", color=QUIET, fontsize=10)
        return
    for racer in track.racers:
        look = looks[racer.label]
        for at, heights in racer.runs:
            axes.plot(at, heights, color=look["color"], linestyle=look["linestyle"], linewidth=1.1, alpha=0.75)
        across, along = [x for x, _ in racer.arrivals], [y for _, y in racer.arrivals]
        axes.scatter(across, along, color=look["color"], marker=look["marker"], s=36, edgecolors="white", zorder=4)
    if track.finish is not None:
        axes.axhline(track.finish, color=INK, linestyle=(0, (4, 2)), linewidth=1.2, zorder=3)
        axes.annotate(f"{track.finish:.2f}", (1, track.finish), xycoords=("axes fraction", "data"), xytext=(-2, 3),
                      textcoords="offset points", ha="right", va="bottom", fontsize=8.5, color=INK, backgroundcolor="white")  # fmt: skip
    _limit(axes, drawn, track.finish)
    axes.xaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 2.5, 5, 10]))


def _limit(axes: Axes, runs: Sequence[Points], finish: float | None) -> None:
    """The start of training is far below the rest, and would leave no room for the end of it."""
    begun = SHOWN_FROM * max(max(at) for at, _ in runs)
    late = [height for at, heights in runs for place, height in zip(at, heights, strict=True) if place >= begun]
    values = [*(late or [height for _, heights in runs for height in heights]), *([] if finish is None else [finish])]
    room = 0.06 * (max(values) - min(values)) or 1.0
    axes.set_ylim(min(values) - room, max(values) + room)
    axes.set_xlim(left=0)
