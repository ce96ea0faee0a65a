"""The cost of a step in figures, and what its cases are called there and in tables. Loads without torch."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from forwardgrad.lab.report import figures
from forwardgrad.lab.report.blocks import Picture, Views, tables

Record = Mapping[str, Any]  # what is stored of one arm, or of one case
UPDATES = {"sgd": "SGD", "momentum": "SGD with momentum", "adam": "Adam", "adamw": "AdamW"}
DEEP = re.compile(r"(mlp|vgg)-(\d+)x(\d+)")
CHAINS = {"mlp": ("MLP", "layer"), "vgg": ("VGG", "convolution")}
TRANSFORMER = re.compile(r"(bert|gpt)-(\d+)x(\d+)")


def title_of(case: Record) -> str:
    where = "" if case.get("accelerator", "cpu") == "cpu" else f" · {case['accelerator']}"
    update = f" · {update_of(case)}" if update_of(case) else ""
    return (
        f"{network_of(case)} · {batch_of(case)} · {case['parameters']:,} parameters · {case['layout']}{where}{update} · "
        f"{case['rounds']} rounds"
    )


def batch_of(case: Record) -> str:
    """The size of a batch, and of an example where that is a text."""
    return f"batch {case['batch']}" + (f" of {case['sequence']:,} tokens" if case.get("sequence") else "")


def update_of(case: Record) -> str:
    """The optimizer in words; empty for plain SGD, which is the usual one, and the only one of older files."""
    name = case.get("optimizer", "sgd")
    return "" if name == "sgd" else str(UPDATES.get(name, name))


def network_of(case: Record) -> str:
    model, data = str(case["model"]), str(case["data"])
    if deep := DEEP.fullmatch(model):
        chain, layer = CHAINS[deep[1]]
        return f"{chain} of {tables.count(int(deep[2]), layer)}, width {deep[3]}"
    if found := TRANSFORMER.fullmatch(model):
        return f"{found[1].upper()} of {tables.count(int(found[2]), 'block')}, width {found[3]}"
    return f"{tables.MODELS.get(model, model)} · {tables.DATA.get(data, data)}"


def bars(name: str, cases: Sequence[Record]) -> Views:
    """Every arm's time in steps of backpropagation, one view for each network."""
    views = []
    for place, case in enumerate(cases):
        there = [arm for arm in case["arms"] if not arm["failed"] and arm["to_backprop"] and arm["to_backprop"]["value"] is not None]
        own = f"{name}-{case['model']}" if place else name
        drawing = figures.bars(own, [(title_of(case), [_bar(arm) for arm in there])], xlabel="time of a step relative to backpropagation")
        caption = f"The cost of one step, {network_of(case)}: its time over that of backpropagation (dotted line)"
        words = f"{caption}; a plain forward pass has no gradient. Whiskers: 95 % intervals; what was too noisy is left out."
        views.append((network_of(case), Picture(own, drawing, words)))
    return Views(name, "network", tuple(views))


def _bar(arm: Record) -> figures.Bar:
    found = arm["to_backprop"]
    return figures.Bar(arm["kind"], arm["label"], found["value"], found["low"], found["high"])


def sweeps(name: str, cases: Sequence[Record]) -> list[Picture]:
    """Time and memory against depth, width and batch, where they were varied."""
    layers = {case["model"]: DEEP.fullmatch(case["model"]) for case in cases}
    shapes = [(case, found[1], int(found[2]), int(found[3])) for case in cases if (found := layers[case["model"]])]
    axes: dict[str, dict[Any, list[tuple[float, Record]]]] = {"depth": {}, "width": {}, "batch": {}}
    for case, chain, depth, width in shapes:
        update = f", {update_of(case)}" if update_of(case) else ""
        rest, kind = f"{batch_of(case)}{update}", "" if chain == "mlp" else f"{CHAINS[chain][0]}, "
        axes["depth"].setdefault(f"{kind}width {width}, {rest}", []).append((depth, case))
        axes["width"].setdefault(f"{kind}{depth} {CHAINS[chain][1]}s, {rest}", []).append((width, case))
    for case in cases:
        update = f", {update_of(case)}" if update_of(case) else ""
        tokens = f" of {case['sequence']:,} tokens" if case.get("sequence") else ""
        axes["batch"].setdefault(f"{case['model']}{tokens}, {case['layout']}{update}", []).append((case["batch"], case))
    pictures = []
    for axis, lines in axes.items():
        for index, (fixed, points) in enumerate((fixed, points) for fixed, points in lines.items() if len({x for x, _ in points}) > 2):
            pictures.append(_sweep(f"{name}-{axis}-{index}", axis, fixed, sorted(points, key=lambda point: point[0])))
    return pictures


def _sweep(name: str, axis: str, fixed: str, points: Sequence[tuple[float, Record]]) -> Picture:
    panels = [
        ("time / backpropagation", trends_of(points, lambda arm: arm["to_backprop"] or {})),
        ("peak memory (bytes)", trends_of(points, lambda arm: {key: arm.get("peak_bytes") for key in ("value", "low", "high")})),
    ]
    drawing = figures.trends(name, panels, xlabel={"depth": "layers", "width": "width", "batch": "batch"}[axis])
    caption = f"The cost of one step against {axis}; {fixed}. Bands: 95 % intervals; gaps: too noisy, or not measured."
    return Picture(name, drawing, caption)


def trends_of(points: Sequence[tuple[float, Record]], read: Callable[[Record], Record]) -> list[figures.Trend]:
    """Lines of the arms that ran at more than two places: two make no line."""
    lines: dict[str, list[tuple[float, Record]]] = {}
    ran = [arm for _, case in points for arm in case["arms"] if not arm["failed"]]
    kinds, often = {arm["label"]: str(arm["kind"]) for arm in ran}, Counter(arm["label"] for arm in ran)
    for x, case in points:
        for arm in case["arms"]:
            if not arm["failed"] and read(arm).get("value") is not None:
                lines.setdefault(arm["label"], []).append((x, read(arm)))
    found = []
    for label, line in lines.items():
        if often[label] > 2:
            value, low, high = (tuple(measured[key] for _, measured in line) for key in ("value", "low", "high"))
            found.append(figures.Trend(label, tuple(x for x, _ in line), value, low, high, kind=kinds[label]))
    return found
