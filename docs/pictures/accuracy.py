"""The picture of the first page: accuracy against seconds of training, four arms, the NN on MNIST.

`python docs/pictures/accuracy.py` draws accuracy-light.svg and accuracy-dark.svg again from accuracy.json, which holds the evaluations
of the stored runs named in it. `--read results` reads them from an output folder first: its run folders, or the file of packed runs.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from forwardgrad.lab.report.figures import FURTHER, LOOKS, Sketch, render

HERE = Path(__file__).resolve().parent
NUMBERS = HERE / "accuracy.json"
ARMS = (
    ("backprop", "backpropagation", ("45ed0ac87918", "eb2f9a0ded74", "f33f19efaac9")),
    ("local", "local losses with feedback", ("8f329ed2b400", "b6a8e7237203", "f9d317bd1ade")),
    ("feedback", "learned feedback", ("a6db7b35a09d", "641251e8391b", "ad9cf3e6e247")),
    ("forward", "forward gradient, on a GPU", ("345904b0c010",)),
)


def files_of(results: Path, runs: Sequence[str]) -> list[dict[str, str]]:
    """The files of every run by name, as text."""
    packed, wanted = results / "runs.jsonl.gz", ("evaluations.csv", "environment.json")
    found: dict[str, dict[str, str]] = {}
    if packed.exists():
        with gzip.open(packed, "rt", encoding="utf-8") as lines:
            found = {entry["run"]: entry["files"] for entry in map(json.loads, lines) if entry.get("run") in runs}
    for run in runs:
        folder = results / "runs" / run
        if folder.is_dir():
            found[run] = {name: (folder / name).read_text(encoding="utf-8") for name in wanted}
    return [found[run] for run in runs]


def read(results: Path) -> list[dict[str, Any]]:
    """The evaluations of every arm's runs, and where they ran."""
    arms = []
    for kind, label, runs in ARMS:
        held = files_of(results, runs)
        tables = [list(csv.DictReader(io.StringIO(files["evaluations.csv"]))) for files in held]
        columns = {"seconds": 2, "validation_accuracy": 4}
        found: dict[str, Any] = {"kind": kind, "label": label, "runs": list(runs), "step": [int(row["step"]) for row in tables[0]]}
        for name, digits in columns.items():
            found[name] = [[round(float(row[name]), digits) for row in table] for table in tables]
        where = json.loads(held[0]["environment.json"])
        found |= {name: where[name] for name in ("command", "commit", "device", "threads", "torch")}
        arms.append(found)
    return arms


def draw(arms: list[dict[str, Any]]) -> tuple[Figure, list[Sketch]]:
    """Means over seeds as lines, the range over seeds as a band, the name at the end of its line."""
    figure = Figure(figsize=(5.8, 3.7), layout="constrained")
    axes = figure.subplots()
    for arm in arms:
        look = (LOOKS | FURTHER)[arm["kind"]]
        seconds, values = (list(zip(*arm[name], strict=True)) for name in ("seconds", "validation_accuracy"))
        at = [sum(column) / len(column) for column in seconds]
        mean = [100 * sum(column) / len(column) for column in values]
        axes.fill_between(at, [100 * min(c) for c in values], [100 * max(c) for c in values], color=look["color"], alpha=0.16, linewidth=0)
        marks = {"marker": look["marker"], "markersize": 4, "markevery": 1 if len(at) < 20 else 5}
        axes.plot(at, mean, color=look["color"], linestyle=look["linestyle"], linewidth=2, label=arm["label"], **marks)
    axes.set_xscale("log")
    axes.set_xlim(0.8, 200)
    axes.set_ylim(0, 102)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set_xticks([1, 2, 5, 10, 20, 50, 100, 200])
    axes.minorticks_off()
    axes.set_xlabel("seconds of training")
    axes.set_ylabel("validation accuracy, %")
    axes.legend(loc="center left", bbox_to_anchor=(0.0, 0.47), fontsize=9)
    return figure, []


def main() -> None:
    """Read the numbers where asked to, and draw both files."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--read", type=Path, metavar="DIR", help="an output folder to read the numbers from first, such as results")
    options = parser.parse_args()
    if options.read:
        rows = ",\n".join("  " + json.dumps(arm, ensure_ascii=False) for arm in read(options.read))
        NUMBERS.write_text(f"[\n{rows}\n]\n", encoding="utf-8")
    arms = json.loads(NUMBERS.read_text(encoding="utf-8"))
    drawing = render("accuracy", lambda: draw(arms))
    for name, dark in (("light", False), ("dark", True)):
        (HERE / f"accuracy-{name}.svg").write_text(drawing.on_ground(dark), encoding="utf-8")


if __name__ == "__main__":
    main()
