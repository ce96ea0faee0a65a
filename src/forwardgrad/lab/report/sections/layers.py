"""The part of a report on what each layer holds and learns from: a table, and probe and angle from layer to layer. Loads without torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from forwardgrad.lab.report import figures
from forwardgrad.lab.report.blocks import NONE, Block, Cell, Picture, Section, Table, number, percent, tables
from forwardgrad.lab.report.figures import LOOKS

MEANING = (
    (
        "layer",
        "counted as the network calls them, with the layer's name in the network; `input` is what the first one takes in. Behind a layer "
        "is what the next one takes in, nonlinearity and pooling included, and behind the last its output",
    ),
    (
        "probe",
        "share of the validation split that a linear probe classifies rightly: multinomial logistic regression on the activations of "
        "training examples, standardised and pooled to a bounded number; below it the 95 % interval, over the examples (Wilson) of one "
        "run or over seeds (t)",
    ),
    (
        "cosine",
        "between one estimate of the layer's gradient and backpropagation's gradient of the network's own loss, at the same weights and "
        "on the same training batch, weight and bias together; mean and 95 % t interval over the batches of one run, or over seeds",
    ),
    ("features", "numbers that the probe sees of an example"),
)
HEADS = ("arm", *(head for head, _ in MEANING))
Record = Mapping[str, Any]  # what is stored of one measurement, of one arm or of one layer


def layers_section(stored: Record) -> Section:
    """The section on every measurement: a table, and a figure of each."""
    measured = stored["measurements"]
    table = Table(HEADS, tuple((_title(one), tuple(_rows(one))) for one in measured), "Layer by layer", MEANING)
    blocks: list[Block] = [table, *(_picture(index, one) for index, one in enumerate(measured))]
    blocks += [note for one in measured for note in _notes(one)]
    said = " ".join(dict.fromkeys(sentence for one in measured for sentence in _sentences(one)))
    return Section("layers", "What each layer holds and learns from", said, (said, *blocks))


def layers_text(measurement: Record) -> str:
    """The rows of one measurement, aligned, for a terminal."""
    rows = [HEADS, *(tuple(f"{cell.text} ({cell.sub})" if cell.sub else cell.text for cell in row) for row in _rows(measurement))]
    widths = [max(len(row[i]) for row in rows) for i in range(len(HEADS))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([_title(measurement), *lines, *_notes(measurement)])


def _title(measurement: Record) -> str:
    arms = measurement["arms"]
    where = " and ".join(
        dict.fromkeys(f"{tables.MODELS.get(a['model'], a['model'])} on {tables.DATA.get(a['data'], a['data'])}" for a in arms)
    )
    return (
        f"{where} · probes of up to {measurement['examples']:,} examples and {measurement['most']:,} features, l2 {measurement['l2']:g} · "
        f"angle of {_estimator(measurement)} in {tables.count(measurement['batches'], 'batch')}".replace("batchs", "batches")
        + f" of {measurement['batch']}"
    )


def _estimator(measurement: Record) -> str:
    return str(measurement["spec"])


def _rows(measurement: Record) -> list[tuple[Cell, ...]]:
    found: list[tuple[Cell, ...]] = []
    for arm in measurement["arms"]:
        tone = arm["kind"] if arm["kind"] in LOOKS else ""
        for place, layer in enumerate(arm["layers"]):
            runs = tables.count(len(arm["runs"]), "run")
            name = Cell(str(place), layer["name"]) if place else Cell("input")
            width = arm["features"][place]
            found.append((Cell(arm["label"], runs, tone), name, _cell(layer["probe"], percent), _cell(layer["cosine"], number),
                          NONE if width is None else Cell(f"{width:,}")))  # fmt: skip
    return found


def _cell(found: Record | None, words: Any) -> Cell:
    if found is None:
        return NONE
    over = f"{found['n']:,} {found['over']}"
    between = over if found["low"] is None else f"{words(found['low'])} to {words(found['high'])}, {over}"
    return Cell(words(found["value"]), between)


def _notes(measurement: Record) -> list[str]:
    """What the reader of a table has to know about the measurement."""
    arms, spec = measurement["arms"], _estimator(measurement)
    notes = [f"{arm['label']}: the angle was not measured: {arm['failed']}." for arm in arms if arm["failed"]]
    loose = [arm["label"] for arm in arms if not arm["converged"]]
    notes += [f"A probe of {', '.join(loose)} did not come to its stopping rule."] if loose else []
    own = [arm["label"] for arm in arms if arm["memory"] == "its own"]
    if len(own) < sum(arm["memory"] != "none" for arm in arms):
        learned = f"The memory of {spec} learned in {measurement['learn']:,} steps on other batches, the weights held still"
        notes.append(f"{learned}; for the arm {', '.join(own)} it is the run's own." if own else f"{learned}.")
    elif own:
        notes.append(f"The memory of {spec} is what it learned while the run was trained.")
    return notes


def _sentences(measurement: Record) -> list[str]:
    """Of every arm, what its probes reach behind the first and the last layer, and the least angle of its layers."""
    found = []
    for arm in measurement["arms"]:
        probes = [layer["probe"]["value"] for layer in arm["layers"][1:] if layer["probe"]]
        angles = [(layer["cosine"]["value"], place) for place, layer in enumerate(arm["layers"]) if layer["cosine"]]
        if probes:
            reached = (
                percent(probes[0])
                if len(probes) == 1
                else f"{percent(probes[0])} behind the first layer and {percent(probes[-1])} behind the last"
            )
            lies = f"; the cosine with the gradient is least in layer {min(angles)[1]}, {number(min(angles)[0])}" if angles else ""
            found.append(f"{arm['label']}: a probe reaches {reached}{lies}.")
    return found


def _picture(index: int, measurement: Record) -> Picture:
    name = f"layers-{index}" if index else "layers"
    panels = [
        ("probe accuracy", _trends(measurement["arms"], "probe")),
        (f"cosine of {_estimator(measurement)} with the gradient", _trends(measurement["arms"], "cosine")),
    ]
    caption = f"Layer by layer, {_title(measurement)}. Marks: means; whiskers: 95 % intervals."
    return Picture(name, figures.by_layer(name, panels), caption)


def _trends(arms: Sequence[Record], key: str) -> list[figures.Trend]:
    found = []
    for arm in arms:
        there = [(float(place), layer[key]) for place, layer in enumerate(arm["layers"]) if layer[key] is not None]
        value = tuple(one["value"] for _, one in there)
        low, high = (tuple(one["value"] if one[end] is None else one[end] for _, one in there) for end in ("low", "high"))
        if there:
            found.append(figures.Trend(arm["label"], tuple(x for x, _ in there), value, low, high, kind=arm["kind"]))
    return found
