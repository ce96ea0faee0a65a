"""The part of a report on measured estimators: a table and a plot against the number of tangents. Loads without torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from forwardgrad.lab.report import figures
from forwardgrad.lab.report.blocks import NONE, Block, Cell, Picture, Section, Table, number, tables
from forwardgrad.lab.report.figures import LOOKS

MEANING = (
    ("K", "tangents averaged in one estimate; – for an estimator without tangents"),
    (
        "squared bias",
        "‖Eĝ − g‖²/‖g‖² freed of the noise of the mean, so that it scatters around 0, below it too, without bias; 95 % interval",
    ),
    ("unbiased?", "p-value of the test that Eĝ = g, Bonferroni's over the direction of g and 16 random ones"),
    ("length along g", "Eĝ·g/‖g‖²: 1 where the length is right; 95 % interval"),
    (
        "variance",
        "E‖ĝ − Eĝ‖²/‖g‖²; below it what the estimator's formula says, where it has one. An estimator with a memory is measured with it "
        "held still, after learning on other batches",
    ),
    ("cosine", "between one estimate and g, mean over the estimates; 95 % interval"),
    (
        "cosine of mean",
        "between the mean of all estimates and g: tends to 1 with their number without bias, however small the cosine of one",
    ),
    ("forward passes", "of one estimate; a backward pass is not among them"),
    ("peak", "bytes held at once by one estimate beyond the model, the batch and what else was there before"),
)
HEADS = ("estimator", *(head for head, _ in MEANING[:-1]), "time", "peak")
Record = Mapping[str, Any]  # what is stored of one estimator, or of one setting


def quality_section(stored: Record) -> Section:
    """The section on every setting that was measured: a table, and a plot for each setting with an estimate."""
    table = Table(HEADS, _groups(stored["settings"]), "Estimators", MEANING)
    pictures = [_picture(index, setting) for index, setting in enumerate(stored["settings"]) if _measured(setting)]
    verdict = " ".join(_sentence(setting) for setting in stored["settings"])
    blocks: list[Block] = [table, *pictures]
    return Section("quality", "How good the estimates are", verdict, (verdict, *blocks))


def quality_text(setting: Record) -> str:
    """The rows of one setting, aligned, for a terminal. Of the intervals, only those of the bias are there."""
    rows: list[tuple[str, ...]] = [
        ("estimator", "K", "bias²", "unbiased?", "length", "variance", "theory", "cosine", "of mean", "passes", "time", "peak")
    ]
    rows += [_plain(estimate) for estimate in setting["estimates"]]
    widths = [max(len(row[i]) for row in rows if i < len(row) - 1 or len(row) > 3) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(widths[i]) for i, cell in enumerate(row)).rstrip() for row in rows]
    return "\n".join([_title(setting), *lines])


def _plain(estimate: Record) -> tuple[str, ...]:
    name, k, *rest = (cell.text for cell in _row(estimate))
    if estimate["quality"] is None:
        return name, k, f"not measured: {estimate['failed']}"
    theory = estimate["quality"]["theory"]
    bias = estimate["quality"]["total"]["bias"]
    rest[0] = f"{number(bias['value'])} ({number(bias['low'])} to {number(bias['high'])})"
    return name, k, *rest[:4], "–" if theory is None else number(theory), *rest[4:]


def _groups(settings: Sequence[Record]) -> tuple[tuple[str, tuple[tuple[Cell, ...], ...]], ...]:
    return tuple((_title(setting), tuple(map(_row, setting["estimates"]))) for setting in settings)


def _title(setting: Record) -> str:
    model, data = str(setting["model"]), str(setting["data"])
    trained = f"after {tables.count(setting['warm_up'], 'step')} of Adam" if setting["warm_up"] else "at initialisation"
    return (
        f"{tables.MODELS.get(model, model)} · {tables.DATA.get(data, data)} · {setting['parameters']:,} parameters · "
        f"batch {setting['batch']} · {trained} · {setting['repeats']} estimates each"
    )


def _row(estimate: Record) -> tuple[Cell, ...]:
    k = NONE if estimate["tangents"] is None else Cell(str(estimate["tangents"]))
    if (found := estimate["quality"]) is None:
        return (Cell(estimate["label"], f"not measured: {estimate['failed']}", "warn"), k, *[NONE] * 9)
    total, theory = found["total"], found["theory"]
    return (
        Cell(estimate["label"], tone=estimate["label"] if estimate["label"] in LOOKS else ""),
        k,
        _between(total["bias"]),
        Cell("p < 1e-99" if total["p"] < 1e-99 else f"p = {total['p']:.2g}", tone="warn" if total["p"] < 0.05 else ""),
        _between(total["length"]),
        Cell(number(total["variance"]["value"]), "no theory" if theory is None else f"theory {number(theory)}"),
        _between(total["cosine"]),
        Cell(number(total["cosine_of_mean"])),
        Cell(f"{found['forward_passes']:,}"),
        Cell(tables.duration(found["seconds"])),
        Cell(tables.size(found["peak_bytes"])),
    )


def _between(interval: dict[str, float]) -> Cell:
    return Cell(number(interval["value"]), f"{number(interval['low'])} to {number(interval['high'])}")


def _measured(setting: Record) -> list[Record]:
    return [estimate for estimate in setting["estimates"] if estimate["quality"] is not None]


def _picture(index: int, setting: Record) -> Picture:
    """Cosines and variance against K."""

    def mean(estimate: Record) -> dict[str, float]:
        value = estimate["quality"]["total"]["cosine_of_mean"]
        return {"value": value, "low": value, "high": value}

    kinds: tuple[tuple[str, Callable[[Record], dict[str, float]]], ...] = (
        ("cosine of one estimate", lambda estimate: estimate["quality"]["total"]["cosine"]),
        (f"cosine of the mean of {setting['repeats']}", mean),
        ("variance / ‖g‖²", lambda estimate: estimate["quality"]["total"]["variance"]),
    )
    panels = [(title, _trends(setting, read, theory="variance" in title)) for title, read in kinds]
    name = f"quality-{index}" if index else "quality"
    caption = (
        f"Estimates against the number of tangents K, {_title(setting)}. Line: mean; band: 95 % interval; level lines: estimators without "
        "tangents; dotted: the variance that theory says. Zero and less are not drawn on a logarithmic axis."
    )
    return Picture(name, figures.trends(name, panels, xlabel="tangents K"), caption)


def _trends(setting: Record, read: Callable[[Record], dict[str, float]], *, theory: bool) -> list[figures.Trend]:
    found = []
    for label in dict.fromkeys(estimate["label"] for estimate in _measured(setting)):
        mine = [estimate for estimate in _measured(setting) if estimate["label"] == label]
        mine.sort(key=lambda estimate: estimate["tangents"] or 0)
        at = tuple(float(estimate["tangents"]) for estimate in mine if estimate["tangents"] is not None)
        values = [tuple(float(read(estimate)[key]) for estimate in mine) for key in ("value", "low", "high")]
        told = tuple(estimate["quality"]["theory"] for estimate in mine) if theory else ()
        found.append(figures.Trend(label, at, values[0], values[1], values[2], told))
    return found


def _sentence(setting: Record) -> str:
    """Which estimate of a setting comes closest to the gradient, and in which a bias was found."""
    measured = _measured(setting)
    where = f"{tables.MODELS.get(setting['model'], setting['model'])} on {tables.DATA.get(setting['data'], setting['data'])}"
    inexact = [estimate for estimate in measured if estimate["estimator"]["name"] != "backprop"]
    if not inexact:
        return f"{where}: no estimate beside the exact gradient was measured."
    best = max(inexact, key=lambda estimate: estimate["quality"]["total"]["cosine"]["value"])
    total, k = best["quality"]["total"], f" with K = {best['tangents']}" if best["tangents"] else ""
    biased = list(dict.fromkeys(e["label"] for e in inexact if e["quality"]["total"]["p"] < 0.05 / len(inexact)))
    told = f"a bias was found in {', '.join(biased)}" if biased else "no bias was found"
    return (
        f"{where}: of {tables.count(len(inexact), 'estimate')} beside the exact gradient the closest in angle is {best['label']}{k}, whose "
        f"cosine with it is {number(total['cosine']['value'])} and whose relative variance is {number(total['variance']['value'])}; {told}."
    )
