"""How arms and figures look: one colour, stroke and mark for each arm, and what every colour becomes on a light and on a dark page."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

# One look for each arm in every figure: Okabe and Ito's colours, told apart without colour by line style and marker.
LOOKS: dict[str, dict[str, Any]] = {
    "backprop": {"color": "#0072B2", "linestyle": "-", "marker": "o", "name": "backpropagation"},
    "forward": {"color": "#D55E00", "linestyle": (0, (3.5, 1.2)), "marker": "s", "name": "forward gradient"},
}
DASHES, DOTS = (0, (6, 1.5)), (0, (3, 1.2, 1, 1.2))
FURTHER: dict[str, dict[str, Any]] = {
    "local": {"color": "#009E73", "linestyle": "-", "marker": "^"},
    "local-scalar": {"color": "#009E73", "linestyle": DOTS, "marker": "^"},
    "zeroth-order": {"color": "#009E73", "linestyle": DASHES, "marker": "^"},
    "feedback": {"color": "#CC79A7", "linestyle": "-", "marker": "D"},
    "feedback-average": {"color": "#CC79A7", "linestyle": DASHES, "marker": "D"},
    "feedback-cv": {"color": "#CC79A7", "linestyle": DOTS, "marker": "D"},
    "activity": {"color": "#E69F00", "linestyle": "-", "marker": "v"},
    "per-example": {"color": "#E69F00", "linestyle": DASHES, "marker": "v"},
    "low-rank": {"color": "#D55E00", "linestyle": DOTS, "marker": "s"},
    "cheapest": {"color": "#56B4E9", "linestyle": "-", "marker": "P"},
    "fixed-feedback": {"color": "#000000", "linestyle": "-", "marker": "*"},
    "readout": {"color": "#000000", "linestyle": DASHES, "marker": "*"},
    "linear": {"color": "#000000", "linestyle": DOTS, "marker": "*"},
    "untrained": {"color": "#5f6b76", "linestyle": DOTS, "marker": "o"},
}  # relatives share a colour
OTHERS = ("#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")  # further arms, in the order in which they come
STROKES: tuple[Any, ...] = ("-", DASHES, DOTS)
MARKERS = ("^", "D", "v", "P", "*")
INK, QUIET, AXIS, GRID, LEVEL = "#1f2933", "#5f6b76", "#9aa5b1", "#e4e7eb", "#8492a0"
STYLE = {
    "figure.facecolor": "white",
    "figure.dpi": 72,  # the SVG's unit
    "axes.facecolor": "white",
    "axes.edgecolor": AXIS,
    "axes.labelcolor": INK,
    "text.color": INK,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlecolor": INK,
    "axes.labelsize": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    "xtick.color": QUIET,
    "ytick.color": QUIET,
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "font.family": "DejaVu Sans",  # comes with matplotlib: the same letters on every machine
    "svg.fonttype": "path",
    "pdf.fonttype": 42,  # letters that journals take
}


def with_rest(looks: dict[str, dict[str, Any]], names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """These looks, and one of the rest for every name that has none."""
    rest = [name for name in dict.fromkeys(names) if name not in looks]
    for place, name in enumerate(rest):
        turn, colour = divmod(place, len(OTHERS))
        looks[name] = {"color": OTHERS[colour], "linestyle": STROKES[turn % len(STROKES)], "marker": MARKERS[colour]}
    return looks


# What the page writes instead of a colour of a figure, and that colour on a light and on a dark ground: lines stand out from the ground
# by at least 3 to 1, words by 4.5 to 1. Exported files keep the colours above.
PAGE: dict[str, tuple[str, str, str]] = {
    INK: ("ink", "#1f2933", "#e6e9ed"),
    QUIET: ("quiet", "#59646e", "#a9b3bd"),
    AXIS: ("axis", "#9aa5b1", "#5d6974"),
    GRID: ("grid", "#e4e7eb", "#2d363f"),
    LEVEL: ("level", "#8492a0", "#71808e"),
    "#ffffff": ("card", "#ffffff", "#1b2128"),
    "#0072b2": ("blue", "#0072b2", "#5aaef2"),
    "#d55e00": ("vermilion", "#d55e00", "#ff8f45"),
    "#009e73": ("green", "#008f68", "#2fcb9d"),
    "#cc79a7": ("pink", "#c0659a", "#e8a0c8"),
    "#e69f00": ("orange", "#b87d00", "#f3b93f"),
    "#56b4e9": ("sky", "#2b92cc", "#a5defa"),
    "#000000": ("black", "#000000", "#ffffff"),
}


def variable(colour: str) -> str:
    """The colour as the page writes it.

    >>> variable("#D55E00")
    'var(--vermilion)'
    """
    return f"var(--{PAGE[colour.lower()][0]})"
