"""The picture of many machines: the time of a step on links of several rates, and how much faster more ranks are.

`python docs/pictures/wire.py` draws wire-light.svg and wire-dark.svg from results/wire.json, or from the file that `--read` names, both as
`python -m benchmarks.wire --out FILE` writes them. Marks are measured, lines are the formula of `benchmarks/wire_model.py`, which has
nothing fitted. Between two links that were measured a gather takes a + b / rate. A mark is hollow where ranks shared a core, which the
lines leave out.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator

from forwardgrad.lab.report.figures import FURTHER, INK, LOOKS, Sketch, render

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
NUMBERS = ROOT / "results" / "wire.json"
sys.path.insert(0, str(ROOT))

from benchmarks.wire_model import Line, Sent, seconds  # noqa: E402  # where the path says

METHODS = {
    "ddp": ("backprop", "DistributedDataParallel"),
    "dense-k8": ("forward", "forward gradient, K = 8"),
    "rank1-k8": ("low-rank", "rank one, K = 8"),
    "zeroth-k1": ("zeroth-order", "zeroth order at rank one, K = 1"),
}
LOOPBACK, PAIR = "loopback", 2  # ranks of the left panel
RANKS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)


class Wire:
    """What is stored of one model with the whole batch size for every rank."""

    def __init__(self, stored: dict[str, Any], model: str) -> None:
        options = stored["environment"]["options"]
        self.batch, self.link = options["batch_size"], f"{options['scaling']:g} Mbit/s"
        self.cores = stored["environment"]["cores"]
        self.rates = {link: 8e-6 * line["bytes_a_second"] for link, line in stored["lines"].items()}
        self._stored, self._model = stored, model

    def _of(self, kind: str, method: str) -> Iterator[dict[str, Any]]:
        case = {"model": self._model, "method": method, "batch": self.batch}
        return (entry for entry in self._stored[kind] if case.items() <= entry.items())

    def alone(self, method: str) -> float:
        """Seconds of a step of one process."""
        return next(row["seconds"] for row in self._of("rows", method) if row["ranks"] == 1 and row["link"] == LOOPBACK)

    def steps(self, method: str) -> list[tuple[float, float, float, float]]:
        """Of two ranks on each link: its Mbit/s, the seconds of a step, and the ends of their interval."""
        rows = [row for row in self._of("rows", method) if row["ranks"] == PAIR]
        return sorted((self.rates[row["link"]], row["seconds"], row["seconds_low"], row["seconds_high"]) for row in rows)

    def told(self, method: str, ranks: int, rate: float) -> float:
        """Seconds of a step by the formula, each rank with a core of its own, on a link of so many Mbit/s."""
        lines = sorted((1 / self.rates[link], line["gather_seconds"]) for link, line in self._stored["lines"].items())
        gather = float(numpy.interp(1 / rate, *zip(*lines, strict=True)))
        pair = next(row for row in self._of("rows", method) if row["ranks"] == PAIR)
        reduced = next(self._of("extrapolations", method))["doubling"] is None
        sent = [Sent(pair["payload_bytes"] / pair["calls"], reduced)] * pair["calls"]
        return seconds(self.alone(method), ranks, sent, Line(gather, rate / 8e-6))

    def speeds(self, method: str) -> list[tuple[float, float]]:
        """For each number of ranks, how many times as many examples a second as one process they take."""
        found = (told for told in self._of("scalings", method) if told["link"] == self.link and not told["batch_of_all"])
        return sorted([(1, 1.0), *((told["ranks"], told["times"]) for told in found)])

    def told_speed(self, method: str, ranks: int) -> float:
        """The same by the formula."""
        return ranks * self.alone(method) / self.told(method, ranks, self.rates[self.link])


def plain(axis: Any, ticks: dict[float, str]) -> None:
    """These ticks alone, by these names."""
    axis.set_ticks(list(ticks))
    axis.set_major_formatter(FuncFormatter(lambda value, _: ticks.get(value, "")))
    axis.set_minor_locator(NullLocator())


def numbered(*values: float) -> dict[float, str]:
    return {value: f"{value:,.10g}" for value in values}


def draw(stored: dict[str, Any], model: str) -> tuple[Figure, list[Sketch]]:
    """Two panels, both with logarithmic axes."""
    wire = Wire(stored, model)
    figure = Figure(figsize=(7.4, 3.9), layout="constrained")
    left, right = figure.subplots(1, 2)
    rates = numpy.geomspace(min(wire.rates.values()), max(wire.rates.values()), 50)
    for method in (method for method in METHODS if method in stored["environment"]["options"]["methods"]):
        kind, label = METHODS[method]
        look = (LOOKS | FURTHER)[kind]
        line = {"color": look["color"], "linestyle": look["linestyle"], "linewidth": 1.5}
        mark = {"color": look["color"], "marker": look["marker"], "linestyle": "none", "markersize": 5.5}
        left.plot(rates, [1e3 * wire.told(method, PAIR, rate) for rate in rates], **line)
        at, medians, low, high = map(numpy.array, zip(*wire.steps(method), strict=True))
        left.errorbar(at, 1e3 * medians, yerr=1e3 * numpy.array([medians - low, high - medians]), elinewidth=1.2, **mark)
        right.plot(RANKS, [wire.told_speed(method, ranks) for ranks in RANKS], **line)
        for ranks, times in wire.speeds(method):
            right.plot(ranks, times, **mark, markerfacecolor=look["color"] if ranks <= wire.cores else "none")
        left.plot([], [], **(line | mark | {"linestyle": look["linestyle"]}), label=label)
    _axes(left, right, wire)
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return figure, []


def _axes(left: Axes, right: Axes, wire: Wire) -> None:
    left.set(
        xscale="log", yscale="log", xlabel="the link, Mbit/s", ylabel="a step, milliseconds", title=f"Two ranks, {wire.batch} examples each"
    )
    named = {rate: "loopback" if link == LOOPBACK else link.split()[0] for link, rate in wire.rates.items()}
    plain(left.xaxis, named)
    plain(left.yaxis, numbered(10, 100, 1000, 10_000, 100_000))
    right.set(xscale="log", yscale="log", xlabel="ranks", ylabel="examples a second, over one process", title=f"More ranks at {wire.link}")
    right.plot([1, RANKS[-1]], [1, RANKS[-1]], color=INK, linewidth=0.8, linestyle=":")
    right.annotate("ideal", (RANKS[-1], RANKS[-1]), ha="right", va="bottom", xytext=(-9, -4), textcoords="offset points", fontsize=8.5)
    plain(right.xaxis, numbered(1, 2, 4, 8, 64, 512))
    plain(right.yaxis, numbered(0.001, 0.01, 0.1, 1, 10, 100, 1000))


def main() -> None:
    """Draw both files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--read", type=Path, metavar="FILE", default=NUMBERS, help="where the numbers are read from")
    parser.add_argument("--model", default="nn", help="which of the models in it")
    parser.add_argument("--out", type=Path, metavar="DIR", default=HERE, help="where both files are written")
    options = parser.parse_args()
    stored = json.loads(options.read.read_text(encoding="utf-8"))
    if options.model not in (models := stored["environment"]["options"]["models"]):
        parser.error(f"{options.read} has no model {options.model!r}: choose of {', '.join(models)}")
    if (link := Wire(stored, options.model).link) not in stored["lines"]:
        parser.error(f"{options.read} has nothing of two ranks at {link}: measure these, too")
    drawing = render("wire", lambda: draw(stored, options.model))
    for name, dark in (("light", False), ("dark", True)):
        (options.out / f"wire-{name}.svg").write_text(drawing.on_ground(dark), encoding="utf-8")


if __name__ == "__main__":
    main()
