"""A drawn figure: as SVG, as PDF, as it stands in a page, and the numbers in it with where they lie; always the same bytes."""

from __future__ import annotations

import io
import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.style
from matplotlib.axes import Axes
from matplotlib.backends.backend_pdf import FigureCanvasPdf
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from forwardgrad.lab.report.figures.style import PAGE, STYLE, variable

DIGITS = 5  # significant ones of the numbers that travel with a page
POINTS = 72  # of an inch, the unit of the SVG's coordinates


@dataclass(frozen=True)
class Trace:
    """A drawn line: its points, and the ends of its band where it has one."""

    name: str
    colour: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] = ()
    high: Sequence[float] = ()


@dataclass(frozen=True)
class Sketch:
    """What stands in one set of axes, before it is known where they will lie."""

    axes: Axes
    title: str
    traces: Sequence[Trace]


@dataclass(frozen=True)
class Drawing:
    """A figure: one <svg> element, the same as PDF once it is asked for, and for each panel its box, limits and lines."""

    svg: str
    pdf: Callable[[], bytes]
    panels: tuple[dict[str, Any], ...] = ()
    xlabel: str = ""
    ylabel: str = ""

    @property
    def data(self) -> str:
        """The numbers as JSON that can stand inside a <script>; empty where there is nothing to read off."""
        if not any(panel["lines"] for panel in self.panels):
            return ""
        stored = {"x": self.xlabel, "y": self.ylabel, "panels": self.panels}
        return json.dumps(stored, allow_nan=False, separators=(",", ":"), ensure_ascii=False).replace("<", "\\u003c")

    def on_page(self, prefix: str) -> str:
        """The <svg> with colours that follow the page, and short ids that begin with `prefix`."""
        places: dict[str, str] = {}

        def short(found: re.Match[str]) -> str:
            return f"{found[1]}{places.setdefault(found[2], f'{prefix}-{len(places)}')}{found[3]}"

        svg = re.sub(r'(\bid=")([^"]*)(")', short, self.svg)
        svg = re.sub(r'(href="#)([^"]*)(")', short, svg)
        svg = re.sub(r"(url\(#)([^)]*)(\))", short, svg)
        svg = svg.replace("xlink:href", "href").replace(' xmlns:xlink="http://www.w3.org/1999/xlink"', "")
        return re.sub(r"#[0-9a-fA-F]{6}\b", lambda colour: variable(colour[0]) if colour[0].lower() in PAGE else colour[0], svg)

    def on_ground(self, dark: bool) -> str:
        """The <svg> as a file of its own for a light or a dark ground, without a ground of its own."""

        def seen(colour: re.Match[str]) -> str:
            return PAGE[colour[0].lower()][1 + dark] if colour[0].lower() in PAGE else colour[0]

        svg = re.sub(r"#[0-9a-fA-F]{6}\b", seen, self.svg)
        return svg.replace(f"fill: {PAGE['#ffffff'][1 + dark]}", "fill: none")


def render(name: str, draw: Callable[[], tuple[Figure, Sequence[Sketch]]], xlabel: str = "", ylabel: str = "") -> Drawing:
    """Draw and lay out once; ids in the SVG begin with the name, so that several can stand in one page."""
    style: list[str | Path | dict[str, Any]] = ["default", {**STYLE, "svg.hashsalt": name}]
    with matplotlib.style.context(style):
        figure, sketches = draw()
        svg = io.BytesIO()
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))  # no metadata: it would name other sites, and the hour
        canvas: Any = FigureCanvasSVG(figure)
        canvas.print_svg(svg, metadata=nothing)  # savefig would draw twice, once for nothing
        panels = tuple(map(_panel, sketches))

    def pdf() -> bytes:
        with matplotlib.style.context(style):  # drawn anew: a report of many figures could not keep them all
            content, canvas = io.BytesIO(), FigureCanvasPdf(draw()[0])
            write: Any = canvas.print_pdf
            write(content, metadata=dict.fromkeys(("CreationDate", "Creator", "Producer")))
        return content.getvalue()

    return Drawing(_cleaned(svg.getvalue().decode(), name), pdf, panels, xlabel, ylabel)


def _cleaned(text: str, name: str) -> str:
    text = text[text.index("<svg") :]
    text = re.sub(r"<!--.*?-->\n?", "", text, flags=re.DOTALL)
    text = re.sub(r'\bid="', f'id="{name}-', text)
    text = re.sub(r'href="#', f'href="#{name}-', text)
    text = re.sub(r"url\(#", f"url(#{name}-", text)
    return re.sub(r'\bd="[^"]*"', lambda path: re.sub(r"(\.\d\d)\d+", r"\1", path[0]), text)  # a hundredth of a point is fine enough


def _panel(sketch: Sketch) -> dict[str, Any]:
    axes = sketch.axes
    figure = axes.get_figure()
    assert figure is not None
    wide, tall = (POINTS * float(inches) for inches in figure.get_size_inches())  # type: ignore[union-attr]
    place = axes.get_position()
    return {
        "title": sketch.title.replace("\n", ", "),
        "box": [round(v, 2) for v in (place.x0 * wide, (1 - place.y1) * tall, place.width * wide, place.height * tall)],
        "x": _axis(axes.get_xscale(), axes.get_xlim()),
        "y": _axis(axes.get_yscale(), axes.get_ylim()),
        "lines": [_line(trace) for trace in sketch.traces if len(trace.x)],
    }


def _axis(scale: str, limits: tuple[float, float]) -> dict[str, Any]:
    return {"log": scale == "log", "from": float(limits[0]), "to": float(limits[1])}


def _line(trace: Trace) -> dict[str, Any]:
    stored: dict[str, Any] = {"name": trace.name, "colour": variable(trace.colour), "x": _rounded(trace.x), "y": _rounded(trace.y)}
    if len(trace.low) and (list(trace.low) != list(trace.y) or list(trace.high) != list(trace.y)):
        stored |= {"low": _rounded(trace.low), "high": _rounded(trace.high)}
    return stored


def _rounded(values: Sequence[float | None]) -> list[float | int | None]:
    return [None if value is None else _number(float(value)) for value in values]


def _number(value: float) -> float | int | None:
    """A number with as few letters as will do; what is not finite is a gap."""
    if not math.isfinite(value):
        return None
    short = float(f"{value:.{DIGITS}g}") if abs(value) < 10**DIGITS else round(value)
    return int(short) if short == int(short) else short
