"""Lines from layer to layer: one line an arm, in panels that each have a quantity of their own."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.figure import Figure

from forwardgrad.lab.report.figures.drawing import Drawing, Sketch, Trace, render
from forwardgrad.lab.report.figures.lines import add_legend
from forwardgrad.lab.report.figures.plots import Trend
from forwardgrad.lab.report.figures.style import AXIS, FURTHER, INK, LOOKS, with_rest

SPREAD = 0.05  # of a layer, between the marks of two arms: intervals of equal values would hide one another


def by_layer(name: str, panels: Sequence[tuple[str, Sequence[Trend]]], *, xlabel: str = "layer") -> Drawing:
    """Panels side by side, each on its own linear y, at whole numbers of layers from 0, the input; whiskers are intervals."""
    labels = list(dict.fromkeys(trend.label for _, group in panels for trend in group))
    first: dict[str, str] = {}
    for trend in (trend for _, group in panels for trend in group):
        first.setdefault(trend.kind or trend.label, trend.label)
    looks = with_rest({first[kind]: look for kind, look in (LOOKS | FURTHER).items() if kind in first}, labels)
    looks = {label: looks[label] for label in labels}
    moved = {label: SPREAD * (place - (len(labels) - 1) / 2) for place, label in enumerate(labels)}

    def draw() -> tuple[Figure, list[Sketch]]:
        figure = Figure(figsize=(9.6, 4.4), layout="constrained")
        sketches = []
        for axes, (title, group) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
            axes.set_title(title)
            ticks = sorted({x for trend in group for x in trend.at}) or [1.0]
            axes.set_xticks(ticks, ["input" if x == 0 else f"{x:g}" for x in ticks])
            axes.set_xlim(ticks[0] - 0.4, ticks[-1] + 0.4)
            if any(value < 0 for trend in group for value in trend.low):
                axes.axhline(0, color=AXIS, linewidth=0.9)
            for trend in group:
                look, at = looks[trend.label], [x + moved[trend.label] for x in trend.at]
                ends = [[y - low for y, low in zip(trend.value, trend.low, strict=True)],
                        [high - y for y, high in zip(trend.value, trend.high, strict=True)]]  # fmt: skip
                style = {"color": look["color"], "linestyle": look["linestyle"], "marker": look["marker"]}
                axes.errorbar(at, trend.value, yerr=ends, linewidth=1.7, markersize=5, elinewidth=1.0, capsize=2.5, **style)
            drawn = [Trace(trend.label, looks[trend.label]["color"], trend.at, trend.value, trend.low, trend.high) for trend in group]
            sketches.append(Sketch(axes, title, drawn))
        figure.supxlabel(xlabel, fontsize=9.5, color=INK)
        add_legend(figure, looks, marks=True)
        return figure, sketches

    return render(name, draw, xlabel)
